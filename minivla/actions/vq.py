"""Chunks of actions as a few codes, and what a policy needs to predict them.

Source: Lee et al. 2024, "Behavior Generation with Latent Actions" (arXiv 2403.03181), sections 3.2 and 3.3;
LeRobot 0.6 `policies/vqbet/modeling_vqbet.py`, VqVae, VQBeTHead and FocalLoss.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minivla.nn.vq import ResidualVQ

COMMITMENT = 5.0  # the weight of the commitment losses beside the reconstruction's L1
FOCUS = 2.0  # the focal loss's exponent


class ActionVQVAE(nn.Module):
    """Chunks of actions to G codes and back: two small networks and a residual quantiser between them.

    horizon H, actions A: the chunk; codes C, width D, levels G and `options`: the quantiser's; hidden: the
    networks' inner width. Two buffers keep where its training stands: discretized, whether it is over and the
    codebooks are frozen; optimized_steps, how many of its steps were made, which is in no checkpoint.
    """

    discretized: Tensor
    optimized_steps: Tensor

    def __init__(
        self,
        horizon: int,
        actions: int,
        *,
        codes: int,
        width: int,
        hidden: int,
        levels: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        self.horizon, size = horizon, horizon * actions
        self.encoder, self.decoder = _mlp(size, hidden, width), _mlp(width, hidden, size)
        self.vq_layer = ResidualVQ(width, codes, levels=levels, **options)
        self.register_buffer("discretized", torch.tensor(False))
        self.register_buffer("optimized_steps", torch.tensor(0), persistent=False)

    def forward(self, chunks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """chunks (N, H, A). Returns (reconstruction (N, H, A), codes (N, G), commitment losses (G,))."""
        quantised, codes, commitment = self.vq_layer(self.encoder(chunks.flatten(1)))
        return self._unfold(self.decoder(quantised.to(chunks.dtype))), codes, commitment

    def learn(self, chunks: Tensor, steps: int) -> tuple[Tensor, dict[str, float]]:
        """Phase 1's loss: L1 of the reconstruction of chunks (N, H, A), and the commitment; its parts by
        upstream's names.

        In training this is one of `steps` steps, of which the last one freezes the codes. Raises ValueError
        when there are to be none.
        """
        if self.training:
            self._count(steps)
        rebuilt, codes, commitment = self(chunks)
        l1 = F.l1_loss(rebuilt, chunks)
        if self.training and self.optimized_steps >= steps:
            self.finish()
        metrics = {
            "n_different_codes": float(sum(len(level.unique()) for level in codes.unbind(-1))),
            "n_different_combinations": float(len(codes.unique(dim=0))),
            "recon_l1_error": l1.item(),
        }
        return l1 + COMMITMENT * commitment.sum(), metrics

    def _count(self, steps: int) -> None:
        if steps < 1:
            self.finish()  # which says that there are no codes, or that phase 1 stopped half-way
            return
        if self.optimized_steps == 0 and self.vq_layer.touched:
            warnings.warn(
                "phase 1 of this VQ-VAE was begun before and not finished. No folder holds how far it was: "
                f"it is counted from 0 again, to n_vqvae_training_steps = {steps}; give what is left of it",
                stacklevel=2,
            )
        self.optimized_steps += 1

    @torch.no_grad()
    def encode(self, chunks: Tensor) -> Tensor:
        """The codes (..., G) of chunks (..., H, A)."""
        latent = self.encoder(chunks.flatten(-2))
        codes: Tensor = self.vq_layer.encode(latent.flatten(0, -2))
        return codes.unflatten(0, latent.shape[:-1])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The chunks (..., H, A) that codes (..., G) stand for."""
        dtype = next(self.decoder.parameters()).dtype
        return self._unfold(self.decoder(self.vq_layer.look_up(codes).to(dtype)))

    def _unfold(self, flat: Tensor) -> Tensor:
        return rearrange(flat, "... (h a) -> ... h a", h=self.horizon)

    def finish(self) -> None:
        """End phase 1: from now on the codes stay what they are. Raises ValueError before its first step."""
        if not self.vq_layer.touched:
            raise ValueError(
                "phase 2 needs codes, and this VQ-VAE is untrained: not one step of phase 1 was made. Set "
                "n_vqvae_training_steps to some thousands, or load a policy whose phase 1 is done"
            )
        self.discretized.fill_(True)
        self.vq_layer.freeze_codebook.fill_(True)


