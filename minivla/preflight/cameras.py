"""Checks of the cameras: which is which, the way round, and whether they show what the data showed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minivla.data.features import OBS_STATE
from minivla.preflight import views
from minivla.preflight.pictures import FLAT
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.scaling import Scaling
from minivla.preflight.subject import Subject
from minivla.training.evaluation import Episode, raw_batch

SEEDS = range(24)
SAME = 1e-5  # mean square between two pictures below which they are one; sensors and codecs leave more
MOVED = 0.5  # standard deviations of the state: a robot that moved so far is seen to have moved
UNLIKE = 4.0  # times as far as recorded episodes are from one another. Clean ones reached 1.3.
NEAR = 0.03  # mean square, a contrast of 0.17: nearer than that no picture is called unlike
Pictures = Mapping[str, Tensor]


def distinct(subject: Subject) -> Iterator[Finding]:
    """No two cameras show the same picture, and no camera shows one picture all the time.

    Threads: lerobot#1620 #2269; strands#517.
    """
    if not subject.cameras:
        raise NotRun("a policy with a camera")
    pictures = pictures_of(subject, subject.observation)
    yield from repeated(pictures, "batch")
    state = _state_of(subject, subject.observation)
    if state is None or len(state) < 3:
        return
    scaling, spread = subject.scaling, torch.ones(state.shape[-1])
    if scaling is not None and scaling.usable(OBS_STATE) and "std" in scaling.stats[OBS_STATE]:
        spread = scaling.stats[OBS_STATE]["std"].flatten().float().clamp(min=1e-6)
    gaps = torch.cdist(state / spread, state / spread)
    for key in subject.cameras:
        same = (pictures[key] - pictures[key][:1]).abs().amax() == 0
        if same and float(gaps.max()) > MOVED and float(pictures[key].std()) > FLAT:
            what = f"{len(state)} samples, one and the same picture, while the state moves"
            mend = "look for a frozen stream or a frame read once; fine for a picture of the goal"
            yield Finding("image-stale", WARNING, key, what, mend)


def repeated(pictures: Pictures, whose: str) -> Iterator[Finding]:
    """Pairs of cameras whose pictures are the same, sample by sample."""
    for one, other in itertools.combinations(pictures, 2):
        mine, its = pictures[one], pictures[other]
        if mine.shape != its.shape or float(mine.std()) < FLAT:
            continue
        if float((mine - its).square().flatten(1).mean(1).max()) < SAME:
            yield _both_show(one, other, f"in the {whose} both cameras show the same picture")


def _both_show(one: str, other: str, what: str) -> Finding:
    mend = "one of them was read twice: give each camera its own device or key"
    return Finding("camera-repeated", ERROR, f"{one}, {other}", what, mend)


def camera_order(subject: Subject) -> Iterator[Finding]:
    """No two cameras have changed places, in the batch or in the config.

    Threads: lerobot#1620 #2269 #3181; openpi#310; strands#517.
    """
    if len(subject.cameras) < 2:
        raise NotRun("a policy with two cameras or more")
    pictures = pictures_of(subject, subject.observation)
    try:
        reference = references(subject, subject.observation)
    except NotRun:
        reference = None
    told = False
    for one, other in itertools.combinations(subject.cameras, 2):
        if pictures[one].shape != pictures[other].shape:
            continue
        if reference is None:
            swapped = _swapped_by_statistics(subject.scaling, pictures, one, other)
        else:
            said = _crossed(pictures, reference, one, other)
            swapped = all(said) if None not in said else None
            if said.count(True) == 1 and not any(repeated({k: pictures[k] for k in (one, other)}, "batch")):
                both, seen = (other, one) if said[0] else (one, other)
                yield _both_show(one, other, f"both look like '{both}' in the data, '{seen}' too")
        told = told or swapped is not None
        if swapped:
            what = "each camera's pictures look like the other's: they have changed places"
            mend = f"raw['{one}'], raw['{other}'] = raw['{other}'], raw['{one}']"
            yield Finding("camera-order", ERROR, f"{one}, {other}", what, mend)
    if reference is not None and subject.recordings is not None:
        yield from _order_of_config(subject)
    if not told:
        raise NotRun("frames to tell the cameras by: dataset, env, or statistics that differ between them")


def _crossed(pictures: Pictures, reference: Pictures, one: str, other: str) -> list[bool | None]:
    """Of both cameras, whether each looks like the other's recorded frames rather than its own."""
    return [
        views.verdict(
            views.distance(pictures[here], reference[here]), views.distance(pictures[here], reference[there])
        )
        for here, there in ((one, other), (other, one))
    ]


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
    """Pictures are the right way round, their colours in order, and like the recorded ones.

    Threads: lerobot#2218 #2650; openvla#142 #197 (LIBERO's pictures are recorded upside down); lerobot#4206.
    """
    if not subject.cameras:
        raise NotRun("a policy with a camera")
    pictures = pictures_of(subject, subject.observation)
    found = list(unlike(subject, pictures, references(subject, subject.observation)))
    told = False
    for finding, sure in found:
        told = told or sure
        if finding is not None:
            yield finding
    if not told:
        raise NotRun(f"{views.SEVERAL} samples or more in the batch that tell, or one that is in the dataset")


