"""The field that carries noise to actions, on a plane through the space of chunks.

A denoiser that predicts the noise ε in x knows which way the data lies: −ε/σ is the score, the gradient of
log p(x) of the noisy chunks, and σ² times it leads from x to √ᾱ x̂₀, where x̂₀ is the mean of all chunks that
x may have come from (Tweedie's formula; Vincent 2011, Song & Ermon 2019). A chunk has H · A numbers, so what
can be drawn is a slice: a noisy chunk of the sampler is frozen but for two of its coordinates.

Which two decides what is seen. Along one single number, or two, the others have already settled where the
chunk goes. Along the direction from one group of samples to the other nothing else has a say: there the
field shows one basin at high noise, where x̂₀ is the average of both ways, and two at low noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from minivla import recorder

Number = tuple[int, int]  # a step of the chunk and a dimension of the action


@dataclass(frozen=True)
class Slice:
    """A plane through the space of chunks.

    axes (2, H, A), orthonormal; origin (H, A), the clean chunk at (0, 0); names of the axes
    """

    axes: Tensor
    origin: Tensor
    names: tuple[str, str]

    def coordinates(self, x: Tensor, signal: float = 1.0) -> Tensor:
        """Where chunks (…, H, A) lie, (…, 2), the origin weighed by `signal`."""
        return einsum(x - signal * self.origin, self.axes, "... h a, xy h a -> ... xy")

    def through(self, x: Tensor, places: Tensor, signal: float = 1.0) -> Tensor:
        """The chunk x (H, A) moved to places (G, 2) of the plane, all its other coordinates frozen.

        Returns (G, H, A).
        """
        moves = places - self.coordinates(x, signal)
        return x + einsum(moves, self.axes, "place xy, xy h a -> place h a")


@dataclass(frozen=True)
class ScoreField:
    """The field at one noise level: places (G, 2) in coordinates of the plane, and at each of them

    score (G, 2)    the part of −ε/σ that lies in the plane
    action (G, 2)   where in the plane the denoised chunk x̂₀ lies (signal 1)

    signal and sigma are the scales of action and noise in x, `time` the sampler's.
    """

    places: Tensor
    score: Tensor
    action: Tensor
    signal: float
    sigma: float
    time: float


def slice_between(chunks: Tensor, dimensions: Sequence[int] | None = None) -> Slice:
    """The plane in which samples (B, H, A) of one scene fall into two groups.

    x runs from the middle of the one group to that of the other, half way between them is 0; y is the
    direction in which they differ most besides. The groups are those that leave the least variance along the
    first principal direction. x points the way in which the sum of the actions' first dimension grows. With
    `dimensions` of the action the others stay frozen too: when a gripper closes may differ more than the way.

    Raises ValueError for fewer than three samples, and for samples that are all the same.
    """
    kept = list(range(chunks.shape[-1]) if dimensions is None else dimensions)
    flat = rearrange(chunks.double()[..., kept], "b h a -> b (h a)")
    off = flat - flat.mean(0)
    if len(flat) < 3 or off.abs().max() < 1e-6:
        raise ValueError(
            f"{len(flat)} samples span no plane, or are all the same; expected at least 3 different ones: "
            "samples=64, or name two numbers of the chunk, along=((step, dimension), (step, dimension))"
        )
    high = two_groups(off @ torch.linalg.svd(off, full_matrices=False).Vh[0])
    low_middle, high_middle = flat[~high].mean(0), flat[high].mean(0)
    first = (high_middle - low_middle) / (high_middle - low_middle).norm()
    rest = flat - torch.where(high[:, None], high_middle, low_middle)
    rest = rest - torch.outer(rest @ first, first)
    second = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    second = second - (second @ first) * first
    if second.norm() < 1e-6:  # two answers and nothing between: any direction across will do
        second = torch.eye(len(first)).to(first)[first.abs().argmin()]
        second = second - (second @ first) * first
    axes = chunks.new_zeros(2, *chunks.shape[1:])
    directions = torch.stack((first, second / second.norm())).to(chunks)
    axes[..., kept] = rearrange(directions, "xy (h a) -> xy h a", a=len(kept))
    axes = axes * torch.where(axes[..., kept[0]].sum(1) < 0, -1.0, 1.0)[:, None, None]
    high = two_groups(einsum(chunks, axes[0], "b h a, h a -> b"))
    origin = (chunks[high].mean(0) + chunks[~high].mean(0)) / 2
    return Slice(axes, origin, ("from one group of samples to the other", "across"))


def slice_through(first: Number, second: Number, like: Tensor) -> Slice:
    """The plane of two numbers of a chunk like `like` (H, A), each (step, dimension).

    Raises ValueError for numbers that are not there, or the same one twice.
    """
    axes = like.new_zeros(2, *like.shape)
    for axis, (step, dimension) in zip(axes, (first, second), strict=True):
        if not (0 <= step < like.shape[0] and 0 <= dimension < like.shape[1]):
            raise ValueError(
                f"along names step {step}, dimension {dimension}; the chunk has {like.shape[0]} steps of "
                f"{like.shape[1]} dimensions, counted from 0"
            )
        axis[step, dimension] = 1
    if first == second:
        raise ValueError(f"along names {first} twice; expected two different numbers of the chunk")
    names = tuple(f"action {dimension} at step {step}" for step, dimension in (first, second))
    return Slice(axes, torch.zeros_like(like), (names[0], names[1]))


def two_groups(values: Tensor) -> Tensor:
    """Values (B,) split in two so that the groups vary least. Returns (B,) bool, True for the high one."""
    ordered, order = values.sort()
    count = torch.arange(1, len(values)).to(values)
    below, total = ordered.cumsum(0)[:-1], ordered.sum()
    between = below**2 / count + (total - below) ** 2 / (len(values) - count)
    high = torch.ones(len(values), dtype=torch.bool, device=values.device)
    high[order[: int(between.argmax()) + 1]] = False
    return high


@torch.no_grad()
def denoise(policy: Any, batch: Mapping[str, Any], x: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """What the policy makes of noisy chunks x (G, H, A) of one scene at one time of its sampler: the score
    −ε/σ and the denoised chunks x̂₀, (G, H, A) each, in one pass of the denoiser.

    batch: the normalised observations, of one sample. Works for every objective and prediction type.
    Raises TypeError for a policy without a denoiser.
    """
    expect_denoiser(policy)
    policy.eval()
    with recorder.paused():
        seen = policy.see(batch)
        observed = policy.denoiser.observe(seen.expand(len(x), *seen.shape[1:]))
        predicted = policy.predict(x, time_of(policy, time, x), observed)
    return split(policy, predicted, x, time)


def split(policy: Any, predicted: Tensor, x: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Score and denoised chunk that a prediction means at x; (…, H, A) each."""
    if policy.config.objective == "flow":
        # x = t a + (1 − t) n and the velocity is a − n: solved for both ends.
        action, noise = x + (1 - time) * predicted, x - time * predicted
    else:
        action, noise = policy.schedule.split(predicted, x, int(time))
    return -noise / scales(policy, time)[1], action


