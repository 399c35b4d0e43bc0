"""Normalisation: bringing every feature to a common scale, and back to robot units.

Four formulas, chosen per type of feature by a policy's `normalization_mapping`:

    MEAN_STD    (x - mean) / (std + eps)             back: x * std + mean
    MIN_MAX     2 (x - min) / (max - min) - 1        back: (x + 1) / 2 * (max - min) + min
    QUANTILES   as MIN_MAX with q01, q99             values beyond the quantiles fall outside [-1, 1]
    QUANTILE10  as MIN_MAX with q10, q90

The numbers are LeRobot 0.6's to the bit (`lerobot/processor/normalize_processor.py`), its eps included. What
differs is what happens when statistics are absent or useless: LeRobot passes the feature through unscaled,
or divides by eps, and the robot fails later for no visible reason. Here such statistics are refused when the
step is built, by `check_statistics`.
"""

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minivla.data.features import FeatureType, MissingKey, NormalizationMode, PolicyFeature

Stats = dict[str, dict[str, Tensor]]

STATISTICS = {
    NormalizationMode.IDENTITY: (),
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
"""The pair of statistics each mode needs."""

BLOW_UP = 100.0
"""A value of the data that lands further out than this, once normalised, is worth a warning."""


def normalize(x: Tensor, mode: NormalizationMode, stats: Mapping[str, Tensor], eps: float = 1e-8) -> Tensor:
    """Scale `x` by the statistics of its feature.

    x (..., S) or (..., 3, H, W), floating point, robot units; stats: {"mean": (S,), …}, or (3, 1, 1) for
    images, moved to x's device and dtype. Returns the shape of x. KeyError when `stats` lacks what `mode`
    needs, TypeError when x is not floating.
    """
    if mode == NormalizationMode.IDENTITY:
        return x
    first, second = _pair(x, mode, stats)
    if mode == NormalizationMode.MEAN_STD:
        return (x - first) / (second + eps)
    return 2 * (x - first) / _span(first, second, eps) - 1


def unnormalize(x: Tensor, mode: NormalizationMode, stats: Mapping[str, Tensor], eps: float = 1e-8) -> Tensor:
    """Undo `normalize`: same arguments, robot units out.

    MEAN_STD comes back smaller by std / (std + eps), as in LeRobot; the others come back exactly, but for
    rounding.
    """
    if mode == NormalizationMode.IDENTITY:
        return x
    first, second = _pair(x, mode, stats)
    if mode == NormalizationMode.MEAN_STD:
        return x * second + first
    return (x + 1) / 2 * _span(first, second, eps) + first


def _pair(x: Tensor, mode: NormalizationMode, stats: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if not x.is_floating_point():
        raise TypeError(
            f"got {x.dtype}; expected floating point. Images go through minivla.data.to_batch first."
        )
    names = STATISTICS[mode]
    if absent := [name for name in names if name not in stats]:
        raise MissingKey(
            f"mode {mode} needs {' and '.join(names)}; {', '.join(absent)} absent, found {list(stats)}"
        )
    first, second = (stats[name].to(device=x.device, dtype=x.dtype) for name in names)
    return first, second


def _span(low: Tensor, high: Tensor, eps: float) -> Tensor:
    span = high - low
    return torch.where(span == 0, torch.tensor(eps, device=span.device, dtype=span.dtype), span)


def as_stats(stats: Mapping[str, Mapping[str, Any]]) -> Stats:
    """Statistics as float32 tensors, from `dataset.meta.stats`, JSON lists or tensors; None is left out.

    Raises TypeError for anything but {key: {name: values}}.
    """
    if not isinstance(stats, Mapping) or not all(isinstance(table, Mapping) for table in stats.values()):
        raise TypeError(
            f"stats is {stats if isinstance(stats, Mapping) else type(stats).__name__}; expected "
            "{'observation.state': {'mean': …, 'std': …}, …}. Give dataset.stats, or that of a "
            "LeRobotDataset, dataset.meta.stats."
        )
    return {
        key: {name: _float32(value) for name, value in table.items() if value is not None}
        for key, table in stats.items()
    }


def _float32(value: Any) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    # cloned, so that no later change to the dataset's own statistics reaches the policy
    return tensor.to("cpu", torch.float32).clone()


def check_statistics(
    stats: Stats, key: str, feature: PolicyFeature, mode: NormalizationMode, *, allow_constant: bool = False
) -> None:
    """Refuse statistics with which `mode` would ruin `feature`, and say how to mend it.

    Raises KeyError when they are absent (naming the keys found and the nearest match), ValueError when they
    have the wrong shape, are not finite, or belong to a constant dimension: its scale is zero, so the
    division by eps turns the least deviation into a huge number. `allow_constant` accepts the last, with
    LeRobot's numbers (a constant dimension becomes 0, or -1 with a range mode). Warns when some value of the
    data would land beyond ±100.
    """
    if mode == NormalizationMode.IDENTITY:
        return
    table = _table(stats, key, feature, mode)
    names = STATISTICS[mode]
    for name in names:
        _check_values(table[name], f"{key}.{name}", feature)
    constant = constant_dimensions(table, mode)
    if constant and not allow_constant:
        raise ValueError(describe_constant(key, constant, feature, mode))
    _warn_blow_up(table, key, mode, constant)


def constant_dimensions(table: Mapping[str, Tensor], mode: NormalizationMode) -> list[int]:
    """The dimensions (channels, for images) of one feature whose scale is zero under `mode`.

    A standard deviation that is only rounding, where min equals max, counts as zero: LeRobot computes it in
    float32 as the difference of two near-equal squares, and rarely gets 0.
    """
    if mode == NormalizationMode.IDENTITY:
        return []
    first, second = (table[name].flatten() for name in STATISTICS[mode])
    scale = second if mode == NormalizationMode.MEAN_STD else second - first
    constant = scale == 0
    if "min" in table and "max" in table:
        low, high = table["min"].flatten(), table["max"].flatten()
        if low.shape == high.shape == scale.shape:
            constant = constant | ((low == high) & (scale <= 1e-2 * high.abs()))
    return [int(index) for index in constant.nonzero().flatten()]


def describe_constant(key: str, constant: list[int], feature: PolicyFeature, mode: NormalizationMode) -> str:
    """The message about constant dimensions, and three ways out."""
    which = ", ".join(f"{key}[{index}]" for index in constant)
    scale = "std" if mode == NormalizationMode.MEAN_STD else "-".join(reversed(STATISTICS[mode]))
    return (
        f"{which}: constant, {scale} = 0, so {mode} divides by zero; expected a dimension that varies in the "
        f"data. Either drop the dimension from the dataset, or set normalization_mapping['{feature.type}'] = "
        "'IDENTITY', or, if it is constant on purpose (a gripper that never moves), pass "
        "allow_constant=True."
    )


def _table(stats: Stats, key: str, feature: PolicyFeature, mode: NormalizationMode) -> dict[str, Tensor]:
    identity = f"set normalization_mapping['{feature.type}'] = 'IDENTITY'"
    if key not in stats:
        near = difflib.get_close_matches(key, stats, n=1, cutoff=0.5)
        rename = f"stats['{key}'] = stats['{near[0]}'] if that is the same quantity, or " if near else ""
        raise MissingKey(
            f"no statistics for '{key}', which {mode} needs; found "
            f"{', '.join(sorted(stats)) or 'none at all'}. Mend: {rename}compute them "
            f"(minivla.data.compute_stats), or {identity}."
        )
    absent = [name for name in STATISTICS[mode] if name not in stats[key]]
    if absent:
        raise MissingKey(
            f"'{key}' has no {' and no '.join(absent)}, which {mode} needs; found "
            f"{', '.join(sorted(stats[key]))}. Mend: compute the dataset's statistics again "
            f"(minivla.data.compute_stats gives all of them), or {identity}."
        )
    return stats[key]


def _check_values(value: Tensor, name: str, feature: PolicyFeature) -> None:
    wanted = (feature.shape[0], 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
    sizes = zip(reversed(value.shape), reversed(wanted), strict=False)
    if not all(given in (1, expected) for given, expected in sizes):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected {wanted}, from the policy's feature "
            f"{feature.shape}. These are another dataset's statistics: use those of the data the policy is "
            "trained on."
        )
    broken = [int(index) for index in (~value.isfinite()).flatten().nonzero().flatten()]
    if broken:
        raise ValueError(
            f"{name} is not finite at {broken} ({value.flatten()[broken].tolist()}); expected numbers. Look "
            "for NaN or inf in that column of the dataset, then compute the statistics again "
            "(minivla.data.compute_stats)."
        )


def _warn_blow_up(
    table: Mapping[str, Tensor], key: str, mode: NormalizationMode, constant: list[int]
) -> None:
    if "min" not in table or "max" not in table:
        return
    for name in ("min", "max"):
        reached = normalize(table[name], mode, table).flatten()
        for index in (reached.abs() > BLOW_UP).nonzero().flatten().tolist():
            if index in constant:
                continue
            warnings.warn(
                f"{key}[{index}] is nearly constant: its {name}, {table[name].flatten()[index]:g}, becomes "
                f"{reached[index]:g} under {mode} (expected within ±{BLOW_UP:g}), enough to swamp the loss. "
                "Drop the dimension, "
                "clean the outliers, or normalise this type with MIN_MAX.",
                stacklevel=2,
            )
