"""FAST's words beside what they spell: a chunk, its frequencies, and which token stands for which of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minivla.actions.fast import FastTokenizer
from minivla.recorder import Call
from minivla.viz import palette
from minivla.viz.layout import spread
from minivla.viz.pictures import as_array

SMALL = palette.FONT - 1
# Neighbouring tokens differ: five light colours in turn, on which ink is read.
TURNS = tuple(
    palette.blend(palette.PAPER, palette.KIND_COLOURS[kind], 0.55)
    for kind in ("action", "image", "language", "state", "time")
)
CHUNK, ROW = 1.5, 0.2  # inches of the curves, of a dimension
PICKED = tuple(palette.KIND_COLOURS[kind] for kind in ("action", "image", "state", "time", "latent"))


def plot_spelling(
    tokenizer: FastTokenizer,
    chunk: Tensor | np.ndarray,
    *,
    tokens: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """A chunk and the words that spell it: curves, coefficients, and the tokens as spans over these.

    chunk (H, A), normalised. tokens: FAST's, of one sample; the chunk's own unless given, else what a network
    said, and then `chunk` may be what it should have said. names: of the A dimensions.

    Above, the chunk and, dotted, what the tokens decode to. Middle: the rounded coefficients, frequencies
    across, dimensions down. They are written column after column, so below a token is a stretch of columns;
    each has its number where there is room. Raises ValueError for a chunk that is not (H, A), a wrong number
    of names, and as `FastTokenizer.encode`.
    """
    values = torch.as_tensor(as_array(chunk)).float()
    if values.ndim != 2:
        raise ValueError(f"chunk has shape {tuple(values.shape)}; expected (H, A), one sample")
    horizon, size = values.shape
    if names is not None and len(names) != size:
        raise ValueError(f"names has {len(names)} entries ({', '.join(names)}), the chunk {size} dimensions")
    told = [f"action {i}" for i in range(size)] if names is None else list(names)
    said = list(tokenizer.encode(values[None])[0] if tokens is None else tokens)
    decoded = tokenizer.decode([said], horizon, size, strict=False)[0][0]
    spans = tokenizer.token_spans(said, strict=False)
    with palette.style():
        tall = max(0.8, ROW * size)
        figure = palette.sheet(CHUNK + 2 * tall + 2.1)
        curves, codes, spelled = figure.subplots(3, 1, height_ratios=(CHUNK, tall, tall))
        _draw_curves(curves, as_array(values), as_array(decoded), told)
        _draw_codes(
            codes, as_array(tokenizer.codes(decoded[None] if tokens is not None else values[None])[0]), told
        )
        _draw_spans(spelled, spans, horizon, told)
        found = spelling_title(as_array(values), as_array(decoded), said) if title is None else title
        palette.headline(figure, found)
    return figure


def plot_said(policy: Any, call: Call, *, sample: int = 0, **options: Any) -> Figure:
    """`plot_spelling` of a call of π0-FAST: of a chunk what was said, of a loss what it teaches to say.

    Raises ValueError for a call of another policy and a sample out of range.
    """
    said = call.hidden.get("action tokens", call.ids.get("action tokens"))
    if said is None or not hasattr(policy, "sentences"):
        raise ValueError(f"{type(policy).__name__} says no actions in words; trace π0-FAST")
    if not 0 <= sample < len(said):
        raise ValueError(f"sample is {sample}; this call holds {len(said)}: expected 0 to {len(said) - 1}")
    chunk = call.batch["action"] if call.chunk is None else call.chunk
    begin = policy.sentences.marks.begin
    row = torch.tensor([[token for token in said[sample].tolist() if token != begin]])
    tokens = policy.sentences.tokens(row)[0]
    return plot_spelling(policy.sentences.fast, chunk[sample], **{"tokens": tokens, **options})


def spelling_title(chunk: np.ndarray, decoded: np.ndarray, tokens: Sequence[int]) -> str:
    """The finding: how many numbers became how many tokens, and what was lost on the way."""
    horizon, size = chunk.shape
    error = float(np.abs(chunk - decoded).max())
    return (
        f"{horizon} × {size} = {chunk.size:,} numbers in {palette.counted(len(tokens), 'token')}; "
        f"off by {error:.2g} at most"
    )


def _draw_curves(ax: Axes, chunk: np.ndarray, decoded: np.ndarray, names: Sequence[str]) -> None:
    steps, colours = np.arange(len(chunk)), [PICKED[i % len(PICKED)] for i in range(len(names))]
    for i, colour in enumerate(colours):
        dash = "-" if i < len(PICKED) else (0, (4, 1.5))
        ax.plot(steps, chunk[:, i], color=colour, linewidth=1.1, linestyle=dash, gid="chunk")
        ax.plot(steps, decoded[:, i], ".", color=colour, markersize=3, gid="decoded")
    ax.set(xlim=(-0.5, len(chunk) - 0.5), ylabel="normalised", xlabel="step of the chunk (dots: decoded)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    order = np.argsort(chunk[-1], kind="stable")
    low, high = ax.get_ylim()
    at = spread(chunk[-1][order], 0.13 * (high - low) / CHUNK)
    for i, y in zip(order, at, strict=True):
        font: dict[str, Any] = {"fontsize": SMALL - 1, "color": colours[i], "va": "center", "clip_on": False}
        ax.text(len(chunk) - 0.3, y, names[i], **font)


def _draw_codes(ax: Axes, codes: np.ndarray, names: Sequence[str]) -> None:
    """Coefficients (H, A): frequencies across, dimensions down."""
    most = max(1, int(np.abs(codes).max()))
    norm = SymLogNorm(1, vmin=-most, vmax=most)
    look: dict[str, Any] = {"cmap": "RdBu_r", "norm": norm, "aspect": "auto", "interpolation": "nearest"}
    image = ax.imshow(codes.T, gid="codes", **look)
    _name_dimensions(ax, names)
    silent = palette.percent(float((codes == 0).mean()))
    ax.set_title(f"codes, by frequency: {silent} are 0", fontsize=palette.FONT, fontweight="normal", pad=3)
    bar = palette.figure_of(ax).colorbar(image, ax=ax, pad=0.01, aspect=12)
    bar.outline.set_visible(False)
    bar.set_ticks([-most, 0, most], labels=[f"−{most}", "0", f"{most}"])
    bar.ax.tick_params(labelsize=SMALL - 1)
    bar.minorticks_off()


def _draw_spans(ax: Axes, spans: Sequence[Sequence[int]], horizon: int, names: Sequence[str]) -> None:
    """Each token's codes in its colour; codes that two tokens share are the first's."""
    size = len(names)
    for i in reversed(range(len(spans))):
        for place in (place for place in spans[i] if place < horizon * size):
            frequency, dimension = divmod(place, size)
            look: dict[str, Any] = {"facecolor": TURNS[i % len(TURNS)], "linewidth": 0}
            ax.add_patch(Rectangle((frequency - 0.5, dimension - 0.5), 1, 1, gid=f"token {i}", **look))
    ax.set(xlim=(-0.5, horizon - 0.5), ylim=(size - 0.5, -0.5))
    _name_dimensions(ax, names)
    _number(ax, spans, horizon, size)
    longest = max((len(span) for span in spans), default=0)
    told = f"tokens, in the order they are said: the longest stands for {palette.counted(longest, 'code')}"
    ax.set_title(told, fontsize=palette.FONT, fontweight="normal", pad=3)
    ax.set_xlabel("frequency (half turns over the chunk)")


def _number(ax: Axes, spans: Sequence[Sequence[int]], horizon: int, size: int) -> None:
    """Numbers on tokens that have the room: at the middle of their codes."""
    wide = palette.inches(ax) / horizon
    for i, span in enumerate(spans):
        if not span or span[0] >= horizon * size:
            continue
        frequency, dimension = divmod(span[len(span) // 2], size)
        columns = span[-1] // size - span[0] // size + 1
        if columns * wide > palette.text_width(str(i), SMALL - 2) + 0.02 and frequency < horizon:
            ax.text(frequency, dimension, str(i), ha="center", va="center", fontsize=SMALL - 2, gid="number")


def _name_dimensions(ax: Axes, names: Sequence[str]) -> None:
    stride = -(-len(names) // 16)
    places = range(0, len(names), stride)
    ax.set_yticks(list(places), [names[i] for i in places], fontsize=SMALL - 1)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
