"""The vision transformer: an image cut into patches, a token each, all of which see all.

One ViT serves SigLIP (here) and DINOv2. An image is a sentence of patches: a strided convolution turns each
into a vector, a learned table says where it was, and pre-norm transformer layers mix them.
Sources: Dosovitskiy et al. 2020 (ViT), Zhai et al. 2023 (SigLIP), Alabdulmohsin et al. 2023 (its shape,
So400m); transformers `models/siglip/modeling_siglip.py`, big_vision `models/vit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minivla import recorder
from minivla.nn.attention import attend, merge_heads, split_heads


@dataclass(frozen=True)
class ViTConfig:
    """width D, layers, heads, mlp (the MLP's inner width), patch and image_size in pixels. The defaults are
    SigLIP So400m/14 at 224 pixels, PaliGemma's eyes: 412 M parameters, 256 tokens.
    """

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    patch: int = 14
    image_size: int = 224
    eps: float = 1e-6

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image: (rows, columns)."""
        return (self.image_size // self.patch,) * 2


class ViTLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); biases everywhere, GELU by its tanh formula."""

    def __init__(self, config: ViTConfig, site: str) -> None:
        super().__init__()
        width = config.width
        self.heads, self.site = config.heads, site
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config.eps) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, config.mlp), nn.Linear(config.mlp, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) in and out."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens)), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        """All see all. (B, L, D) in and out."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(merge_heads(attend(q, k, v, None, site=self.site)))


class ViT(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to one token a patch (B, L, D), in reading order; no class token, no
    pooling. `name` is what a trace calls it.

    Raises ValueError when heads do not divide the width, or patches the image.
    """

    def __init__(self, config: ViTConfig, name: str = "vision") -> None:
        super().__init__()
        if config.width % config.heads or config.image_size % config.patch:
            raise ValueError(
                f"width {config.width} must be a multiple of heads {config.heads}, and image_size "
                f"{config.image_size} of patch {config.patch}"
            )
        self.config, self.name = config, name
        rows, columns = config.grid
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.position_embedding = nn.Embedding(rows * columns, config.width)
        self.layers = nn.ModuleList(ViTLayer(config, f"{name}.{i}") for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        nn.init.normal_(self.position_embedding.weight, std=config.width**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, L, D)."""
        patches = rearrange(self.patch_embedding(image), "batch width y x -> batch (y x) width")
        tokens = recorder.enter(self.name, patches + self.position_embedding.weight)
        for i, layer in enumerate(self.layers):
            tokens = layer(tokens)
            recorder.keep(f"{self.name}.{i}", tokens)
        tokens = self.norm(tokens)
        recorder.keep(self.name, tokens)
        return tokens
