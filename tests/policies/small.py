"""A tiny ACT with statistics, and raw observations for it."""

from __future__ import annotations

from typing import Any

import torch

from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.act import ACT, ACTConfig

CAMERAS = ("observation.images.table", "observation.images.wrist")


# The smallest ACT that still has every part.
TINY = {
    "chunk_size": 6,
    "n_action_steps": 4,
    "dim_model": 16,
    "n_heads": 2,
    "dim_feedforward": 24,
    "n_encoder_layers": 1,
    "n_vae_encoder_layers": 1,
    "latent_dim": 4,
    "dropout": 0.0,
    "pretrained_backbone_weights": None,
    "compact_vision": True,
}
WORDS = ("put", "the", "red", "blue", "block", "on", "square")


def tiny_config(**settings: Any) -> ACTConfig:
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in CAMERAS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (3,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    return ACTConfig(
        input_features=inputs, output_features=outputs, **TINY | {"vocabulary": WORDS} | settings
    )


def tiny_stats() -> dict[str, dict[str, torch.Tensor]]:
    image = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)}
    state = {"mean": torch.tensor([0.5, 0.5, 0.0]), "std": torch.tensor([0.2, 0.3, 1.0])}
    action = {"mean": torch.tensor([1.0, -1.0]), "std": torch.tensor([2.0, 0.5])}
    return {**dict.fromkeys(CAMERAS, image), "observation.state": state, "action": action}


def tiny_act(seed: int = 0, **settings: Any) -> ACT:
    torch.manual_seed(seed)
    return ACT(tiny_config(**settings), stats=tiny_stats())


def tiny_raw(size: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    raw: dict[str, Any] = {key: torch.rand(size, 3, 64, 64, generator=generator) for key in CAMERAS}
    raw["observation.state"] = torch.rand(size, 3, generator=generator)
    raw["task"] = ["put the red block on the blue square", "put the blue block on the red square"][:size]
    return raw


def tiny_batch(policy: ACT, size: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    raw = tiny_raw(size) | {"action": torch.randn(size, 6, 2, generator=generator)}
    return policy.preprocess(raw | {"action_is_pad": torch.arange(6)[None].expand(size, 6) >= 4})
