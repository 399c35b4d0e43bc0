"""PaliGemma: SigLIP's patches and a sentence's words as one sequence of tokens for Gemma.

    camera 1 ─ SigLIP ─ projector ─┐
    camera 2 ─ SigLIP ─ projector ─┼─ tokens ─ Gemma ─ hidden states ─ (table transposed) ─ logits
    words    ─ table · √width ─────┘

Patches are not scaled, words are. PaliGemma was trained as a prefix-LM: all patches and words see each
other, only what is generated is causal. The decoder's first stream is Gemma; a policy may add others.
Sources: Beyer et al. 2024 (arXiv 2407.07726); transformers `models/paligemma`; LeRobot 0.6
`policies/pi_gemma.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from minivla import recorder
from minivla.nn.compact_vision import CompactVision
from minivla.nn.decoder import Decoder, DecoderConfig
from minivla.nn.vit import ViT, ViTConfig
from minivla.segments import Segment, camera_names

VOCABULARY = 257_152
VARIANTS = {
    "gemma_2b": DecoderConfig(width=2048, layers=18, mlp=16_384, heads=8, kv_heads=1, head_dim=256),
    "gemma_300m": DecoderConfig(width=1024, layers=18, mlp=4096, heads=8, kv_heads=1, head_dim=256),
}
# Our names to LeRobot's, below "model.", for a policy's CHECKPOINT_NAMES.
_VISION = r"paligemma\.model\.vision_tower\.vision_model\."
PALIGEMMA_NAMES: tuple[tuple[str, str], ...] = (
    (r"^paligemma\.vision\.", "paligemma.model.vision_tower.vision_model."),
    (rf"^({_VISION})(patch|position)_embedding", r"\1embeddings.\2_embedding"),
    (rf"^({_VISION})layers\.", r"\1encoder.layers."),
    (rf"^({_VISION}encoder\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (rf"^({_VISION}encoder\.layers\.\d+)\.fc", r"\1.mlp.fc"),
    (rf"^({_VISION}encoder\.layers\.\d+)\.o_proj", r"\1.out_proj"),
    (rf"^({_VISION})norm\.", r"\1post_layernorm."),
    (r"^paligemma\.projector\.", "paligemma.model.multi_modal_projector.linear."),
    (r"^paligemma\.embedding\.", "paligemma.model.language_model.embed_tokens."),
    (r"^paligemma\.decoder\.streams\.prefix\.", "paligemma.model.language_model."),
    (r"^paligemma\.decoder\.streams\.suffix\.", "gemma_expert.model."),
    (r"(layers\.\d+)\.input_norm\.", r"\1.input_layernorm."),
    (r"(layers\.\d+)\.post_norm\.", r"\1.post_attention_layernorm."),
    (r"(layers\.\d+)\.([qkvo]|out)_proj\.", r"\1.self_attn.\2_proj."),
    (r"(layers\.\d+)\.(gate|up|down)_proj\.", r"\1.mlp.\2_proj."),
    (r"^(paligemma|gemma_expert)\.", r"model.paligemma_with_expert.\1."),
)


@dataclass
class Prefix:
    """What a policy sees and reads: tokens (B, L, D), which of them are real, valid (B, L), and what they
    are."""

    tokens: Tensor
    valid: Tensor
    segments: list[Segment]

    def without_padding(self) -> Prefix:
        """Without the places that are padding in every sample: what follows from the others is the same."""
        real = self.valid.any(dim=0)
        if real.all():
            return self
        counts = real.split([s.length for s in self.segments])
        segments = [replace(s, length=int(c.sum())) for s, c in zip(self.segments, counts, strict=True)]
        return Prefix(self.tokens[:, real], self.valid[:, real], segments)


class PaliGemma(nn.Module):
    """Eyes, words and the decoder. `streams`: the decoder's, by name, the language model first; `vocabulary`:
    rows of the table; `compact_vision`: a few convolutions in place of the ViT (minivla only).
    """

    def __init__(
        self,
        vision: ViTConfig,
        streams: dict[str, DecoderConfig],
        *,
        vocabulary: int = VOCABULARY,
        compact_vision: bool = False,
    ) -> None:
        super().__init__()
        width = next(iter(streams.values())).width
        self.vision = CompactVision(vision.width) if compact_vision else ViT(vision)
        self.projector = nn.Linear(vision.width, width)
        self.embedding = nn.Embedding(vocabulary, width)
        self.decoder = Decoder(streams)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.grid = (vision.image_size // 8,) * 2 if compact_vision else vision.grid

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to tokens (B, L, D).

        Computed in the projector's type, given back in the table's.
        """
        seen = self.vision(images.to(self.projector.weight.dtype))
        if seen.ndim == 4:
            seen = rearrange(seen, "batch width y x -> batch (y x) width")
        out: Tensor = self.projector(seen).to(self.embedding.weight.dtype)
        return out

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) to tokens (B, L, D), their table rows times √D, rounded to the table's type.

        Raises ValueError, on the CPU, for an id that the table has no row for.
        """
        table = self.embedding.weight
        try:
            rows = self.embedding(ids)
        except IndexError as error:
            raise ValueError(
                f"token ids go from {ids.min()} to {ids.max()}, and the table has {len(table)} words: is the "
                "tokenizer this policy's? Else make vocab_size as large as the tokenizer"
            ) from error
        return rows * torch.tensor(table.shape[1] ** 0.5, dtype=table.dtype)

    def embed_prefix(self, images: Mapping[str, Tensor | None], ids: Tensor, valid: Tensor) -> Prefix:
        """All cameras, then the prompt.

        images: by batch key, (B, 3, H, W) in [-1, 1], or None for a camera that is absent: its places stay,
        empty, and nobody looks there. ids (B, L), valid (B, L) bool: the prompt and which of it is real.
        """
        present = {camera: image for camera, image in images.items() if image is not None}
        names, length = camera_names(images), self.grid[0] * self.grid[1]
        segments = [Segment(names[c], "image", length, grid=self.grid, image=c) for c in images]
        with recorder.apart([s for s in segments if s.image in present]):
            patches = self.embed_images(torch.cat(list(present.values()))).chunk(len(present))
        seen = dict(zip(present, patches, strict=True))
        blank = torch.zeros_like(patches[0])
        recorder.spell("prompt", ids)
        words = self.embed_tokens(ids)
        there = torch.tensor([camera in present for camera in images], device=valid.device)
        real = repeat(there, "camera -> batch (camera patch)", batch=len(ids), patch=length)
        return Prefix(
            torch.cat([*(seen.get(camera, blank) for camera in images), words], dim=1),
            torch.cat((real, valid), dim=1),
            [*segments, Segment("prompt", "language", ids.shape[1])],
        )
