"""The normalisation a policy really does, read from its processors, ours or LeRobot's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minivla.data.features import FeatureType, NormalizationMode, PolicyFeature
from minivla.data.normalize import STATISTICS, Stats, as_stats, constant_dimensions, normalize, unnormalize
from minivla.data.steps import Normalize


@dataclass(frozen=True)
class Scaling:
    """Features, the mode of each, and the statistics, as one processor step holds them."""

    features: dict[str, PolicyFeature]
    modes: dict[str, NormalizationMode]
    stats: Stats
    eps: float

    def pair(self, key: str) -> tuple[Tensor, Tensor] | None:
        """The two statistics that the mode of `key` needs, or None where it needs none or has not both."""
        names = STATISTICS[self.modes.get(key, NormalizationMode.IDENTITY)]
        table = self.stats.get(key, {})
        if not names or any(name not in table for name in names):
            return None
        return table[names[0]], table[names[1]]

    def usable(self, key: str) -> bool:
        """Whether a vector's statistics are there, finite and of its size."""
        pair = self.pair(key)
        size = self.features[key].shape[-1] if key in self.features else 0
        return pair is not None and all(v.isfinite().all() and v.numel() in (1, size) for v in pair)

    def constant(self, key: str) -> list[int]:
        """Dimensions whose scale is zero."""
        return constant_dimensions(self.stats[key], self.modes[key]) if self.pair(key) else []

    def apply(self, key: str, values: Tensor, *, inverse: bool = False) -> Tensor:
        """Robot units to the network's, or back; unchanged where there are no statistics."""
        if self.pair(key) is None:
            return values
        scale = unnormalize if inverse else normalize
        return scale(values.float().cpu(), self.modes[key], self.stats[key], self.eps)


def features_from(table: Any) -> dict[str, PolicyFeature]:
    """Features as ours, whichever library's they are."""
    return {
        key: PolicyFeature(FeatureType(getattr(f.type, "value", f.type)), tuple(f.shape))
        for key, f in (table or {}).items()
    }


def modes_from(
    features: dict[str, PolicyFeature], norm_map: Any, chosen: Any = None
) -> dict[str, NormalizationMode]:
    """The mode of each feature under a map from type to mode; both may be LeRobot's or plain text."""
    plain = {
        FeatureType(getattr(kind, "value", kind)): NormalizationMode(getattr(mode, "value", mode))
        for kind, mode in (norm_map or {}).items()
    }
    step = Normalize(features, plain, normalize_observation_keys=chosen)
    return {key: step.mode(key) for key in features}


def scaling_of(pipeline: Any) -> Scaling | None:
    """The first normalising step of a pipeline, ours or LeRobot's; None when it has none."""
    step = next((step for step in getattr(pipeline, "steps", ()) if hasattr(step, "norm_map")), None)
    if step is None:
        return None
    features = features_from(step.features)
    modes = modes_from(features, step.norm_map, step.normalize_observation_keys)
    return Scaling(features, modes, as_stats(step.stats or {}), float(step.eps))


def rename_map_of(pipeline: Any) -> dict[str, str]:
    """{name in the data: name in the policy} of a pipeline's renaming step."""
    steps = getattr(pipeline, "steps", ())
    return dict(next((step.rename_map for step in steps if hasattr(step, "rename_map")), {}))


def are_exchanged(preprocessor: Any, postprocessor: Any) -> bool:
    """Whether the first pipeline undoes a normalisation and the second makes one."""
    undoing = [
        any(type(step).__name__.startswith("Unnormalize") for step in getattr(pipeline, "steps", ()))
        for pipeline in (preprocessor, postprocessor)
    ]
    return undoing == [True, False] and scaling_of(postprocessor) is not None
