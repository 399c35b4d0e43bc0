"""Checks of what the policy is shown: names, pictures, vectors, the way round, and the environment's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minivla.data.features import OBS_STATE
from minivla.preflight import views
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.scaling import Scaling
from minivla.preflight.subject import Subject
from minivla.training.evaluation import Episode, raw_batch

SEEDS = range(24)
Pictures = Mapping[str, Tensor]


def inputs(subject: Subject) -> Iterator[Finding]:
    """Every input is there under its name, in the layout, range, size and padding the policy knows.

    Threads on names and numbers of cameras: lerobot#1620 #2262 #2269 #3181; openpi#310 #464 #593. On range,
    layout, padding: lerobot#1065 #2218 #2512 #2650 PR#2891; physical-ai-studio#408; big_vision#91. On sizes:
    openpi#681; lerobot#3353. On padding flags under another name: lerobot#1707.
    """
    yield from subject.faults


def preparation(subject: Subject) -> Iterator[Finding]:
    """The mended batch goes through the preprocessor, and comes out within what the pictures' range allows.

    Threads: lerobot#2512 #2650; big_vision#91 (a picture padded, then rescaled, reaches -3).
    """
    batch, scaling = subject.batch, subject.scaling
    for key in subject.cameras:
        if scaling is None or key not in scaling.features:
            continue
        ends = torch.stack([scaling.apply(key, torch.full((3, 1, 1), end)) for end in (0.0, 1.0)])
        low, high = (float(bound) for bound in batch[key].float().aminmax())
        floor, ceiling = float(ends.min()), float(ends.max())
        slack = 0.02 * (ceiling - floor)
        if low < floor - slack or high > ceiling + slack:
            possible = f"{floor:.3g} to {ceiling:.3g}"
            what = f"the network sees {low:.3g} to {high:.3g}; pictures in [0, 1] give {possible}"
            mend = "the preprocessor pads or scales twice: pad with what black becomes, scale once"
            yield Finding("image-pad-value", ERROR, f"{key}, preprocessed", what, mend)


def camera_order(subject: Subject) -> Iterator[Finding]:
    """No two cameras have changed places, in the batch or in the config.

    Threads: lerobot#1620 #2269 #3181; openpi#310; strands#517.
    """
    if len(subject.cameras) < 2:
        raise NotRun("a policy with two cameras or more")
    pictures = _pictures(subject, subject.observation)
    try:
        reference = _references(subject, subject.observation)
    except NotRun:
        reference = None
    told = False
    for one, other in itertools.combinations(subject.cameras, 2):
        if pictures[one].shape != pictures[other].shape:
            continue
        swapped = (
            _swapped_by_statistics(subject.scaling, pictures, one, other)
            if reference is None
            else _swapped(pictures, reference, one, other)
        )
        told = told or swapped is not None
        if swapped:
            what = "each camera's pictures look like the other's: they have changed places"
            mend = f"raw['{one}'], raw['{other}'] = raw['{other}'], raw['{one}']"
            yield Finding("camera-order", ERROR, f"{one}, {other}", what, mend)
    if reference is not None and subject.recordings is not None:
        yield from _order_of_config(subject)
    if not told:
        raise NotRun("frames to tell the cameras by: dataset, env, or statistics that differ between them")


def _swapped(pictures: Pictures, reference: Pictures, one: str, other: str) -> bool | None:
    said = [
        views.verdict(
            views.distance(pictures[here], reference[here]), views.distance(pictures[here], reference[there])
        )
        for here, there in ((one, other), (other, one))
    ]
    return all(said) if None not in said else None


def _swapped_by_statistics(scaling: Scaling | None, pictures: Pictures, one: str, other: str) -> bool | None:
    """Told by the channels' mean and spread, which say little: only where cameras differ much."""
    marks = {}
    for key in (one, other):
        table = scaling.stats.get(key, {}) if scaling is not None else {}
        if "mean" not in table or "std" not in table or table["mean"].numel() != 3:
            return None
        marks[key] = torch.cat([table["mean"].flatten(), table["std"].flatten()])
    apart = float((marks[one] - marks[other]).square().sum())
    if apart < 0.02:
        return None
    seen = {key: _marks(pictures[key]) for key in (one, other)}
    right = sum(float((seen[key] - marks[key]).square().sum()) for key in (one, other))
    crossed = float((seen[one] - marks[other]).square().sum() + (seen[other] - marks[one]).square().sum())
    return crossed < 0.25 * right and right > apart


def _marks(pictures: Tensor) -> Tensor:
    channels = pictures.transpose(0, 1).flatten(1)
    return torch.cat([channels.mean(1), channels.std(1)])


