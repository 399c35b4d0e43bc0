"""Words as boxes of text, line after line: the tokens of a prompt, or what a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minivla.viz import palette

SIZE = palette.FONT - 1
LINE = 0.21  # inches from one line to the next
BOX = 0.175  # inches, of a box
SIGNS = {"\n": "↵", " ": "␣", "\t": "⇥", "<0x0A>": "↵"}


@dataclass(frozen=True)
class Word:
    """A box of text: `count` tokens from `start` on (several where they are padding), where it lies in inches
    on its line, and whether its tokens are padding.
    """

    text: str
    start: int
    count: int
    left: float
    right: float
    line: int
    padding: bool = False


def shown_word(text: str) -> str:
    """A token's text as it can be seen: signs for a new line and for space alone, no space around it.

    >>> [shown_word(word) for word in (" red", "\\n", " ")]
    ['red', '↵', '␣']
    """
    return SIGNS.get(text) or text.replace("\n", "↵").strip() or "␣"


def place_words(
    words: Sequence[str],
    inches: float,
    valid: np.ndarray | None = None,
    *,
    left: float = 0.0,
    empty: str = "of padding",
) -> list[Word]:
    """Boxes in lines at most `inches` wide, the first of which begins at `left`; a run of padding is one box.

    words, valid (L,): the tokens' texts, and which of them are real (all, unless given); `empty` says what
    the others are. A word's space before it becomes a gap: without it the box touches the one before. Raises
    ValueError for another length.
    """
    real = np.ones(len(words), bool) if valid is None else np.asarray(valid, bool)
    if len(real) != len(words):
        raise ValueError(
            f"there are {len(words)} words and {len(real)} tokens; expected one word for each token"
        )
    placed: list[Word] = []
    x, line, at = left, 0, 0
    while at < len(words):
        count = 1 if real[at] else _run(real, at)
        text = shown_word(words[at]) if real[at] else f"{palette.counted(count, 'token')} {empty}"
        x += 0.045 if words[at][:1] in (" ", "<") or not real[at] else 0.012
        width = palette.text_width(text, SIZE) + 0.07
        if x + width > inches and x > left:
            x, line = 0.0, line + 1
        placed.append(Word(text, at, count, x, x + width, line, not real[at]))
        x, at = x + width, at + count
    return placed


def _run(real: np.ndarray, start: int) -> int:
    """How many tokens from `start` on are padding."""
    after = np.flatnonzero(real[start:])
    return int(after[0]) if len(after) else len(real) - start


def height_of(words: Sequence[Word]) -> float:
    """How high the lines are together, in inches."""
    return LINE * (1 + max((word.line for word in words), default=0))


def draw_words(ax: Axes, words: Sequence[Word], colours: Sequence[str], top: float) -> None:
    """The boxes on axes that are laid out in inches, the first line below `top`; a colour for each word."""
    for word, colour in zip(words, colours, strict=True):
        y = top - LINE * word.line - BOX
        plain: dict[str, Any] = {"facecolor": colour, "edgecolor": palette.HATCH_INK, "linewidth": 0.4}
        look = palette.PADDING if word.padding else plain
        ax.add_patch(Rectangle((word.left, y), word.right - word.left, BOX, **look, gid=f"word {word.start}"))
        ink = palette.INK if word.padding else palette.text_on(colour)
        font: dict[str, Any] = {"fontsize": SIZE, "color": ink, "va": "center_baseline", "ha": "center"}
        box = {"boxstyle": "square,pad=0.08", "facecolor": palette.PADDING["facecolor"], "edgecolor": "none"}
        more = {"bbox": box} if word.padding else {}
        ax.text((word.left + word.right) / 2, y + BOX / 2, word.text, **font, **more)


def words_axes(ax: Axes, inches: float, tall: float) -> None:
    """Axes whose data are inches, without frame and ticks."""
    ax.set(xlim=(0, inches), ylim=(0, tall), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.patch.set_alpha(0)
