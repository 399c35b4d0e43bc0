"""Relative actions: to the bit as LeRobot's, linked, and right for a queue of several actions."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from minivla.data import MissingKey
from minivla.data.processors import Pipeline, read_pipeline, write_pipeline
from minivla.data.relative import AbsoluteActions, RelativeActions, link

STATE = "observation.state"
NAMES = ["shoulder.pos", "Left_Gripper.pos", "wrist.pos"]


def batch(action_shape, state_size=5):
    generator = torch.Generator().manual_seed(0)
    return {
        STATE: torch.randn(action_shape[0], state_size, generator=generator),
        "action": torch.randn(action_shape, generator=generator),
    }


@pytest.mark.parametrize(
    ("shape", "exclude", "names"),
    list(
        product([(2, 3), (2, 4, 3)], [[], ["gripper"], ["WRIST", ""], ["nothing"]], [None, NAMES, NAMES[:2]])
    ),
)
def test_equal_to_lerobots_there_and_back(shape, exclude, names):
    from lerobot.lerobot_types import TransitionKey
    from lerobot.processor import AbsoluteActionsProcessorStep, RelativeActionsProcessorStep

    given = batch(shape)
    theirs = RelativeActionsProcessorStep(enabled=True, exclude_joints=exclude, action_names=names)
    ours = RelativeActions(True, exclude, names)
    transition = {TransitionKey.OBSERVATION: {STATE: given[STATE]}, TransitionKey.ACTION: given["action"]}
    expected = theirs(transition)[TransitionKey.ACTION]
    out = ours(given)
    assert torch.equal(out["action"], expected)
    assert ours.to_json() == theirs.get_config()
    back = AbsoluteActions(True, ours)
    theirs_back = AbsoluteActionsProcessorStep(enabled=True, relative_step=theirs)
    assert torch.equal(
        back(out)["action"], theirs_back({TransitionKey.ACTION: expected})[TransitionKey.ACTION]
    )
    assert back.to_json() == theirs_back.get_config()
    torch.testing.assert_close(back(out)["action"], given["action"])


def test_disabled_steps_let_all_pass():
    given = batch((2, 3))
    step = RelativeActions()
    assert step(given) is given
    assert AbsoluteActions()(given) is given
    assert Pipeline([step]).relative_to is None


def test_the_pair_is_linked_after_reading(tmp_path):
    step = RelativeActions(True, ["gripper"], NAMES)
    write_pipeline(Pipeline([step]), tmp_path)
    write_pipeline(Pipeline([AbsoluteActions(True, step)], "policy_postprocessor"), tmp_path)
    before, after = read_pipeline(tmp_path), read_pipeline(tmp_path, "policy_postprocessor.json")
    given = batch((2, 4, 3))
    relative = before(given)
    with pytest.raises(MissingKey, match=r"the two are not linked; minivla.data.relative.link"):
        after(relative["action"])
    link(before.steps, after.steps)
    torch.testing.assert_close(after(relative["action"]), given["action"])
    assert "action - state, but for gripper" in repr(before)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"none was seen; call policy\.preprocess"):
        AbsoluteActions(True, RelativeActions(True))({"action": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match=r"the state has 2 numbers, the action 3"):
        RelativeActions(True)(batch((2, 3), state_size=2))


class TestQueue:
    """A policy that predicts four actions at once serves them while the robot moves on."""

    def policy(self):
        from tests.policies.small_vla import statistics, tiny_pi

        return tiny_pi("pi0", statistics(), use_relative_actions=True, n_action_steps=3)

    def raw(self, moment):
        from tests.policies.small_vla import tiny_raw

        given = tiny_raw(1)
        return {k: v for k, v in given.items() if not k.startswith("action")} | {
            STATE: torch.full((1, 5), 0.1 * moment)
        }

    def test_all_actions_of_a_chunk_are_relative_to_the_state_it_was_predicted_from(self):
        policy = self.policy()
        torch.manual_seed(0)
        served = torch.cat([policy.act(self.raw(moment)) for moment in range(4)])
        torch.manual_seed(0)
        for moment in (0, 3):
            chunk = policy.postprocess(policy.predict_action_chunk(policy.preprocess(self.raw(moment))))
            steps = chunk[0, : len(served) - moment][:3]
            torch.testing.assert_close(served[moment : moment + len(steps)], steps)

    def test_a_chunk_predicted_meanwhile_is_relative_to_its_own_state(self):
        policy = self.policy()
        policy.act(self.raw(0))
        torch.manual_seed(0)
        chunk = policy.postprocess(policy.predict_action_chunk(policy.preprocess(self.raw(5))))
        policy.reset()
        torch.manual_seed(0)
        assert torch.equal(policy.act(self.raw(5)), chunk[:, 0])
