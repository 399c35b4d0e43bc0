"""Temporal ensembling: every step predicts a chunk, and what is executed is a weighted mean of all that
speak of now.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minivla.viz import palette
from minivla.viz.pictures import as_array


def plot_ensemble(
    chunks: Tensor | np.ndarray,
    coefficient: float = 0.01,
    *,
    dimension: int = 0,
    at: int | None = None,
    name: str | None = None,
    title: str | None = None,
) -> Figure:
    """Chunks as rows over time, each cell as strong as its say in its moment; below, what comes of it.

    chunks (T, H, A) or (T, H): the chunk predicted at each of T steps, one dimension of which is drawn.
    coefficient: m of weight exp(-m i), where i = 0 is the oldest prediction. `at` is the moment whose weights
    are written out (default: the last that a full set of chunks speaks of).

    Raises ValueError for other shapes or a moment out of range.
    """
    values = _check(chunks, dimension)
    steps, horizon = values.shape
    weights, executed = ensemble_weights(steps, horizon, coefficient), ensemble(values, coefficient)
    moment = min(horizon, steps) - 1 if at is None else at
    if not 0 <= moment < steps:
        raise ValueError(f"at is {moment}; {steps} chunks were given: expected 0 to {steps - 1}")
    name = f"action {dimension}" if name is None else name
    with palette.style():
        rows = min(0.19 * steps + 0.3, 3.6)
        figure = palette.sheet(rows + 2.2)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(rows, 1.4))
        _draw_rows(above, weights, horizon, moment)
        _write_weights(above, weights[:, moment], moment)
        _draw_values(below, values, executed, moment, name)
        palette.headline(figure, ensemble_title(weights, moment) if title is None else title)
    return figure


def ensemble_weights(steps: int, horizon: int, coefficient: float) -> np.ndarray:
    """The say of chunk s in the action of moment t, (steps, steps + horizon - 1); columns add up to 1.

    Only the columns t < steps are ever executed; later ones are what is known of the future after the last
    step. Source: Zhao et al. 2023 (ACT), algorithm 2.
    """
    made, moment = np.arange(steps), np.arange(steps + horizon - 1)
    age = rearrange(moment, "moment -> 1 moment") - rearrange(made, "made -> made 1")
    speaks = (age >= 0) & (age < horizon)
    order = np.cumsum(speaks, axis=0) - 1  # 0 for the oldest chunk that speaks of this moment
    weights = np.where(speaks, np.exp(-coefficient * order), 0.0)
    return weights / weights.sum(axis=0)


def ensemble(chunks: np.ndarray, coefficient: float) -> np.ndarray:
    """The executed actions (T,) of chunks (T, H), one dimension."""
    steps, horizon = chunks.shape
    spread = np.zeros((steps, steps + horizon - 1))
    for made, chunk in enumerate(chunks):
        spread[made, made : made + horizon] = chunk
    return (ensemble_weights(steps, horizon, coefficient) * spread).sum(axis=0)[:steps]


def ensemble_title(weights: np.ndarray, moment: int) -> str:
    """The finding: how many chunks share the marked action, and who has the most say."""
    say = weights[:, moment]
    count, oldest, newest = int((say > 0).sum()), say[say > 0][0], say[say > 0][-1]
    if count == 1:
        return f"Step {moment} has one prediction to go by"
    who = (
        "all have the same say"
        if np.isclose(oldest, newest)
        else f"the {'oldest' if oldest > newest else 'newest'} has the most say"
    )
    return f"The action of step {moment} is a mean of {count} predictions: {who}"


def _check(chunks: Any, dimension: int) -> np.ndarray:
    array = as_array(chunks).astype(float)
    if array.ndim == 3 and not 0 <= dimension < array.shape[2]:
        raise ValueError(
            f"dimension is {dimension}; the chunks have {array.shape[2]}: expected 0 to {array.shape[2] - 1}"
        )
    if array.ndim == 3:
        array = array[:, :, dimension]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"chunks have shape {np.shape(chunks)}; expected (T, H, A) or (T, H): one chunk a step"
        )
    return array


def _draw_rows(ax: Axes, weights: np.ndarray, horizon: int, moment: int) -> None:
    """A bar a chunk; a cell is as strong as its weight beside the largest of its moment."""
    steps = len(weights)
    strongest = weights.max(axis=0)
    for made in range(steps):
        for t in range(made, made + horizon):
            share = 0.1 + 0.9 * weights[made, t] / strongest[t]
            colour = palette.blend(palette.PAPER, palette.KIND_COLOURS["action"], share)
            look: dict[str, Any] = {"facecolor": colour if t < steps else palette.KIND_COLOURS["padding"]}
            cell = Rectangle((t - 0.47, made - 0.4), 0.94, 0.8, linewidth=0, gid=f"chunk {made}", **look)
            ax.add_patch(cell)
    ax.add_patch(
        Rectangle((moment - 0.5, -0.6), 1, steps + 0.2, fill=False, edgecolor=palette.INK, linewidth=1.4)
    )
    told = "the stronger the colour, the more say\ngrey: not executed yet"
    ax.text(0.995, 0.97, told, transform=ax.transAxes, ha="right", va="top", fontsize=palette.FONT - 1)
    ax.set(xlim=(-0.7, steps + horizon - 1.3), ylim=(steps - 0.3, -0.7), ylabel="chunk predicted\nat step")
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.tick_params(axis="x", length=0, labelbottom=False)


def _write_weights(ax: Axes, say: np.ndarray, moment: int) -> None:
    """The weights of one moment, beside its cells; of many, only the oldest and the newest."""
    speaking = np.flatnonzero(say)
    box = {"boxstyle": "round,pad=0.12", "facecolor": palette.PAPER, "edgecolor": "none", "alpha": 0.92}
    for made in speaking if len(speaking) <= 10 else speaking[[0, -1]]:
        ax.text(moment + 0.65, made, f"{say[made]:.2f}", va="center", fontsize=palette.FONT - 2, bbox=box)


def _draw_values(ax: Axes, values: np.ndarray, executed: np.ndarray, moment: int, name: str) -> None:
    steps, horizon = values.shape
    for made, chunk in enumerate(values):
        thin: dict[str, Any] = {"color": palette.KIND_COLOURS["action"], "linewidth": 0.9, "alpha": 0.4}
        ax.plot(np.arange(made, made + horizon), chunk, gid="chunk", **thin)
    strong: dict[str, Any] = {"linewidth": 2, "marker": "o", "markersize": 3, "gid": "executed"}
    ax.plot(np.arange(steps), executed, color=palette.INK, **strong)
    ax.axvline(moment, color=palette.INK, linewidth=0.8, linestyle=(0, (2, 2)))
    palette.say(ax, 0, "executed", palette.INK)
    palette.say(ax, 1, "predictions", palette.KIND_COLOURS["action"])
    ax.set(xlabel="step of the episode", ylabel=name)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
