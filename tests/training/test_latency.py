"""Timelines written by hand, for a policy whose chunks say when they were thought of."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch

import minivla
from minivla.data.relative import AbsoluteActions, RelativeActions
from minivla.training.evaluation import evaluate, wilson
from minivla.training.latency import (
    STRATEGIES,
    Chunk,
    DelayedPolicy,
    Latency,
    against_delay,
    change_sizes,
    squared_jerk,
    under_delay,
)
from minivla.world.spec import ActionSpec
from tests.training.tiny import ACTION, STATE, STATS, Tiny, TinyConfig, tiny

STEPS, HORIZON, EVERY = 12, 8, 3


class Line(gymnasium.Env):
    """Twelve steps; the state counts them, beginning at the seed's hundreds."""

    observation_space = gymnasium.spaces.Dict(
        {"observation.state": gymnasium.spaces.Box(-1e4, 1e4, (STATE,))}
    )
    action_space = gymnasium.spaces.Box(-1e4, 1e4, (ACTION,))

    def reset(self, *, seed=None, options=None):
        self.elapsed, self.first = 0, 100 * seed
        return self._observe(), {}

    def step(self, action):
        self.elapsed += 1
        return self._observe(), 0.0, False, self.elapsed == STEPS, {"is_success": self.first > 0}

    def _observe(self):
        return {"observation.state": np.full(STATE, self.first + self.elapsed, np.float32)}


class Pushed(Line):
    """The first number is a displacement, a share of half a unit; the second a place to be."""

    action_spec = ActionSpec(("dx", "y"), ("m", "m"), (False, True), (0.5, 1.0), (), 1, "table")


class Telling(Tiny):
    """Action i of a chunk thought of at state s is (s + i / 10, i)."""

    def predict_action_chunk(self, batch, *, noise=None, steps=None, generator=None):
        moment = batch["observation.state"][:, 0].reshape(-1, 1).expand(-1, HORIZON)
        index = torch.arange(HORIZON).expand_as(moment)
        return torch.stack((moment + index / 10, index), dim=-1)


class Guided(Telling):
    """Writes down what it is told of the old chunk, and goes on from it."""

    def predict_action_chunk(
        self, batch, *, inference_delay=0, prev_chunk_left_over=None, execution_horizon=None, **others
    ):
        self.told.append((inference_delay, prev_chunk_left_over, execution_horizon))
        chunk = super().predict_action_chunk(batch)
        if prev_chunk_left_over is not None:
            chunk[:, :inference_delay] = prev_chunk_left_over[:, :inference_delay]
        return chunk


class RelativeConfig(TinyConfig):
    """The first number of an action is a difference to the state's first, the second is none."""

    def arrange_steps(self, before, after):
        step = RelativeActions(True, exclude_joints=["y"], action_names=["x", "y"])
        return [*before[:-1], step, before[-1]], [after[0], AbsoluteActions(True, step), *after[1:]]


MEAN, STD = 3.0, 2.0  # of a relative policy's actions


class RelativeTelling(Telling):
    """The same actions in robot units; what the network says is relative to the state, and normalised."""

    def predict_action_chunk(self, batch, *, noise=None, steps=None, generator=None):
        chunk = super().predict_action_chunk(batch)
        chunk[..., 0] -= batch["observation.state"][:, :1]
        return (chunk - MEAN) / STD


class RelativeGuided(Guided, RelativeTelling):
    """Guided's way with the old chunk, RelativeTelling's actions."""


def telling(kind=Telling):
    policy = tiny(chunk_size=HORIZON, n_action_steps=EVERY)
    if issubclass(kind, RelativeTelling):
        stats = STATS | {"action": {"mean": torch.full((2,), MEAN), "std": torch.full((2,), STD)}}
        policy = Tiny(RelativeConfig(**vars(policy.config)), stats)
    policy.__class__, policy.told = kind, []
    return policy


def driven(strategy, delay, *, policy=None, env=Line, seed=0, **steps):
    """The actions of one episode, (T, A), and the delayed policy."""
    actions = []

    class Watched(env):
        def step(self, action):
            actions.append(action.tolist())
            return super().step(action)

    absolute = getattr(env, "action_spec", None) and env.action_spec.absolute
    delayed = DelayedPolicy(policy or telling(), delay, strategy, absolute, **steps)
    evaluate(delayed, Watched, 1, seed, progress=False)
    return np.array(actions), delayed


