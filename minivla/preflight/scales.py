"""Checks of the batch under the policy's scale: units, order, and zeros that only fill up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minivla.data.features import ACTION, FeatureType, NormalizationMode
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.scaling import Scaling
from minivla.preflight.statistics import near_constant
from minivla.preflight.subject import Subject

FAR = {NormalizationMode.MEAN_STD: 20.0}  # standard deviations; the other modes bring data to [-1, 1]
FAR_IN_RANGE = 6.0
BEYOND = 0.4  # of the range of all training data, beyond its ends
UNSCALED = 10.0  # data this far from zero want a scale
PAD_OFF = 3.0  # a zero this far from the mean, once normalised, is no measurement


def scale_of_batch(subject: Subject) -> Iterator[Finding]:
    """The batch, once normalised, lies where training data lay.

    Threads: openpi#763 #773 #814; lerobot#4113; SpatialVLA#24; units and frames, openpi#416 #602.
    """
    scaling = subject.scaling
    for key in (*subject.inputs, *subject.outputs):
        value = subject.mended(key)
        if value is None or key in subject.cameras:
            continue
        flat = value.reshape(-1, value.shape[-1])
        if subject.modes[key] == NormalizationMode.IDENTITY:
            yield from _unscaled(subject, key, flat)
        elif scaling is not None and scaling.usable(key):
            yield from _far(subject, scaling, key, flat)


def _unscaled(subject: Subject, key: str, flat: Tensor) -> Iterator[Finding]:
    reached = flat.abs().amax(0)
    if reached.max() > UNSCALED:
        index = int(reached.argmax())
        what = (
            f"goes into the network as it is (IDENTITY), and dimension {index} reaches {reached[index]:.3g}"
        )
        mend = (
            f"set normalization_mapping['{_type(subject, key)}'] to MEAN_STD or MIN_MAX, and train with that"
        )
        yield Finding("statistics-identity", WARNING, key, what, mend)


def _far(subject: Subject, scaling: Scaling, key: str, flat: Tensor) -> Iterator[Finding]:
    reached = scaling.apply(key, flat).abs().amax(0)
    reached[[*scaling.constant(key), *near_constant(scaling, key)]] = 0  # `statistics vary` names these
    limit = FAR.get(scaling.modes[key], FAR_IN_RANGE)
    if not reached.max() > limit:
        yield from _out_of_range(subject, scaling, key, flat)
        return
    index = int(reached.argmax())
    unit = "standard deviations" if scaling.modes[key] in FAR else "times the range"
    what = (
        f"{int((reached > limit).sum())} of {len(reached)} dimensions are far from all training data: "
        f"{subject.dimension(key, index)} reads {_furthest(flat, index):.3g}, {reached[index]:.3g} {unit} off"
    )
    mend = "compare units (degrees or radians, mm or m), order and robot with the training data"
    yield Finding("statistics-scale", ERROR, key, what, mend)


def _out_of_range(subject: Subject, scaling: Scaling, key: str, flat: Tensor) -> Iterator[Finding]:
    """Most samples lie outside what training saw, by a good part of its range: told where it is known."""
    table = scaling.stats[key]
    if key == ACTION or any(n not in table or table[n].numel() != flat.shape[-1] for n in ("min", "max")):
        return
    low, high = (table[name].flatten().float() for name in ("min", "max"))
    beyond = torch.maximum(low - flat, flat - high) / (high - low).clamp(min=1e-6)
    typical = beyond.median(0).values
    typical[[*scaling.constant(key), *near_constant(scaling, key)]] = 0
    if not typical.max() > BEYOND:
        return
    index = int(typical.argmax())
    what = (
        f"{int((typical > BEYOND).sum())} of {len(typical)} dimensions are out of the range of all training "
        f"data: {subject.dimension(key, index)} reads {float(flat[:, index].median()):.3g}, "
        f"there it was {low[index]:.3g} to {high[index]:.3g}"
    )
    mend = "compare signs, order and units with the training data"
    yield Finding("statistics-scale", ERROR, key, what, mend)


def padded_with_zeros(subject: Subject) -> Iterator[Finding]:
    """State and action hold no zeros that only fill up the size.

    Threads: openpi#681 PR#894; lerobot#3353 #3433; lingbot-vla#62.
    """
    scaling = subject.scaling
    if scaling is None:
        raise NotRun("preprocessor")
    for key in (*subject.inputs, *subject.outputs):
        value = subject.mended(key)
        if value is None or key in subject.cameras or not scaling.usable(key):
            continue
        flat = value.reshape(-1, value.shape[-1])
        zero = _trailing((flat == 0).all(0))
        off = scaling.apply(key, torch.zeros(flat.shape[-1])).abs() > PAD_OFF
        strange = zero & off
        if subject.recordings is not None and subject.recordings.has(key):
            rows = subject.recordings.column(key).reshape(-1, flat.shape[-1])
            strange = zero & ((rows == 0).float().mean(0) < 0.01)
        if strange.any():
            indices = strange.nonzero().flatten().tolist()
            what = f"exactly zero throughout at {indices}, where training data were not"
            mend = "fill these dimensions with what the robot measures, or use a policy without them"
            kind = "action" if key == ACTION else "state"
            yield Finding(f"{kind}-padding", ERROR, key, what, mend)


def _type(subject: Subject, key: str) -> FeatureType:
    return {**subject.inputs, **subject.outputs}[key].type


def _trailing(flags: Tensor) -> Tensor:
    """The run of True at the end, and nothing before."""
    return flags.flip(0).long().cumprod(0).bool().flip(0)


def _furthest(flat: Tensor, index: int) -> float:
    column = flat[:, index]
    return float(column[column.abs().argmax()])
