"""How a discrete policy uses its codes: bins, FAST tokens, entries of a codebook."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minivla.viz import palette
from minivla.viz.pictures import as_array


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
            _draw_usage(panel, count, order, f"level {level}\n" if len(counts) > 1 else "")
            if len(counts) > 1 or title is not None:
                _tell(panel, count)
        axes[-1].set_xlabel("codes, the most frequent first" if order == "usage" else "code")
        palette.entitle(axes[0], usage_title(counts) if title is None else title, own=ax is None)
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
