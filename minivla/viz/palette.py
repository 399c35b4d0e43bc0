"""One palette for token kinds, through the whole library, and the sheet every figure is drawn on.

The seven colours stay apart under the three kinds of colour blindness, but not in grey: so every group is
also labelled directly. A figure is an opaque, nearly white card, the same on light pages and on dark ones:
of transparent figures no ink would reach a contrast of 4.5 on both white and #1a1a1a (4.2 at best, a middle
grey).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, get_args

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from minivla.segments import Kind

KIND_COLOURS: dict[str, str] = {
    "image": "#0072B2",
    "language": "#E69F00",
    "state": "#009E73",
    "action": "#D55E00",
    "time": "#CC79A7",
    "latent": "#444444",
    "query": "#444444",
    "padding": "#DDDDDD",
}
"""Colour of each `Segment.kind`."""

KIND_NAMES: dict[str, str] = {
    "image": "image patches",
    "language": "words",
    "state": "robot state",
    "action": "actions",
    "time": "time",
    "latent": "latent",
    "query": "learned queries",
    "padding": "padding",
}
"""What a title calls each kind."""

INK = "#222222"  # text, axes, rules
MUTED = "#666666"  # what is said in a lower voice: 5.5 to 1 against the paper
PAPER = "#FAFAFA"  # a card on a white page and on a dark one
FAINT = "#E9E9E9"  # a closed place, an empty track
HATCH = "////"  # padding, on top of its grey
HATCH_INK = "#9A9A9A"
PADDING: dict[str, Any] = {  # how a box of padding is drawn, in every figure
    "facecolor": KIND_COLOURS["padding"],
    "edgecolor": HATCH_INK,
    "hatch": HATCH,
    "linewidth": 0,
}

WIDTH = 6.5  # inches
FONT = 9.0  # points
DPI = 200  # two pixels for each one that a page shows

_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same letters on every machine
    "font.size": FONT,
    "axes.labelsize": FONT,
    "axes.titlesize": FONT + 1,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "figure.titlesize": FONT + 1,
    "figure.titleweight": "bold",
    "xtick.labelsize": FONT - 1,
    "ytick.labelsize": FONT - 1,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "figure.dpi": DPI,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.7,
    "hatch.color": HATCH_INK,
    "legend.frameon": False,
    "image.cmap": "viridis",
    "figure.max_open_warning": 0,  # what is shown is closed
}


class Sheet(Figure):
    """A figure that a notebook shows once, at its true width and with twice the pixels."""

    def _ipython_display_(self) -> None:
        """Shown by `plt.show()`, by the end of a cell or as its last expression, whichever comes first."""
        from IPython.display import display

        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        width, height = (round(inches * DPI / 2) for inches in self.get_size_inches())
        plt.close(self)
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode("ascii"), "text/plain": str(self)}
        display(data, metadata={"image/png": {"width": width, "height": height}}, raw=True)

    def __str__(self) -> str:
        width, height = (round(inches * DPI / 2) for inches in self.get_size_inches())
        return f"Figure({width}x{height})"


@contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib draws in the book's style; outside, nothing has changed."""
    with mpl.rc_context(_RC):
        yield
        interactive = mpl.is_interactive()
    # A notebook's backend goes interactive when the first figure is made, which may have been in there.
    mpl.interactive(interactive)


def sheet(height: float, *, width: float = WIDTH, layout: str | None = "constrained") -> Figure:
    """An empty figure in inches, known to pyplot so that `plt.show()` shows it."""
    with style():
        return plt.figure(FigureClass=Sheet, figsize=(width, height), dpi=DPI, layout=layout)


def panel(ax: Axes | None, height: float, *, width: float = WIDTH) -> tuple[Figure, Axes]:
    """The axes to draw on and their figure: those given, or a new sheet with one panel."""
    if ax is None:
        figure = sheet(height, width=width)
        return figure, figure.add_subplot()
    ax.tick_params(labelsize=FONT - 1)
    ax.xaxis.label.set_fontsize(FONT)
    ax.yaxis.label.set_fontsize(FONT)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_facecolor(PAPER)
    return figure_of(ax), ax


