"""Flow matching: noise becomes actions along straight lines, and a network learns how fast to move.

A line runs from noise to a demonstrated chunk; the velocity along it, action − noise, does not depend on the
time. A network that predicts it from the point alone learns the mean of all lines through that point, a field
whose streamlines carry noise to data. Papers differ in which end of time is noise: a `Convention` says so.
Sources: Liu et al. 2022 (rectified flow), Lipman et al. 2022 (flow matching).
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


def interpolate(action: Tensor, noise: Tensor, time: Tensor, convention: Convention) -> Tensor:
    """The point at `time` on the line between noise and action.

    action, noise (B, H, A); time (B,) in [0, 1]. Returns (B, H, A).
    """
    start, end = (action, noise) if convention.noise_at else (noise, action)
    return torch.lerp(start, end, rearrange(time, "batch -> batch 1 1"))


def velocity_target(action: Tensor, noise: Tensor, convention: Convention) -> Tensor:
    """d point / d time along the line: its sign follows the convention. (B, H, A) in and out."""
    return noise - action if convention.noise_at else action - noise


def euler(field: Field, noise: Tensor, steps: int, convention: Convention) -> Tensor:
    """From noise (B, H, A) to actions in `steps` equal steps along field(x, time (1,)), the velocity.

    A trace keeps the path. Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1 step from noise to action")
    times = torch.linspace(convention.noise_at, 1 - convention.noise_at, steps + 1, dtype=noise.dtype)
    times = times.to(noise.device)
    x, path, velocities = noise, [noise], list[Tensor]()
    for now, after in itertools.pairwise(times):
        velocity = field(x, rearrange(now, "-> 1"))
        x = x + (after - now) * velocity
        if recorder.current() is not None:
            path.append(x)
            velocities.append(velocity)
    keep_flow(times, path, velocities)
    return x


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
    place = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=place, dtype=like.dtype).to(like.device)


def expect_one_of(name: str, given: str, known: Collection[str]) -> None:
    """Raises ValueError unless the setting `name` is one of those that are known."""
    if given not in known:
        raise ValueError(f"{name} is {given!r}, expected one of {', '.join(known)}")
