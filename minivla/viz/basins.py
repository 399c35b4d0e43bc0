"""The score field on a plane at several noise levels: one basin at high noise, two at low noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minivla import tracing
from minivla.recorder import Flow
from minivla.viz import palette, score
from minivla.viz.flow import SMALL, clock, quiver, spread_over
from minivla.viz.pictures import as_array
from minivla.viz.plane import Meaning, Plane
from minivla.viz.scene import commanded_paths, draw_table, draw_way, table_picture

COLOURS = "RdBu_r"
LOW, HIGH = "#2166AC", "#B2182B"  # the two groups of samples, as the ends of COLOURS
LEGEND = "arrows: the score; colour: to which group x̂₀ belongs; dots: samples, by where they end"
FIELD = 31  # places a side; every other one has an arrow


def plot_score_field(
    policy: Any,
    batch: Mapping[str, Any],
    *,
    sample: int = 0,
    along: tuple[score.Number, score.Number] | None = None,
    moments: int | Sequence[int] = 3,
    samples: int = 64,
    steps: int | None = None,
    seed: int = 0,
    meaning: Meaning = None,
    camera: str = "table",
    title: str | None = None,
) -> Figure:
    """Where a denoiser would send a noisy chunk, on a slice through the space of chunks, at several moments.

    policy, batch   a DiffusionPolicy, and normalised observations, of which `sample` is taken
    along           the two numbers of the chunk that vary, each (step, dimension); None for the direction
                    between the two groups into which `samples` chunks of this scene fall, and the one across
    moments         how many, evenly spread over the first four fifths of the sampler's steps, or which ones
    steps, seed     of the sampler that draws the samples
    meaning         of an action's numbers (`minivla.viz.plane.Meaning`): the groups are then those of the
                    motion alone, and below is drawn where the denoised chunks of the samples lead, over the
                    picture of `camera` if there is one of that name

    A panel freezes the noisy chunk of the first sample and varies two coordinates. Arrows are the score there
    (longest: √ᾱ x̂₀ - x, equal to σ² times the score); the colour says to which group the denoised chunk x̂₀
    belongs, white is between the two; dots are the samples at that moment, in the colour of where they end.
    Raises TypeError for a policy without a denoiser, ValueError for what is out of range.
    """
    score.expect_denoiser(policy)
    one = one_sample(batch, sample)
    flow = sampled(policy, one, samples, steps, seed)
    ends = flow.x[-1]
    moving = None if meaning is None else _moving(meaning, ends.shape[-1])
    if along is None:
        plane = score.slice_between(ends, moving)
    else:
        plane = score.slice_through(*along, like=ends[0])
    chosen = _moments(moments, len(flow.times) - 1)
    high = score.two_groups(plane.coordinates(ends)[:, 0])
    rows, side = 1 if meaning is None else 2, (palette.WIDTH - 0.3) / max(2, len(chosen)) - 0.3
    with palette.style():
        figure = palette.sheet(1.15 + side + (side + 0.1) * (rows - 1))
        axes = figure.subplots(rows, len(chosen), squeeze=False)
        counts = []
        for ax, k in zip(axes[0], chosen, strict=True):
            counts.append(_draw_level(ax, policy, one, flow, k, plane, high))
        axes[0, len(chosen) // 2].set_xlabel(plane.names[0])
        axes[0, 0].set_ylabel(plane.names[1])
        if meaning is not None:
            picture = table_picture(policy, one, meaning, camera)
            for ax, k in zip(axes[1], chosen, strict=True):
                _, clean = score.split(policy, flow.v[k], flow.x[k], float(flow.times[k]))
                _draw_answers(ax, commanded_paths(policy, one, clean, meaning), high, picture)
            axes[1, 0].set_ylabel("what x̂₀ commands")
        figure.supxlabel(LEGEND, fontsize=SMALL, color=palette.MUTED)
        palette.headline(figure, _title(counts, flow, chosen) if title is None else title)
    return figure


def one_sample(batch: Mapping[str, Any], sample: int) -> dict[str, Any]:
    """One sample of a batch, as a batch of one. Raises ValueError for a sample out of range."""
    size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
    if not 0 <= sample < size:
        raise ValueError(f"sample is {sample}; the batch has {size}: expected 0 to {size - 1}")
    return {k: v[sample : sample + 1] for k, v in batch.items() if isinstance(v, Tensor | list | tuple)}


def sampled(policy: Any, one: Mapping[str, Any], samples: int, steps: int | None, seed: int) -> Flow:
    """The paths of many samples of one scene (a batch of one)."""
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected at least 1, and 3 for the plane between groups")
    many = {
        key: value.expand(samples, *value.shape[1:]) if isinstance(value, Tensor) else list(value) * samples
        for key, value in one.items()
    }
    with tracing.trace(policy, attention=False) as t:
        policy.predict_action_chunk(many, steps=steps, generator=torch.Generator().manual_seed(seed))
    assert t.flow is not None
    return t.flow


def _moments(moments: int | Sequence[int], steps: int) -> list[int]:
    if not moments:
        raise ValueError(f"moments is {moments!r}; expected how many, at least 1, or which steps")
    if isinstance(moments, int):
        return spread_over(1 + math.ceil(0.8 * (steps - 1)), moments)  # at the end x̂₀ is x: nothing to see
    if wrong := [k for k in moments if not 0 <= k < steps]:
        raise ValueError(f"moments has {wrong}; the sampler's steps are 0 to {steps - 1}")
    return list(moments)


def _moving(meaning: Meaning, size: int) -> list[int]:
    plane = Plane.of(meaning, size)
    return [plane.x, plane.y]


def _draw_level(
    ax: Axes, policy: Any, one: Mapping[str, Any], flow: Flow, k: int, plane: score.Slice, high: Tensor
) -> int:
    """One noise level: colours, arrows, samples. Returns how many basins the middle row has."""
    time, ends = float(flow.times[k]), plane.coordinates(flow.x[-1])
    signal, sigma = score.scales(policy, time)
    middles = torch.stack((ends[~high].mean(0), ends[high].mean(0)))
    here, centre = plane.coordinates(flow.x[k], signal), signal * middles.mean(0)
    reach = 1.1 * float((here - centre).abs().max())
    places = centre + score.grid(reach, FIELD, flow.x)
    field = score.score_field(policy, one, flow.x[k, 0], time, plane, places)
    _draw_field(ax, field, as_array(centre), reach, middles)
    for group, colour in ((~high, LOW), (high, HIGH)):
        edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6, "gid": "samples"}
        ax.plot(*as_array(here[group]).T, "o", color=colour, markersize=3.6, **edge)
    noise = palette.percent(sigma**2 / (signal**2 + sigma**2))
    ax.set_title(f"time {clock(time)}: {noise} noise", fontsize=SMALL, fontweight="normal", pad=3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    ax.tick_params(labelsize=SMALL - 1)
    return score.basins(field, FIELD)


def _draw_field(ax: Axes, field: score.ScoreField, centre: np.ndarray, reach: float, middles: Tensor) -> None:
    """A square of places: arrows, and to which of two groups, whose middles are (2, 2), answers belong."""
    between, apart = middles[:, 0].mean(), (middles[1, 0] - middles[0, 0]) / 2
    shade = as_array((field.action[:, 0] - between) / apart).clip(-1.2, 1.2).reshape(FIELD, FIELD)
    frame = (centre[0] - reach, centre[0] + reach, centre[1] - reach, centre[1] + reach)
    look: dict[str, Any] = {"cmap": COLOURS, "vmin": -1.8, "vmax": 1.8, "alpha": 0.75}
    ax.imshow(shade, extent=frame, origin="lower", interpolation="bilinear", gid="answer", **look)
    inside = np.zeros((FIELD, FIELD), bool)
    inside[1::2, 1::2] = True
    some = inside.ravel()
    arrows = quiver(ax, as_array(field.places)[some], as_array(field.score)[some], 2 * reach)
    arrows.set(gid="score", color=palette.INK, alpha=0.8)


def _draw_answers(ax: Axes, paths: np.ndarray, high: Tensor, picture: Any) -> None:
    """What each sample's denoised chunk commands, in the colour of where the sample ends."""
    draw_table(ax, picture)
    for path, up in zip(paths, high.tolist(), strict=True):
        draw_way(ax, path, HIGH if up else LOW, None, strong=False)


def _title(counts: Sequence[int], flow: Flow, chosen: Sequence[int]) -> str:
    """The finding: how many basins at each moment."""
    times = [clock(float(flow.times[k])) for k in chosen]
    told = [f"{count} at time {time}" for count, time in zip(counts, times, strict=True)]
    told[0] = f"{palette.counted(counts[0], 'basin')} at time {times[0]}"
    return palette.listed(told, 9)
