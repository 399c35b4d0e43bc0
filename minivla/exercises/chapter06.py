"""Self-checks of chapter 6, flow matching: what a prediction means as a velocity, times that lean one way, a
solver of four calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minivla.actions.flow import Convention, Field, interpolate, velocity_target
from minivla.exercises.verdict import verdict

DRAWS = 20_000


def check_as_velocity(as_velocity: Callable[[Tensor, Tensor, float, str, int], Tensor]) -> None:
    """Check `as_velocity(predicted, x, time, kind, noise_at)`: what a network says at the point x (B, H, A),
    the clean "action" or the "noise" in it, as the velocity d x / d time; `noise_at`: the end that is noise.
    """

    def complaint() -> str | None:
        action, noise = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
        for noise_at, time, kind in (
            (0, 0.25, "action"),
            (0, 0.25, "noise"),
            (1, 0.25, "action"),
            (1, 0.25, "noise"),
            (1, 0.75, "noise"),
        ):
            convention = Convention("exercise", noise_at)
            x = interpolate(action, noise, torch.full((3,), time), convention)
            wanted = velocity_target(action, noise, convention)
            given = as_velocity({"action": action, "noise": noise}[kind], x, time, kind, noise_at)
            case = f"noise at {noise_at}, time {time}, {kind} predicted"
            if tuple(given.shape) != tuple(x.shape):
                return f"{case}: it returns shape {tuple(given.shape)}, expected {tuple(x.shape)}"
            if torch.allclose(given, -wanted, atol=1e-4):
                return f"{case}: right but for its sign; the velocity is d x / d time"
            if not torch.allclose(given, wanted, atol=1e-4):
                ratio = (given / wanted).median()
                return f"{case}: it is {ratio:.2f} times what is expected, by the median number"
        return None

    verdict(complaint)


def check_beta_draws(beta_draws: Callable[[int, torch.Generator], Tensor]) -> None:
    """Check `beta_draws(size, generator)`: times (size,) of which a share of t^1.5 lies below t, for every t:
    Beta(1.5, 1).
    """

    def complaint() -> str | None:
        drawn = beta_draws(DRAWS, torch.Generator().manual_seed(0))
        if tuple(drawn.shape) != (DRAWS,):
            return f"it returns shape {tuple(drawn.shape)}, expected ({DRAWS},)"
        if not (drawn.isfinite().all() and (drawn >= 0).all() and (drawn <= 1).all()):
            return "some times are not in [0, 1]"
        if not torch.equal(drawn, beta_draws(DRAWS, torch.Generator().manual_seed(0))):
            return "the same generator gives other times; draw from the one that is handed over"
        for time in (0.25, 0.5, 0.75, 0.1, 0.9):
            share, wanted = (drawn <= time).float().mean().item(), time**1.5
            if abs(share - wanted) > 0.02:  # five standard errors
                return f"{share:.0%} of the times lie below {time}, expected {wanted:.0%}"
        return None

    verdict(complaint)


def check_rk4_step(rk4_step: Callable[[Field, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Check `rk4_step(field, x, now, after)`: a step of the classical Runge-Kutta method, which returns the
    new x (B, H, A) and the velocity it went along, as the steps in `minivla.actions.flow.SOLVERS` do.
    """

    def complaint() -> str | None:
        called: list[float] = []
        cases: tuple[tuple[str, Field, float], ...] = (
            ("velocity 1", lambda x, time: torch.ones_like(x), 1.5),
            ("velocity 4 t³", lambda x, time: 4 * time**3 + 0 * x, 1 + 0.75**4 - 0.25**4),
            ("velocity x", lambda x, time: x, sum(0.5**k / math.factorial(k) for k in range(5))),
        )
        for name, field, wanted in cases:
            called.clear()

            def counted(x: Tensor, time: Tensor, field: Field = field) -> Tensor:
                called.append(float(time))
                return field(x, time)

            x, velocity = rk4_step(counted, torch.ones(1, 1, 1), torch.tensor([0.25]), torch.tensor([0.75]))
            if sorted(round(time, 3) for time in called) != [0.25, 0.5, 0.5, 0.75]:
                return f"it calls the field at times {_told(called)}, expected 0.25, 0.5, 0.5 and 0.75"
            if abs(x.item() - wanted) > 1e-5:
                return f"{name}, from x = 1 at time 0.25 to time 0.75: {x.item():.4f}, expected {wanted:.4f}"
            if abs(velocity.item() - (wanted - 1) / 0.5) > 1e-4:
                return f"{name}: the velocity is {velocity.item():.3f}, expected {(wanted - 1) / 0.5:.3f}"
        return None

    verdict(complaint)


def _told(times: list[float]) -> str:
    return ", ".join(f"{time:g}" for time in times) or "none"
