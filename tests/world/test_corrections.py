"""What the expert does where a policy has got to."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

import minivla.world as world
from minivla.world.corrections import LATEST

HOME = torch.tensor([1.0, 1.0, -1.0])


class Stray:
    """Goes to the upper right, with open fingers; remembers what it was shown."""

    def __init__(self) -> None:
        self.resets, self.shown = 0, []

    def reset(self) -> None:
        self.resets += 1

    def act(self, batch: dict[str, Any]) -> torch.Tensor:
        self.shown.append(batch)
        return HOME.expand(len(batch["task"]), 3)


class Shaky(Stray):
    """Draws what it does, as a policy draws noise."""

    def act(self, batch: dict[str, Any]) -> torch.Tensor:
        return torch.rand(len(batch["task"]), 3) * 2 - 1


def test_episodes_begin_where_the_policy_led_and_end_in_success() -> None:
    stray = Stray()
    data = world.corrections(stray, ("reach", "pick_place"), 6, seed=3, batch_size=4)
    first = data.columns["observation.state"][data.starts[:-1]]
    plain = world.demonstrations(("reach", "pick_place"), 6, seed=3)
    usual = plain.columns["observation.state"][plain.starts[:-1]]
    assert (first[:, :2].sum(-1) > usual[:, :2].sum(-1).mean()).mean() > 0.6, "led to the upper right"
    assert data.num_episodes == 6
    assert data.features == plain.features
    assert {key: column.dtype for key, column in data.columns.items()} == {
        key: column.dtype for key, column in plain.columns.items()
    }
    assert stray.resets > 0


def test_the_policy_sees_what_evaluation_would_show_it() -> None:
    stray = Stray()
    world.corrections(stray, "reach", 2, seed=0, batch_size=3, size=32, cameras=("table",))
    batch = stray.shown[0]
    assert batch["observation.images.table"].shape == (3, 32, 32, 3)
    assert batch["observation.images.table"].dtype == torch.uint8
    assert batch["observation.state"].shape == (3, 3)
    assert all(isinstance(text, str) for text in batch["task"])
    assert len(stray.shown) <= LATEST * 40 * 2


@pytest.mark.parametrize("policy", [Stray, Shaky])
def test_same_seed_same_episodes(policy: type[Stray]) -> None:
    """A policy's draws follow the seed too; those of the caller go on as if nothing had been drawn."""
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    drawn = [torch.rand(())]
    one, again, other = (world.corrections(policy(), "push", 4, seed=s, batch_size=4) for s in (5, 5, 6))
    drawn.append(torch.rand(()))
    assert torch.equal(torch.stack(drawn), expected)
    for key, column in one.columns.items():
        np.testing.assert_array_equal(column, again.columns[key])
    assert one.columns["action"].shape != other.columns["action"].shape or not np.array_equal(
        one.columns["action"], other.columns["action"]
    )


def test_recorded_is_what_the_expert_wants_not_what_the_policy_did() -> None:
    data = world.corrections(Stray(), "reach", 3, seed=1, batch_size=3, noise=0.0)
    plain = world.demonstrations("reach", 3, seed=1, noise=0.0)
    for dataset in (data, plain):  # the expert never closes its fingers to reach, and moves towards the block
        assert (dataset.columns["action"][:, 2] == -1).all()
    assert not (data.columns["action"][:, :2] == HOME[:2].numpy()).all(-1).all()


def test_nothing_to_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    class Solved(world.Tabletop):
        """Whatever is done solves it."""

        def step(self, action: Any) -> Any:
            observation, *_ = super().step(action)
            return observation, 1.0, True, False, self._info(True)

    monkeypatch.setattr(sys.modules["minivla.world.corrections"], "Tabletop", Solved)
    with pytest.raises(RuntimeError, match="20 episodes of reach left nothing to correct"):
        world.corrections(Stray(), "reach", 1, seed=0, batch_size=2)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"episodes": 0}, "expected ≥ 1"),
        ({"seed": -1}, "expected ≥ 1, ≥ 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"noise": 1.0}, "0 ≤ noise < 1"),
        ({"task": ()}, "task is empty"),
        ({"task": "fly"}, "fly"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        world.corrections(Stray(), **({"task": "reach", "episodes": 1, "seed": 0} | change))


def test_joined_with_demonstrations() -> None:
    plain, more = world.demonstrations("reach", 3, seed=0), world.corrections(Stray(), "push", 2, seed=0)
    both = plain.windows({"action": [0.0, 0.1]}).joined(more)
    assert both.num_episodes == 5
    assert len(both) == len(plain) + len(more)
    assert both[0]["action"].shape == (2, 3), "seen through the first one's windows"
    for here, there in ((0, plain[0]), (len(plain), more[0]), (len(both) - 1, more[len(more) - 1])):
        assert both[here]["task"] == there["task"]
        torch.testing.assert_close(both[here]["observation.state"], there["observation.state"])
    assert both[len(plain) - 1]["action_is_pad"].tolist() == [False, True], "windows end with an episode"
    assert both[len(plain)]["episode_index"] == 3
    assert both.stats["action"]["count"] == len(both)


def test_joining_what_does_not_fit() -> None:
    plain = world.demonstrations("reach", 1, seed=0)
    with pytest.raises(ValueError, match="expected the same columns"):
        plain.joined(world.demonstrations("reach", 1, seed=0, size=32))