def _order_of_config(subject: Subject) -> Iterator[Finding]:
    features = subject.recordings.features if subject.recordings is not None else {}
    theirs = [key for key in features if key in subject.cameras]
    if len(theirs) == len(subject.cameras) and theirs != subject.cameras:
        what = f"the policy has {', '.join(subject.cameras)}; the dataset lists {', '.join(theirs)}"
        mend = (
            "harmless while cameras go by name; reorder config.input_features if the weights go by position"
        )
        yield Finding("camera-order-config", WARNING, "config.input_features", what, mend)


def orientation(subject: Subject) -> Iterator[Finding]:
    """Pictures are the right way round, and their colours in order.

    Threads: lerobot#2218 #2650; openvla#142 #197 (LIBERO's pictures are recorded upside down); lerobot#4206.
    """
    if not subject.cameras:
        raise NotRun("a policy with a camera")
    pictures = _pictures(subject, subject.observation)
    reference = _references(subject, subject.observation)
    told = False
    for key in subject.cameras:
        how, sure = views.turned(pictures[key], reference[key])
        told = told or sure
        if how is not None:
            yield _turned(key, how)
    if not told:
        raise NotRun(f"{views.SEVERAL} samples or more in the batch, or one that is in the dataset")


def _turned(key: str, how: str) -> Finding:
    what = f"compared with frames recorded in the same state, it is {how}"
    code = "image-colours" if how == views.COLOURS else "image-flipped"
    mends = {
        "upside down": "image.flip(-2) (rows), where the camera is read",
        "mirrored": "image.flip(-1) (columns), where the camera is read",
        "turned by 180 degrees": "image.flip(-2).flip(-1), where the camera is read",
        views.COLOURS: "reverse the channels (OpenCV reads BGR): image[..., ::-1]",
    }
    return Finding(code, ERROR, key, what, mends[how])


def environment(subject: Subject) -> Iterator[Finding]:
    """What the environment observes is what the policy reads, and looks like the dataset.

    Threads: openvla#142; lerobot#4206 #4168; openpi#602.
    """
    if subject.env is None:
        raise NotRun("env")
    try:
        seen = subject.few(_observed(subject.env, range(8)))
    except (KeyError, ValueError, TypeError) as error:
        table = str(error).splitlines()
        mend = (
            "make the environment the policy was trained in (embodiment, cameras, size), or rename its inputs"
        )
        yield Finding("environment-mismatch", ERROR, "env", table[0], mend, "\n".join(table[1:]))
        return
    if subject.recordings is None or not subject.cameras:
        return
    reference = _references(subject, seen)
    for key, pictures in _pictures(subject, seen).items():
        how, _ = views.turned(pictures, reference[key])
        if how is not None:
            yield _turned(f"{key} of the environment", how)


def _observed(env: Any, seeds: range) -> dict[str, Any]:
    """First observations of some episodes, as one raw batch."""
    return raw_batch([Episode(env, seed, None, False) for seed in seeds])


def _pictures(subject: Subject, observation: Mapping[str, Any]) -> dict[str, Tensor]:
    """The latest picture of every camera, (B, 3, H, W)."""
    by_name = {subject.named(key): value for key, value in observation.items()}
    return {
        key: by_name[key].reshape(len(by_name[key]), -1, *by_name[key].shape[-3:])[:, -1]
        for key in subject.cameras
    }


def _references(subject: Subject, observation: Mapping[str, Any]) -> dict[str, Tensor]:
    """For each sample, frames taken in like states: {camera: (B, K, 3, H, W)}. NotRun without any source."""
    state = {subject.named(key): value for key, value in observation.items()}.get(OBS_STATE)
    size = len(next(iter(_pictures(subject, observation).values())))
    if subject.recordings is not None:
        recordings = subject.recordings
        usable = state is not None and recordings.has(OBS_STATE)
        if state is not None and usable and recordings.column(OBS_STATE).shape[-1] == state.shape[-1]:
            states = state.reshape(size, -1, state.shape[-1])[:, -1].float()
            rows = views.nearest(states, recordings.column(OBS_STATE).float())
        else:
            rows = torch.tensor(recordings.spread_rows(16)).expand(size, -1)
        return _fetched(subject, rows)
    if subject.env is None:
        raise NotRun("dataset or env")
    try:
        seen = subject.few(_observed(subject.env, SEEDS), limit=len(SEEDS))
    except (KeyError, ValueError, TypeError) as error:
        raise NotRun("an env whose observations the policy can read") from error
    pictures = _pictures(subject, seen)
    return {key: value[None].expand(size, *value.shape) for key, value in pictures.items()}


def _fetched(subject: Subject, rows: Tensor) -> dict[str, Tensor]:
    """The dataset's frames (B, K), each fetched once."""
    unique, places = rows.unique(return_inverse=True)
    found = _pictures(subject, subject.recorded(unique.tolist(), limit=len(unique)))
    return {key: value[places] for key, value in found.items()}
