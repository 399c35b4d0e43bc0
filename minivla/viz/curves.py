"""Curves side by side, each with its name at its end: an error against the calls of a network, a loss against
the time of a flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from minivla.viz import palette
from minivla.viz.layout import spread
from minivla.viz.pictures import as_array

COLOURS = ("action", "image", "state", "time", "latent")  # kinds: of the first curve, the second, …
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)), (0, (3, 3)))  # colours fade in grey
MARKED = 16  # points up to which a curve shows them


def plot_curves(
    curves: Mapping[str, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Up to five curves, named where they end.

    curves   {name: (x (N,), y (N,) or (R, N))}: of several runs the mean is drawn, and the range as a band
    log      which axes are logarithmic: "", "x", "y" or "xy"

    Raises ValueError for no curves or too many, for shapes that do not fit, and for values that are not
    positive on a logarithmic axis.
    """
    drawn = {name: _curve(name, *pair, log) for name, pair in curves.items()}
    if not 1 <= len(drawn) <= len(COLOURS):
        raise ValueError(f"{len(drawn)} curves were given; expected 1 to {len(COLOURS)}, to tell them apart")
    with palette.style():
        own = ax is None
        figure, ax = palette.panel(ax, 2.9)
        for side in log:
            ax.set(**{f"{side}scale": "log"})
        for (name, (x, runs)), kind, dash in zip(drawn.items(), COLOURS, DASHES, strict=False):
            look: dict[str, Any] = {"color": palette.KIND_COLOURS[kind], "linestyle": dash}
            mark = "o" if len(x) <= MARKED else ""
            ax.plot(x, runs.mean(0), marker=mark, markersize=3, linewidth=1.8, gid=name, zorder=3, **look)
            if len(runs) > 1:
                ax.fill_between(x, runs.min(0), runs.max(0), color=look["color"], alpha=0.18, linewidth=0)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        every = np.unique(np.concatenate([x for x, _ in drawn.values()]))
        if "x" in log and len(every) <= MARKED // 2:
            ax.set_xticks(every)
        for axis in [getattr(ax, f"{side}axis") for side in log]:
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        _name_ends(ax, drawn)
        if title is not None:
            palette.entitle(ax, title, own=own)
    return figure


def _curve(name: str, x: Any, y: Any, log: str) -> tuple[np.ndarray, np.ndarray]:
    """Places (N,) and runs (R, N) of one curve."""
    x, runs = as_array(x).astype(float), np.atleast_2d(as_array(y).astype(float))
    if x.ndim != 1 or not len(x) or runs.ndim != 2 or runs.shape[1] != len(x):
        raise ValueError(
            f"curve {name!r} has x {x.shape} and y {as_array(y).shape}; expected (N,), and (N,) or (R, N)"
        )
    for side, values in (("x", x), ("y", runs)):
        if side in log and not (values > 0).all():
            raise ValueError(
                f"curve {name!r} has {side} = {values.min():g}, on a logarithmic axis; expected above 0"
            )
    return x, runs


def _name_ends(ax: Axes, drawn: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Names right of the axes, as high as the last points, moved apart where they would touch."""
    ax.autoscale_view()  # limits, which are otherwise found when a figure is drawn
    ends = np.array([(x[-1], runs.mean(0)[-1]) for x, runs in drawn.values()])
    places = ax.transAxes.inverted().transform(ax.transData.transform(ends))[:, 1]
    order = places.argsort(kind="stable")
    height = ax.get_window_extent().height / palette.figure_of(ax).dpi
    at = spread(places[order], 0.16 / max(height, 0.5))
    names = list(drawn)
    font: dict[str, Any] = {"fontsize": palette.FONT - 1, "fontweight": "bold", "va": "center"}
    beside: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    for place, i in zip(at, order, strict=True):
        colour = palette.KIND_COLOURS[COLOURS[i]]
        ax.annotate(names[i], (1, float(place)), (4, 0), color=colour, **beside, **font)
