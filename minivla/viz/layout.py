"""Where the tokens of a sequence lie in a picture: shared by ribbon, mask and bars.

One state token beside 64 patches is invisible when drawn to scale, so a segment is as wide as the square
root of its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from minivla.segments import Segment
from minivla.viz import palette

SMALLEST = 0.018  # share of the picture that any segment gets
LINE = 0.21  # inches from one line of labels to the next


def check_segments(segments: Sequence[Segment], length: int | None = None, what: str = "") -> list[Segment]:
    """The segments, if they are a sequence of `length` tokens laid end to end.

    Raises ValueError for an empty list, a gap or overlap, a length that does not add up, and a grid that
    does not fit.
    """
    segments = list(segments)
    if not segments:
        raise ValueError(
            f"there are no {what}segments to draw: the trace recorded none. Give a list of Segment, "
            "or trace a call of the policy that describes its sequence"
        )
    told = ", ".join(f"{s.name} {s.length}" for s in segments)
    total = sum(s.length for s in segments)
    if length is not None and total != length:
        raise ValueError(
            f"the {what}segments add up to {total} tokens ({told}), but the sequence has {length}; "
            "give each segment its length"
        )
    starts = np.cumsum([0, *(s.length for s in segments)])[:-1]
    wrong = [s.name for s, start in zip(segments, starts, strict=True) if s.start != start]
    if wrong:
        raise ValueError(
            f"the {what}segments {', '.join(wrong)} do not start where the one before ends ({told}); "
            "lay them out with minivla.segments.arrange(segments)"
        )
    for s in segments:
        if s.grid is not None and s.grid[0] * s.grid[1] != s.length:
            raise ValueError(
                f"segment {s.name!r} has {s.length} tokens and a grid of {s.grid[0]} × {s.grid[1]}; "
                "expected a grid with one place for each token"
            )
    return segments


def segment_edges(segments: Sequence[Segment]) -> np.ndarray:
    """Borders of the segments in [0, 1], (n + 1,): widths go with the square root of the length."""
    width = np.sqrt([s.length for s in segments])
    width = np.maximum(width / width.sum(), SMALLEST)
    return np.concatenate(([0.0], np.cumsum(width / width.sum())))


def token_edges(segments: Sequence[Segment]) -> np.ndarray:
    """Borders of the tokens in [0, 1], (L + 1,): each segment shared out evenly among its tokens."""
    edges = segment_edges(segments)
    inner = [np.linspace(edges[i], edges[i + 1], s.length + 1)[1:] for i, s in enumerate(segments)]
    return np.concatenate(([0.0], *inner))


@dataclass(eq=False)
class Label:
    """Where a name goes, in inches: text from `left` to `right` on line `level`; 0 is right above its box."""

    text: str
    anchor: float
    left: float
    right: float
    level: int


def place_labels(
    segments: Sequence[Segment], inches: float, texts: Sequence[str] | None = None
) -> list[Label]:
    """A name above its box where it fits, else higher up beside a leader line; nothing overlaps.

    Leaders in the left half have their text on the right and are placed from the middle outwards, each on
    the lowest free line: so no leader runs through a text. The right half is the mirror image.
    """
    edges = segment_edges(segments) * inches
    middles, rooms = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    labels = []
    for text, x in zip(texts or [f"{s.name} · {s.length}" for s in segments], middles, strict=True):
        half = palette.text_width(text) / 2 + 0.03
        centre = min(max(x, half), inches - half)
        labels.append(Label(text, float(x), centre - half, centre + half, 0))
    tight = [(room / (label.right - label.left), label) for label, room in zip(labels, rooms, strict=True)]
    narrow = [label for ratio, label in tight if ratio < 1]
    placed = [label for ratio, label in tight if ratio >= 1]
    for ratio, label in sorted(tight, key=lambda pair: -pair[0]):
        if 0.5 < ratio < 1 and _fits_above(label, placed, narrow):
            placed.append(label)
    led = [label for label in narrow if label not in placed]
    left = [label for label in led if label.anchor <= inches / 2]
    right = [label for label in led if label.anchor > inches / 2]
    for label in (*reversed(left), *right):
        _lead(label, placed, inches)
        placed.append(label)
    return labels


def _lead(label: Label, placed: Sequence[Label], inches: float) -> None:
    """Raise a name to the lowest line where it is clear, beside the end of its leader.

    Many narrow boxes side by side leave no such line: then the lowest without another name, over a leader.
    """
    width = label.right - label.left
    label.left = label.anchor if label.anchor <= inches / 2 else label.anchor - width
    label.right = label.left + width
    for meet in (_meet, _overlap):
        for label.level in range(1, len(placed) + 2):
            if not any(meet(label, other) for other in placed):
                return


def _fits_above(label: Label, placed: Sequence[Label], narrow: Sequence[Label]) -> bool:
    """Shift a name a little wider than its box to where it is clear of names and leaders, if it can be."""
    leaders = [other.anchor for other in narrow if other is not label and other not in placed]
    middle, half = (label.left + label.right) / 2, (label.right - label.left) / 2
    for shift in (0, 0.05, -0.05, 0.1, -0.1, 0.15, -0.15):
        label.left, label.right = middle + shift - half, middle + shift + half
        inside = -0.05 < label.left < label.anchor < label.right
        clear = not any(label.left < x < label.right for x in leaders)
        if inside and clear and not any(_meet(label, other) for other in placed):
            return True
    label.left, label.right = middle - half, middle + half
    return False


def _overlap(one: Label, other: Label) -> bool:
    return one.level == other.level and one.left < other.right and other.left < one.right


def _meet(one: Label, other: Label) -> bool:
    """Do the texts overlap, or does the leader of one run through the text of the other?"""
    if one.level == other.level:
        return _overlap(one, other)
    low, high = sorted((one, other), key=lambda label: label.level)
    return low.left < high.anchor < low.right


def draw_labels(ax: Axes, labels: Sequence[Label], inches: float, bottom: float) -> None:
    """Write the labels on axes that are `inches` wide, above `bottom`, which is in data units."""
    scale = ax.get_xlim()[1] / inches
    for label in labels:
        x, rise = label.anchor * scale, 72 * (0.05 + LINE * label.level)
        beside = 3 if label.left >= label.anchor - 1e-9 else -3
        if label.level:
            line = {"arrowstyle": "-", "color": palette.MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1}
            ax.annotate("", (x, bottom), (0, rise + 11), textcoords="offset points", arrowprops=line)
            align = "left" if beside > 0 else "right"
        else:
            x, beside, align = (label.left + label.right) / 2 * scale, 0, "center"
        style: dict[str, Any] = {"ha": align, "va": "bottom", "annotation_clip": False, "zorder": 4}
        style["bbox"] = {"boxstyle": "square,pad=0.1", "facecolor": palette.PAPER, "edgecolor": "none"}
        ax.annotate(label.text, (x, bottom), (beside, rise), textcoords="offset points", **style)


def spread(places: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """Ascending places moved apart, so that neighbours are `gap` or more from each other."""
    shift = np.arange(len(places)) * gap
    down = np.maximum.accumulate(np.asarray(places) - shift)
    up = np.minimum.accumulate((np.asarray(places) - shift)[::-1])[::-1]
    return (down + up) / 2 + shift
