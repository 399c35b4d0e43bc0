"""Schedules and steps are those of diffusers, at every step; and they are right by themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from minivla.actions.diffusion import (
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    NoiseSchedule,
    make_betas,
    sample,
)

CLIPS = (None, 1.0, 0.5)
TRAINED = 100


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def schedule(kind: str = "squaredcos_cap_v2", **options) -> NoiseSchedule:
    return NoiseSchedule(make_betas(kind, TRAINED), **options)


def theirs(sampler: str, kind: str, prediction: str, clip: float | None):
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, f"{sampler}Scheduler")(
        num_train_timesteps=TRAINED,
        beta_schedule=kind,
        prediction_type=prediction,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )


def largest_difference(ours: torch.Tensor, upstream: torch.Tensor) -> float:
    return ((ours - upstream).abs().max() / upstream.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize(
    ("sampler", "kind", "prediction", "clip"),
    list(itertools.product(SAMPLERS, SCHEDULES, PREDICTIONS, CLIPS)),
)
@pytest.mark.parametrize("steps", [TRAINED, 10, 7, 1])
def test_every_step_equals_diffusers(sampler, kind, prediction, clip, steps):
    upstream = theirs(sampler, kind, prediction, clip)
    ours = schedule(kind, prediction=prediction, clip=clip)
    assert torch.allclose(ours.alpha_bar[:-1], upstream.alphas_cumprod, rtol=1e-6, atol=0)
    upstream.set_timesteps(steps)
    assert ours.timesteps(steps) == upstream.timesteps.tolist()
    x, mine, yours = torch.randn(3, 8, 2, generator=rng()), rng(1), rng(1)
    draws = {"generator": mine} if sampler == "DDPM" else {}
    times = [*ours.timesteps(steps), -1]
    for k, timestep in enumerate(upstream.timesteps):
        predicted = torch.randn(3, 8, 2, generator=rng(100 + k))
        step = getattr(ours, f"{sampler.lower()}_step")
        after = step(predicted, x, times[k], times[k + 1], **draws)
        expected = upstream.step(predicted, timestep, x, generator=yours).prev_sample
        assert largest_difference(after, expected) <= 1e-6, f"step {k}, timestep {timestep}"
        x = expected


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_and_targets_equal_diffusers(sampler, kind):
    upstream = theirs(sampler, kind, "v_prediction", None)
    ours = schedule(kind, prediction="v_prediction")
    action, noise = torch.randn(2, 5, 8, 2, generator=rng())
    timestep = torch.tensor([0, 3, 50, 98, 99])
    upstream_x = upstream.add_noise(action, noise, timestep)
    assert largest_difference(ours.add_noise(action, noise, timestep), upstream_x) <= 1e-6
    expected = upstream.get_velocity(action, noise, timestep)
    assert largest_difference(ours.target(action, noise, timestep), expected) <= 1e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timestep", [0, 40, torch.tensor([10, 40, 70])])
def test_a_perfect_prediction_splits_into_action_and_noise(prediction, timestep):
    ours = schedule(prediction=prediction)
    action, noise = torch.randn(2, 3, 8, 2, generator=rng())
    x = ours.add_noise(action, noise, timestep)
    found, found_noise = ours.split(ours.target(action, noise, timestep), x, timestep)
    assert torch.allclose(found, action, atol=1e-4)
    assert torch.allclose(found_noise, noise, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_network_samples_the_data(sampler, prediction):
    """The data is N(m, s²), whose best prediction is known: samples have its mean and spread."""
    mean, spread = 0.3, 0.4
    ours = schedule(prediction=prediction)

    def network(x, timestep):
        signal, sigma = ours.scales(timestep, x)
        gain = signal * spread**2 / (signal**2 * spread**2 + sigma**2)
        action = mean + gain * (x - signal * mean)
        return ours.target(action, (x - signal * action) / sigma, timestep)

    noise = torch.randn(4000, 1, 1, generator=rng())
    drawn = sample(network, noise, ours, TRAINED, sampler, rng(1))
    assert abs(drawn.mean() - mean) < 0.03
    assert abs(drawn.std() - spread) < 0.03


def test_ddim_is_deterministic_and_ddpm_is_its_generator():
    ours, noise = schedule(), torch.randn(2, 8, 2, generator=rng())
    first, again = (sample(lambda x, t: x * 0.1, noise, ours, 5, "DDIM") for _ in range(2))
    assert torch.equal(first, again)
    draws = [sample(lambda x, t: x * 0.1, noise, ours, 5, "DDPM", rng(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


def test_a_cosine_schedule_keeps_what_its_formula_says():
    kept = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert schedule().alpha_bar[49].item() == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: make_betas("cosine", 10), "beta_schedule is 'cosine', expected one of linear"),
        (lambda: schedule(prediction="x0"), "prediction_type is 'x0', expected one of epsilon"),
        (lambda: schedule().timesteps(0), "steps is 0; expected 1 to num_train_timesteps = 100"),
        (lambda: schedule().timesteps(101), "steps is 101; expected 1"),
        (
            lambda: sample(lambda x, t: x, torch.zeros(1, 2, 1), schedule(), 2, "DPM"),
            "noise_scheduler_type is 'DPM', expected one of DDPM, DDIM",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
