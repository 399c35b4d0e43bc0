"""Self-checks of chapter 4, Diffusion Policy: the best denoiser there is, the windows, where sampling
starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minivla.exercises.verdict import verdict


def check_ideal_denoiser(ideal_denoiser: Callable[[Tensor, Tensor, float, float], Tensor]) -> None:
    """Check `ideal_denoiser(x, answers, signal, sigma)`: x (B, D), noisy, to the mean (B, D) of the `answers`
    (K, D), alike often demonstrated, that x = signal · answer + sigma · noise may have come from.
    """

    def complaint() -> str | None:
        answers = torch.tensor([[-1.0, 0.5], [1.0, 0.5]])
        cases = (
            ([0.0, 0.0], 0.1, 0.99, "half way between two answers it is their mean, here (0, 0.5)"),
            ([0.9, 0.4], 0.95, 0.3, "with little noise it is the nearer answer, here (1, 0.5)"),
            ([0.3, 0.2], 0.5, 0.8, "the weights are softmax of −|x − signal · answer|² / (2 sigma²)"),
            ([0.4, 0.4], 0.4, 0.5, "the answers are scaled by `signal` before x is compared with them"),
        )
        for x, signal, sigma, why in cases:
            given = ideal_denoiser(torch.tensor([x]), answers, signal, sigma)
            wanted = _posterior_mean(torch.tensor([x]), answers, signal, sigma)
            if tuple(given.shape) != (1, 2):
                return (
                    f"for x (1, 2) and answers (2, 2) it returns shape {tuple(given.shape)}, expected (1, 2)"
                )
            if not torch.allclose(given, wanted, atol=1e-4):
                return (
                    f"at x = {_told(x)}, signal {signal:g}, sigma {sigma:g} it returns "
                    f"{_told(given[0].tolist())}, expected {_told(wanted[0].tolist())}: {why}"
                )
        return _complaint_of_many(ideal_denoiser)

    verdict(complaint)


def check_frames(frames: Callable[[int, int, int, int], tuple[Any, Any, Any]]) -> None:
    """Check `frames(now, n_obs_steps, horizon, n_action_steps)`: the frames that are seen, those an action is
    predicted for, and those whose action is carried out, three lists of numbers.
    """

    def complaint() -> str | None:
        for now, seen, horizon, carried in ((10, 2, 16, 8), (10, 1, 8, 8), (20, 3, 12, 4), (5, 2, 16, 15)):
            given = [[int(frame) for frame in part] for part in frames(now, seen, horizon, carried)]
            oldest = now - seen + 1
            wanted = (
                ("seen", list(range(oldest, now + 1)), "the last one seen is now"),
                (
                    "predicted",
                    list(range(oldest, oldest + horizon)),
                    "it begins at the oldest of these",
                ),
                ("carried out", list(range(now, now + carried)), "nobody can act in the past"),
            )
            if len(given) != 3:
                return f"it returns {len(given)} lists, expected three: seen, predicted, carried out"
            for (name, right, why), got in zip(wanted, given, strict=True):
                if got != right:
                    return (
                        f"now {now}, n_obs_steps {seen}, horizon {horizon}, n_action_steps {carried}: "
                        f"{name} {_span(got)}, expected {_span(right)}; {why}"
                    )
        return None

    verdict(complaint)


def check_trailing(trailing: Callable[[int, int], Sequence[int]]) -> None:
    """Check `trailing(total, steps)`: `steps` timesteps falling from total - 1, `total / steps` apart."""

    def complaint() -> str | None:
        for total, steps in ((100, 2), (100, 10), (100, 100), (100, 1), (100, 3), (50, 5)):
            given = [int(timestep) for timestep in trailing(total, steps)]
            wanted = [round(total - k * total / steps) - 1 for k in range(steps)]
            if len(given) != steps:
                return f"trailing({total}, {steps}) has {len(given)} timesteps, expected {steps}"
            if given[0] != total - 1:
                return (
                    f"trailing({total}, {steps}) starts at timestep {given[0]}; expected {total - 1}, "
                    "where the noise that sampling starts from belongs"
                )
            if given != wanted:
                return f"trailing({total}, {steps}) is {given}, expected {wanted}"
        return None

    verdict(complaint)


def _posterior_mean(x: Tensor, answers: Tensor, signal: float, sigma: float) -> Tensor:
    """E[answer | x], when x = signal · answer + sigma · noise."""
    off = torch.cdist(x.double(), signal * answers.double())
    return ((-(off**2) / (2 * sigma**2)).softmax(-1) @ answers.double()).to(x)


def _complaint_of_many(ideal_denoiser: Callable[[Tensor, Tensor, float, float], Tensor]) -> str | None:
    """The same for several x at once, three answers, and so little noise that exp would underflow."""
    generator = torch.Generator().manual_seed(0)
    x, answers = torch.randn(5, 4, generator=generator), torch.randn(3, 4, generator=generator)
    if tuple(ideal_denoiser(x, answers, 0.7, 0.7).shape) != (5, 4):
        return "for x (5, 4) and answers (3, 4) it does not return shape (5, 4)"
    for sigma in (0.7, 0.01):
        given = ideal_denoiser(x, answers, 0.7, sigma)
        if not torch.isfinite(given).all():
            return f"with sigma {sigma:g} it returns values that are not finite: take softmax, not exp"
        if not torch.allclose(given, _posterior_mean(x, answers, 0.7, sigma), atol=1e-3):
            return f"for several x at once, and three answers, it is wrong at sigma {sigma:g}"
    return None


def _told(numbers: Sequence[float]) -> str:
    return "(" + ", ".join(f"{number:.2f}" for number in numbers) + ")"


def _span(frames: Sequence[int]) -> str:
    """Consecutive frames as "9 to 24", others one by one."""
    if len(frames) > 2 and list(frames) == list(range(frames[0], frames[0] + len(frames))):
        return f"{frames[0]} to {frames[-1]}"
    return ", ".join(map(str, frames)) or "none"
