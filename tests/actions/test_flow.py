"""Straight lines, their velocity, and Euler's steps, against what is known exactly."""

from __future__ import annotations

import pytest
import torch

from minivla.actions.flow import Convention, draw_noise, euler, interpolate, velocity_target

CONVENTIONS = [Convention("noise first", 0), Convention("noise last", 1)]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    action, noise = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    return action, noise


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_ends_of_the_line_are_noise_and_action(convention):
    action, noise = pair()
    at = torch.full((3,), float(convention.noise_at))
    assert torch.equal(interpolate(action, noise, at, convention), noise)
    assert torch.equal(interpolate(action, noise, 1 - at, convention), action)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_velocity_is_the_derivative_along_the_line(convention):
    action, noise = (side.double() for side in pair())
    time = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    ahead, behind = (interpolate(action, noise, time + h, convention) for h in (1e-6, -1e-6))
    torch.testing.assert_close((ahead - behind) / 2e-6, velocity_target(action, noise, convention))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_euler_is_exact_on_a_straight_line(convention, steps):
    action, noise = pair()
    velocity = velocity_target(action, noise, convention)
    torch.testing.assert_close(euler(lambda x, t: velocity, noise, steps, convention), action)


def test_euler_follows_the_time_in_the_conventions_direction():
    seen: list[float] = []
    for convention in CONVENTIONS:
        euler(lambda x, t: seen.append(t.item()) or x, torch.zeros(1, 1, 1), 2, convention)
    assert seen == [0.0, 0.5, 1.0, 0.5]


def test_noise_of_a_generator_is_repeatable_and_typed():
    like = torch.zeros(1, dtype=torch.bfloat16)
    drawn = [draw_noise((2, 3), like, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert drawn[0].dtype == torch.bfloat16


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="noise_at is 2, expected 0 or 1"):
        Convention("nowhere", 2)
    with pytest.raises(ValueError, match="steps is 0; expected at least 1"):
        euler(lambda x, t: x, torch.zeros(1, 1, 1), 0, CONVENTIONS[0])