def scales(policy: Any, time: float) -> tuple[float, float]:
    """How much action and how much noise there is in x at a time of the sampler."""
    if policy.config.objective == "flow":
        return time, 1 - time
    signal, sigma = policy.schedule.scales(int(time), torch.zeros(1))
    return float(signal), float(sigma)


def time_of(policy: Any, time: float, like: Tensor) -> Tensor:
    """A time of the sampler as its network takes it, (1,)."""
    if policy.config.objective == "flow":
        return like.new_full((1,), time)
    return torch.full((1,), int(time), device=like.device)


def expect_denoiser(policy: Any) -> None:
    """Raises TypeError unless the policy takes noise away from chunks."""
    if not all(hasattr(policy, name) for name in ("see", "denoiser", "predict")):
        raise TypeError(
            f"{type(policy).__name__} has no denoiser, so there is no score to draw; expected a "
            "DiffusionPolicy (objective 'diffusion' or 'flow')"
        )


def score_field(
    policy: Any, batch: Mapping[str, Any], x: Tensor, time: float, plane: Slice, places: Tensor
) -> ScoreField:
    """The field of the policy at `time`, in a slice through the noisy chunk x (H, A).

    places (G, 2): where in the plane, in coordinates of x's own noise level. All are denoised in one pass.
    """
    signal, sigma = scales(policy, time)
    score, action = denoise(policy, batch, plane.through(x, places, signal), time)
    along = einsum(score, plane.axes, "place h a, xy h a -> place xy")
    return ScoreField(places, along, plane.coordinates(action), signal, sigma, time)


def grid(reach: float, side: int, like: Tensor) -> Tensor:
    """`side` × `side` places over [−reach, reach]², row after row from below. Returns (side², 2)."""
    line = torch.linspace(-reach, reach, side).to(like)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def basins(field: ScoreField, side: int) -> int:
    """How many valleys lead the middle row of a `grid` along x: where the field turns from + to −."""
    row = field.score.reshape(side, side, 2)[side // 2, :, 0]
    signs = row[row != 0].sign()
    return int(((signs[:-1] > 0) & (signs[1:] < 0)).sum())
