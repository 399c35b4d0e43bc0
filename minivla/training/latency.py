"""Driving while thinking: what a policy is worth when a chunk takes its time.

Thinking is simulated: a chunk predicted from the observation of step k is there at step k + delay, and its
action i is meant for step k + i. So nothing depends on how fast the machine is. What happens meanwhile is
the strategy:

    synchronous    the robot stands still, then carries the chunk out from its first action
    asynchronous   the old chunk goes on; the new one takes over at its action `delay`
    smooth         the same, but the two are mixed for a while (`minivla.actions.realtime.smooth`)
    rtc            the same, but the policy is told what the old chunk still holds, and continues it
                   (`minivla.actions.realtime.guide`)

A prediction begins `n_action_steps` after the last began, or when that one is there, if that is later; where
the robot stands still, after `n_action_steps` actions. An episode's first chunk is there when it begins.
Sources: Black et al. 2025 (real-time chunking), section 2; LeRobot `policies/rtc/action_queue.py`, whose
queue drops the actions that came too late in the same way, and `policies/rtc/relative.py`, for actions that
are relative to the state.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from minivla.actions.flow import expect_one_of
from minivla.actions.realtime import smooth
from minivla.data.features import ACTION, OBS_STATE
from minivla.data.processors import Pipeline
from minivla.data.relative import RelativeActions
from minivla.data.steps import Normalize
from minivla.training.environments import environments
from minivla.training.evaluation import Evaluation, evaluate
from minivla.world.spec import ActionSpec

if TYPE_CHECKING:
    from minivla.policies.base import Policy

STRATEGIES = ("synchronous", "asynchronous", "smooth", "rtc")
GUIDANCE = ("inference_delay", "prev_chunk_left_over", "execution_horizon")  # LeRobot's keywords


@dataclass(frozen=True)
class Latency:
    """One strategy at one delay, in steps; prints as a line of a table.

    jerk       mean squared third difference of the commanded path, (units / step³)²
    seam       mean size of the action's change, in units, at steps where the robot begins to follow another
               chunk, or to stand still
    elsewhere  the same at all other steps: what a seam should look like

    Units are the action's, "table widths" or "radians" in Tabletop; grippers are left out. What is commanded
    is what was carried out: clipped to the bounds. Where an action is a displacement (ActionSpec.absolute
    False), in units per step, the path is the sum of them; where it is a place to be, it is the path. Means
    are over all moments of all episodes; NaN where there is none.
    """

    strategy: str
    delay: int
    evaluation: Evaluation
    jerk: float
    seam: float
    elsewhere: float

    def __str__(self) -> str:
        e = self.evaluation
        return (
            f"{self.strategy:<12}  delay {self.delay:>2}  success {e.success:.3f} [{e.low:.3f}, {e.high:.3f}]"
            f"  jerk {self.jerk:.2e}  seam {self.seam:.3f}  elsewhere {self.elsewhere:.3f}"
        )


def against_delay(
    policy: Policy,
    task: Any,
    delays: Sequence[int],
    strategies: Sequence[str],
    episodes: int,
    seed: int,
    **options: Any,
) -> list[Latency]:
    """`under_delay` at every delay with every strategy, in this order, on the same episodes.

    `options` are those of `under_delay`. A strategy that the policy cannot follow is refused before any runs.
    """
    for strategy in strategies:
        expect_strategy(policy, strategy)
    settings = itertools.product(delays, strategies)
    return [under_delay(policy, task, *setting, episodes, seed, **options) for setting in settings]


def under_delay(
    policy: Policy,
    task: Any,
    delay: int,
    strategy: str,
    episodes: int,
    seed: int,
    *,
    batch_size: int = 25,
    max_steps: int | None = None,
    progress: bool = False,
    **steps: int | None,
) -> Latency:
    """Run a policy for some episodes while every chunk takes `delay` steps.

    task   an environment as `minivla.evaluate` takes it, "tabletop:pick_place"
    steps  n_action_steps and execution_horizon, as `DelayedPolicy` takes them

    The others are `minivla.evaluate`'s; it and `DelayedPolicy` say what is refused.
    """
    with environments(task, max(1, min(batch_size, episodes)), policy=policy) as envs:
        recorded = [Recorded(env) for env in envs]
        spec = action_spec(envs[0])
        delayed: Any = DelayedPolicy(policy, delay, strategy, spec.absolute, **steps)
        ready = iter(recorded)
        evaluation = evaluate(
            delayed, lambda: next(ready), episodes, seed,
            batch_size=min(batch_size, len(recorded)), max_steps=max_steps, progress=progress,
        )  # fmt: skip
    driven = [np.stack(actions) for env in recorded for actions in env.episodes]
    changes = np.concatenate([change_sizes(actions, spec) for actions in driven])
    seam = np.isin(np.concatenate([np.arange(1, len(a)) for a in driven]), list(delayed.seams))
    jerk = np.concatenate([squared_jerk(actions, spec) for actions in driven])
    return Latency(strategy, delay, evaluation, _mean(jerk), _mean(changes[seam]), _mean(changes[~seam]))


@dataclass(frozen=True)
class Chunk:
    """Normalised actions (B, H, A), and the state (B, S) that they are relative to; None: they are not."""

    actions: Tensor
    relative_to: Tensor | None

    def after(self, index: int) -> Chunk:
        """What is left of it from action `index` on."""
        return Chunk(self.actions[:, index:], self.relative_to)

    def seen_from(self, state: Tensor | None, policy: Policy) -> Tensor:
        """The actions (B, H, A) as the network would say them of another state (B, S): to robot units, and
        back by the preprocessor's own steps, which leave the policy relative to `state`.

        Source: LeRobot `policies/rtc/relative.py`, reanchor_relative_rtc_prefix.
        """
        before = policy.preprocessor
        if before is None or self.relative_to is None:
            return self.actions
        before.relative_to = self.relative_to
        absolute = policy.postprocess(self.actions)
        back = Pipeline([step for step in before.steps if isinstance(step, RelativeActions | Normalize)])
        return back({OBS_STATE: state, ACTION: absolute})[ACTION].to(self.actions)


class DelayedPolicy(nn.Module):
    """A policy whose chunks arrive late, for `minivla.evaluate`.

    policy             a `Policy`; its queue and its temporal ensembling are not used
    delay              control steps that a prediction takes
    strategy           one of `STRATEGIES`
    absolute           for each action dimension: does repeating the last action stand still (True), or does
                       zero (False)? See ActionSpec; None: repeating does
    n_action_steps     steps from one prediction to the next (None: the policy's)
    execution_horizon  where the new chunk is free of the old one, in steps from the prediction's beginning.
                       None: "smooth" uses all that is left of the old chunk, "rtc" the policy's own setting

    `seams` are the steps at which another chunk took over, or standing still began. Where actions are
    relative to the state, `postprocess` adds the one that their chunk was predicted from, as in
    `Policy.select_action`; "smooth" and "rtc", where two chunks meet, see the old one from that of the new.
    Raises ValueError for numbers out of range and, at the first prediction, for a chunk too short to last
    until the next one is there; for strategies as `expect_strategy`.
    """

    def __init__(
        self,
        policy: Policy,
        delay: int,
        strategy: str,
        absolute: Sequence[bool] | None = None,
        *,
        n_action_steps: int | None = None,
        execution_horizon: int | None = None,
    ) -> None:
        super().__init__()
        expect_strategy(policy, strategy)
        self.every = policy.config.n_action_steps if n_action_steps is None else n_action_steps
        if delay < 0 or self.every < 1 or (execution_horizon or 0) < 0:
            raise ValueError(
                f"delay={delay}, n_action_steps={self.every}, execution_horizon={execution_horizon}; "
                "expected ≥ 0, ≥ 1 and ≥ 0 or None"
            )
        self.policy, self.config, self.preprocessor = policy, policy.config, policy.preprocessor
        self.delay, self.strategy, self.execution_horizon = delay, strategy, execution_horizon
        self.absolute = None if absolute is None else torch.tensor(absolute)
        self.seams: set[int] = set()  # alike in every episode
        self.reset()

    def reset(self) -> None:
        """Forget the episode."""
        self.policy.reset()
        self.step, self.index, self.arrival = 0, 0, 0
        self.plan, self.last = Chunk(torch.empty(0), None), torch.empty(0)  # in progress; the last action
        self.pending: Chunk | None = None  # the chunk being thought about, there at step `arrival`

    @torch.no_grad()
    def act(self, raw: Mapping[str, Any]) -> Tensor:
        """One step of control, as `Policy.act`: raw observation in, actions (B, A) in robot units out."""
        batch = self.policy.preprocess(raw, history=False)
        now = self.preprocessor.relative_to if self.preprocessor else None
        self.policy._remember(batch)
        if self.step == 0:
            self.plan = self._predict(batch, now, None)
            self._expect_to_last(self.plan.actions.shape[1])
        self._receive()
        if self.pending is None and self.index >= self.every:
            self._begin(batch, now)
            self._receive()  # without delay it is there at once
        self.step += 1
        if self.strategy == "synchronous" and self.pending is not None:
            return self.last if self.absolute is None else self.last * self.absolute
        if self.preprocessor:
            self.preprocessor.relative_to = self.plan.relative_to
        self.last = self.policy.postprocess(self.plan.actions[:, self.index])
        self.index += 1
        return self.last

    def _begin(self, batch: Mapping[str, Any], now: Tensor | None) -> None:
        """Start to think about the next chunk."""
        self.pending = self._predict(batch, now, self.plan.after(self.index))
        self.arrival = self.step + self.delay
        if self.strategy == "synchronous":
            self.seams.add(self.step)

    def _predict(self, batch: Mapping[str, Any], now: Tensor | None, old: Chunk | None) -> Chunk:
        """The next chunk, relative to the state `now` if to any; "rtc" is told what is left of the `old`."""
        told: dict[str, Any] = {}
        if self.strategy == "rtc":
            left_over = None if old is None else old.seen_from(now, self.policy)
            told = dict(zip(GUIDANCE, (self.delay, left_over, self.execution_horizon), strict=True))
        return Chunk(self.policy.predict_action_chunk(self.policy._with_history(batch), **told), now)

    def _receive(self) -> None:
        """Where a chunk arrives now, it becomes the plan."""
        if self.pending is None or self.step < self.arrival:
            return
        left, new, self.pending = self.plan.after(self.index), self.pending, None
        self.index = 0 if self.strategy == "synchronous" else self.delay
        if self.strategy == "smooth":
            old, fresh = left.seen_from(new.relative_to, self.policy), new.actions
            overlap = len(old[0]) if self.execution_horizon is None else self.execution_horizon - self.delay
            mixed = smooth(old, fresh[:, self.index :], max(overlap, 0))
            new = Chunk(torch.cat((fresh[:, : self.index], mixed), dim=1), new.relative_to)
        self.plan = new
        self.seams.add(self.step)

    def _expect_to_last(self, horizon: int) -> None:
        """Raises ValueError unless the robot has something to do until the next chunk is there."""
        waited = 0 if self.strategy == "synchronous" else self.delay
        if (needed := max(self.every, waited) + waited) > horizon:
            raise ValueError(
                f"a chunk of {horizon} actions is over before the next one is there, it takes {needed} with "
                f"n_action_steps={self.every} and delay={self.delay}; make one of them smaller"
            )


def expect_strategy(policy: Policy, strategy: str) -> None:
    """Raises ValueError for an unknown strategy, and for "rtc" where the config switches it off; TypeError
    for "rtc" where `predict_action_chunk` does not take LeRobot's keywords.
    """
    expect_one_of("strategy", strategy, STRATEGIES)
    if strategy != "rtc":
        return
    takes = inspect.signature(policy.predict_action_chunk).parameters
    missing = [name for name in GUIDANCE if name not in takes]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise TypeError(
            f"strategy 'rtc' needs a policy that can be guided, a flow; {type(policy).__name__}."
            f"predict_action_chunk does not take {', '.join(missing)}. Drive it with one of "
            f"{', '.join(STRATEGIES[:-1])}"
        )
    rtc = getattr(policy.config, "rtc_config", {})
    if rtc is None or not (rtc.get("enabled", True) if isinstance(rtc, Mapping) else rtc.enabled):
        raise ValueError(
            f"rtc_config is {rtc}, with which strategy 'rtc' is the same as 'asynchronous'; set "
            "policy.config.rtc_config = RTCConfig().to_json() (minivla.actions.realtime)"
        )


class Recorded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that writes down which actions were carried out, episode by episode."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.episodes: list[list[np.ndarray]] = []

    def reset(self, **options: Any) -> Any:
        """As the environment's; what follows is another episode."""
        self.episodes.append([])
        return self.env.reset(**options)

    def step(self, action: np.ndarray) -> Any:
        """As the environment's."""
        self.episodes[-1].append(np.array(action, np.float64))
        return self.env.step(action)

    def close(self) -> None:
        """Nothing: who made the environment closes it."""


def action_spec(env: Any) -> ActionSpec:
    """The environment's own; without one, every number is a place to be, none a gripper."""
    n = env.action_space.shape[0]
    plain = ActionSpec(("",) * n, ("",) * n, (True,) * n, (1.0,) * n, (), 1, "")
    return getattr(env.unwrapped, "action_spec", plain)


def in_units(actions: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """Actions (T, A) in units, without grippers: where they are shares of the largest step, times that."""
    return np.delete(actions * np.where(spec.absolute, 1.0, spec.max_step), spec.gripper, axis=1)


def change_sizes(actions: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """|action k − action k − 1| for k = 1 … T − 1, in units (`Latency`); actions (T, A) give (T − 1,)."""
    return np.linalg.norm(np.diff(in_units(actions, spec), axis=0), axis=1)


def squared_jerk(actions: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """|third difference|² of the path that is commanded (`Latency`); actions (T, A) give (T − 3,)."""
    values = in_units(actions, spec)
    path = np.where(np.delete(spec.absolute, spec.gripper), values, values.cumsum(axis=0))
    return (np.diff(path, n=3, axis=0) ** 2).sum(axis=1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
