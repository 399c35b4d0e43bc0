"""Checks of the statistics: there, finite, varying, of this data and of the right kind, alike both ways."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor

from minivla.data.features import NormalizationMode
from minivla.data.normalize import BLOW_UP, STATISTICS
from minivla.data.stats import IMAGENET
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.scaling import Scaling
from minivla.preflight.subject import Subject


def statistics_present(subject: Subject) -> Iterator[Finding]:
    """Every feature that is to be normalised has the statistics its mode needs, on both sides.

    Threads: lerobot#694 #699 #1078 #1095 #1459 #1733 #4647 #1763 #4446 #4047; openpi#455 #618 #763 (mean/std
    where quantiles are wanted); openvla#21 #87 #192 #248 #261; SpatialVLA#24; X-VLA#63.
    """
    if not subject.has_processors:
        raise NotRun("preprocessor and postprocessor (LeRobot's make_pre_post_processors gives both)")
    if subject.preprocessor is None:
        what = "the policy has no statistics at all: it can neither normalise nor give robot units"
        mend = "build it with stats=dataset.stats, or minivla.load(folder, stats=dataset.stats)"
        yield Finding("statistics-absent", ERROR, "policy", what, mend)
        return
    for key, mode in subject.modes.items():
        yield from _present(subject, subject.scaling, key, mode, "preprocessor")
    if subject.postprocessor is not None:
        for key in subject.outputs:
            yield from _present(subject, subject.back, key, subject.modes[key], "postprocessor")


def processors_in_order(subject: Subject) -> Iterator[Finding]:
    """The preprocessor normalises, the postprocessor undoes it, and not the other way about."""
    if not subject.has_processors:
        raise NotRun("preprocessor and postprocessor (LeRobot's make_pre_post_processors gives both)")
    if subject.exchanged:
        what = "the preprocessor un-normalises and the postprocessor normalises: they have changed places"
        mend = "give preprocessor= and postprocessor= the other way about (the other checks did)"
        yield Finding("processors-exchanged", ERROR, "preprocessor, postprocessor", what, mend)


def _present(
    subject: Subject, scaling: Scaling | None, key: str, mode: NormalizationMode, where: str
) -> Iterator[Finding]:
    real = scaling.modes.get(key, NormalizationMode.IDENTITY) if scaling is not None else None
    place = f"{where}, {key}"
    if real is not None and real != mode:
        what = f"the config wants {mode}, this pipeline does {real}: another scale than the network learnt"
        yield Finding("statistics-mode", ERROR, place, what, "make the processors again from policy.config")
        mode = real
    if not STATISTICS[mode]:
        return
    table = (scaling.stats if scaling is not None else {}).get(key)
    if not table:
        found = sorted(scaling.stats) if scaling is not None else []
        near = difflib.get_close_matches(key, found, 1, 0.5)
        what = f"{mode} needs statistics of '{key}'; found {', '.join(found) or 'none at all'}" + (
            f" (did '{near[0]}' mean it?)" if near else ""
        )
        mend = (
            "make the processors with dataset_stats=dataset.meta.stats; without, LeRobot passes it unscaled"
        )
        yield Finding("statistics-absent", ERROR, place, what, mend)
    elif lacking := [name for name in STATISTICS[mode] if name not in table]:
        needs = " and ".join(STATISTICS[mode])
        what = f"{mode} needs {needs}; there is no {', '.join(lacking)}, only {', '.join(table)}"
        mend = "compute the dataset's statistics again (minivla.data.compute_stats gives quantiles too)"
        yield Finding("statistics-kind", ERROR, place, what, mend)


def statistics_sound(subject: Subject) -> Iterator[Finding]:
    """Statistics are finite and have the feature's shape.

    Threads: lerobot#1459 #3645 ("mean is infinity"); openvla-oft#156.
    """
    for scaling, key, where in _scaled(subject):
        names = STATISTICS[scaling.modes[key]]
        for name, value in zip(names, scaling.pair(key) or (), strict=True):
            size = scaling.features[key].shape[0 if key in subject.cameras else -1]
            yield from _sound(f"{where}, {key}.{name}", value, size)
        low, high = scaling.pair(key) or (torch.zeros(1), torch.ones(1))
        if names[0] != "mean" and low.numel() == high.numel() and bool((high < low).any()):
            wrong = (high < low).flatten().nonzero().flatten().tolist()
            what = f"{names[1]} is below {names[0]} at {wrong[:8]}: it turns the sign round"
            mend = "compute the statistics again"
            yield Finding("statistics-negative", ERROR, f"{where}, {key}", what, mend)


def _sound(place: str, value: Tensor, size: int) -> Iterator[Finding]:
    if value.numel() not in (1, size):
        what = f"{value.numel()} numbers for {size} dimensions: another robot's statistics"
        yield Finding("statistics-shape", ERROR, place, what, "use those of the training dataset")
    if place.endswith(".std") and bool((value < 0).any()):
        wrong = (value < 0).flatten().nonzero().flatten().tolist()
        what = f"a negative spread at {wrong[:8]}: it turns the sign round"
        yield Finding("statistics-negative", ERROR, place, what, "compute the statistics again")
    if broken := (~value.isfinite()).flatten().nonzero().flatten().tolist():
        mend = "look for NaN or inf in that column, then compute the statistics again"
        yield Finding("statistics-not-finite", ERROR, place, f"not finite at {broken[:8]}", mend)


def statistics_vary(subject: Subject) -> Iterator[Finding]:
    """No dimension is divided by (almost) nothing.

    Threads: openpi#773 #814 (a dimension that hardly moves lands at -3200); lerobot#1459.
    """
    for scaling, key, where in _scaled(subject):
        if where == "postprocessor":  # the preprocessor has the same, or `processors agree` says so
            continue
        for index in scaling.constant(key):
            place = subject.dimension(key, index)
            what = "constant in the data: its scale is 0, so the least deviation is divided by nothing"
            mend = (
                "drop the dimension, or normalise this type with IDENTITY; fine if the robot never moves it"
            )
            yield Finding("statistics-constant", WARNING, place, what, mend)
        for index, reached in near_constant(scaling, key).items():
            what = f"nearly constant: the data's own extremes become {reached:.3g} once normalised"
            mend = "drop the dimension or its outliers, or put a floor under its std or range"
            yield Finding("statistics-near-constant", ERROR, subject.dimension(key, index), what, mend)


def near_constant(scaling: Scaling, key: str) -> dict[int, float]:
    """Dimensions whose scale is next to nothing, though not nothing, and where their own extremes land."""
    table, pair = scaling.stats[key], scaling.pair(key)
    if pair is None or not all(value.isfinite().all() for value in pair):
        return {}
    if "min" in table and "max" in table:
        ends = torch.stack([scaling.apply(key, table[name]).flatten() for name in ("min", "max")])
        reached = ends.abs().amax(0)
    else:  # nothing is known of the extremes: a scale of a millionth of the level is rounding
        first, second = (value.flatten() for value in pair)
        scale = second if scaling.modes[key] == NormalizationMode.MEAN_STD else second - first
        reached = 1e-4 * first.abs().clamp(min=1) / scale.abs().clamp(min=1e-12)
    indices = (reached > BLOW_UP).nonzero().flatten().tolist()
    return {i: float(reached[i]) for i in indices if i not in scaling.constant(key)}


def dataset_finite(subject: Subject) -> Iterator[Finding]:
    """The dataset's states and actions are numbers.

    Threads: lerobot#3645; openvla-oft#156.
    """
    if subject.dataset is None:
        raise NotRun("dataset")
    for key, rows in subject.dataset.broken.items():
        what = f"{len(rows)} frames hold NaN or inf, the first is number {rows[0]}"
        mend = "drop or mend these episodes; the checks that compare with the dataset wait until then"
        yield Finding("dataset-not-finite", ERROR, f"{key}, dataset", what, mend)


def statistics_of_dataset(subject: Subject) -> Iterator[Finding]:
    """The policy's statistics are those of the dataset, up to what another draw of episodes would change.

    Threads: lerobot#1763 #4446; openvla#248 (`unnorm_key`); openpi#455; X-VLA#63.
    """
    if subject.recordings is None:
        raise NotRun("dataset")
    episodes = len(subject.recordings.episodes)
    for scaling, key, where in _scaled(subject):
        theirs = subject.recordings.stats.get(key)
        if where == "postprocessor" or theirs is None or _is_imagenet(scaling, key):
            continue
        names = STATISTICS[scaling.modes[key]]
        if any(
            name not in theirs or theirs[name].numel() != scaling.stats[key][name].numel() for name in names
        ):
            continue
        yield from _compared(subject, scaling, key, theirs, episodes)


def _compared(
    subject: Subject, scaling: Scaling, key: str, theirs: dict[str, Tensor], episodes: int
) -> Iterator[Finding]:
    first, second = (value.flatten() for value in scaling.pair(key) or ())
    other = [theirs[name].flatten() for name in STATISTICS[scaling.modes[key]]]
    if scaling.modes[key] == NormalizationMode.MEAN_STD:
        mine, its = (first, second), (other[0], other[1])
    else:
        mine, its = ((first + second) / 2, second - first), ((other[0] + other[1]) / 2, other[1] - other[0])
    spread = torch.maximum(mine[1].abs(), its[1].abs()).clamp(min=1e-8)
    shift = (mine[0] - its[0]).abs() / spread
    ratio = its[1].abs().clamp(min=1e-8) / mine[1].abs().clamp(min=1e-8)
    few = 2 / episodes**0.5  # a handful of episodes is no average
    wide = ratio > 1.5 + 2 * few
    narrow = (ratio < 1 / (1.5 + 2 * few)) & (episodes >= 10)
    wrong = ((shift > 0.3 + few) | wide | narrow) & mine[0].isfinite() & mine[1].isfinite()
    if not wrong.any():
        return
    index = int(torch.where(wrong, shift + ratio.log().abs(), -1.0).argmax())
    names = STATISTICS[scaling.modes[key]]
    ours, others = (f"{pair[0][index]:.3g}, {pair[1][index]:.3g}" for pair in ((first, second), other))
    what = (
        f"{int(wrong.sum())} of {len(wrong)} dimensions differ, most {subject.dimension(key, index)}: "
        f"the policy's {names[0]}, {names[1]} are {ours}, the dataset's {others}"
    )
    mend = "are these the data, and the units, the policy was trained on? Else take their own statistics"
    yield Finding("statistics-other-dataset", ERROR, key, what, mend)


def processors_agree(subject: Subject) -> Iterator[Finding]:
    """What the preprocessor does to an action the postprocessor undoes.

    Threads: lerobot#1763 #4446 (un-normalising skipped or with another dataset's key); openvla-oft#156.
    """
    if subject.scaling is None or subject.postprocessor is None:
        raise NotRun("preprocessor and postprocessor, with statistics")
    one, other = subject.scaling, subject.back
    if other is None:
        return  # `statistics present` has said so
    for key in subject.outputs:
        pairs = [scaling.pair(key) for scaling in (one, other)]
        if pairs[0] is None or pairs[1] is None or not all(scaling.usable(key) for scaling in (one, other)):
            continue
        probe = torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, subject.outputs[key].shape[-1])
        units = one.apply(key, probe, inverse=True)
        back = other.apply(key, one.apply(key, units), inverse=True)
        scale = (units[2] - units[0]).abs().clamp(min=1e-8)
        off = ((back - units).abs() / scale).amax(0)
        off[one.constant(key)] = 0
        if off.max() > 1e-2:
            index = int(off.argmax())
            what = (
                f"an action normalised and brought back is off by {off.max():.2g} of its scale, at "
                f"{subject.dimension(key, index)}: pre- and postprocessor hold different statistics"
            )
            mend = "make both from the same statistics (make_pipelines, or make_pre_post_processors)"
            yield Finding("processors-disagree", ERROR, key, what, mend)


def _scaled(subject: Subject) -> Iterator[tuple[Scaling, str, str]]:
    """Every feature with a full pair of statistics: (scaling, key, whose)."""
    sides = {"preprocessor": subject.scaling, "postprocessor": subject.back}
    there = [(scaling, where) for where, scaling in sides.items() if scaling is not None]
    if not there:
        raise NotRun("preprocessor, with statistics")
    for scaling, where in there:
        yield from ((scaling, key, where) for key in scaling.features if scaling.pair(key) is not None)


def _is_imagenet(scaling: Scaling, key: str) -> bool:
    mean = scaling.stats.get(key, {}).get("mean", torch.zeros(0)).flatten()
    return len(mean) == 3 and torch.allclose(mean, torch.tensor(IMAGENET["mean"]), atol=1e-3)
