"""Each check of chapter 6 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

from pathlib import Path

import torch

from minivla.actions.flow import heun_step
from minivla.exercises import chapter06

CHAPTER = Path(__file__).parents[2] / "notebooks" / "06_flow_matching.ipynb"


def as_velocity(predicted, x, time, kind, noise_at):
    share = (
        {"action": time, "noise": 1 - time}[kind] if noise_at else {"action": 1 - time, "noise": time}[kind]
    )
    towards = (predicted - x) / share
    return towards if (kind == "action") == (noise_at == 0) else -towards


def beta_draws(size, generator):
    return torch.rand(size, generator=generator) ** (1 / 1.5)


def rk4_step(field, x, now, after):
    step, half = after - now, (now + after) / 2
    first = field(x, now)
    second = field(x + step / 2 * first, half)
    third = field(x + step / 2 * second, half)
    fourth = field(x + step * third, after)
    velocity = (first + 2 * second + 2 * third + fourth) / 6
    return x + step * velocity, velocity


CHECKS = [
    (chapter06.check_as_velocity, as_velocity),
    (chapter06.check_beta_draws, beta_draws),
    (chapter06.check_rk4_step, rk4_step),
]


def one_convention_for_all(predicted, x, time, kind, noise_at):
    return as_velocity(predicted, x, time, kind, 0)


def sign_forgotten(predicted, x, time, kind, noise_at):
    velocity = as_velocity(predicted, x, time, kind, noise_at)
    return -velocity if noise_at else velocity


def not_divided(predicted, x, time, kind, noise_at):
    return predicted - x if kind == "action" else x - predicted


def action_for_noise(predicted, x, time, kind, noise_at):
    return as_velocity(predicted, x, time, "action", noise_at)


def two_powers_and_no_rejection(size, generator):
    """What LeRobot's π0 did until pull request 1605: Jöhnk's method without throwing pairs away."""
    first, second = (torch.rand(size, generator=generator) ** (1 / shape) for shape in (1.5, 1.0))
    return first / (first + second)


def leaning_the_other_way(size, generator):
    return 1 - beta_draws(size, generator)


def the_power_itself(size, generator):
    return torch.rand(size, generator=generator) ** 1.5


def of_its_own_generator(size, generator):
    return torch.rand(size) ** (1 / 1.5)


def uniform(size, generator):
    return torch.rand(size, generator=generator)


def all_weighed_alike(field, x, now, after):
    step, half = after - now, (now + after) / 2
    first = field(x, now)
    second = field(x + step / 2 * first, half)
    third = field(x + step / 2 * second, half)
    velocity = (first + second + third + field(x + step * third, after)) / 4
    return x + step * velocity, velocity


def never_looks_again(field, x, now, after):
    step, half = after - now, (now + after) / 2
    first, second, third, fourth = (field(x, time) for time in (now, half, half, after))
    velocity = (first + 2 * second + 2 * third + fourth) / 6
    return x + step * velocity, velocity


def first_velocity_returned(field, x, now, after):
    return rk4_step(field, x, now, after)[0], field(x, now)


def without_dividing(field, x, now, after):
    velocity = rk4_step(field, x, now, after)[1]
    return x + (after - now) * 6 * velocity, 6 * velocity


MISTAKES = [
    (chapter06.check_as_velocity, one_convention_for_all, "noise at 1, time 0.25, action predicted"),
    (
        chapter06.check_as_velocity,
        sign_forgotten,
        "action predicted: right but for its sign",
    ),
    (chapter06.check_as_velocity, not_divided, "noise at 0, time 0.25, action predicted: it is 0.75 times"),
    (chapter06.check_as_velocity, action_for_noise, "noise at 0, time 0.25, noise predicted"),
    (chapter06.check_beta_draws, two_powers_and_no_rejection, "of the times lie below 0.25, expected 12%"),
    (chapter06.check_beta_draws, leaning_the_other_way, "expected 12%"),
    (chapter06.check_beta_draws, the_power_itself, "39% of the times lie below 0.25"),
    (chapter06.check_beta_draws, of_its_own_generator, "the same generator gives other times"),
    (chapter06.check_beta_draws, uniform, "25% of the times lie below 0.25"),
    (chapter06.check_rk4_step, heun_step, "it calls the field at times 0.25, 0.75"),
    (chapter06.check_rk4_step, all_weighed_alike, "velocity 4 t³"),
    (chapter06.check_rk4_step, never_looks_again, "velocity x"),
    (chapter06.check_rk4_step, first_velocity_returned, "0.25, 0.5, 0.5, 0.75, 0.25, expected"),
    (chapter06.check_rk4_step, without_dividing, "velocity 1"),
]
