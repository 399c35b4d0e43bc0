"""How a time steers a network: scale, shift and gate of its adaptive norms, step by step of the sampler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minivla.viz import palette
from minivla.viz.flow import clock
from minivla.viz.pictures import as_array

PARTS = ("scale", "shift", "gate")
SMALL = palette.FONT - 1


def modulations(steps: Mapping[str, Tensor], part: str, *, sample: int = 0) -> tuple[list[str], np.ndarray]:
    """What steers each adaptive norm: their names, in the network's order, and (norms, N, D).

    steps: a trace's; part: "scale", "shift" or "gate"; sample: of those that may differ (a loss draws a time
    for each). Raises ValueError where no adaptive norm was recorded, or for another part or sample.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, expected one of {', '.join(PARTS)}")
    names = [name for name in steps if re.search(rf"norm\.{part}$", name)]
    if not names:
        raise ValueError(
            "no adaptive norm was recorded: of the policies here only π0.5 has some; trace "
            "predict_action_chunk, which tells them at each step of the sampler"
        )
    values = [as_array(steps[name]) for name in names]
    size = values[0].shape[1]
    if not 0 <= sample < max(size, 1) and size > 1:
        raise ValueError(f"sample is {sample}; there are {size}: expected 0 to {size - 1}")
    place = sample if size > 1 else 0
    return [name.removesuffix(f".{part}") for name in names], np.stack([v[:, place] for v in values])


def plot_modulation(
    steps: Mapping[str, Tensor], *, sample: int = 0, times: Tensor | None = None, title: str | None = None
) -> Figure:
    """Three heatmaps, norms down and sampler steps across: how strong scale, shift and gate are.

    A cell is the root mean square over the channels: 0 is a norm without scale or shift, and a gate through
    which nothing passes. `times` (N,) or (N, B) names the steps; without it `steps["time"]`. The norm before
    the last projection has no branch behind it: its gate is computed, and not used.
    Raises ValueError as `modulations`.
    """
    found = {part: modulations(steps, part, sample=sample) for part in PARTS}
    names, gates = found["gate"]
    clocks = _times(steps.get("time") if times is None else times, gates.shape[1], sample)
    with palette.style():
        figure = palette.sheet(0.95 + min(3.6, max(1.4, 0.13 * len(names))))
        axes = figure.subplots(1, 3, sharey=True)
        for ax, part in zip(axes, PARTS, strict=True):
            _draw_part(ax, part, found[part][1], clocks)
        _name_norms(axes[0], names)
        axes[0].set_ylabel("norm, first on top")
        figure.supxlabel("time of the flow, in the order of the sampler", fontsize=palette.FONT)
        palette.headline(figure, modulation_title(gates) if title is None else title)
    return figure


def modulation_title(gates: np.ndarray) -> str:
    """The finding, of gates (norms, N, D): how much they change along the way, or that they do not."""
    if gates.shape[1] < 2:
        return f"{len(gates)} norms steered by one time"
    change = np.sqrt(((gates - gates.mean(1, keepdims=True)) ** 2).mean((1, 2)))
    size = np.sqrt((gates**2).mean((1, 2)))
    share = float((change / np.maximum(size, 1e-12)).mean())
    return f"Along the flow a gate of the {len(gates)} norms varies by {palette.percent(share)} of its size"


def _times(times: Tensor | None, count: int, sample: int) -> list[str]:
    """A name for each step."""
    if times is None:
        return [str(i) for i in range(count)]
    values = as_array(times).astype(float)
    values = values if values.ndim == 1 else values[:, sample if values.shape[1] > 1 else 0]
    return [clock(float(value)) for value in values]


def _draw_part(ax: Axes, part: str, values: np.ndarray, clocks: list[str]) -> None:
    """Root mean squares (norms, N) over channels."""
    strength = np.sqrt((values**2).mean(-1))
    look: dict[str, Any] = {"aspect": "auto", "cmap": "viridis", "interpolation": "nearest", "vmin": 0}
    image = ax.imshow(strength, gid=part, **look)
    ax.set_title(part, fontsize=palette.FONT, fontweight="normal", pad=4)
    shown = np.unique(np.linspace(0, len(clocks) - 1, min(len(clocks), 5)).round().astype(int))
    ax.set_xticks(shown, [clocks[i] for i in shown])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = palette.figure_of(ax).colorbar(image, ax=ax, orientation="horizontal", pad=0.03, aspect=25)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL - 1)
    bar.set_label("root mean square", fontsize=SMALL - 1, labelpad=1)


def _name_norms(ax: Axes, names: list[str]) -> None:
    """Every norm by its layer where there is room, else every few layers."""
    rows = [(i, _short(name)) for i, name in enumerate(names)]
    stride = -(-len(rows) // 20)
    kept = (
        [row for row in rows if row[0] % (2 * stride) == 0 or row[0] == len(rows) - 1] if stride > 1 else rows
    )
    ax.set_yticks([i for i, _ in kept], [text for _, text in kept])


def _short(name: str) -> str:
    """ "suffix.3.input_norm" as "3 attention": the layer, and which branch lies behind the norm."""
    parts = name.split(".")
    branch = {"input_norm": "attention", "post_norm": "MLP"}.get(parts[-1], "last")
    return f"{parts[1]} {branch}" if len(parts) > 2 else branch