def unlike(
    subject: Subject, pictures: Pictures, reference: Pictures, whose: str = ""
) -> Iterator[tuple[Finding | None, bool]]:
    """For each camera how it differs from its references, if it does, and whether that could be told."""
    for key in subject.cameras:
        how, sure = views.turned(pictures[key], reference[key])
        if how is not None:
            yield _turned(key + whose, how), True
            continue
        # Cameras that changed places are far from their own frames; `camera order` says that.
        nearest = [views.distance(pictures[key], reference[other]) for other in _alike(reference, key)]
        apart = float(torch.stack(nearest).amin(0).median())
        usual = _usual(subject, key) if apart > NEAR else None
        if usual is not None and apart > UNLIKE * usual:
            what = f"{apart / usual:.0f} times as far from recorded frames as these from one another"
            mend = "compare one picture with the dataset's by eye: exposure, colours, crop, camera's place"
            yield Finding("image-unlike-dataset", WARNING, key + whose, what, mend), True
        else:
            yield None, sure


def _alike(reference: Pictures, key: str) -> list[str]:
    return [other for other in reference if reference[other].shape == reference[key].shape]


def _usual(subject: Subject, key: str) -> float | None:
    """How far recorded frames are from those of other episodes in like states, the farthest of some."""
    recordings = subject.recordings
    if recordings is None or not recordings.has(OBS_STATE) or len(recordings.episodes) < 3:
        return None
    rows = torch.tensor(recordings.spread_rows(16))
    states = recordings.column(OBS_STATE).float()
    number = recordings.column("episode_index").flatten()
    own = number[rows][:, None] == number[None]
    pictures = _fetched(subject, rows[:, None])[key][:, 0]
    reference = _fetched(subject, views.nearest(states[rows], states, without=own))[key]
    return float(views.distance(pictures, reference).max())


def _turned(key: str, how: str) -> Finding:
    what = f"compared with frames recorded in the same state, it is {how}"
    code = "image-colours" if how.endswith("exchanged") and "columns" not in how else "image-flipped"
    other = "give the channels in the order red, green, blue"
    mends = {
        "upside down": "image.flip(-2) (rows), where the camera is read",
        "mirrored": "image.flip(-1) (columns), where the camera is read",
        "turned by 180 degrees": "image.flip(-2).flip(-1), where the camera is read",
        "a quarter turned to the right": "image.rot90(1, (-2, -1)), where the camera is read",
        "a quarter turned to the left": "image.rot90(-1, (-2, -1)), where the camera is read",
        "with rows and columns exchanged": "image.transpose(-2, -1), where the camera is read",
        views.COLOURS: "reverse the channels (OpenCV reads BGR): image[..., ::-1]",
    }
    return Finding(code, ERROR, key, what, mends.get(how, other))


def first_observations(env: Any, seeds: range) -> dict[str, Any]:
    """First observations of some episodes, as one raw batch."""
    return raw_batch([Episode(env, seed, None, False) for seed in seeds])


def pictures_of(subject: Subject, observation: Mapping[str, Any]) -> dict[str, Tensor]:
    """The latest picture of every camera, (B, 3, H, W)."""
    by_name = {subject.named(key): value for key, value in observation.items()}
    return {
        key: by_name[key].reshape(len(by_name[key]), -1, *by_name[key].shape[-3:])[:, -1]
        for key in subject.cameras
    }


def _state_of(subject: Subject, observation: Mapping[str, Any]) -> Tensor | None:
    """The latest state (B, S) of an observation, if it has one."""
    state = {subject.named(key): value for key, value in observation.items()}.get(OBS_STATE)
    return None if state is None else state.reshape(len(state), -1, state.shape[-1])[:, -1].float()


def references(subject: Subject, observation: Mapping[str, Any]) -> dict[str, Tensor]:
    """For each sample, frames taken in like states: {camera: (B, K, 3, H, W)}. NotRun without any source."""
    state = _state_of(subject, observation)
    size = len(next(iter(pictures_of(subject, observation).values())))
    if subject.recordings is not None:
        recordings = subject.recordings
        usable = state is not None and recordings.has(OBS_STATE)
        if state is not None and usable and recordings.column(OBS_STATE).shape[-1] == state.shape[-1]:
            rows = views.nearest(state, recordings.column(OBS_STATE).float())
        else:
            rows = torch.tensor(recordings.spread_rows(16)).expand(size, -1)
        return _fetched(subject, rows)
    if subject.env is None:
        raise NotRun("dataset or env")
    try:
        seen = subject.few(first_observations(subject.env, SEEDS), limit=len(SEEDS))
    except (KeyError, ValueError, TypeError) as error:
        raise NotRun("an env whose observations the policy can read") from error
    pictures = pictures_of(subject, seen)
    return {key: value[None].expand(size, *value.shape) for key, value in pictures.items()}


def _fetched(subject: Subject, rows: Tensor) -> dict[str, Tensor]:
    """The dataset's frames (B, K), each fetched once."""
    unique, places = rows.unique(return_inverse=True)
    found = pictures_of(subject, subject.recorded(unique.tolist(), limit=len(unique)))
    return {key: value[places] for key, value in found.items()}
