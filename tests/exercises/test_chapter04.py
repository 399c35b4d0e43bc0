"""Each check of chapter 4 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

from pathlib import Path

import torch

from minivla.data.windows import delta_frames, delta_timestamps
from minivla.exercises import chapter04
from minivla.policies.diffusion import DiffusionConfig

CHAPTER = Path(__file__).parents[2] / "notebooks" / "04_diffusion_policy.ipynb"


def ideal_denoiser(x, answers, signal, sigma):
    weight = (-(torch.cdist(x, signal * answers) ** 2) / (2 * sigma**2)).softmax(-1)
    return weight @ answers


def frames(now, n_obs_steps, horizon, n_action_steps):
    oldest = now - n_obs_steps + 1
    return range(oldest, now + 1), range(oldest, oldest + horizon), range(now, now + n_action_steps)


def trailing(total, steps):
    return [round(total - k * total / steps) - 1 for k in range(steps)]


CHECKS = [
    (chapter04.check_ideal_denoiser, ideal_denoiser),
    (chapter04.check_frames, frames),
    (chapter04.check_trailing, trailing),
]


def always_the_mean(x, answers, signal, sigma):
    return answers.mean(0).expand(len(x), -1)


def the_nearest(x, answers, signal, sigma):
    return answers[torch.cdist(x, signal * answers).argmin(-1)]


def not_scaled(x, answers, signal, sigma):
    return ideal_denoiser(x, answers, 1.0, sigma)


def not_squared(x, answers, signal, sigma):
    return (-torch.cdist(x, signal * answers) / (2 * sigma**2)).softmax(-1) @ answers


def still_scaled(x, answers, signal, sigma):
    return signal * ideal_denoiser(x, answers, signal, sigma)


def underflowing(x, answers, signal, sigma):
    weight = (-(torch.cdist(x, signal * answers) ** 2) / (2 * sigma**2)).exp()
    return weight @ answers / weight.sum(-1, keepdim=True)


def one_answer_for_all(x, answers, signal, sigma):
    return ideal_denoiser(x[:1], answers, signal, sigma)


def from_now_on(now, n_obs_steps, horizon, n_action_steps):
    seen, _, carried = frames(now, n_obs_steps, horizon, n_action_steps)
    return seen, range(now, now + horizon), carried


def carried_from_the_oldest(now, n_obs_steps, horizon, n_action_steps):
    seen, predicted, _ = frames(now, n_obs_steps, horizon, n_action_steps)
    return seen, predicted, predicted[:n_action_steps]


def one_frame_early(now, n_obs_steps, horizon, n_action_steps):
    _, predicted, carried = frames(now, n_obs_steps, horizon, n_action_steps)
    return range(now - n_obs_steps, now), predicted, carried


def leading(total, steps):
    return [k * (total // steps) for k in reversed(range(steps))]


def to_the_end(total, steps):
    return [round(step) for step in torch.linspace(total - 1, 0, steps).tolist()]


def counted_from_one(total, steps):
    return [timestep + 1 for timestep in trailing(total, steps)]


MISTAKES = [
    (chapter04.check_ideal_denoiser, always_the_mean, "the nearer answer"),
    (chapter04.check_ideal_denoiser, the_nearest, "their mean"),
    (chapter04.check_ideal_denoiser, not_scaled, "expected"),
    (chapter04.check_ideal_denoiser, not_squared, "expected"),
    (chapter04.check_ideal_denoiser, still_scaled, "expected (0.00, 0.50)"),
    (chapter04.check_ideal_denoiser, underflowing, "take softmax"),
    (chapter04.check_ideal_denoiser, one_answer_for_all, "does not return shape (5, 4)"),
    (chapter04.check_frames, from_now_on, "predicted 10 to 25, expected 9 to 24"),
    (chapter04.check_frames, carried_from_the_oldest, "carried out 9 to 16, expected 10 to 17"),
    (chapter04.check_frames, one_frame_early, "the last one seen is now"),
    (chapter04.check_trailing, leading, "starts at timestep 50; expected 99"),
    (chapter04.check_trailing, to_the_end, "trailing(100, 2) is [99, 0], expected [99, 49]"),
    (chapter04.check_trailing, counted_from_one, "starts at timestep 100"),
]


def test_the_windows_are_those_of_the_policy():
    """What the check calls right is what training sees."""
    config = DiffusionConfig(n_obs_steps=3, horizon=16, n_action_steps=8, down_dims=(8, 16))
    seen, predicted, carried = frames(20, 3, 16, 8)
    deltas = delta_frames(delta_timestamps(config, 10, ["observation.state", "action"]), 10)
    assert [20 + delta for delta in deltas["observation.state"]] == list(seen)
    assert [20 + delta for delta in deltas["action"]] == list(predicted)
    assert list(carried) == list(predicted)[config.n_obs_steps - 1 :][: config.n_action_steps]
