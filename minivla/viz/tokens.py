"""The token ribbon: what a policy's sequence is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from minivla.viz.words import BOX, Word, draw_words, height_of, place_words, words_axes

RIBBON = 0.5  # inches
BLOCKS = 0.28  # inches for the blocks' lines
LEFT, RIGHT, BOTTOM, TOP = 0.15, 0.2, 0.48, 0.42


def plot_tokens(
    segments: Sequence[Segment],
    *,
    valid: Tensor | np.ndarray | None = None,
    mask: Tensor | np.ndarray | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The sequence as a ribbon: a box a segment with its name and length, patches as the grid they are.

    `valid` (L,) bool, False where a token is padding, which is hatched; without it, `mask` (Q, L) bool tells:
    padding is what no query may look at (`seen_tokens`). Boxes are as wide as the square
    root of their length, so that one token stays visible beside hundreds; the positions below are exact.
    Where segments share blocks, a line below the ribbon holds each block together: a token sees its own and
    those to the left. `words`: by segment's name, its tokens as text, which is written below (not on `ax`).
    Raises ValueError when there are no segments or they do not add up.
    """
    if valid is None and mask is not None:
        valid = seen_tokens(mask)
    segments = check_segments(segments, None if valid is None else len(valid))
    real = np.ones(segments[-1].stop, bool) if valid is None else as_array(valid).astype(bool)
    inches = palette.WIDTH - LEFT - RIGHT if ax is None else palette.inches(ax)
    labels = place_labels(segments, inches, [_count(s, real[s.start : s.stop]) for s in segments])
    texts = _texts(segments, words or {}, real, inches) if ax is None else []
    blocks = BLOCKS if len({s.block for s in segments}) not in (1, len(segments)) else 0.0
    with palette.style():
        if ax is None:
            above = LINE * (1 + max(label.level for label in labels))
            below = BOTTOM + blocks + sum(height_of(placed) + 0.1 for _, placed in texts)
            figure = palette.sheet(TOP + above + RIBBON + below, layout=None)
            ax = palette.axes_at(figure, LEFT, TOP, inches, above + RIBBON)
            _write_texts(figure, texts, TOP + above + RIBBON + BOTTOM + blocks, inches)
        ax.set(xlim=(0, inches), ylim=(0, ax.get_window_extent().height / palette.figure_of(ax).dpi))
        _draw_boxes(ax, segments, inches)
        _hatch_padding(ax, token_edges(segments) * inches, real)
        draw_labels(ax, labels, inches, RIBBON)
        _draw_positions(ax, segments, inches)
        if blocks:
            _draw_blocks(ax, segments, inches)
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


def _texts(
    segments: Sequence[Segment], words: Mapping[str, Sequence[str]], real: np.ndarray, inches: float
) -> list[tuple[Segment, list[Word]]]:
    """Segments whose words are known, and where these go: the first line leaves room for the name."""
    found = []
    for s in (s for s in segments if s.name in words):
        name = palette.text_width(f"{s.name}: ") + 0.06
        found.append((s, place_words(words[s.name], inches, real[s.start : s.stop], left=name)))
    return found


def _write_texts(
    figure: Figure, texts: Sequence[tuple[Segment, list[Word]]], down: float, inches: float
) -> None:
    for s, placed in texts:
        tall = height_of(placed)
        ax = palette.axes_at(figure, LEFT, down, inches, tall)
        words_axes(ax, inches, tall)
        ax.text(0, tall - BOX / 2, f"{s.name}:", va="center_baseline", fontsize=palette.FONT)
        draw_words(
            ax, placed, [palette.blend(palette.PAPER, palette.colour_of(s.kind), 0.45)] * len(placed), tall
        )
        down += tall + 0.1


def _draw_blocks(ax: Axes, segments: Sequence[Segment], inches: float) -> None:
    """A line below the ribbon for each run of segments that share a block, with the block's number."""
    edges, high = segment_edges(segments) * inches, -0.1
    starts = [i for i, s in enumerate(segments) if i == 0 or s.block != segments[i - 1].block]
    for first, stop in zip(starts, [*starts[1:], len(segments)], strict=True):
        left, right = edges[first] + 0.03, edges[stop] - 0.03
        ax.plot((left, right), (high, high), color=palette.INK, linewidth=1.2, clip_on=False, gid="block")
        number = segments[first].block
        told = f"block {number}" if right - left > 0.6 else str(number)
        box = {"boxstyle": "square,pad=0.15", "facecolor": palette.PAPER, "edgecolor": "none"}
        place: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": palette.FONT - 1, "clip_on": False}
        ax.text((left + right) / 2, high - 0.03, told, color=palette.MUTED, bbox=box, **place)
    ax.tick_params(axis="x", pad=3 + 72 * BLOCKS)


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
