"""How a discrete policy uses its codes: bins, FAST tokens, entries of a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from minivla.viz import palette
from minivla.viz.pictures import as_array

DEAD = palette.KIND_COLOURS["padding"]
TICKS = 24  # codes named along an axis, at most


def plot_code_usage(
    codes: Tensor | np.ndarray,
    size: int,
    *,
    order: Literal["usage", "id"] = "usage",
    levels: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """How often each of `size` codes occurs: a bar a code, the even share as a line, dead codes grey.

    codes    integers in [0, size), of any shape; with `levels` their last axis counts the levels of a
             residual quantiser, each of which gets a panel (and `ax` is refused when there are several)
    order    "usage", the most frequent first, or "id", which shows gaps in what should be continuous

    The perplexity (`perplexity`) is how many codes, used evenly, would be as hard to guess. Raises
    ValueError for no codes, codes out of range, another order or `ax` with several levels, TypeError for
    codes that are not integers.
    """
    if order not in ("usage", "id"):
        raise ValueError(f"order is {order!r}; expected 'usage' or 'id'")
    table = as_array(codes)
    parts = np.moveaxis(table, -1, 0) if levels and table.ndim else table[None]
    counts = [code_counts(part, size) for part in parts]
    if ax is not None and len(counts) != 1:
        raise ValueError(f"there are {len(counts)} levels; `ax` takes one: give codes[..., 0] without levels")
    with palette.style():
        if ax is None:
            figure = palette.sheet(0.75 + 1.65 * len(counts))
            axes = list(figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0])
        else:
            figure, ax = palette.panel(ax, 0)
            axes = [ax]
        for level, (panel, count) in enumerate(zip(axes, counts, strict=True)):
            _draw_usage(panel, count, order, f"level {level + 1}\n" if len(counts) > 1 else "")
            if len(counts) > 1 or title is not None:
                _tell(panel, count)
        axes[-1].set_xlabel("codes, the most frequent first" if order == "usage" else "code")
        palette.entitle(axes[0], usage_title(counts) if title is None else title, own=ax is None)
    return figure


def plot_code_grid(
    codes: Tensor | np.ndarray,
    sizes: int | Sequence[int],
    *,
    levels: tuple[int, int] = (1, 2),
    order: Literal["usage", "id"] = "id",
    title: str | None = None,
) -> Figure:
    """How often each pair of two levels' codes occurs: a map of counts, pairs that never do grey; beside it
    and above, how often each code does.

    codes    integers (..., G): a code for each level of a residual quantiser
    sizes    how many codes each level has, or one number for all
    levels   which two, counted from 1: the first down, the second across
    order    "id", or "usage", the most frequent first

    Perplexities are those of `perplexity`; of the pairs it reaches the product of the levels' own only where
    these know nothing of each other. Raises ValueError for codes, levels, sizes or an order out of range,
    TypeError for codes that are not integers.
    """
    counts = _pairs(codes, sizes, levels)
    if order not in ("usage", "id"):
        raise ValueError(f"order is {order!r}; expected 'usage' or 'id'")
    down, across = (
        np.argsort(-uses, kind="stable") if order == "usage" else np.arange(len(uses))
        for uses in (counts.sum(axis=1), counts.sum(axis=0))
    )
    with palette.style():
        figure = palette.sheet(5.6, layout=None)
        picture = _draw_pairs(palette.axes_at(figure, 0.62, 1.34, 3.75, 3.75), counts[np.ix_(down, across)])
        _name_codes(picture, down, across, levels)
        _draw_margins(figure, counts[np.ix_(down, across)])
        palette.headline(figure, grid_title(counts) if title is None else title)
    return figure


def perplexity(codes: Tensor | np.ndarray, size: int) -> float:
    """The exponential of the codes' entropy: `size` when all are used evenly, 1 when only one is used.

    Raises ValueError and TypeError as `plot_code_usage` does.
    """
    return _perplexity(code_counts(codes, size))


def code_counts(codes: Tensor | np.ndarray, size: int) -> np.ndarray:
    """How often each code occurs, (size,). Raises ValueError and TypeError as `plot_code_usage` does."""
    table = as_array(codes)
    if not np.issubdtype(table.dtype, np.integer):
        raise TypeError(f"the codes are {table.dtype}; expected integers: the codes, not what they stand for")
    if not table.size:
        raise ValueError(f"there are no codes to count: they have shape {table.shape}")
    if table.min() < 0 or table.max() >= size:
        raise ValueError(
            f"codes lie between {table.min()} and {table.max()}; expected 0 to {size - 1} (size is {size}). "
            "Leave padding out: codes[valid]"
        )
    return np.bincount(table.reshape(-1), minlength=size)


def usage_title(counts: list[np.ndarray]) -> str:
    """The finding: how many codes are dead, and what the rest are worth."""
    dead, size = sum(int((count == 0).sum()) for count in counts), sum(len(count) for count in counts)
    worth = " and ".join(f"{_perplexity(count):.3g}" for count in counts[:3])
    more = ", …" if len(counts) > 3 else ""
    told = "Every code is used" if not dead else f"{dead:,} of {size:,} codes are never used"
    return f"{told}; perplexity {worth}{more}"


def grid_title(counts: np.ndarray) -> str:
    """The finding: how many pairs (C, C) there really are, and what they are worth."""
    alone = [_perplexity(counts.sum(axis=axis)) for axis in (1, 0)]
    told = f"{int((counts > 0).sum()):,} of {counts.size:,} pairs occur\nPerplexity {alone[0]:.3g} and "
    both = f"{_perplexity(counts.reshape(-1)):.3g}"
    return told + f"{alone[1]:.3g}, together {both} (independent levels: {alone[0] * alone[1]:.3g})"


def _pairs(codes: Tensor | np.ndarray, sizes: int | Sequence[int], levels: tuple[int, int]) -> np.ndarray:
    """How often each pair of codes occurs, (C, C). Raises ValueError and TypeError as `plot_code_grid`."""
    table = as_array(codes)
    count = table.shape[-1] if table.ndim else 0
    many = [sizes] * count if isinstance(sizes, int) else list(sizes)
    if len(many) != count:
        raise ValueError(
            f"sizes are {many}, but codes has shape {table.shape}; expected (..., {len(many)}), a code for "
            "each level"
        )
    if len(set(levels)) != 2 or not all(1 <= level <= count for level in levels):
        raise ValueError(f"levels are {levels}; expected two of 1 to {count}, as codes has {table.shape}")
    for level, size in enumerate(many):
        code_counts(table[..., level], size)
    first, second = (table[..., level - 1].reshape(-1) for level in levels)
    counts = np.zeros([many[level - 1] for level in levels], dtype=np.int64)
    np.add.at(counts, (first, second), 1)
    return counts


def _draw_pairs(ax: Axes, counts: np.ndarray) -> Axes:
    """The map, with its scale: logarithmic, since a few pairs are most of a data set."""
    shown: dict[str, Any] = {"norm": LogNorm(1, max(2, counts.max())), "cmap": "viridis", "aspect": "auto"}
    ax.set_facecolor(DEAD)
    image = ax.imshow(np.ma.masked_equal(counts, 0), interpolation="nearest", gid="pairs", **shown)
    scale = palette.axes_at(palette.figure_of(ax), 5.42, 1.34, 0.14, 3.75)
    bar = palette.figure_of(ax).colorbar(image, cax=scale)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    bar.ax.minorticks_off()
    bar.set_label("uses of the pair (grey: none)")
    return ax


def _name_codes(ax: Axes, down: np.ndarray, across: np.ndarray, levels: tuple[int, int]) -> None:
    ax.set(xlabel=f"code of level {levels[1]}", ylabel=f"code of level {levels[0]}")
    for axis, ids in ((ax.xaxis, across), (ax.yaxis, down)):
        places = np.arange(0, len(ids), 1 + (len(ids) - 1) // TICKS)
        axis.set_ticks(places, [str(ids[place]) for place in places])
        axis.set_tick_params(length=0)


def _draw_margins(figure: Figure, counts: np.ndarray) -> None:
    """Each level's own usage, along its side of the map."""
    boxes = (0.62, 0.62, 3.75, 0.64), (4.45, 1.34, 0.64, 3.75)
    fill: dict[str, Any] = {"fill": True, "color": palette.KIND_COLOURS["action"], "linewidth": 0}
    font: dict[str, Any] = {"fontsize": 7, "color": palette.MUTED}
    for down, box in enumerate(boxes):
        ax, uses = palette.axes_at(figure, *box), counts.sum(axis=down)
        way: Any = "horizontal" if down else "vertical"
        ax.stairs(uses / uses.sum(), np.arange(len(uses) + 1) - 0.5, orientation=way, gid="usage", **fill)
        ax.spines[:].set_visible(False)
        ax.set(xticks=[], yticks=[])
        for code in np.flatnonzero(uses == 0) if len(uses) <= TICKS else ():
            place: Any = (0, code) if down else (code, 0)
            align = {"va": "center"} if down else {"ha": "center", "rotation": 90}
            ax.annotate(
                "never", place, (2, 0) if down else (0, 2), textcoords="offset points", **align, **font
            )
        span = (len(uses) - 0.5, -0.5)
        ax.set_ylim(span) if down else ax.set_xlim(span[::-1])