def seen(strategy, delay, **options):
    """When each step's action was thought of, and which of its chunk it is: "0.0 0.1 …"."""
    actions, delayed = driven(strategy, delay, **options)
    return " ".join(f"{moment:.1f}" for moment in actions[:, 0]), sorted(delayed.seams)


TIMELINES = [
    # No delay: three actions of each chunk.
    ("asynchronous", 0, "0.0 0.1 0.2 3.0 3.1 3.2 6.0 6.1 6.2 9.0 9.1 9.2", [3, 6, 9]),
    ("synchronous", 0, "0.0 0.1 0.2 3.0 3.1 3.2 6.0 6.1 6.2 9.0 9.1 9.2", [3, 6, 9]),
    # Thought of after three steps, there two later: its first two actions are over.
    ("asynchronous", 2, "0.0 0.1 0.2 0.3 0.4 3.2 3.3 3.4 6.2 6.3 6.4 9.2", [5, 8, 11]),
    # The last action again while it thinks.
    ("synchronous", 2, "0.0 0.1 0.2 0.2 0.2 3.0 3.1 3.2 3.2 3.2 8.0 8.1", [3, 5, 8, 10]),
    # Slower than three steps: a prediction begins as soon as the last one is there.
    ("asynchronous", 4, "0.0 0.1 0.2 0.3 0.4 0.5 0.6 3.4 3.5 3.6 3.7 7.4", [7, 11]),
    ("synchronous", 9, "0.0 0.1 0.2 0.2 0.2 0.2 0.2 0.2 0.2 0.2 0.2 0.2", [3]),
]


@pytest.mark.parametrize(("strategy", "delay", "timeline", "seams"), TIMELINES)
def test_timeline(strategy, delay, timeline, seams):
    assert seen(strategy, delay) == (timeline, seams)


@pytest.mark.parametrize(("strategy", "delay", "timeline", "seams"), TIMELINES)
def test_relative_actions_are_added_to_the_state_their_chunk_was_thought_of_at(
    strategy, delay, timeline, seams
):
    assert seen(strategy, delay, policy=telling(RelativeTelling)) == (timeline, seams)


@pytest.mark.parametrize(
    ("strategy", "delay", "steps"),
    [("smooth", 0, {}), ("smooth", 2, {}), ("smooth", 2, {"execution_horizon": 4}), ("smooth", 4, {})],
)
def test_relative_chunks_are_mixed_as_absolute_ones(strategy, delay, steps):
    absolute, _ = driven(strategy, delay, **steps)
    relative, _ = driven(strategy, delay, policy=telling(RelativeTelling), **steps)
    np.testing.assert_allclose(relative, absolute, atol=1e-5)


@pytest.mark.parametrize("delay", [0, 2, 4])
def test_a_relative_policy_is_told_of_the_old_chunk_as_seen_from_the_new_state(delay):
    plain, policy = telling(Guided), telling(RelativeGuided)
    absolute, _ = driven("rtc", delay, policy=plain)
    relative, _ = driven("rtc", delay, policy=policy)
    np.testing.assert_allclose(relative, absolute, atol=1e-5)
    assert [told[1] is None for told in policy.told] == [told[1] is None for told in plain.told]
    # The first new chunk begins at state 3, where five actions are left: 0.3, …, 0.7; it is 3 too far there.
    left = plain.told[1][1] - torch.tensor([3.0, 0.0])
    torch.testing.assert_close(policy.told[1][1], (left - MEAN) / STD)


