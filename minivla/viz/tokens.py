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
from minivla.viz.masks import check_mask
from minivla.viz.pictures import as_array

RIBBON = 0.5  # inches
LEFT, RIGHT, BOTTOM, TOP = 0.15, 0.2, 0.48, 0.42


def plot_tokens(
    segments: Sequence[Segment],
    *,
    valid: Tensor | np.ndarray | None = None,
    mask: Tensor | np.ndarray | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The sequence as a ribbon: a box a segment with its name and length, patches as the grid they are.

    `valid` (L,) bool, False where a token is padding, which is hatched; without it, `mask` (Q, L) bool tells:
    padding is what no query may look at (`seen_tokens`). Boxes are as wide as the square
    root of their length, so that one token stays visible beside hundreds; the positions below are exact.
    Raises ValueError when there are no segments or they do not add up.
    """
    if valid is None and mask is not None:
        valid = seen_tokens(mask)
    segments = check_segments(segments, None if valid is None else len(valid))
    real = np.ones(segments[-1].stop, bool) if valid is None else as_array(valid).astype(bool)
    inches = palette.WIDTH - LEFT - RIGHT if ax is None else palette.inches(ax)
    labels = place_labels(segments, inches, [_count(s, real[s.start : s.stop]) for s in segments])
    with palette.style():
        if ax is None:
            above = LINE * (1 + max(label.level for label in labels))
            height = TOP + above + RIBBON + BOTTOM
            ax = palette.axes_at(palette.sheet(height, layout=None), LEFT, TOP, inches, above + RIBBON)
        ax.set(xlim=(0, inches), ylim=(0, ax.get_window_extent().height / palette.figure_of(ax).dpi))
        _draw_boxes(ax, segments, inches)
        _hatch_padding(ax, token_edges(segments) * inches, real)
        draw_labels(ax, labels, inches, RIBBON)
        _draw_positions(ax, segments, inches)
        ax.set_title(tokens_title(segments, real) if title is None else title, x=0)
    return palette.figure_of(ax)


def seen_tokens(mask: Tensor | np.ndarray) -> np.ndarray:
    """Tokens that at least one query may look at, (K,) bool, of a mask (Q, K): all others are padding.

    Raises ValueError and TypeError for what is no mask.
    """
    return np.asarray(check_mask(mask).any(axis=0))


def tokens_title(segments: Sequence[Segment], valid: np.ndarray | None = None) -> str:
    """What the ribbon shows: which kind fills more than half of it, else how many tokens there are."""
    total = sum(s.length for s in segments)
    padding = 0 if valid is None else int((~valid).sum())
    if padding:
        return f"{padding} of {total} tokens are padding"
    by_kind: dict[str, int] = {}
    for s in segments:
        by_kind[s.kind] = by_kind.get(s.kind, 0) + s.length
    kind, most = max(by_kind.items(), key=lambda item: item[1])
    if len(segments) == 1 or 2 * most <= total:
        return f"{palette.counted(total, 'token')} in {palette.counted(len(segments), 'segment')}"
    return f"{most} of {total} tokens are {palette.KIND_NAMES[kind]}"


def _count(segment: Segment, valid: np.ndarray) -> str:
    """A segment's label: its name and length, and how many tokens are real where some are not."""
    if valid.all() or segment.kind == "padding":
        return f"{segment.name} · {segment.length}"
    return f"{segment.name} · {int(valid.sum())} of {segment.length}"


def _draw_boxes(ax: Axes, segments: Sequence[Segment], inches: float) -> None:
    edges = segment_edges(segments) * inches
    for s, left, right in zip(segments, edges[:-1], edges[1:], strict=True):
        plain = {"facecolor": palette.colour_of(s.kind), "linewidth": 0}
        look: dict[str, Any] = palette.PADDING if s.kind == "padding" else plain
        ax.add_patch(Rectangle((left, 0), right - left, RIBBON, **look, gid=s.name))
        rows, columns = s.grid or (1, s.length)
        seam: dict[str, Any] = {"color": palette.PAPER, "linewidth": 0.4}
        if (right - left) / columns > 0.025:
            ax.vlines(np.linspace(left, right, columns + 1)[1:-1], 0, RIBBON, **seam)
        ax.hlines(np.linspace(0, RIBBON, rows + 1)[1:-1], left, right, **seam)
    ax.vlines(edges[1:-1], 0, RIBBON, color=palette.PAPER, linewidth=2.5)


def _hatch_padding(ax: Axes, edges: np.ndarray, valid: np.ndarray) -> None:
    steps = np.flatnonzero(np.diff(np.concatenate(([True], valid, [True])).astype(int)))
    for start, stop in zip(steps[::2], steps[1::2], strict=True):
        box = Rectangle((edges[start], 0), edges[stop] - edges[start], RIBBON, **palette.PADDING)
        box.set_gid("padding")
        ax.add_patch(box)


def _draw_positions(ax: Axes, segments: Sequence[Segment], inches: float) -> None:
    """Ticks at the borders, with exact positions; those that would collide are left out."""
    at, free = segment_edges(segments) * inches, -1.0
    names = [*(s.start for s in segments), segments[-1].stop]
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
