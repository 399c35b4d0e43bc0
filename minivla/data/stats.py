"""A dataset's statistics: what normalisation is made of.

The numbers are LeRobot 0.6's (`lerobot/datasets/compute_stats.py`, `dataset_metadata.py`), whose way of
getting them is worth knowing:
- each episode is summed up alone (min, max, mean, std, count, five quantiles off a histogram of 5000 bins);
- episodes are then merged one by one. Mean and std of the whole come out right; a *quantile* of the whole
  does not follow from its parts, and LeRobot takes the average of the episodes' quantiles, weighted by their
  lengths. A dimension that varies between episodes but little within one gets a range that is too narrow, and
  its data end far outside [-1, 1];
- images count in [0, 1], per channel, over at most a sample of the frames, thinned out where they are large;
- everything is float32, sums included, as the frames are.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minivla.data.features import FeatureType, PolicyFeature
from minivla.data.normalize import Stats

Array = NDArray[Any]
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BINS = 5000

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Mean and standard deviation of ImageNet's channels, which LeRobot's training gives every camera."""

LEGACY_KEY = re.compile(
    r"^(?:(?:un)?normalize(?:_inputs|_outputs|_targets)?|input_normalizer|output_normalizer)"
    r"\.(?:buffer_)?(?P<feature>.+)\.(?P<name>mean|std|min|max)$"
)
"""Checkpoint keys that hold statistics, from before LeRobot 0.4."""


def compute_stats(
    episodes: Iterable[Mapping[str, Array]], features: Mapping[str, Mapping[str, Any]]
) -> Stats:
    """The statistics of a dataset, as `LeRobotDataset.meta.stats` holds them.

    episodes: for each episode, {key: array} with N frames each: (N, S), (N,) or, for images, uint8 (N, H, W,
    3).
    features: {key: {"dtype": …}} as in the dataset; text is passed over.

    Returns {key: {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}}, float64 of shape
    (S,), (1,) or (3, 1, 1); count int64 (1,).
    Raises ValueError when there is no episode, or a value is NaN or infinite (naming episode, key and
    dimension).
    """
    total: dict[str, dict[str, Array]] = {}
    for number, episode in enumerate(episodes):
        for key, column in features.items():
            if key not in episode or column["dtype"] in ("string", "language"):
                continue
            _check_finite(episode[key], key, number)
            summed_up = _image_stats if column["dtype"] in ("image", "video") else _vector_stats
            found = summed_up(episode[key])
            total[key] = _merge(total[key], found) if key in total else found
    if not total:
        raise ValueError("no episodes with any of the features; expected at least one. Record some first.")
    return {key: {name: _float64(value) for name, value in table.items()} for key, table in total.items()}


def with_imagenet_stats(
    stats: Mapping[str, Mapping[str, Any]], features: Mapping[str, PolicyFeature]
) -> Stats:
    """A copy of `stats` in which every camera among `features` has ImageNet's mean and std, (3, 1, 1)."""
    copy: Stats = {key: dict(table) for key, table in stats.items()}
    for key, feature in features.items():
        if feature.type == FeatureType.VISUAL:
            imagenet = {name: torch.tensor(value).reshape(-1, 1, 1) for name, value in IMAGENET.items()}
            copy[key] = {**copy.get(key, {}), **imagenet}
    return copy


def legacy_stats(tensors: Mapping[str, Tensor], features: Mapping[str, PolicyFeature]) -> Stats:
    """Statistics out of an old checkpoint, where they are buffers of the model.

    tensors: the checkpoint's, of which `LEGACY_KEY` picks `normalize_inputs.buffer_observation_state.mean`
    and its like.
    features: input and output features of its config, whose names are what tells `observation_state` from
    `observation.state`, since dots became underscores there; LeRobot's migration script
    (`migrate_policy_normalization.py`) guesses, and turns `observation.environment_state` into
    `observation.environment.state`. Buffers that were never set (infinite throughout) are left out, so that
    they count as absent. Raises KeyError for buffers of no known feature, ValueError where two buffers of
    one feature disagree.
    """
    names = {key.replace(".", "_"): key for key in features} | {key: key for key in features}
    stats: Stats = {}
    for full, value in tensors.items():
        match = LEGACY_KEY.match(full)
        if match is None or bool(value.isinf().all()):
            continue
        if match["feature"] not in names:
            raise KeyError(
                f"'{full}' holds statistics of '{match['feature']}', and the config knows {list(features)}; "
                "expected one of these. Add the feature to config.json, or take the buffer out of the "
                "weights."
            )
        table = stats.setdefault(names[match["feature"]], {})
        if not torch.equal(table.setdefault(match["name"], value), value):
            raise ValueError(
                f"'{full}' differs from another buffer of the same statistic; expected one value, since both "
                "sides of a policy share a dataset. Decide which is right, and take the other out of the "
                "weights."
            )
    return stats