class Prediction(NamedTuple):
    """What the heads say at each of Q queries: which codes, and what to add to what they stand for."""

    logits: Tensor  # (B, Q, G, C)
    codes: Tensor  # (B, Q, G), sampled
    decoded: Tensor  # (B, Q, H, A)
    offset: Tensor  # (B, Q, H, A)

    @property
    def chunks(self) -> Tensor:
        """The chunks of actions, (B, Q, H, A)."""
        return self.decoded + self.offset


class CodeHead(nn.Module):
    """Features of width D to codes and to an offset for each: linear layers, and a draw.

    horizon H, actions A, codes C, levels G: as of the `ActionVQVAE`. one_by_one: each level's codes are drawn
    knowing those of the levels before it, else all at once. temperature: of the draw; a low one takes the
    likeliest.
    """

    def __init__(
        self,
        width: int,
        horizon: int,
        actions: int,
        *,
        codes: int,
        levels: int,
        one_by_one: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.levels, self.codes, self.horizon = levels, codes, horizon
        self.one_by_one, self.temperature = one_by_one, temperature
        if one_by_one:
            self.by_level = nn.ModuleList(nn.Linear(width + g * codes, codes) for g in range(levels))
        else:
            self.all_levels = nn.Linear(width, levels * codes)
        self.offset = nn.Linear(width, levels * codes * horizon * actions)

    def forward(
        self,
        features: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        shown: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """features (B, Q, D); noise (B, Q, G, C) and generator as in `sample_codes`; codes `shown` (B, Q, G),
        if given, stand in place of those drawn wherever something depends on them.

        Returns (logits (B, Q, G, C), drawn codes (B, Q, G), offset (B, Q, H, A): the sum of its codes').
        """
        logits, codes = self.choose(features, noise, generator, shown)
        offsets = rearrange(
            self.offset(features), "b query (level c h a) -> b query level c h a",
            level=self.levels, c=self.codes, h=self.horizon,
        )  # fmt: skip
        chosen = rearrange(codes if shown is None else shown, "b query level -> b query level 1 1 1")
        return logits, codes, offsets.take_along_dim(chosen, dim=3).squeeze(3).sum(2)

    def choose(
        self,
        features: Tensor,
        noise: Tensor | None,
        generator: torch.Generator | None,
        shown: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits and the codes that `forward` returns."""
        if not self.one_by_one:
            logits = rearrange(
                self.all_levels(features), "b query (level c) -> b query level c", c=self.codes
            )
            return logits, sample_codes(logits / self.temperature, noise, generator)
        every, codes = [], []
        for g, layer in enumerate(self.by_level):
            every.append(layer(features))
            draw = None if noise is None else noise[:, :, g]
            codes.append(sample_codes(every[-1] / self.temperature, draw, generator))
            before = codes[-1] if shown is None else shown[..., g]
            features = torch.cat((features, F.one_hot(before, self.codes).to(features.dtype)), dim=-1)
        return torch.stack(every, dim=2), torch.stack(codes, dim=2)


def sample_codes(
    logits: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """One code for each row of logits (..., C), with the softmax's probabilities. Returns (...).

    `noise` (..., C) from Exp(1), if given, decides: the first of C races to end, run at these speeds, is each
    one with its own probability. That is how torch.multinomial draws one sample, so both give the same.
    """
    probability = logits.float().softmax(-1)
    if noise is not None:
        return (probability / noise).argmax(-1)
    drawn = torch.multinomial(probability.flatten(0, -2), 1, generator=generator)
    return drawn.view(logits.shape[:-1])


def focal_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy in which a certain answer counts little: the mean of -(1 - p)² log p, by level, (G,).

    logits (B, Q, G, C), codes (B, Q, G). Source: Lin et al. 2017 (arXiv 1708.02002).
    """
    log_p = logits.log_softmax(-1).take_along_dim(codes[..., None], dim=-1).squeeze(-1)
    return (-((1 - log_p.exp()) ** FOCUS) * log_p).mean((0, 1))


@torch.no_grad()
def describe_errors(targets: Tensor, codes: Tensor, given: Prediction) -> dict[str, Tensor]:
    """How good a prediction is, by upstream's names: codes hit at each level, errors without and with offset.

    targets (B, Q, H, A) and their codes (B, Q, G).
    """
    hit = (codes == given.codes).flatten(0, 1).float().mean(0)
    ranks = ["primary", "secondary", *(f"level_{g}" for g in range(2, len(hit)))][: len(hit)]
    error = (targets - given.chunks).abs()
    return {
        **{f"equal_{rank}_code_rate": rate for rank, rate in zip(ranks, hit, strict=True)},
        "vq_action_error": (targets - given.decoded).abs().mean(),
        "offset_action_error": error.mean(),
        "action_error_max": error.max(),
        "action_mse_error": error.square().mean(),
    }


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )  # fmt: skip
