"""Checks of what the actions mean: range, frame, delta or absolute, gripper, and replays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivla.data.features import ACTION, OBS_STATE
from minivla.preflight import motion, running
from minivla.preflight.recordings import Recordings
from minivla.preflight.report import ERROR, Finding, NotRun
from minivla.preflight.subject import Subject
from minivla.training.evaluation import Episode

BEYOND = 0.5  # of the range: what a policy's output may be off before it is worth a word
POOR = 0.95  # std off, in any one dimension: no better than predicting the mean
FRAMES = 48  # looked at in the open-loop replay
DRAWS = 4  # of a policy that draws its chunks
OPPOSITE = 0.65  # of a gripper's motions against its command; disturbed demonstrations have up to 0.2 of them
MOTIONS = 4  # of each kind; fewer prove nothing


def action_range(subject: Subject) -> Iterator[Finding]:
    """Recorded and predicted actions have the environment's size and keep to its bounds.

    Threads: openpi#347 #602; lerobot#2259; X-VLA#27.
    """
    if subject.env is None:
        raise NotRun("env")
    space = subject.env.action_space
    low, high = (torch.as_tensor(np.asarray(bound)).float() for bound in (space.low, space.high))
    size = subject.outputs[ACTION].shape[-1]
    if low.shape[-1] != size:
        what = f"the policy gives {size} numbers, the environment takes {low.shape[-1]}"
        mend = "make the environment with the embodiment the policy was trained for"
        yield Finding("action-size", ERROR, ACTION, what, mend)
        return
    span = (high - low).clamp(min=1e-6)
    if subject.recordings is not None and subject.recordings.column(ACTION).shape[-1] == size:
        recorded = subject.recordings.column(ACTION).float()
        yield from _beyond(subject, recorded, low - 1e-3 * span, high + 1e-3 * span, "recorded")
    if subject.postprocessor is not None:
        predicted = _robot_units(subject, running.chunk(subject.patient, subject.batch)).flatten(0, -2)
        yield from _beyond(subject, predicted, low - BEYOND * span, high + BEYOND * span, "predicted")


def _beyond(subject: Subject, actions: Tensor, low: Tensor, high: Tensor, whose: str) -> Iterator[Finding]:
    out = ((actions < low) | (actions > high)).float().mean(0)
    if not out.max() > 0.02:
        return
    index = int(out.argmax())
    column = actions[:, index]
    what = (
        f"{out[index]:.0%} of the {whose} actions are out of the environment's bounds at "
        f"{subject.dimension(ACTION, index)}: {column.min():.3g} to {column.max():.3g}"
    )
    mend = "compare the units and the meaning of this number with the environment's ActionSpec"
    yield Finding("action-out-of-range", ERROR, f"{ACTION}, {whose}", what, mend)


def _robot_units(subject: Subject, actions: Tensor) -> Tensor:
    back: Any = subject.postprocessor
    found: Tensor = back(actions)
    return found.float().cpu()


def action_frame(subject: Subject) -> Iterator[Finding]:
    """Recorded actions move the robot as the environment's ActionSpec says: delta or absolute, frame, scale.

    Threads: openpi#416 #602 #637; LIBERO#125; lerobot#2259; X-VLA#27.
    """
    recordings, spec = _with_spec(subject)
    action, state, after = _motion(subject, recordings)
    for index, name in enumerate(spec.names):
        if index in spec.gripper or float(action[:, index].std()) < 1e-6:
            continue
        change = after - state
        moved, placed = (_correlation(action[:, index], x[:, index]) for x in (change, after))
        where = f"{ACTION}[{index}] ({name})"
        along = change if not spec.absolute[index] else after
        if not spec.absolute[index] and placed > 0.9 and placed > moved + 0.2:
            what = f"the environment takes changes; the data's numbers are places (correlation {placed:.2f})"
            mend = "record, or convert to, the change from the state: action - state, in the spec's units"
            yield Finding("action-absolute", ERROR, where, what, mend)
        elif spec.absolute[index] and moved > 0.6 and placed < 0.7:
            what = f"the environment takes places; the data's numbers are changes (correlation {moved:.2f})"
            mend = "add the state to them, or use an environment that takes changes"
            yield Finding("action-delta", ERROR, where, what, mend)
        elif (placed if spec.absolute[index] else moved) < -0.5:
            what = "the robot moved against the recorded numbers: the sign is reversed"
            mend = "turn the sign of this dimension, or look at the joint's or axis's direction"
            yield Finding("action-sign", ERROR, where, what, mend)
        else:
            yield from _other_axis(spec, action, along, index, where)


def _other_axis(spec: Any, action: Tensor, along: Tensor, index: int, where: str) -> Iterator[Finding]:
    """Another dimension moves, or this one moves by another amount."""
    motion = [i for i in range(len(spec.names)) if i not in spec.gripper]
    strength = {i: abs(_correlation(action[:, index], along[:, i])) for i in motion}
    best = max(strength, key=lambda i: strength[i])
    if best != index and strength[best] > 0.7 and strength[index] < 0.4:
        what = f"{spec.names[best]} follows these numbers: axes are exchanged, or the frame is another"
        mend = "order and turn the action as the ActionSpec's frame says"
        yield Finding("action-frame", ERROR, where, what, mend)
        return
    centred = action[:, index] - action[:, index].mean()
    slope = float((centred * along[:, index]).sum() / centred.square().sum())
    wanted = 1.0 if spec.absolute[index] else float(spec.max_step[index])
    if strength[index] > 0.6 and not wanted / 3 < slope < wanted * 3:
        unit = spec.units[index]
        what = f"one unit of it moved the robot by {slope:.3g} {unit}; the spec says {wanted:.3g}"
        yield Finding("action-units", ERROR, where, what, "bring the data to the ActionSpec's units")


def gripper_sign(subject: Subject) -> Iterator[Finding]:
    """A recorded command moves the gripper the way the environment moves it.

    Threads: openpi#347 #416 #637; LIBERO#125; X-VLA#27.
    """
    recordings, spec = _with_spec(subject)
    action, state, after = _motion(subject, recordings)
    if not spec.gripper:
        raise NotRun("an ActionSpec with a gripper")
    told = False
    places = motion.felt(spec, recordings, recordings.column(OBS_STATE).shape[-1])
    for index in spec.gripper:
        change = after[:, index] - state[:, index]
        opening = torch.sign(change) * motion.opens(subject.env, places, index)
        closes = action[:, index] * spec.gripper_closes > 0
        moving = change.abs() > 1e-6
        # Both commands must be seen: one alone may be all that disturbances moved the gripper against.
        shares = [
            (opening[moving & sent] > 0) == told_to for sent, told_to in ((closes, True), (~closes, False))
        ]
        if min(len(share) for share in shares) < MOTIONS:
            continue
        told = True
        opposite = float(sum(share.float().mean() for share in shares)) / 2
        if opposite > OPPOSITE:
            what = f"in {opposite:.0%} of its motions the recorded gripper did the opposite of the command"
            mend = "turn the sign of the gripper command; shift 0…1 to -1…1 if the environment wants that"
            yield Finding("gripper-sign", ERROR, f"{ACTION}[{index}] ({spec.names[index]})", what, mend)
    if not told:
        raise NotRun("episodes in which a gripper is told to open and to close")


def open_loop_replay(subject: Subject) -> Iterator[Finding]:
    """On training episodes the chunk comes nearer to the recorded actions than their mean does.

    A chunk that is drawn, and the recorded one, may rightly be two answers. So the mean of n draws is taken;
    if they are from what is recorded, it is still √(1 + 1/n) times as far off as their expectation.

    Threads: lerobot#952 #955 #2533 #3247 #4168 #4206; openvla#142 #197; openvla-oft#5 #106.
    """
    recordings = subject.recordings
    if recordings is None:
        raise NotRun("dataset")
    if subject.postprocessor is None:
        raise NotRun("postprocessor")
    rows = recordings.spread_rows(FRAMES)
    parts = (rows[first : first + 8] for first in range(0, len(rows), 8))
    found = [_expected(subject, subject.prepare(subject.recorded(part))) for part in parts]
    predicted = torch.cat([chunk for chunk, _ in found])
    spare = math.sqrt(1 + 1 / DRAWS) if any(is_drawn for _, is_drawn in found) else 1.0
    now = list(subject.config.action_delta_indices).index(0)  # some learn from past actions too
    recorded = {key: value[:, now:] for key, value in recordings.chunks(rows, subject.config).items()}
    steps = min(predicted.shape[1], recorded[ACTION].shape[1])
    valid = ~recorded["action_is_pad"][:, :steps]
    mine, theirs = predicted[:, :steps][valid], recorded[ACTION][:, :steps][valid]
    varied = theirs.std(0) > 1e-6
    error = ((mine - theirs).square().mean(0).sqrt() / theirs.std(0).clamp(min=1e-6))[varied] / spare
    subject.measurements["replay error, in std of the actions"] = float(error.mean())
    subject.measurements["  of their mean"] = 1.0
    dimensions = varied.nonzero().flatten().tolist()
    turned = [i for i in dimensions if _is_opposite(mine[:, i], theirs[:, i])]
    yield from (_reversed(subject, index) for index in turned)
    kept = {i: e for i, e in zip(dimensions, error.tolist(), strict=True) if i not in turned}
    off = max(kept.values(), default=0.0)
    if off >= POOR:
        poor = ", ".join(subject.dimension(ACTION, i) for i, e in kept.items() if e >= POOR)
        what = f"{off:.2f} std off on training episodes in {poor}; predicting the mean is 1.00 std off"
        mend = "expected of an untrained policy; else look at statistics, cameras and actions of this data"
        yield Finding("replay-error", ERROR, "policy", what, mend)


def _expected(subject: Subject, batch: Any) -> tuple[Tensor, bool]:
    """The chunk in robot units (B, H, A), the mean of several where they are drawn, and whether they are."""
    chunks = [running.chunk(subject.patient, batch, seed) for seed in range(2)]
    is_drawn = not torch.equal(*chunks)
    chunks += [running.chunk(subject.patient, batch, seed) for seed in range(2, DRAWS) if is_drawn]
    return torch.stack([_robot_units(subject, chunk) for chunk in chunks]).mean(0), is_drawn


def _is_opposite(predicted: Tensor, recorded: Tensor) -> bool:
    """Whether the predictions would be good if they were turned round: chance correlations are not."""
    turned = 2 * recorded.mean() - predicted
    error = float((turned - recorded).square().mean().sqrt() / recorded.std())
    return _correlation(predicted, recorded) < -0.5 and error < 0.85


def _reversed(subject: Subject, index: int) -> Finding:
    spec = getattr(getattr(subject.env, "unwrapped", None), "action_spec", None)
    code = "gripper-sign" if spec is not None and index in spec.gripper else "action-sign"
    what = "the policy predicts the opposite of what was recorded in this dimension"
    mend = "look for a sign turned once on the way in or out (dataset conversion, postprocessor)"
    return Finding(code, ERROR, f"{subject.dimension(ACTION, index)}, predicted", what, mend)


def environment_replay(subject: Subject) -> Iterator[Finding]:
    """Recorded actions, carried out in the environment from the same start, succeed again.

    Threads: openvla#142; lerobot#4206 (the replayed-action test). Needs `dataset.seeds`, one an episode.
    """
    recordings, env = subject.recordings, subject.env
    if recordings is None or env is None:
        raise NotRun("dataset and env" if recordings is None and env is None else "dataset" if env else "env")
    seeds = getattr(recordings.dataset, "seeds", None)
    if seeds is None:
        raise NotRun("a dataset with its episodes' seeds (dataset.seeds; demonstrations with noise=0)")
    played = [
        _replayed(env, int(seed), recordings.column(ACTION)[start:stop].float().numpy())
        for seed, (start, stop) in list(zip(seeds, recordings.episodes, strict=False))[:5]
    ]
    subject.measurements["recorded episodes that succeed when replayed"] = sum(played) / len(played)
    if sum(played) < 0.8 * len(played):
        what = f"{sum(played)} of {len(played)} recorded episodes succeed when carried out again"
        mend = "it is not the environment recorded in: control rate, meaning of actions, version, start"
        yield Finding("replay-fails-in-env", ERROR, "env", what, mend)


def _replayed(env: Any, seed: int, actions: np.ndarray) -> bool:
    episode = Episode(env, seed, None, False)
    for action in actions:
        if not episode.over:
            episode.step(action)
    return episode.success


def _with_spec(subject: Subject) -> tuple[Recordings, Any]:
    """The dataset, and the environment's ActionSpec."""
    spec = getattr(getattr(subject.env, "unwrapped", None), "action_spec", None)
    lacking = [name for name, x in (("dataset", subject.recordings), ("env", subject.env)) if x is None]
    if lacking or subject.recordings is None:
        raise NotRun(" and ".join(lacking))
    if spec is None:
        raise NotRun("an env with an ActionSpec (env.unwrapped.action_spec)")
    return subject.recordings, spec


def _motion(subject: Subject, recordings: Recordings) -> tuple[Tensor, Tensor, Tensor]:
    """Recorded actions (M, A), and the part of the state each dimension moves, before and after, (M, A)."""
    if not recordings.has(OBS_STATE):
        raise NotRun("a dataset with observation.state")
    action, state = recordings.column(ACTION).float(), recordings.column(OBS_STATE).float()
    spec = subject.env.unwrapped.action_spec
    if action.shape[-1] != len(spec.names):
        raise NotRun(f"a dataset with the ActionSpec's {len(spec.names)} numbers; it has {action.shape[-1]}")
    state = state[:, motion.felt(spec, recordings, recordings.column(OBS_STATE).shape[-1])]
    now, then = recordings.pairs
    return action[now], state[now], state[then]


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-12))