def test_seen_from_another_state_as_in_lerobot():
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.rtc.relative import reanchor_relative_rtc_prefix
    from lerobot.processor import NormalizerProcessorStep, RelativeActionsProcessorStep

    policy, draw = telling(RelativeTelling), torch.Generator().manual_seed(0)
    chunk, old, new = (torch.randn(2, *shape, generator=draw) for shape in ((5, ACTION), (STATE,), (STATE,)))
    policy.preprocessor.relative_to = old
    theirs = reanchor_relative_rtc_prefix(
        policy.postprocess(chunk), new,
        RelativeActionsProcessorStep(enabled=True, exclude_joints=["y"], action_names=["x", "y"]),
        NormalizerProcessorStep(
            {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
            {FeatureType.ACTION: NormalizationMode.MEAN_STD},
            policy.preprocessor.stats,
        ),
        "cpu",
    )  # fmt: skip
    torch.testing.assert_close(Chunk(chunk, old).seen_from(new, policy), theirs)
    assert torch.equal(Chunk(chunk, None).seen_from(None, telling()), chunk)


def test_without_delay_it_is_the_plain_evaluation():
    plain = evaluate(telling(), Line, 3, 0, progress=False)
    assert evaluate(DelayedPolicy(telling(), 0, "asynchronous"), Line, 3, 0, progress=False) == plain


def test_other_steps_between_predictions():
    timeline, seams = seen("asynchronous", 1, n_action_steps=5)
    assert timeline == "0.0 0.1 0.2 0.3 0.4 0.5 5.1 5.2 5.3 5.4 5.5 10.1"
    assert seams == [6, 11]


def test_standing_still_is_no_displacement_and_the_same_place():
    actions, _ = driven("synchronous", 2, env=Pushed, seed=1)
    assert actions[:6].round(3).tolist() == [[100, 0], [100.1, 1], [100.2, 2], [0, 2], [0, 2], [103, 0]]


def test_smooth_mixes_what_is_left_with_what_is_new():
    actions, _ = driven("smooth", 2)
    # At step 5 the old chunk has 0.5, 0.6, 0.7 left, the new one goes on with 3.2, 3.3, 3.4.
    mixed = [0.75 * 0.5 + 0.25 * 3.2, 0.5 * 0.6 + 0.5 * 3.3, 0.25 * 0.7 + 0.75 * 3.4]
    assert actions[:8, 0] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, *mixed])
    # At step 8 the plan is that mixture, of which 3.5, 3.6, 3.7 are left.
    assert actions[8, 0] == pytest.approx(0.75 * 3.5 + 0.25 * 6.2)
    shorter, _ = driven("smooth", 2, execution_horizon=4)  # two of them pass before the chunk is there
    assert shorter[5:8, 0] == pytest.approx([(2 * 0.5 + 3.2) / 3, (0.6 + 2 * 3.3) / 3, 3.4])
    assert seen("smooth", 2, execution_horizon=2) == seen("asynchronous", 2)


def test_rtc_is_told_what_is_left_over():
    policy = telling(Guided)
    actions, _ = driven("rtc", 2, policy=policy, execution_horizon=5)
    assert [round(value, 1) for value in actions[:8, 0].tolist()] == [0, 0.1, 0.2, 0.3, 0.4, 3.2, 3.3, 3.4]
    (first, second, third), *_ = zip(*[iter(policy.told)] * 3, strict=False)
    assert first == (2, None, 5)
    assert (second[0], second[2]) == (2, 5)
    left = [0.3, 0.4, 0.5, 0.6, 0.7]
    torch.testing.assert_close(second[1][0, :, 0], torch.tensor(left))
    # The second chunk begins with what it was told, and has five actions left at step 6.
    torch.testing.assert_close(third[1][0, :, 0], torch.tensor([3.3, 3.4, 3.5, 3.6, 3.7]))


def test_one_row_a_delay_and_strategy():
    rows = against_delay(telling(Guided), Line, [0, 2], STRATEGIES, 3, 0, batch_size=2)
    assert [(row.delay, row.strategy) for row in rows] == [(d, s) for d in (0, 2) for s in STRATEGIES]
    row = rows[5]
    assert (row.evaluation.success, row.evaluation.episodes) == (2 / 3, 3)
    assert (row.evaluation.low, row.evaluation.high) == wilson(2, 3)
    # Within a chunk the action changes by (0.1, 1); asynchronous at delay 2, from 0.4 to 3.2, and so on.
    assert row.elsewhere == pytest.approx(math.hypot(0.1, 1))
    assert row.seam == pytest.approx(math.hypot(2.8, 2))
    assert "asynchronous  delay  2  success 0.667 [0.208, 0.939]  jerk " in str(row)


def test_the_batch_size_changes_nothing():
    results = [under_delay(telling(), Line, 2, "smooth", 3, 0, batch_size=size) for size in (1, 2, 50)]
    assert results[0] == results[1] == results[2]


def test_without_a_seam_its_size_is_unknown():
    row = under_delay(telling(), Line, 2, "asynchronous", 1, 0, max_steps=3)
    assert math.isnan(row.seam) and math.isnan(row.jerk)
    assert row.elsewhere == pytest.approx(math.hypot(0.1, 1))
    assert "seam nan" in str(row)


