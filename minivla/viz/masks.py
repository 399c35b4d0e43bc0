"""The attention mask as a block picture: queries down, keys across, filled where a query may look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from minivla.segments import Segment
from minivla.viz import palette
from minivla.viz.layout import (
    LINE,
    check_segments,
    draw_labels,
    place_labels,
    segment_edges,
    spread,
    token_edges,
)
from minivla.viz.pictures import as_array

SIDE, RIGHT, BOTTOM, TOP = 3.4, 0.85, 0.35, 0.42  # inches


def plot_mask(
    mask: Tensor | np.ndarray | None,
    query_segments: Sequence[Segment],
    key_segments: Sequence[Segment],
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Who may look at whom. `mask` (Q, K) bool, True = may look; segments name its rows and its columns.

    A filled place has the colour of the key looked at; on the right, how many keys each group of queries
    sees. Of one sequence that looks at itself, tokens at which nobody looks, not even they, are padding:
    hatched, as rows too, whatever these see; strong lines part the blocks. Rows and columns are as wide as
    the square root of their group's length. Raises ValueError when there is no mask or the segments do not
    add up to its sides.
    """
    table = check_mask(mask)
    queries = check_segments(query_segments, table.shape[0], "query ")
    keys = check_segments(key_segments, table.shape[1], "key ")
    found = mask_title(table, queries, keys) if title is None else title
    with palette.style():
        own, ax = ax is None, _axes(ax, queries, keys, found)
        x, y = token_edges(keys), token_edges(queries)
        ax.pcolormesh(x, y, mask_picture(table, keys), edgecolors="none", antialiased=False, gid="mask")
        ax.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
        _hatch(ax, keys)
        padding = padded(table, queries, keys)
        _hatch_padding(ax, padding, x)
        _rule_off(ax, queries, keys)
        lines = _name_groups(ax, queries, keys, sees(table, queries, padding))
        if own:
            _write_title(palette.figure_of(ax), found)
        else:
            ax.set_title(found, pad=72 * (0.1 + LINE * lines))
    return palette.figure_of(ax)


def check_mask(mask: Tensor | np.ndarray | None) -> np.ndarray:
    """The mask as (Q, K) bool. Raises ValueError for none and for a batch of them, TypeError for numbers."""
    if mask is None:
        raise ValueError(
            "there is no mask to draw: the policy described none. Give a site: trace.plot_mask('encoder.0')"
        )
    table = as_array(mask)
    if table.ndim != 2:
        raise ValueError(
            f"the mask has shape {table.shape}; expected (Q, K). Of a batch give one sample: mask[0]"
        )
    if table.dtype != bool:
        raise TypeError(
            f"the mask holds {table.dtype}; expected bool, True = may look. "
            "Give mask.bool(), or ~mask.bool() if 1 means closed"
        )
    return table


def mask_picture(mask: np.ndarray, keys: Sequence[Segment]) -> np.ndarray:
    """Colours (Q, K, 3) in [0, 1]: the key's own where it may be looked at, faint grey elsewhere."""
    colour = np.concatenate([np.tile(to_rgb(palette.colour_of(s.kind)), (s.length, 1)) for s in keys])
    return np.where(
        rearrange(mask, "q k -> q k 1"), rearrange(colour, "k rgb -> 1 k rgb"), to_rgb(palette.FAINT)
    )


