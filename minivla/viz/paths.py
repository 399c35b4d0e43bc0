"""Ways of many samples in two dimensions, side by side: the lines a flow is trained on, the ways it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from minivla.viz import palette
from minivla.viz.flow import ACTION, NOISE
from minivla.viz.pictures import as_array

SPREAD = 99  # per cent of the points that the axes are made for, along each axis


def plot_paths(
    panels: Mapping[str, Any],
    *,
    obstacle: float | None = None,
    names: tuple[str, str] = ("action 0", "action 1"),
    most: int = 60,
    title: str | None = None,
) -> Figure:
    """Small panels of one scale: each sample's way from noise (grey) to action (vermilion).

    panels     {title: points (N + 1, B, 2), from the noise to the result}; of each at most `most` ways are
               drawn, and all results
    obstacle   radius of a circle around (0, 0), where nothing should arrive
    names      of the two axes

    Raises ValueError for no panels, and for points of another shape.
    """
    drawn = {name: as_array(points).astype(float) for name, points in panels.items()}
    if not drawn:
        raise ValueError("there are no panels to draw; expected {title: points (N + 1, B, 2)}")
    for name, points in drawn.items():
        if points.ndim != 3 or points.shape[-1] != 2 or len(points) < 2:
            raise ValueError(
                f"the points of {name!r} have shape {points.shape}; expected (N + 1, B, 2) with N ≥ 1"
            )
    reach = np.percentile(np.abs(np.concatenate([p.reshape(-1, 2) for p in drawn.values()])), SPREAD)
    side = palette.WIDTH / len(drawn)
    with palette.style():
        figure = palette.sheet(min(side, 3.2) + 0.45 + 0.25 * (title is not None))
        axes = figure.subplots(1, len(drawn), sharex=True, sharey=True, squeeze=False)[0]
        for ax, (name, points) in zip(axes, drawn.items(), strict=True):
            _draw_ways(ax, points[:, :most])
            ax.plot(*points[-1].T, "o", color=ACTION, markersize=1.6, alpha=0.55, gid="results", zorder=4)
            if obstacle is not None:
                ax.add_patch(Circle((0, 0), obstacle, facecolor=palette.FAINT, zorder=0, gid="obstacle"))
            ax.set(xlim=(-1.1 * reach, 1.1 * reach), ylim=(-1.1 * reach, 1.1 * reach), aspect="equal")
            ax.set_xlabel(names[0])
            ax.set_title(palette.wrapped(name, side - 0.4, palette.FONT), fontsize=palette.FONT)
        axes[0].set_ylabel(names[1])
        palette.say(axes[0], 0, "noise", NOISE, left=True)
        palette.say(axes[0], 1, "action", ACTION, left=True)
        if title is not None:
            palette.headline(figure, title)
    return figure


def _draw_ways(ax: Axes, points: np.ndarray) -> None:
    """Ways (N + 1, B, 2), each piece coloured by how far along it is, and dots where they start."""
    pieces = np.stack((points[:-1], points[1:]), axis=2)  # (N, B, 2 ends, 2)
    shares = np.arange(len(pieces)) / max(1, len(pieces) - 1)
    colours = [palette.blend(palette.HATCH_INK, ACTION, float(share)) for share in shares]
    look: dict[str, Any] = {"linewidths": 0.8, "alpha": 0.75, "capstyle": "round"}
    for piece, colour in zip(pieces, colours, strict=True):
        ax.add_collection(LineCollection(list(piece), colors=colour, zorder=2, gid="ways", **look))
    ax.plot(*points[0].T, "o", color=NOISE, markersize=2.4, gid="noise", zorder=3)