def _perplexity(count: np.ndarray) -> float:
    share = count[count > 0] / count.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _draw_usage(ax: Axes, count: np.ndarray, order: str, name: str) -> None:
    share = count / count.sum()
    shown = np.sort(share)[::-1] if order == "usage" else share
    edges = np.arange(len(share) + 1) - 0.5
    fill: dict[str, Any] = {"fill": True, "color": palette.KIND_COLOURS["action"], "linewidth": 0}
    ax.stairs(shown, edges, gid="usage", **fill)
    even = 1 / len(share)
    ax.axhline(even, color=palette.INK, linewidth=0.9)
    ax.text(1.005, even, "even", transform=ax.get_yaxis_transform(), va="center", fontsize=palette.FONT - 1)
    top = 1.18 * max(shown.max(), even)
    grey: dict[str, Any] = {"facecolor": palette.KIND_COLOURS["padding"], "edgecolor": palette.HATCH_INK}
    for code in np.flatnonzero(shown == 0):
        ax.axvspan(code - 0.5, code + 0.5, **grey, linewidth=0, zorder=0, gid="dead")
    ax.set(xlim=(-0.5, len(share) - 0.5), ylim=(0, top), ylabel=f"{name}share of all uses")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))


def _tell(ax: Axes, count: np.ndarray) -> None:
    """What the title does not say: the numbers of this level."""
    told = f"{int((count == 0).sum())} dead, perplexity {_perplexity(count):.3g} of {len(count)}"
    where: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "va": "top"}
    box = {"boxstyle": "square,pad=0.15", "facecolor": palette.PAPER, "edgecolor": "none", "alpha": 0.9}
    ax.text(0.99, 0.97, told, fontsize=palette.FONT - 1, bbox=box, **where)