def sees(
    mask: np.ndarray, queries: Sequence[Segment], padding: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """For each group of queries, the fewest and the most keys that one of its tokens may look at; of tokens
    that are real, unless all are `padding` (Q,): then (0, 0).
    """
    counts, found = mask.sum(axis=1), []
    for s in queries:
        own = counts[s.start : s.stop]
        own = own if padding is None else own[~padding[s.start : s.stop]]
        found.append(
            (int(own.min(initial=len(counts) + mask.shape[1])), int(own.max())) if len(own) else (0, 0)
        )
    return found


def padded(mask: np.ndarray, queries: Sequence[Segment], keys: Sequence[Segment]) -> np.ndarray:
    """Which tokens of a sequence that looks at itself are padding, (Q,) bool: nobody looks there."""
    return np.asarray(~mask.any(axis=0)) if list(queries) == list(keys) else np.zeros(len(mask), bool)


def blocks_of(mask: np.ndarray, segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments of one sequence, together where they share a block, if the mask is what blocks say: each
    real token sees all real ones of its block and of lower ones, and none of higher ones. Else none.
    """
    real = mask.any(axis=0)
    block = np.concatenate([np.full(s.length, s.block) for s in segments])
    expected = (block[None, :] <= block[:, None]) & real
    if not np.array_equal(mask[real], expected[real]):
        return []
    numbers = sorted({s.block for s in segments})
    return [[s for s in segments if s.block == number] for number in numbers]


def blocks_title(blocks: Sequence[Sequence[Segment]]) -> str:
    """What blocks mean, in words."""
    number = ("One", "Two", "Three", "Four", "Five")[len(blocks) - 1] if len(blocks) < 6 else f"{len(blocks)}"
    told = " → ".join(palette.listed([s.name for s in block], 4) for block in reversed(blocks))
    return f"{number} blocks, each sees itself and those before it: {told}"


def mask_title(mask: np.ndarray, queries: Sequence[Segment], keys: Sequence[Segment]) -> str:
    """The finding: everything is open, looking goes one way only, or some group is kept for a few."""
    if mask.all():
        return "Every token may look at every token"
    if _one_way(mask, queries, keys):
        return "Looking goes one way: each may look at itself and back, nobody ahead"
    blocks = blocks_of(mask, keys) if list(queries) == list(keys) else []
    if len(blocks) > 1 and (len(blocks) > 2 or not mask.any(axis=0).all()):
        return blocks_title(blocks)
    seen_by = {k: [q.name for q in queries if mask[q.start : q.stop, k.start : k.stop].any()] for k in keys}
    nobody = [k.name for k, names in seen_by.items() if not names]
    if nobody:
        return f"Nobody may look at {palette.listed(nobody)}"
    hidden = [names for names in seen_by.values() if len(names) < len(queries)]
    if hidden:
        few = min(hidden, key=len)
        which = [k.name for k, names in seen_by.items() if names == few]
        return f"Only {palette.listed(few)} may look at {palette.listed(which)}"
    closed = int((~mask).sum())
    return f"{closed:,} of {mask.size:,} places are closed"


def _one_way(mask: np.ndarray, queries: Sequence[Segment], keys: Sequence[Segment]) -> bool:
    """Of one sequence: does each token see all before it and none after it, or each of three or more
    segments those before it and none after it? Of two, "only the second may look at it" says more.
    """
    if list(queries) != list(keys):
        return False
    if np.array_equal(mask, np.tri(len(mask), dtype=bool)):
        return True
    seen = np.array([[mask[q.start : q.stop, k.start : k.stop].any() for k in keys] for q in queries])
    return len(keys) > 2 and np.array_equal(seen, np.tri(len(keys), dtype=bool))


def _axes(ax: Axes | None, queries: Sequence[Segment], keys: Sequence[Segment], title: str) -> Axes:
    """The axes given, or a square on a new sheet, with room for the names of the groups."""
    if ax is not None:
        return palette.panel(ax, 0)[1]
    left = 0.45 + max(palette.text_width(f"{s.name} · {s.length}") for s in queries)
    side = min(SIDE, palette.WIDTH - left - RIGHT)
    lines = 1 + max(label.level for label in place_labels(keys, side, _key_names(queries, keys)))
    top = TOP + LINE * lines + 0.05 + 0.17 * palette.wrapped(title, palette.WIDTH - 0.3).count("\n")
    return palette.axes_at(palette.sheet(top + side + BOTTOM, layout=None), left, top, side, side)


def _key_names(queries: Sequence[Segment], keys: Sequence[Segment]) -> list[str]:
    """Names of the columns, with lengths unless the rows, being the same tokens, tell them already."""
    return [s.name if list(keys) == list(queries) else f"{s.name} · {s.length}" for s in keys]


def _write_title(figure: Figure, text: str) -> None:
    """The title at the sheet's left edge, above the names of the keys."""
    lines, height = palette.wrapped(text, palette.WIDTH - 0.3), figure.get_size_inches()[1]
    font: dict[str, Any] = {"fontsize": palette.FONT + 1, "fontweight": "bold"}
    figure.text(0.15 / palette.WIDTH, 1 - 0.16 / height, lines, va="top", **font)


def _hatch(ax: Axes, keys: Sequence[Segment]) -> None:
    """Hatches over the columns of padding; their colours stay, which tell whether they are closed."""
    edges = segment_edges(keys)
    for s, left, right in zip(keys, edges[:-1], edges[1:], strict=True):
        if s.kind == "padding":
            hatched: dict[str, Any] = {**palette.PADDING, "facecolor": "none"}
            ax.add_patch(Rectangle((left, 0), right - left, 1, **hatched))


def _hatch_padding(ax: Axes, padding: np.ndarray, edges: np.ndarray) -> None:
    """Padding as hatched columns, and as rows that are veiled: what they see changes nothing."""
    steps = np.flatnonzero(np.diff(np.concatenate(([False], padding, [False])).astype(int)))
    for start, stop in zip(steps[::2], steps[1::2], strict=True):
        low, high = edges[start], edges[stop]
        hatched: dict[str, Any] = {**palette.PADDING, "facecolor": "none", "gid": "padding"}
        ax.add_patch(Rectangle((0, low), 1, high - low, color=palette.PAPER, alpha=0.75, linewidth=0))
        ax.add_patch(Rectangle((0, low), 1, high - low, **hatched))
        ax.add_patch(Rectangle((low, 0), high - low, 1, **hatched))


def _rule_off(ax: Axes, queries: Sequence[Segment], keys: Sequence[Segment]) -> None:
    """Strong lines between groups, hair lines between tokens where they are large enough to be told apart."""
    for segments, tokens, draw in (
        (queries, token_edges(queries), ax.hlines),
        (keys, token_edges(keys), ax.vlines),
    ):
        wide = np.diff(tokens) > 0.012
        inner = [t for i, t in enumerate(tokens[1:-1], 1) if wide[i - 1] and wide[i]]
        draw(inner, 0, 1, color=palette.PAPER, linewidth=0.3)
        edges, blocks = segment_edges(segments), [s.block for s in segments]
        draw(edges, 0, 1, color=palette.INK, linewidth=0.9, clip_on=False)
        apart = [at for at, one, other in zip(edges[1:-1], blocks, blocks[1:], strict=False) if one != other]
        if len(apart) + 1 < len(segments):
            draw(apart, 0, 1, color=palette.INK, linewidth=1.8, clip_on=False)
    ax.spines[:].set_visible(False)


def _name_groups(
    ax: Axes, queries: Sequence[Segment], keys: Sequence[Segment], counts: Sequence[tuple[int, int]]
) -> int:
    """Keys above, queries on the left, on the right how many keys a query sees. Returns lines of names."""
    inches = palette.inches(ax)
    labels = place_labels(keys, inches, _key_names(queries, keys))
    draw_labels(ax, labels, inches, 0)
    y = segment_edges(queries)
    at = spread((y[1:] + y[:-1]) / 2, 0.14 / inches)
    ax.set(xticks=[])
    ax.set_yticks(at, [f"{s.name} · {s.length}" for s in queries])
    ax.tick_params(length=0, labelsize=palette.FONT)
    ax.set_xlabel("keys: who is looked at", labelpad=6)
    ax.set_ylabel("queries: who looks", labelpad=6)
    for middle, (few, most) in zip(at, counts, strict=True):
        told = f"sees {most}" if few == most else f"sees {few}–{most}"
        told = told if most else "padding"
        ax.text(1.02, middle, told, va="center", fontsize=palette.FONT - 1, color=palette.MUTED)
    return 1 + max(label.level for label in labels)