SPEC = ActionSpec(("dx", "y", "grip"), ("m",) * 3, (False, True, True), (0.5, 9, 9), (2,), 1, "table")


def test_jerk_is_the_third_difference_of_the_path():
    time = np.arange(7.0)
    still = np.stack((0 * time, 0 * time + 2, time % 2), axis=1)  # only the gripper moves
    assert squared_jerk(still, SPEC).tolist() == [0] * 4
    bent = np.stack((time, time**2, 0 * time), axis=1)  # constant acceleration in both
    assert np.allclose(squared_jerk(bent, SPEC), 0)
    cubic = np.stack((time**2, time**3, 0 * time), axis=1)
    # Displacements t² / 2 have second differences of 1; places t³ third differences of 6.
    assert np.allclose(squared_jerk(cubic, SPEC), 1**2 + 6**2)
    assert squared_jerk(cubic[:3], SPEC).shape == (0,)


def test_changes_are_in_units_and_leave_the_gripper_out():
    actions = np.array([[0, 0, 0], [6, 4, 1], [6, 4, -1.0]])
    assert change_sizes(actions, SPEC).tolist() == [5, 0]


def test_a_policy_with_a_history_sees_every_step():
    policy, generator = minivla.load("vqbet-tabletop"), torch.Generator().manual_seed(0)
    assert policy.config.n_obs_steps > 1
    keys = policy.config.input_features.items()
    observations = [
        {key: torch.rand(2, *feature.shape, generator=generator) for key, feature in keys}
        | {"task": ["put the red cube on the blue square"] * 2}
        for _ in range(2 * policy.config.n_action_steps + 1)
    ]
    seen = []
    for driver in (policy, DelayedPolicy(policy, 0, "asynchronous")):
        driver.reset()
        torch.manual_seed(0)  # VQ-BeT draws its codes
        seen.append(torch.stack([driver.act(raw) for raw in observations]))
    assert torch.equal(*seen)


def test_act_on_the_table():
    policy = minivla.load("act-tabletop").train()
    rows = against_delay(policy, "tabletop:pick_place", [0, 4], STRATEGIES[:3], 4, 11)
    plain = evaluate(policy, "tabletop:pick_place", 4, 11, progress=False)
    assert rows[1].evaluation == rows[0].evaluation == plain
    by = {(row.strategy, row.delay): row for row in rows}
    assert by["asynchronous", 4].seam > 2 * by["asynchronous", 4].elsewhere
    assert by["smooth", 4].seam < by["asynchronous", 4].seam
    assert by["smooth", 4].jerk < by["asynchronous", 4].jerk
    assert policy.training
    with pytest.raises(TypeError, match=r"ACT\.predict_action_chunk does not take inference_delay, prev"):
        against_delay(policy, "tabletop:pick_place", [0], STRATEGIES, 4, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "hasty"}, "strategy is 'hasty', expected one of synchronous, asynchronous"),
        ({"delay": -1}, "delay=-1, n_action_steps=3"),
        ({"n_action_steps": 0}, "n_action_steps=0"),
        ({"execution_horizon": -1}, "execution_horizon=-1"),
        ({"delay": 5}, "a chunk of 8 actions is over before the next one is there, it takes 10 with"),
        ({"n_action_steps": 9, "strategy": "synchronous"}, "it takes 9 with n_action_steps=9 and delay=2"),
        ({"episodes": 0}, "episodes=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    given = {"delay": 2, "strategy": "asynchronous", "episodes": 1} | arguments
    with pytest.raises(ValueError, match=message):
        under_delay(telling(), Line, seed=0, **given)


@pytest.mark.parametrize("rtc", [None, {"enabled": False}])
def test_guidance_that_is_switched_off_is_not_measured_as_guidance(rtc):
    policy = telling(Guided)
    policy.config.rtc_config = rtc
    with pytest.raises(ValueError, match="'rtc' is the same as 'asynchronous'; set policy"):
        DelayedPolicy(policy, 2, "rtc")
    policy.config.rtc_config = {"execution_horizon": 6}
    assert DelayedPolicy(policy, 2, "rtc").every == EVERY


def test_rows_print_aligned():
    rows = [
        Latency(s, 10, evaluate(telling(), Line, 1, 0, progress=False), 0.0, 0.0, 0.0) for s in STRATEGIES
    ]
    assert len({str(row).index("success") for row in rows}) == 1
