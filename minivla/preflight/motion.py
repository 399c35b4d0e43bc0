"""What an environment does with an action: it is made to move, one dimension after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minivla.data.features import ACTION, OBS_STATE
from minivla.preflight.recordings import Recordings
from minivla.preflight.report import ERROR, Finding, NotRun
from minivla.preflight.subject import Subject
from minivla.training.evaluation import Episode

PUSHES = (0.5, 0.5, -0.5, -0.5, -0.5, 0.5)  # of the farthest step; one way may be blocked, not both


def environment_motion(subject: Subject) -> Iterator[Finding]:
    """Told to move one dimension, the environment moves that one, as far and the way its ActionSpec says.

    Threads: openpi#416 #602 #637; LIBERO#125; lerobot#2259.
    """
    if subject.env is None:
        raise NotRun("env")
    spec = getattr(subject.env.unwrapped, "action_spec", None)
    if spec is None:
        raise NotRun("an env with an ActionSpec (env.unwrapped.action_spec)")
    if subject.env.action_space.shape != (len(spec.names),):
        raise NotRun("an env whose actions have the size of its ActionSpec")
    episode = Episode(subject.env, 0, None, False)
    if OBS_STATE not in episode.observation:
        raise NotRun("an env that observes observation.state")
    places = felt(spec, subject.recordings, len(episode.observation[OBS_STATE]))
    for index in (i for i in range(len(spec.names)) if i not in spec.gripper):
        yield from _moved(subject.env, spec, places, index)


def _moved(env: Any, spec: Any, places: list[int], index: int) -> Iterator[Finding]:
    pushes, moves = _pushed(env, spec, places, index)
    along = pushes @ moves / (pushes @ pushes)  # (A,): how far each dimension went for one unit of this one
    motion = [i for i in range(len(spec.names)) if i not in spec.gripper]
    best = max(motion, key=lambda i: abs(along[i]))
    where, slope = f"env, {ACTION}[{index}] ({spec.names[index]})", float(along[index])
    wanted = 1.0 if spec.absolute[index] else float(spec.max_step[index])
    mend = "look for a wrapper or a controller that changes actions on their way (sign, order, scale)"
    told = f"told to move by {PUSHES[0]:g} of its farthest step, the environment"
    if best != index and abs(slope) < 0.3 * abs(along[best]):
        yield Finding("action-frame", ERROR, where, f"{told} moves {spec.names[best]}", mend)
    elif slope < -wanted / 3:
        yield Finding("action-sign", ERROR, where, f"{told} goes the other way", mend)
    elif not wanted / 3 < slope < wanted * 3:
        what = f"{told} goes {slope / wanted:.2g} times as far as its ActionSpec says"
        yield Finding("action-units", ERROR, where, what, mend)


def _pushed(env: Any, spec: Any, places: list[int], index: int) -> tuple[np.ndarray, np.ndarray]:
    """What one dimension was told (P,), and how far each one went (P, A); blocked pushes left out."""
    episode, pushes, moves = Episode(env, 0, None, False), [], []
    for push in PUSHES:
        before = np.asarray(episode.observation[OBS_STATE], np.float64)[places]
        action = np.where(spec.absolute, before, 0.0)
        told = push * (spec.max_step[index] if spec.absolute[index] else 1.0)
        action[index] += told
        action[list(spec.gripper)] = -spec.gripper_closes
        episode.step(action.astype(np.float32))
        pushes.append(told)
        moves.append(np.asarray(episode.observation[OBS_STATE], np.float64)[places] - before)
    went = np.abs(moves)[:, [i for i in range(len(places)) if i not in spec.gripper]].max(1)
    free = went > 0.2 * went.max()
    return np.array(pushes)[free], np.array(moves)[free]


def opens(env: Any, places: list[int], index: int) -> float:
    """Which way the state goes when the environment's gripper opens: 1 up, -1 down."""
    spec, episode, moves = env.unwrapped.action_spec, Episode(env, 0, None, False), 0.0
    for command in [-spec.gripper_closes] * 3 + [spec.gripper_closes] * 3:
        before = np.asarray(episode.observation[OBS_STATE], np.float64)[places]
        action = np.where(spec.absolute, before, 0.0).astype(np.float32)
        action[list(spec.gripper)] = command
        episode.step(action)
        moved = np.asarray(episode.observation[OBS_STATE])[places][index] - before[index]
        moves -= command * spec.gripper_closes * float(np.sign(moved))
    return 1.0 if moves >= 0 else -1.0


def felt(spec: Any, recordings: Recordings | None, size: int) -> list[int]:
    """For each dimension of the action the one of the state (of this size) that it moves: by the dataset's
    names, else by position. NotRun where it cannot be told.
    """
    names = recordings.names(OBS_STATE, size) if recordings is not None else []
    if set(spec.names) <= set(names):
        return [names.index(name) for name in spec.names]
    if size != len(spec.names):
        raise NotRun("a state whose dimensions can be told to be those the actions move")
    return list(range(size))