def _vector_stats(values: Array) -> dict[str, Array]:
    rows = _floats(values.reshape(-1, 1) if values.ndim == 1 else values.reshape(-1, values.shape[-1]))
    return _row_stats(rows, [(column, None) for column in rows.T]) | {"count": np.array([len(values)])}


def _image_stats(frames: Array) -> dict[str, Array]:
    if frames.dtype != np.uint8 or frames.ndim != 4:
        raise ValueError(
            f"got frames of {frames.dtype} {frames.shape}; expected uint8 (N, H, W, 3). Move the channels "
            "last, and scale to 0…255."
        )
    chosen = _thinned(frames[_sampled(len(frames))])
    pixels = chosen.reshape(-1, frames.shape[-1])
    # There are 256 values at most: counting them first makes the histogram a thousand times cheaper, and the
    # same.
    tallies = [np.bincount(channel, minlength=256) for channel in pixels.T]
    columns = [(np.flatnonzero(tally).astype(np.float32), tally[tally > 0]) for tally in tallies]
    stats = _row_stats(_floats(pixels), columns)
    in_unit = {name: (value / 255.0).reshape(-1, 1, 1) for name, value in stats.items()}
    return in_unit | {"count": np.array([len(chosen)])}


def _floats(rows: Array) -> Array:
    return rows.astype(np.result_type(rows.dtype, np.float32), copy=False)


def _sampled(frames: int) -> NDArray[np.intp]:
    size = max(min(100, frames), min(int(frames**0.75), 10_000))
    return np.round(np.linspace(0, frames - 1, size)).astype(np.intp)


def _thinned(frames: Array) -> Array:
    height, width = frames.shape[1:3]
    if max(height, width) < 300:
        return frames
    stride = int(max(height, width) / 150)
    return frames[:, ::stride, ::stride]


def _row_stats(rows: Array, columns: Sequence[tuple[Array, Array | None]]) -> dict[str, Array]:
    """rows (N, D); columns: for each of D, its values, and how often each counts (None: once)."""
    mean = np.mean(rows, axis=0)
    if len(rows) < 2:
        return {name: rows[0].copy() for name in ("min", "max", "mean", *QUANTILES)} | {
            "std": np.zeros_like(mean)
        }
    variance = np.mean(rows**2, axis=0) - mean**2
    low, high = (np.array([end(values) for values, _ in columns]) for end in (np.min, np.max))
    quantiles = [
        _quantiles(values, counts, a, b) for (values, counts), a, b in zip(columns, low, high, strict=True)
    ]
    by_name = {name: np.array([column[i] for column in quantiles]) for i, name in enumerate(QUANTILES)}
    return {"min": low, "max": high, "mean": mean, "std": np.sqrt(np.maximum(0, variance)), **by_name}


def _quantiles(values: Array, counts: Array | None, low: Any, high: Any) -> list[Any]:
    """Where the histogram's cumulative count passes q N, straight lines drawn within a bin."""
    edges = np.linspace(low - 1e-10, high + 1e-10, BINS + 1)
    histogram, _ = np.histogram(values, bins=edges, weights=counts)
    below = np.concatenate([[0], np.cumsum(histogram)])
    total = len(values) if counts is None else counts.sum()
    return [_crossing(quantile * total, below, edges) for quantile in QUANTILES.values()]


def _crossing(target: float, below: Array, edges: Array) -> Any:
    """Where the cumulative count reaches `target`; below (BINS + 1,): how many lie below each edge."""
    index = int(np.searchsorted(below[1:], target))
    if index in (0, BINS):  # LeRobot does not interpolate within the first bin
        return edges[index]
    share = (target - below[index]) / (below[index + 1] - below[index])
    return edges[index] + share * (edges[index + 1] - edges[index])


def _merge(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
    """The statistics of two stretches of data together."""
    count = one["count"] + other["count"]
    weigh = {
        name: (one[name] * one["count"] + other[name] * other["count"]) / count
        for name in ("mean", *QUANTILES)
    }
    off = [(part["mean"] - weigh["mean"]) ** 2 for part in (one, other)]
    variance = (
        (one["std"] ** 2 + off[0]) * one["count"] + (other["std"] ** 2 + off[1]) * other["count"]
    ) / count
    return weigh | {
        "min": np.minimum(one["min"], other["min"]),
        "max": np.maximum(one["max"], other["max"]),
        "std": np.sqrt(variance),
        "count": count,
    }


def _check_finite(values: Array, key: str, episode: int) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        axes = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(
            f"'{key}' of episode {episode} holds NaN or inf, first at frame {axes[0]}, dimension "
            f"{axes[1:] or 0}; expected finite numbers. Mend or drop that episode."
        )


def _float64(value: Array) -> Tensor:
    return torch.from_numpy(np.array(value, dtype=np.int64 if value.dtype.kind in "iu" else np.float64))