def figure_of(ax: Axes) -> Figure:
    """The figure that axes belong to, through any subfigures. Raises ValueError when there is none."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes belong to no figure; make them with figure.subplots() or plt.subplots()")
    return figure


def inches(ax: Axes) -> float:
    """How wide axes are drawn."""
    return ax.get_window_extent().width / figure_of(ax).dpi


def entitle(ax: Axes, text: str, *, own: bool) -> None:
    """The title of a single panel: the figure's where the figure is our own, else above its axes."""
    if own:
        headline(figure_of(ax), text)
    else:
        ax.set_title(wrapped(text, inches(ax)), fontsize=FONT)


def say(ax: Axes, line: int, text: str, colour: str, *, left: bool = False) -> None:
    """A line of bold text in an upper corner, in the colour of the curve that it names: a legend."""
    style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    font: dict[str, Any] = {"color": colour, "fontsize": FONT - 1, "fontweight": "bold"}
    corner, inwards = ((0, 1), 3) if left else ((1, 1), -1)
    ax.annotate(text, corner, (inwards, -1 - 12 * line), ha="left" if left else "right", **style, **font)


def headline(figure: Figure, text: str) -> None:
    """The figure's title, at its left edge, broken into lines where it is too long."""
    figure.suptitle(wrapped(text, figure.get_size_inches()[0] - 0.25), x=0.012, ha="left")


def wrapped(text: str, inches: float, size: float = FONT + 1, weight: str = "bold") -> str:
    """A text, a title by default, broken between words into lines of at most `inches`; its breaks stay."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split(" "):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and text_width(longer, size, weight) > inches:
                lines.append(word)
            else:
                lines[-1] = longer
    return "\n".join(lines)


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def colour_of(kind: str) -> str:
    """The colour of a token kind. Raises ValueError for a kind that has none."""
    if kind not in KIND_COLOURS:
        raise ValueError(f"token kind {kind!r} has no colour; expected one of {', '.join(KIND_COLOURS)}")
    return KIND_COLOURS[kind]


def blend(one: str, other: str, share: float) -> str:
    """The colour that is `share` of the way from `one` to `other`."""
    share = min(1.0, max(0.0, share))
    return to_hex([(1 - share) * a + share * b for a, b in zip(to_rgb(one), to_rgb(other), strict=True)])


def text_on(colour: str) -> str:
    """Ink or white, whichever has the higher contrast on `colour`."""
    light = luminance(colour) + 0.05
    return INK if light / (luminance(INK) + 0.05) > 1.05 / light else "#FFFFFF"


def luminance(colour: str) -> float:
    """Relative luminance in [0, 1] (WCAG 2.2)."""
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float = FONT, weight: str = "normal") -> float:
    """How wide a line of text is drawn, in inches."""
    with style():
        font = FontProperties(size=size, weight=weight)
        return TextPath((0, 0), text, prop=font).get_extents().x1 / 72 if text.strip() else 0.0


def shortened(text: str, inches: float, size: float = FONT) -> str:
    """A text, cut off with "…" where it is wider than `inches`."""
    if text_width(text, size) <= inches:
        return text
    kept = next((n for n in range(len(text) - 1, 0, -1) if text_width(f"{text[:n]}…", size) <= inches), 1)
    return f"{text[:kept]}…"


def percent(share: float, digits: int = 0) -> str:
    """A share as text: "61 %"."""
    return f"{100 * share:.{digits}f} %"


def counted(count: int, what: str) -> str:
    """A number of things in prose: "1 step", "12 steps"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in prose: "state", "state and table", "state, table and wrist"; beyond `most`, how many more."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


assert set(KIND_COLOURS) == set(KIND_NAMES) == set(get_args(Kind)), (
    "a token kind lacks its colour or its name"
)
