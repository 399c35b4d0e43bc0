"""Checks of what the policy is shown: names, pictures, vectors, the preprocessor, the environment's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minivla.data.features import ACTION, OBS_STATE
from minivla.preflight import cameras, running, statistics, views
from minivla.preflight.report import ERROR, Finding, NotRun
from minivla.preflight.subject import FEW, Refused, Subject
from minivla.preflight.vectors import examine_task

MANY = 4096  # frames with one action; more tell nothing, and take their time
ALIKE = 16  # frames with one chunk
OWN = 1e-3  # mean square between a frame and itself; codecs and resampling stay below


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
    scaling = subject.scaling
    try:
        batch = subject.batch
    except Refused as refused:
        if _statistics_at_fault(subject):  # and said to be
            raise
        yield refused.finding
        return
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
    yield from _pictures_as_seen(subject)


def _pictures_as_seen(subject: Subject) -> Iterator[Finding]:
    """What a policy that pads and rescales pictures itself, for SigLIP, shows its vision encoder lies in
    [-1, 1]. Shown are pictures of half their height, which must be padded.
    """
    if not subject.resizes or not subject.cameras or subject.broken_weights:
        return
    eyes = [m for name, m in subject.patient.named_modules() if name.endswith("patch_embedding")]
    if not eyes:
        return
    batch, found = subject.batch, list[Tensor]()
    wide = {key: batch[key][..., : max(1, batch[key].shape[-2] // 2), :] for key in subject.cameras}
    handle = eyes[0].register_forward_pre_hook(lambda module, args: found.append(args[0].detach().float()))
    try:
        running.chunk(subject.patient, {**batch, **wide})
    finally:
        handle.remove()
    low, high = min(float(x.min()) for x in found), max(float(x.max()) for x in found)
    if low < -1.02 or high > 1.02:
        what = f"the vision encoder sees {low:.3g} to {high:.3g}; it knows -1, black, to 1, white"
        mend = "padded with -1, then rescaled, a border becomes -3: pad with 0 first, or rescale first"
        yield Finding("image-pad-value", ERROR, "pictures, as the network sees them", what, mend)


def _statistics_at_fault(subject: Subject) -> bool:
    checks = (statistics.statistics_present, statistics.statistics_sound)
    return any(True for check in checks for _ in check(subject))


def environment(subject: Subject) -> Iterator[Finding]:
    """What the environment observes is what the policy reads, and looks like the dataset.

    Threads: openvla#142; lerobot#4206 #4168; openpi#602.
    """
    if subject.env is None:
        raise NotRun("env")
    raw = cameras.first_observations(subject.env, range(8))
    if subject.reads_text:
        said = examine_task(dict(raw), getattr(subject.config, "vocabulary", ()))
        yield from (replace(finding, where="task of the environment") for finding in said)
    try:
        seen = subject.few(raw)
    except (KeyError, ValueError, TypeError) as error:
        table = str(error).splitlines()
        mend = (
            "make the environment the policy was trained in (embodiment, cameras, size), or rename its inputs"
        )
        yield Finding("environment-mismatch", ERROR, "env", table[0], mend, "\n".join(table[1:]))
        return
    pictures = cameras.pictures_of(subject, seen)
    yield from cameras.repeated(pictures, "environment")
    if subject.recordings is None or not subject.cameras:
        return
    reference = cameras.references(subject, seen)
    for finding, _ in cameras.unlike(subject, pictures, reference, " of the environment"):
        if finding is not None:
            yield finding


def as_recorded(subject: Subject) -> Iterator[Finding]:
    """Samples whose actions are a frame's of the dataset have the state and the pictures recorded with them.

    Threads: openvla#142; lerobot#4206; openpi#347 (order of the state's dimensions).
    """
    recordings, chunk = subject.recordings, subject.mended(ACTION)
    if recordings is None:
        raise NotRun("dataset")
    if chunk is None or getattr(recordings.dataset, "image_transforms", None) is not None:
        raise NotRun("a batch with the actions of the dataset's frames, its pictures as they were recorded")
    pairs = [(i, row) for i, each in enumerate(chunk[:FEW]) for row in _rows_of(subject, each)]
    if 2 * len({sample for sample, _ in pairs}) <= len(chunk[:FEW]):  # the others are of other data
        raise NotRun("a batch of the dataset's own frames, to be found by their actions")
    samples, recorded = _best(subject, pairs)
    yield from _state_as_recorded(subject, samples, recorded)
    faulty = {finding.where for finding in subject.faults}
    mine = cameras.pictures_of(subject, subject.observation)
    theirs = cameras.pictures_of(subject, recorded)
    for key in (key for key in subject.cameras if key not in faulty):
        off = (mine[key][samples] - theirs[key]).square().flatten(1).mean(1) > OWN
        if off.float().mean() >= 0.5 and not _is_explained(mine[key][samples], theirs, key):
            what = f"{int(off.sum())} of {len(off)} pictures are not those recorded with the same actions"
            mend = "look at one beside the dataset's: turned, shifted, recoloured, another camera or moment"
            yield Finding("image-unlike-dataset", ERROR, key, what, mend)


def _is_explained(pictures: Tensor, recorded: cameras.Pictures, key: str) -> bool:
    """Whether they are turned, or another camera's: `picture orientation`, `camera order` report that."""
    alike = [each for each in recorded.values() if each.shape == pictures.shape]
    crossed = [bool(((pictures - each).square().flatten(1).mean(1) < OWN).all()) for each in alike]
    return any(crossed) or views.turned(pictures, recorded[key][:, None])[0] is not None


