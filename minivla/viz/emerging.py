"""A chunk as it emerges from FAST's tokens: low frequencies come first, so the first few say it roughly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minivla.actions.fast import FastTokenizer
from minivla.viz import palette
from minivla.viz.pictures import as_array

SAID = palette.KIND_COLOURS["action"]
SMALL = palette.FONT - 1
SHARES = (1 / 6, 1 / 3, 2 / 3)  # of the tokens, whose chunks are drawn


def partial_chunks(tokenizer: FastTokenizer, tokens: Sequence[int], horizon: int, action_dim: int) -> Tensor:
    """What the first 0, 1, … all tokens of a chunk stand for, codes that are still to come taken as 0:
    (tokens + 1, H, A). Raises ValueError as `FastTokenizer.decode`.
    """
    begun = [list(tokens[:count]) for count in range(len(tokens) + 1)]
    return tokenizer.decode(begun, horizon, action_dim)[0]


def plot_emerging(
    tokenizer: FastTokenizer,
    tokens: Sequence[int],
    chunk: Tensor | np.ndarray,
    *,
    counts: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """The chunk (H, A), normalised, in grey, and over it what the first `counts` of its tokens say: a panel a
    dimension, four at most.

    tokens: FAST's, of one sample; counts: by default a sixth, a third, two thirds and all of them. Raises
    ValueError for a chunk that is not (H, A), counts or names that do not fit, and as `partial_chunks`.
    """
    shown = as_array(chunk)
    if shown.ndim != 2:
        raise ValueError(f"chunk has shape {shown.shape}; expected one chunk (H, A), normalised")
    horizon, size = shown.shape
    told = [f"action {a}" for a in range(size)] if names is None else list(names)
    many = _counts(len(tokens)) if counts is None else list(counts)
    if len(told) != size or not many or not all(0 <= count <= len(tokens) for count in many):
        raise ValueError(
            f"the chunk has {size} dimensions and {len(tokens)} tokens; names are {told}, counts {many}"
        )
    partial = as_array(partial_chunks(tokenizer, tokens, horizon, size))
    with palette.style():
        figure = palette.sheet(2.35)
        panels = figure.subplots(1, min(size, 4), sharey=True, squeeze=False)[0]
        for a, panel in enumerate(panels):
            _draw(panel, shown[:, a], partial[many][..., a])
            panel.set_title(told[a], fontsize=palette.FONT, fontweight="normal")
        panels[0].set_ylabel("normalised")
        _name_counts(panels[-1], many)
        palette.headline(figure, emerging_title(partial) if title is None else title)
    return figure


def emerging_title(partial: np.ndarray) -> str:
    """The finding: how many of the tokens bring nine tenths of the chunk, in squares."""
    left = np.square(partial - partial[-1]).sum((1, 2)) / max(1e-9, np.square(partial[-1]).sum())
    tokens, enough = len(partial) - 1, int((left > 0.1).sum())
    return f"The first {enough} of {palette.counted(tokens, 'token')} say nine tenths of the chunk"


def _counts(tokens: int) -> list[int]:
    return sorted({max(1, round(share * tokens)) for share in SHARES} | {tokens}) if tokens else [0]


def _draw(ax: Axes, chunk: np.ndarray, said: np.ndarray) -> None:
    """The chunk (H,), and what the first tokens say of it, (counts, H)."""
    steps = np.arange(len(chunk))
    ax.plot(steps, chunk, color="#AAAAAA", linewidth=4, gid="chunk")
    for colour, line in zip(_colours(len(said)), said, strict=True):
        ax.plot(steps, line, color=colour, linewidth=1.4, gid="said")
    ax.set_xlabel("step of the chunk")


def _colours(count: int) -> list[str]:
    """From pale to vermilion."""
    return [palette.blend("#F0C9AE", SAID, math.sqrt(i / max(1, count - 1))) for i in range(count)]


def _name_counts(ax: Axes, counts: Sequence[int]) -> None:
    """A legend above the panel's right end: how many tokens each line knows."""
    right, unit = 0.0, f"token{'s' * (counts[-1] != 1)}"
    named = list(zip(map(str, counts), _colours(len(counts)), strict=True))
    for text, colour in [(unit, palette.INK), *reversed(named)]:
        style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
        ink = palette.blend(colour, palette.INK, 0.15)
        ax.annotate(text, (1, 1), (-right, 5), color=ink, fontsize=SMALL, fontweight="bold", **style)
        right += 72 * palette.text_width(text, SMALL, "bold") + 5
