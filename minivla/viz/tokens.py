"""The token ribbon: what a policy's sequence is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from minivla.segments import Segment
from minivla.viz import palette
from minivla.viz.layout import LINE, check_segments, draw_labels, place_labels, segment_edges, token_edges

RIBBON = 0.5  # inches
LEFT, RIGHT, BOTTOM, TOP = 0.15, 0.2, 0.48, 0.42


def plot_tokens(
    segments: Sequence[Segment],
    *,
    valid: Tensor | np.ndarray | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The sequence as a ribbon: a box a segment with its name and length, patches as the grid they are.

    `valid` (L,) bool, False where a token is padding, which is hatched. Boxes are as wide as the square
    root of their length, so that one token stays visible beside hundreds; the positions below are exact.
    Raises ValueError when there are no segments or they do not add up.
    """
    segments = check_segments(segments, None if valid is None else len(valid))
    inches = (
        palette.WIDTH - LEFT - RIGHT
        if ax is None
        else ax.get_window_extent().width / palette.figure_of(ax).dpi
    )
    labels = place_labels(segments, inches)
    with palette.style():
        if ax is None:
            above = LINE * (1 + max(label.level for label in labels))
            height = TOP + above + RIBBON + BOTTOM
            ax = palette.axes_at(palette.sheet(height, layout=None), LEFT, TOP, inches, above + RIBBON)
        ax.set(xlim=(0, inches), ylim=(0, ax.get_window_extent().height / palette.figure_of(ax).dpi))
        _draw_boxes(ax, segments, inches)
        if valid is not None:
            _hatch_padding(ax, token_edges(segments) * inches, np.asarray(valid, dtype=bool))
        draw_labels(ax, labels, inches, RIBBON)
        _draw_positions(ax, segments, inches)
        ax.set_title(tokens_title(segments) if title is None else title, x=0)
    return palette.figure_of(ax)


def tokens_title(segments: Sequence[Segment]) -> str:
    """What the ribbon shows: which kind fills more than half of it, else how many tokens there are."""
    total = sum(s.length for s in segments)
    by_kind: dict[str, int] = {}
    for s in segments:
        by_kind[s.kind] = by_kind.get(s.kind, 0) + s.length
    kind, most = max(by_kind.items(), key=lambda item: item[1])
    if len(segments) == 1 or 2 * most <= total:
        return f"{total} token{'s' * (total != 1)} in {len(segments)} segment{'s' * (len(segments) != 1)}"
    return f"{most} of {total} tokens are {palette.KIND_NAMES[kind]}"


def _draw_boxes(ax: Axes, segments: Sequence[Segment], inches: float) -> None:
    edges = segment_edges(segments) * inches
    for s, left, right in zip(segments, edges[:-1], edges[1:], strict=True):
        hatch = palette.HATCH if s.kind == "padding" else None
        style: dict[str, Any] = {
            "facecolor": palette.colour_of(s.kind),
            "hatch": hatch,
            "linewidth": 0,
            "gid": s.name,
        }
        ax.add_patch(Rectangle((left, 0), right - left, RIBBON, **style))
        rows, columns = s.grid or (1, s.length)
        seam: dict[str, Any] = {"color": palette.PAPER, "linewidth": 0.4}
        if (right - left) / columns > 0.025:
            ax.vlines(np.linspace(left, right, columns + 1)[1:-1], 0, RIBBON, **seam)
        ax.hlines(np.linspace(0, RIBBON, rows + 1)[1:-1], left, right, **seam)
    ax.vlines(edges[1:-1], 0, RIBBON, color=palette.PAPER, linewidth=2.5)


def _hatch_padding(ax: Axes, edges: np.ndarray, valid: np.ndarray) -> None:
    steps = np.flatnonzero(np.diff(np.concatenate(([True], valid, [True])).astype(int)))
    for start, stop in zip(steps[::2], steps[1::2], strict=True):
        width = edges[stop] - edges[start]
        grey = palette.KIND_COLOURS["padding"]
        ax.add_patch(
            Rectangle(
                (edges[start], 0),
                width,
                RIBBON,
                facecolor=grey,
                hatch=palette.HATCH,
                linewidth=0,
                gid="padding",
            )
        )


def _draw_positions(ax: Axes, segments: Sequence[Segment], inches: float) -> None:
    """Ticks at the borders, with exact positions; those that would collide are left out."""
    at, names, free = (
        segment_edges(segments) * inches,
        [*(s.start for s in segments), segments[-1].stop],
        -1.0,
    )
    shown = []
    for i in (len(names) - 1, *range(len(names) - 1)):
        half = palette.text_width(str(names[i]), palette.FONT - 1) / 2 + 0.02
        last = i == len(names) - 1
        if last or (at[i] - half > free and at[i] + half < at[-1] - 0.15):
            shown.append(i)
            free = free if last else at[i] + half
    shown.sort()
    ax.set_xticks(at[shown], [str(names[i]) for i in shown])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_xlabel("position in the sequence (box width: square root of its length)")
