"""Observations that were not made, for where no dataset has others: noise, and other sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minivla.data.features import FeatureType, PolicyFeature
from minivla.preflight.scaling import Scaling


def noise(
    observation: Mapping[str, Any], inputs: Mapping[str, PolicyFeature], scaling: Scaling | None, seed: int
) -> dict[str, Any]:
    """Pictures of noise, and states drawn with the mean and spread of the statistics (or about the batch).

    observation, inputs and scaling go by the same keys.
    """
    generator = torch.Generator().manual_seed(seed)
    other: dict[str, Any] = {}
    for key, feature in inputs.items():
        if feature.type == FeatureType.VISUAL:
            other[key] = torch.rand(observation[key].shape, generator=generator)
            continue
        step = torch.randn(observation[key].shape, generator=generator)
        is_known = scaling is not None and scaling.pair(key) is not None
        other[key] = (
            scaling.apply(key, step, inverse=True) if scaling and is_known else observation[key] + step
        )
    return other


def other_texts(own: Sequence[str], theirs: Sequence[str], config: Any, seed: int) -> list[str]:
    """For each sample an instruction that is not its own: the other observation's, if it differs."""
    pairs = zip(own, theirs, strict=True)
    return [new if new != text else another_text(config, text, seed) for text, new in pairs]


def another_text(config: Any, text: str, seed: int) -> str:
    """Six words that are not in `text`, of the policy's vocabulary if it has one."""
    known = [word for word in getattr(config, "vocabulary", ()) if word not in text.lower().split()]
    words = known or ["open", "the", "left", "drawer", "and", "wait"]
    return " ".join(words[(seed + i) % len(words)] for i in range(6))
