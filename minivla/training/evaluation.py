"""How often a policy succeeds, with an honest interval: `evaluate`.

Environments run as a batch: n episodes step together and the policy sees their observations as one raw
batch, which is what makes a network on a CPU affordable. Episode i starts from seed + i, whatever the batch
size.

What is measured is what LeRobot measures (`lerobot/scripts/lerobot_eval.py`: success, sum and maximum of the
rewards, seeds that count up), but for two things. Actions are held to the action space, and how many had to
be is told. An episode ends when it is over: LeRobot counts one reward more, which belongs to the next
episode, where others of the same batch are still running.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from minivla.data.features import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_IMAGES, OBS_STATE, MissingKey
from minivla.training.batches import EPISODES, preserved_rng, seed_all
from minivla.training.environments import environments
from minivla.training.video import FILMED, check_video, write_video

if TYPE_CHECKING:
    import gymnasium

    from minivla.policies.base import Policy

# Without a limit of its own, an environment is stopped after this many steps.
STEP_LIMIT = 1000
# Keys of gymnasium environments that LeRobot renames (`lerobot/envs/utils.py`, preprocess_observation).
RENAMED = {"pixels": OBS_IMAGE, "agent_pos": OBS_STATE, "environment_state": OBS_ENV_STATE}


@dataclass(frozen=True)
class Evaluation:
    """The outcome of some episodes; prints as "0.955 [0.917, 0.976] over 200 episodes".

    success      share of episodes that succeeded at any time
    low, high    Wilson's 95 % interval of that share
    episodes     how many there were
    clipped      share of actions that had a value beyond the action space's bounds, and were clipped to them
    video        the film, if one was asked for
    successes, lengths   episode by episode: did it succeed, how many steps it took
    max_reward   mean over episodes of their largest reward; printed unless rewards are all 0 and 1. PushT's
                 reward is the share of the goal that the T covers, over the 0.95 that are success, at most 1
    max_rewards, sum_rewards, infos   episode by episode: largest reward, sum of rewards, the last step's info
    """

    success: float
    low: float
    high: float
    episodes: int
    clipped: float
    video: Path | None = None
    successes: tuple[bool, ...] = field(default=(), repr=False)
    lengths: tuple[int, ...] = field(default=(), repr=False)
    max_reward: float = 0.0
    max_rewards: tuple[float, ...] = field(default=(), repr=False)
    sum_rewards: tuple[float, ...] = field(default=(), repr=False)
    # Arrays in there have no plain ==.
    infos: tuple[dict[str, Any], ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        text = f"{self.success:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.episodes} episodes"
        if not set(self.max_rewards) <= {0.0, 1.0}:
            text += f", mean max reward {self.max_reward:.3f}"
        return text + (f", {self.clipped:.1%} of actions clipped" if self.clipped >= 0.0005 else "")


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, at 95 % unless `z` says otherwise; sensible at 0 and 1 too.

    >>> [round(end, 3) for end in wilson(191, 200)]
    [0.917, 0.976]
    """
    share = successes / trials
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def evaluate(
    policy: Policy,
    env: str | Callable[[], Any] | gymnasium.Env[Any, Any],
    episodes: int,
    seed: int,
    *,
    batch_size: int = 25,
    max_steps: int | None = None,
    video: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run a policy for some episodes and count its successes.

    env         "tabletop:pick_place?size=64", a gymnasium id (with ?key=value arguments), a function that
                makes an environment, or an environment (copied by its `spec`; without one it runs alone).
                The package of "gym_pusht/PushT-v0" is imported, and the environment made for what the policy
                sees (`minivla.training.environments.fitting`), where ?key=value does not say otherwise
    episodes    how many; episode i is reset with seed + i, and the policy's random numbers follow the seed
    batch_size  environments that step together
    max_steps   steps until an episode counts as over (None: the environment's limit, else 1000)
    video       a .gif or .mp4 of the first episodes, side by side, framed by their outcome

    An episode succeeds when `info["is_success"]` was ever true. The policy comes back in the mode it was
    in, and the caller's random generators untouched. Raises ValueError for numbers out of range and for
    actions (B, A) of a wrong shape or with NaN, KeyError when the environment reports no `is_success` or
    lacks an input of the policy, TypeError when its actions are not a Box, ModuleNotFoundError for an
    environment whose package is not installed.
    """
    if episodes < 1 or batch_size < 1 or seed < 0:
        raise ValueError(
            f"episodes={episodes}, batch_size={batch_size}, seed={seed}; expected ≥ 1, ≥ 1 and ≥ 0"
        )
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps={max_steps}; expected at least 1, or None for the environment's limit")
    path = check_video(video)
    done: list[Episode] = []
    with contextlib.ExitStack() as stack:
        count = min(batch_size, episodes)
        envs = stack.enter_context(environments(env, count, policy=policy, rendered=path is not None))
        stack.enter_context(preserved_rng())
        stack.enter_context(_acting(policy))
        bar = stack.enter_context(tqdm(total=episodes, desc="episodes", leave=False, disable=not progress))
        for first in range(0, episodes, len(envs)):
            seed_all(EPISODES, seed, first)
            numbers = range(first, min(first + len(envs), episodes))
            running = [
                Episode(e, seed + i, max_steps, path is not None and i < FILMED)
                for e, i in zip(envs, numbers, strict=False)
            ]
            _play(policy, running, bar)
            done += running
    if path is not None:
        write_video([e.frames for e in done[:FILMED]], [e.success for e in done[:FILMED]], path, done[0].fps)
    return _summary(done, path)


def _summary(done: Sequence[Episode], video: Path | None) -> Evaluation:
    successes = sum(episode.success for episode in done)
    steps = sum(episode.length for episode in done)
    low, high = wilson(successes, len(done))
    return Evaluation(
        successes / len(done),
        low,
        high,
        len(done),
        sum(episode.clipped for episode in done) / steps,
        video,
        tuple(episode.success for episode in done),
        tuple(episode.length for episode in done),
        sum(max(episode.rewards) for episode in done) / len(done),
        tuple(max(episode.rewards) for episode in done),
        tuple(math.fsum(episode.rewards) for episode in done),
        tuple(episode.info for episode in done),
    )


class Episode:
    """One environment from reset to end. What it last observed stays, so that the batch keeps its size."""

    def __init__(self, env: Any, seed: int, max_steps: int | None, filmed: bool) -> None:
        self.env = env
        self.low, self.high = _bounds(env)
        self.limit = (
            max_steps or getattr(env.spec, "max_episode_steps", None) or _own_limit(env) or STEP_LIMIT
        )
        self.length, self.clipped = 0, 0
        self.success = self.over = False
        self.rewards: list[float] = []
        self.frames: list[np.ndarray] = []
        self.filmed = filmed
        self.observation, self.info = env.reset(seed=seed)
        self.task = self.info.get("task")
        self._film()

    @property
    def fps(self) -> float:
        """Control steps a second, for the film's speed."""
        rate = getattr(self.env.unwrapped, "fps", None) or self.env.metadata.get("render_fps")
        return float(rate or 10)

    def step(self, action: np.ndarray) -> None:
        """Carry out one action (A,) in robot units, clipped to the bounds."""
        slack = 1e-6 * (self.high - self.low)  # rounding, when statistics and bounds coincide
        self.clipped += bool(((action < self.low - slack) | (action > self.high + slack)).any())
        action = np.clip(action, self.low, self.high).astype(self.env.action_space.dtype)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        if "is_success" not in info:
            raise KeyError(
                f"{self.env} reports {', '.join(info) or 'nothing'} in info, not 'is_success'; "
                "wrap it so that step() adds info['is_success']"
            )
        self.length += 1
        self.info = dict(info)
        self.rewards.append(float(reward))
        self.success = self.success or bool(info["is_success"])
        self.over = bool(terminated or truncated) or self.length >= self.limit
        self.task = info.get("task", self.task)
        self._film()

    def _film(self) -> None:
        if not self.filmed:
            return
        pictures = [v for v in _flat(self.observation).values() if v.dtype == np.uint8 and v.ndim == 3]
        frame = self.env.render() if self.env.render_mode == "rgb_array" else next(iter(pictures), None)
        if frame is None:
            raise ValueError(
                f"{self.env} can neither render (render_mode='rgb_array') nor has it a camera; drop video="
            )
        self.frames.append(np.asarray(frame))


def _own_limit(env: Any) -> int | None:
    limit = getattr(env.unwrapped, "max_steps", None)
    # One more than the environment's own, whose last step says `truncated`.
    return int(limit) + 1 if isinstance(limit, int) else None


def _bounds(env: Any) -> tuple[np.ndarray, np.ndarray]:
    space = env.action_space
    if not hasattr(space, "low"):
        raise TypeError(
            f"the actions of {env} are {space}; expected a gymnasium.spaces.Box of continuous values"
        )
    return space.low, space.high


def _play(policy: Any, running: Sequence[Episode], bar: tqdm[Any]) -> None:
    """Step the episodes together until all are over."""
    policy.reset()
    while not all(episode.over for episode in running):
        actions = _checked(_asked(policy, running), running)
        for episode, action in zip(running, actions, strict=True):
            if not episode.over:
                episode.step(action)
                bar.update(int(episode.over))


def _asked(policy: Any, running: Sequence[Episode]) -> Tensor:
    try:
        actions: Tensor = policy.act(raw_batch(running))
    except MissingKey as error:
        if "rename" not in str(error):
            raise
        raise MissingKey(
            f"{error}\nThe observations are those of {running[0].env}; for an evaluation, rename them in the "
            "policy:\n  policy.preprocessor.rename_map.update(rename)"
        ) from error
    return actions


def raw_batch(running: Sequence[Episode]) -> dict[str, Any]:
    """The episodes' observations as one raw batch: each key stacked along a new first axis, `task` a list."""
    observations = [_flat(episode.observation) for episode in running]
    batch: dict[str, Any] = {key: _stack([each[key] for each in observations]) for key in observations[0]}
    if running[0].task is not None:
        batch["task"] = [str(episode.task) for episode in running]
    return batch


def _flat(observation: Any) -> dict[str, np.ndarray]:
    """An observation by LeRobot's keys: a bare array is the state, `pixels` the camera or cameras."""
    if not isinstance(observation, Mapping):
        return {OBS_STATE: np.asarray(observation)}
    flat: dict[str, np.ndarray] = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            flat |= {f"{OBS_IMAGES}.{camera}": np.asarray(picture) for camera, picture in value.items()}
        else:
            flat[RENAMED.get(str(key), str(key))] = np.asarray(value)
    return flat


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    stacked = np.stack(arrays)
    return torch.from_numpy(stacked.astype(np.float32) if stacked.dtype == np.float64 else stacked)


def _checked(actions: Tensor, running: Sequence[Episode]) -> np.ndarray:
    """The policy's actions (B, A) as an array, if they are that."""
    expected = (len(running), *running[0].env.action_space.shape)
    if tuple(actions.shape) != expected:
        raise ValueError(
            f"the policy gave actions of shape {tuple(actions.shape)}, the environments take {expected}; "
            f"was it trained for another embodiment? Its '{ACTION}' feature must match env.action_space"
        )
    array = actions.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array).all(-1))[0, 0])
        raise ValueError(
            f"the policy gave a NaN or an infinite action, {array[row]}, at step {running[row].length}; "
            "look at its weights (a diverged training?) and at its statistics"
        )
    return array


@contextlib.contextmanager
def _acting(policy: Any) -> Iterator[None]:
    """Inside, evaluation mode without gradients; afterwards each module's own mode and no queued action."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        policy.reset()
