"""Diffusion: noise is added to actions in small steps; a network learns to take it away.

After t steps an action x₀ has become x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε with ε standard normal, and
ᾱ_t = Π (1 − β) falls from almost 1 to almost 0. A network that sees x_t and t predicts ε ("epsilon"), x₀
("sample"), or v = √ᾱ_t ε − √(1 − ᾱ_t) x₀ ("v_prediction"): given x_t, each says the same. Sampling walks
back, either drawing from the Gaussian x_before given x_t and the predicted x₀ (DDPM), or moving to where the
same ε would be at the lower noise (DDIM), deterministic and good for few steps.

Sources: Ho et al. 2020 (DDPM, equations 4, 6, 7), Song et al. 2021 (DDIM, equation 12), Nichol & Dhariwal
2021 (cosine schedule), Salimans & Ho 2022 (v). Settings are the defaults of Hugging Face diffusers 0.39,
`schedulers/scheduling_ddpm.py` and `scheduling_ddim.py`: variance "fixed_small", spacing "leading" (with few
steps sampling starts below the highest noise: Lin et al. 2024 call it a flaw), and in DDIM a clipped x₀
beside an ε that is not recomputed from it.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from minivla import recorder
from minivla.actions.flow import Field, Rng, draw_noise, expect_one_of, keep_flow

# What a network may predict, and what a reader calls it.
PREDICTIONS = {"epsilon": "predicted noise", "sample": "predicted action", "v_prediction": "predicted v"}
SAMPLERS = ("DDPM", "DDIM")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def make_betas(schedule: str, steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """How much noise each of `steps` steps adds. Returns (steps,); `start` and `end` are the linear ones'.

    Raises ValueError on an unknown schedule.
    """
    if schedule == "linear":
        return torch.linspace(start, end, steps)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps) ** 2
    expect_one_of("beta_schedule", schedule, SCHEDULES)

    def kept(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - kept((t + 1) / steps) / kept(t / steps), 0.999) for t in range(steps)])


class NoiseSchedule:
    """ᾱ for every timestep, and the algebra between actions, noise and what the network predicts.

    betas (N,); `prediction` one of PREDICTIONS; `clip` bounds |x₀| while sampling, None for no bound.
    `timestep` is an int, -1 for no noise at all, or (B,) int64. Raises ValueError on an unknown prediction.
    """

    def __init__(self, betas: Tensor, *, prediction: str = "epsilon", clip: float | None = None) -> None:
        expect_one_of("prediction_type", prediction, PREDICTIONS)
        self.prediction, self.clip = prediction, clip
        self.alpha_bar = torch.cat(((1 - betas).cumprod(0), torch.ones(1)))  # the last, at -1, is no noise

    def scales(self, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ), broadcastable to `like` (B, …)."""
        if isinstance(timestep, int):
            kept = self.alpha_bar[timestep]  # a number on the CPU, whatever the device
        else:
            kept = self.alpha_bar.to(like)[timestep].view(-1, *[1] * (like.ndim - 1))
        return kept**0.5, (1 - kept) ** 0.5

    def add_noise(self, action: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """x_t. action, noise (B, H, A). Returns the same shape."""
        signal, sigma = self.scales(timestep, action)
        return signal * action + sigma * noise

    def target(self, action: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """What the network should predict. action, noise (B, H, A). Returns the same shape."""
        signal, sigma = self.scales(timestep, action)
        velocity = signal * noise - sigma * action
        return {"epsilon": noise, "sample": action, "v_prediction": velocity}[self.prediction]

    def split(self, predicted: Tensor, x: Tensor, timestep: Tensor | int) -> tuple[Tensor, Tensor]:
        """The x₀, clipped, and the ε that a prediction means at x, (B, H, A) each."""
        signal, sigma = self.scales(timestep, x)
        if self.prediction == "epsilon":
            action, noise = (x - sigma * predicted) / signal, predicted
        elif self.prediction == "sample":
            action, noise = predicted, (x - signal * predicted) / sigma
        else:
            action, noise = signal * x - sigma * predicted, signal * predicted + sigma * x
        return action if self.clip is None else action.clamp(-self.clip, self.clip), noise

    def ddpm_step(
        self, predicted: Tensor, x: Tensor, timestep: int, before: int, generator: Rng = None
    ) -> Tensor:
        """One draw from timestep to the lower `before` (-1: no noise left). predicted, x (B, H, A)."""
        kept, kept_before = self.alpha_bar[timestep], self.alpha_bar[before]
        kept_between = kept / kept_before
        action, _ = self.split(predicted, x, timestep)
        towards_action = kept_before**0.5 * (1 - kept_between) / (1 - kept)
        towards_x = kept_between**0.5 * (1 - kept_before) / (1 - kept)
        mean = towards_action * action + towards_x * x
        if timestep == 0:
            return mean
        variance = (1 - kept_before) / (1 - kept) * (1 - kept_between)
        return mean + variance.clamp(min=1e-20) ** 0.5 * draw_noise(x.shape, x, generator)

    def ddim_step(self, predicted: Tensor, x: Tensor, timestep: int, before: int) -> Tensor:
        """One deterministic step from timestep to the lower `before` (-1: no noise left). All (B, H, A)."""
        return self.add_noise(*self.split(predicted, x, timestep), before)

    def timesteps(self, steps: int) -> list[int]:
        """The timesteps that `steps` steps of sampling visit, falling to 0, with "leading" spacing.

        Raises ValueError unless 1 ≤ steps ≤ N.
        """
        total = len(self.alpha_bar) - 1
        if not 1 <= steps <= total:
            raise ValueError(f"steps is {steps}; expected 1 to num_train_timesteps = {total}")
        return [k * (total // steps) for k in reversed(range(steps))]


def sample(
    network: Field, noise: Tensor, schedule: NoiseSchedule, steps: int, sampler: str, generator: Rng = None
) -> Tensor:
    """From noise (B, H, A) to actions, by `steps` calls of network(x, timestep (1,)) -> (B, H, A).

    A trace keeps the path as a `Flow`: times are the timesteps and -1 for the result, v is what the network
    predicted (ε, x₀ or v: no velocity). Raises ValueError on an unknown sampler, or steps out of range.
    """
    expect_one_of("noise_scheduler_type", sampler, SAMPLERS)
    times = [*schedule.timesteps(steps), -1]
    x, path, predictions = noise, [noise], list[Tensor]()
    for now, before in itertools.pairwise(times):
        step = (network(x, torch.full((1,), now, device=x.device)), x, now, before)
        x = schedule.ddpm_step(*step, generator) if sampler == "DDPM" else schedule.ddim_step(*step)
        if recorder.current() is not None:
            path.append(x)
            predictions.append(step[0])
    keep_flow(torch.tensor(times), path, predictions, PREDICTIONS[schedule.prediction])
    return x