def _rows_of(subject: Subject, chunk: Tensor) -> list[int]:
    """The dataset's frames with this chunk (H, A); none where there are too many to tell anything, or where
    the chunk holds nothing but stops, and any other data would have it too.
    """
    recordings, config = subject.recordings, subject.config
    if recordings is None or recordings.column(ACTION).shape[-1] != chunk.shape[-1]:
        return []
    column = recordings.column(ACTION).float()
    stops = torch.stack([column.amin(0), column.amax(0), torch.zeros(column.shape[-1])])
    if int(((chunk[None] - stops[:, None]).abs() > 1e-4).all(0).sum()) < 2:
        return []
    now = list(config.action_delta_indices).index(0)
    rows = (column - chunk[now]).abs().amax(1).lt(1e-5).nonzero().flatten()
    if not 0 < len(rows) <= MANY:
        return []
    same = (recordings.chunks(rows.tolist(), config)[ACTION] - chunk).abs().amax((1, 2)) < 1e-5
    return rows[same].tolist() if int(same.sum()) <= ALIKE else []


def _best(subject: Subject, pairs: list[tuple[int, int]]) -> tuple[list[int], dict[str, Any]]:
    """Of (sample, frame) pairs, for each sample the frame that agrees in most inputs: an arm that goes on
    at one speed repeats its chunk. Returns the samples and the recorded observations of their frames.
    """
    samples, rows = torch.tensor(pairs).unbind(1)
    recorded = subject.recorded(rows.tolist(), limit=len(rows))
    mine = {subject.named(key): value for key, value in subject.observation.items()}
    score = torch.zeros(len(rows))
    for key, value in recorded.items():
        given = mine.get(subject.named(key))
        if subject.named(key) in subject.inputs and given is not None:
            limit = OWN if subject.named(key) in subject.cameras else 1e-3 * OWN
            score += (given[samples].float() - value.float()).square().flatten(1).mean(1) < limit
    kept = [int(torch.where(samples == i, score, -1.0).argmax()) for i in samples.unique()]
    every = {
        key: value[kept] if isinstance(value, Tensor) else [value[i] for i in kept]
        for key, value in recorded.items()
    }
    return samples[kept].tolist(), every


def _state_as_recorded(
    subject: Subject, samples: list[int], recorded: Mapping[str, Any]
) -> Iterator[Finding]:
    names = {subject.named(key): key for key in recorded}
    state = subject.mended(OBS_STATE)
    if state is None or OBS_STATE not in names or OBS_STATE in {finding.where for finding in subject.faults}:
        return
    mine = state[samples].reshape(len(samples), -1, state.shape[-1])[:, -1]
    theirs = recorded[names[OBS_STATE]].reshape(len(samples), -1, state.shape[-1])[:, -1].float()
    off = ((mine - theirs).abs() > 1e-3 * (1 + theirs.abs())).float().mean(0) >= 0.5
    if off.any():
        where = ", ".join(subject.dimension(OBS_STATE, i) for i in off.nonzero().flatten().tolist())
        what = f"it is not what was recorded with the same actions: {_instead(mine, theirs)}"
        mend = "read the state as it was recorded: order, signs, units"
        yield Finding("state-unlike-dataset", ERROR, where, what, mend)


def _instead(mine: Tensor, theirs: Tensor) -> str:
    """What became of the first dimension that differs: another one, or the same with its sign turned."""
    index = int((mine - theirs).abs().amax(0).gt(1e-3).nonzero()[0])
    column = mine[:, index]
    if torch.allclose(column, -theirs[:, index], atol=1e-3):
        return f"number {index} has its sign turned"
    places = [j for j in range(theirs.shape[1]) if torch.allclose(column, theirs[:, j], atol=1e-3)]
    if places and places[0] != index:
        return f"number {index} is the recorded number {places[0]}"
    return f"number {index} reads {column[0]:.3g}, recorded was {theirs[0, index]:.3g}"
