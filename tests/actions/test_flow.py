"""Straight lines, their velocity, and Euler's steps, against what is known exactly."""

from __future__ import annotations

import math

import pytest
import torch

from minivla.actions.flow import (
    PI,
    RECTIFIED,
    Convention,
    beta_time,
    convert,
    draw_noise,
    euler,
    integrate,
    interpolate,
    logit_normal_time,
    uniform_time,
    velocity_target,
)

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


def drift(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """A field whose streamlines are known: x(t) = x(0) exp(t + t² / 2)."""
    return x * (1 + time)


@pytest.mark.parametrize(("solver", "order", "calls"), [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2)])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_twice_the_steps_divide_a_solvers_error_by_two_to_its_order(convention, solver, order, calls):
    noise = pair()[1].double()
    sign = -1 if convention.noise_at else 1
    exact = noise * math.exp(sign * 1.5)
    asked: list[float] = []

    def field(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        asked.append(time.item())
        return drift(x, time)

    errors = [
        (integrate(field, noise, steps, convention, solver=solver) - exact).abs().max() for steps in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)
    assert len(asked) == calls * (64 + 128)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_a_flow_told_in_another_convention_brings_the_same_sample(solver):
    noise = pair()[1]
    here = integrate(drift, noise, 7, PI, solver=solver)
    there = integrate(convert(drift, PI, RECTIFIED), noise, 7, RECTIFIED, solver=solver)
    torch.testing.assert_close(here, there)
    assert not torch.allclose(here, integrate(drift, noise, 7, RECTIFIED, solver=solver))
    back = convert(convert(drift, PI, RECTIFIED), RECTIFIED, PI)
    time = torch.tensor([0.3])
    torch.testing.assert_close(back(noise, time), drift(noise, time))
    assert convert(drift, PI, CONVENTIONS[1]) is drift


def test_training_times_are_spread_as_said():
    """Kolmogorov and Smirnov find no difference in 5000 draws."""
    from scipy import stats

    def fit(times: torch.Tensor, law: object) -> float:
        return stats.kstest(times.double().numpy(), law.cdf).pvalue

    seed = torch.Generator().manual_seed
    assert fit(uniform_time(5000, seed(0)), stats.uniform) > 0.05
    for alpha, beta in ((1.5, 1.0), (2.0, 5.0)):
        times = beta_time(5000, alpha, beta, 0.999, 0.001, seed(1))
        assert fit((times - 0.001) / 0.999, stats.beta(alpha, beta)) > 0.05
        assert times.min() >= 0.001 and times.max() <= 1.0
    for mean, std in ((0.0, 1.0), (-0.5, 1.4)):
        assert fit(torch.logit(logit_normal_time(5000, mean, std, seed(2))), stats.norm(mean, std)) > 0.05
    assert fit(beta_time(5000, 1.5, 1.0, 1.0, 0.0, seed(1)), stats.beta(1.0, 1.5)) < 1e-6


def test_training_times_of_a_generator_are_repeatable_and_whole_numbers_will_do():
    draws = [
        uniform_time,
        lambda size, seed: beta_time(size, 2, 1, 1, 0, seed),
        lambda size, seed: logit_normal_time(size, generator=seed),
    ]
    for draw in draws:
        first, again = (draw(4, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again) and first.dtype == torch.float32


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
    with pytest.raises(ValueError, match="solver is 'rk4', expected one of euler, midpoint, heun"):
        integrate(lambda x, t: x, torch.zeros(1, 1, 1), 1, CONVENTIONS[0], solver="rk4")
