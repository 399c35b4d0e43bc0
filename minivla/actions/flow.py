"""Flow matching: noise becomes actions along straight lines, and a network learns how fast to move.

A line runs from noise to a demonstrated chunk; the velocity along it, action − noise, does not depend on the
time. A network that predicts it from the point alone learns the mean of all lines through that point, a field
whose paths carry noise to data. Papers differ in which end of time is noise: a `Convention` says so.
Sources: Liu et al. 2022 (rectified flow), Lipman et al. 2022 (flow matching), Black et al. 2024 (π0).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from minivla import recorder

Field = Callable[
    [Tensor, Tensor], Tensor
]  # a network: the noisy chunk (B, H, A) and a time (1,), to (B, H, A)
Rng = torch.Generator | None


@dataclass(frozen=True)
class Convention:
    """Which way time runs: `noise_at` is the time, 0 or 1, at which all is noise; the action is at the other.

    Raises ValueError for another `noise_at`.
    """

    name: str
    noise_at: int

    def __post_init__(self) -> None:
        if self.noise_at not in (0, 1):
            raise ValueError(f"noise_at is {self.noise_at!r}, expected 0 or 1: the end of time that is noise")


RECTIFIED = Convention("rectified flow", noise_at=0)
PI = Convention("π0", noise_at=1)  # the code of π0; its paper prints the reverse


def interpolate(action: Tensor, noise: Tensor, time: Tensor, convention: Convention) -> Tensor:
    """The point at `time` on the line between noise and action.

    action, noise (B, H, A); time (B,) in [0, 1]. Returns (B, H, A).
    """
    start, end = (action, noise) if convention.noise_at else (noise, action)
    return torch.lerp(start, end, rearrange(time, "batch -> batch 1 1"))


def velocity_target(action: Tensor, noise: Tensor, convention: Convention) -> Tensor:
    """d point / d time along the line: its sign follows the convention. (B, H, A) in and out."""
    return noise - action if convention.noise_at else action - noise


def convert(field: Field, source: Convention, target: Convention) -> Field:
    """The same flow, told in another convention: where time runs the other way, so does the velocity."""
    if source.noise_at == target.noise_at:
        return field
    return lambda x, time: -field(x, 1 - time)


# --- which times a network is trained at -------------------------------------------------------------------


def uniform_time(size: int, generator: Rng = None) -> Tensor:
    """(size,) in [0, 1), every time as likely as another."""
    return torch.rand(size, generator=generator, device=_place(generator))


def beta_time(
    size: int, alpha: float, beta: float, scale: float, offset: float, generator: Rng = None
) -> Tensor:
    """(size,): scale · Beta(alpha, beta) + offset. π0 takes Beta(1.5, 1), scale 0.999, offset 0.001.

    Where t = 1 is noise that dwells on the noisy end, and never reaches t = 0, where the answer is plain. A
    Beta draw is one Gamma draw's share in the sum of two.
    Source: Black et al. 2024, appendix B; LeRobot `policies/common/flow_matching.py`, sample_time_beta.
    """
    first, second = (
        torch._standard_gamma(
            torch.full((size,), float(shape), device=_place(generator)), generator=generator
        )
        for shape in (alpha, beta)
    )
    return first / (first + second) * scale + offset


def logit_normal_time(size: int, mean: float = 0.0, std: float = 1.0, generator: Rng = None) -> Tensor:
    """(size,) in (0, 1): the logistic function of a normal draw, most often in the middle.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1.
    """
    return torch.sigmoid(mean + std * torch.randn(size, generator=generator, device=_place(generator)))


def _place(generator: Rng, otherwise: torch.device | str = "cpu") -> torch.device | str:
    """Where numbers are drawn: where the generator is, and `otherwise` without one."""
    return otherwise if generator is None else generator.device


# --- from noise to actions ---------------------------------------------------------------------------------


def euler_step(field: Field, x: Tensor, now: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Straight on along the velocity at the start. One call. Returns (x (B, H, A), velocity)."""
    velocity = field(x, now)
    return x + (after - now) * velocity, velocity


def midpoint_step(field: Field, x: Tensor, now: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Half a step to feel the velocity there, then the whole step along it. Two calls."""
    half = (now + after) / 2
    velocity = field(x + (half - now) * field(x, now), half)
    return x + (after - now) * velocity, velocity


def heun_step(field: Field, x: Tensor, now: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Along the mean of the velocities at both ends of an Euler step. Two calls."""
    first = field(x, now)
    velocity = (first + field(x + (after - now) * first, after)) / 2
    return x + (after - now) * velocity, velocity


SOLVERS = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}


def integrate(
    field: Field, noise: Tensor, steps: int, convention: Convention, *, solver: str = "euler"
) -> Tensor:
    """From noise (B, H, A) to actions in `steps` equal steps along field(x, time (1,)), the velocity.

    Times are reckoned in float64 and told in the dtype of `noise`, so that they are upstream's to the bit. A
    trace keeps the path. Raises ValueError for fewer than one step or an unknown solver.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1 step from noise to action")
    expect_one_of("solver", solver, SOLVERS)
    start, end = float(convention.noise_at), float(1 - convention.noise_at)
    times = torch.linspace(start, end, steps + 1, dtype=torch.float64).to(noise.device, noise.dtype)
    x, path, velocities = noise, [noise], list[Tensor]()
    for now, after in itertools.pairwise(times.split(1)):
        x, velocity = SOLVERS[solver](field, x, now, after)
        if recorder.current() is not None:
            path.append(x)
            velocities.append(velocity)
    keep_flow(times, path, velocities)
    return x


def euler(field: Field, noise: Tensor, steps: int, convention: Convention) -> Tensor:
    """`integrate` with Euler's steps, as every published flow policy samples."""
    return integrate(field, noise, steps, convention)


def keep_flow(times: Tensor, path: list[Tensor], v: list[Tensor], quantity: str = "velocity") -> None:
    """Give a trace the path of a sampler: times (N + 1,), N + 1 points, N predictions, (B, H, A) each, and
    what it is that is predicted.
    """
    if (call := recorder.current()) is not None:
        call.flow = recorder.Flow(times, torch.stack(path).detach(), torch.stack(v).detach(), quantity)


def draw_noise(shape: tuple[int, ...], like: Tensor, generator: Rng = None) -> Tensor:
    """Standard normal, with the dtype and device of `like`. A generator on the CPU draws there, so that a
    seed gives one chunk on every device.
    """
    place = _place(generator, like.device)
    return torch.randn(shape, generator=generator, device=place, dtype=like.dtype).to(like.device)


def expect_one_of(name: str, given: str, known: Collection[str]) -> None:
    """Raises ValueError unless the setting `name` is one of those that are known."""
    if given not in known:
        raise ValueError(f"{name} is {given!r}, expected one of {', '.join(known)}")
