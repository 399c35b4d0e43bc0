"""Observations that were not made, for where no dataset has others: noise, and other sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minivla.data.features import FeatureType

if TYPE_CHECKING:
    from minivla.preflight.subject import Subject


def noise(subject: Subject, seed: int) -> dict[str, Any]:
    """Pictures of noise, and states drawn with the mean and spread of the statistics (or about the batch)."""
    generator = torch.Generator().manual_seed(seed)
    other: dict[str, Any] = {}
    for name, value in subject.observation.items():
        key = subject.named(name)
        if key not in subject.inputs or not isinstance(value, Tensor):
            continue
        if subject.inputs[key].type == FeatureType.VISUAL:
            other[name] = torch.rand(value.shape, generator=generator)
            continue
        step = torch.randn(value.shape, generator=generator)
        scaling = subject.scaling
        is_known = scaling is not None and scaling.pair(key) is not None
        other[name] = scaling.apply(key, step, inverse=True) if scaling and is_known else value + step
    return other


def other_texts(subject: Subject, other: Mapping[str, Any], seed: int) -> list[str]:
    """For each sample an instruction that is not its own: the other observation's, if it differs."""
    size = len(next(value for value in subject.observation.values() if isinstance(value, Tensor)))
    own = subject.observation.get("task") or [""] * size
    theirs = other.get("task") or own
    pairs = zip(own, theirs, strict=True)
    return [new if new != text else another_text(subject.config, text, seed) for text, new in pairs]


def another_text(config: Any, text: str, seed: int) -> str:
    """Six words that are not in `text`, of the policy's vocabulary if it has one."""
    known = [word for word in getattr(config, "vocabulary", ()) if word not in text.lower().split()]
    words = known or ["open", "the", "left", "drawer", "and", "wait"]
    return " ".join(words[(seed + i) % len(words)] for i in range(6))
