"""What a query looks at, laid over the cameras."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from einops import rearrange, reduce
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minivla.data.features import MissingKey
from minivla.recorder import Call, NotKept
from minivla.segments import Segment
from minivla.viz import palette
from minivla.viz.layout import check_segments
from minivla.viz.pictures import as_array, as_picture
from minivla.viz.words import Word, draw_words, height_of, place_words, words_axes

COLOURS = "viridis"
STRIKING = 8.0  # times the even share, from which a title names a patch
MORE = 2.0  # times what the patch gets, from which a title rather names a segment without patches
LEFT, TOP, GAP, STRIP, BAR = 0.15, 0.7, 0.12, 1.15, 0.27  # inches
LINE = 0.15  # inches, of a label
WORDS = 0.48  # inches above and below the words
SCALE = "attention on one patch (root scale; most: framed)"


def plot_attention(
    call: Call,
    site: str,
    *,
    query: SupportsIndex | str = 0,
    head: int | None = None,
    sample: int = 0,
    images: Mapping[str, Any] | None = None,
    title: str | None = None,
    camera: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """What one query of one attention site looks at: patches of the cameras, and shares of the segments.

    call: one forward call of a trace.
    query: a position at this site, or a segment's name (the mean of its tokens).
    head: None for the mean of all.
    images: {key: (3, H, W) or (H, W, 3)} to draw under the patches; without it the normalised images of the
    batch, rescaled for display.
    ax, camera: as in `plot_look`. Words of a prompt are written out where the call has them.

    KeyError for a site that was not kept, a segment or an image that is not there; ValueError for a position,
    head or sample out of range.
    """
    weights = attention_weights(call, site, query=query, head=head, sample=sample)
    queries, keys = call.sites[site]
    if images is None:
        images = shown(call.batch, keys, sample)
    if title is None:
        heads = "mean of all heads" if head is None else f"head {head}"
        title = f"{asker(query, queries)} {attention_title(weights, keys)}\n{site}, {heads}"
    asking = None if isinstance(query, str) or queries != keys else operator.index(query)
    words = spoken(call, sample)
    return plot_look(weights, keys, images, title=title, camera=camera, words=words, asking=asking, ax=ax)


def spoken(call: Call, sample: int) -> dict[str, list[str]]:
    """By segment, the words of one sample's tokens, where the call has them."""
    return {name: rows[sample] for name, rows in call.words.items() if sample < len(rows)}


def plot_look(
    weights: Tensor | np.ndarray,
    segments: Sequence[Segment],
    images: Mapping[str, Any],
    *,
    title: str | None = None,
    camera: str | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
    asking: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Attention that is already a row of weights (K,), adding up to 1, over keys that `segments` name.

    images: {batch key: image (3, H, W) or (H, W, 3) in [0, 1]} for the segments with a grid. The scale
    starts at 0 and goes with the root, so that a single strong patch does not hide all others; its mark
    "even" is what every token that is seen would get if all got the same; the same mark is on the bars.
    A camera that gets nothing and has no image was absent, and is hatched.
    words: by segment's name, its tokens as text, shaded by what each gets; other segments of several tokens
    become bars. asking: the position of the query, if it is one of the keys: its patch gets a dot.
    ax: draw one camera there, without scale and bars: the one named `camera`, else that of the strongest
    patch.

    KeyError for an absent image or camera; ValueError for weights that are no softmax row, for `camera`
    without `ax`, and for `ax` where no segment is a camera.
    """
    row = _check_weights(weights)
    segments = check_segments(segments, len(row), "key ")
    cameras = [s for s in segments if s.grid is not None]
    strips = [s for s in segments if s.grid is None and s.length > 1 and row[s.start : s.stop].any()]
    seen = [s for s in cameras if row[s.start : s.stop].any()]
    if absent := [s.image or s.name for s in seen if s.image not in images]:
        raise MissingKey(
            f"no image for {', '.join(absent)}; images has {', '.join(images) or 'none'}. "
            "Pass images={key: image}"
        )
    title = f"This query {attention_title(row, segments)}" if title is None else title
    if ax is not None or camera is not None:
        return _draw_alone(ax, _one_camera(cameras, camera, row), images, row, title)
    lines = palette.wrapped(title, palette.WIDTH - 0.25).count("\n") + 1
    top = TOP + 0.17 * (lines - 2) + LINE * _name_lines(cameras)
    texts = {s.name: _texts(s, row, words or {}) for s in strips}
    heights = [height_of(placed) + WORDS if (placed := texts[s.name]) else STRIP for s in strips]
    with palette.style():
        figure = _sheet(top, cameras, heights, segments)
        if cameras:
            _draw_cameras(figure, top, cameras, images, row, asking)
        if len(segments) > 1:
            _draw_shares(_shares_axes(figure, top, len(cameras), segments), segments, row)
        down = figure.get_size_inches()[1] - sum(heights)
        for s, tall in zip(strips, heights, strict=True):
            if placed := texts[s.name]:
                ax = palette.axes_at(figure, LEFT, down, palette.WIDTH - 2 * LEFT, tall)
                _draw_texts(ax, s, placed, row)
            else:
                ax = palette.axes_at(figure, 0.78, down + 0.12, palette.WIDTH - 1.33, STRIP - 0.55)
                _draw_strip(ax, s, row[s.start : s.stop], _even(row))
            down += tall
        palette.headline(figure, title)
    return figure


def attention_weights(
    call: Call, site: str, *, query: SupportsIndex | str = 0, head: int | None = None, sample: int = 0
) -> Tensor:
    """The row of weights (K,) that `plot_attention` draws; adds up to 1. Same arguments, same errors."""
    if site not in call.attention:
        raise NotKept(
            f"attention site {site!r} was not kept; this call holds {', '.join(call.attention) or 'none'}"
        )
    attention = call.attention[site]
    batch, heads, length, _ = attention.shape
    for what, value, size in (("sample", sample, batch), ("head", head, heads)):
        if value is not None and not 0 <= value < size:
            raise ValueError(f"{what} is {value}; site {site!r} has {size}: expected 0 to {size - 1}")
    start, stop = positions(query, check_segments(call.sites[site][0], length, "query "))
    heads_asked = slice(None) if head is None else slice(head, head + 1)
    rows = attention[sample, heads_asked, start:stop].float()
    # rows of a half-precision policy add up to 1 only roughly; one that sees nothing stays 0
    rows = rows / rows.sum(-1, keepdim=True).clamp(min=0.5)
    return reduce(rows, "head query key -> key", "mean")


def attention_shares(weights: Tensor | np.ndarray, segments: Sequence[Segment]) -> dict[str, float]:
    """How the attention of one query (K,) is shared out: {segment name: share}, adding up to 1."""
    row = _check_weights(weights)
    shares: dict[str, float] = {}
    for s in check_segments(segments, len(row), "key "):
        shares[s.name] = shares.get(s.name, 0.0) + float(row[s.start : s.stop].sum())
    return shares


def striking_patch(
    weights: Tensor | np.ndarray, segments: Sequence[Segment], times: float = STRIKING
) -> tuple[str, int, int] | None:
    """Camera, row and column (from 0, row 0 on top) of the patch that a title should name, or None.

    weights (K,). It is the brightest patch of all cameras, if it gets `times` the even share, and unless a
    segment without patches gets more than twice as much.
    """
    row = _check_weights(weights)
    shares = attention_shares(row, segments)
    cameras = [s for s in segments if s.grid is not None]
    if not cameras:
        return None
    s = max(cameras, key=lambda camera: row[camera.start : camera.stop].max())
    place, (_, columns) = int(row[s.start : s.stop].argmax()), s.grid or (1, 1)
    share = row[s.start + place]
    rival = max((shares[other.name] for other in segments if other.grid is None), default=0.0)
    striking = share >= times * _even(row) and rival <= MORE * share
    return (s.name, *divmod(place, columns)) if striking else None


def attention_title(weights: Tensor | np.ndarray, segments: Sequence[Segment]) -> str:
    """The finding, without its subject: "gives 61 % of its attention to wrist (even: 44 %)"."""
    shares = attention_shares(weights, segments)
    if len(segments) == 1:
        place, s = int(weights.argmax()), segments[0]
        share, even = float(weights[place]), _even(weights)
        told = f"{_precisely(share)} (even: {_precisely(even)})"
        row, column = divmod(place, s.grid[1]) if s.grid else (0, place)
        where = f"row {row}, column {column} of {s.name}" if s.grid else f"{s.name}[{place}]"
        return f"looks most at {where}: {told}"
    if patch := striking_patch(weights, segments):
        name, row, column = patch
        share = max(float(weights[s.start : s.stop].max()) for s in segments if s.grid is not None)
        even = _even(weights)
        told = f"{name}, row {row}, column {column} (even: {palette.percent(even, 1)})"
        return f"gives {palette.percent(share)} to one patch: {told}"
    name = max(shares, key=lambda key: shares[key])
    even = sum(_even(weights, s) for s in segments if s.name == name)
    told = f"{name} (even: {palette.percent(even)})"
    return f"gives {palette.percent(shares[name])} of its attention to {told}"


def _precisely(share: float) -> str:
    """A share with as many digits as tell it from half of it: "61 %", "0.42 %"."""
    return palette.percent(share, 0 if share >= 0.1 else 1 if share >= 0.01 else 2)


def _even(weights: Tensor | np.ndarray, segment: Segment | None = None) -> float:
    """What a token that is seen (its weight is above 0), or a segment, would get if all seen got the same."""
    seen = np.asarray(weights) > 0
    return float(seen[segment.start : segment.stop].sum() if segment else 1) / max(1, int(seen.sum()))


def _check_weights(weights: Tensor | np.ndarray) -> np.ndarray:
    row = as_array(weights).astype(float)
    if row.ndim != 1:
        raise ValueError(f"the weights have shape {row.shape}; expected (K,), one query of one sample")
    if not np.isclose(row.sum(), 1, atol=1e-3):
        raise ValueError(
            f"the weights add up to {row.sum():.4g}; expected 1. Give one softmax row, of all keys"
        )
    return row


def positions(query: SupportsIndex | str, segments: Sequence[Segment]) -> tuple[int, int]:
    """First and one past the last position of a query: one token, or a segment by name.

    A position may be any whole number: int, NumPy's, or a tensor without dimensions. Raises ValueError for
    one out of range, KeyError for an unknown name, TypeError for what is neither.
    """
    length = sum(s.length for s in segments)
    if not isinstance(query, str):
        place = operator.index(query)
        if not 0 <= place < length:
            raise ValueError(
                f"query is {place}; this site has {length} queries: expected 0 to {length - 1}, "
                "or the name of a segment"
            )
        return place, place + 1
    named = [s for s in segments if s.name == query]
    if not named:
        raise MissingKey(
            f"no query segment is called {query!r}; this site has {', '.join(s.name for s in segments)}"
        )
    return named[0].start, named[0].stop


def asker(query: SupportsIndex | str, segments: Sequence[Segment]) -> str:
    """What a title calls the query: its segment, and its place inside where there are several."""
    if isinstance(query, str):
        return query.capitalize()
    place = operator.index(query)
    s = next(s for s in segments if s.start <= place < s.stop)
    return s.name.capitalize() if s.length == 1 else f"{s.name.capitalize()}[{place - s.start}]"


def shown(batch: Mapping[str, Any], keys: Sequence[Segment], sample: int) -> dict[str, np.ndarray]:
    """The images of one sample, the newest where there is a history, stretched to [0, 1] for display."""
    stacks = {s.image: batch[s.image] for s in keys if s.grid is not None and s.image and s.image in batch}
    return {
        k: as_picture(v[sample, -1] if v.ndim == 5 else v[sample], rescale=True)
        for k, v in stacks.items()
        if k
    }


def _side(cameras: int) -> float:
    """How large a camera's picture is drawn, in inches: two or more share the width that the bars leave."""
    return min(1.85, (palette.WIDTH - 2.5) / max(cameras, 1) - GAP)


def _end(cameras: int) -> float:
    """Where the pictures end, in inches from the left."""
    return LEFT + cameras * (_side(cameras) + GAP) - GAP if cameras else LEFT


def _sheet(
    top: float, cameras: Sequence[Segment], heights: Sequence[float], segments: Sequence[Segment]
) -> Figure:
    if cameras:
        below = _side(len(cameras)) + 0.42 + LINE * _scale_label(_end(len(cameras)) - LEFT).count("\n") + LINE
    else:
        below = BAR * len(segments) + 0.55 if len(segments) > 1 else -0.3
    return palette.sheet(top + below + sum(heights), layout=None)


def _draw_cameras(
    figure: Figure,
    top: float,
    cameras: Sequence[Segment],
    images: Mapping[str, Any],
    row: np.ndarray,
    asking: int | None,
) -> None:
    """All cameras in a row on one scale, and the scale below them."""
    side, end = _side(len(cameras)), _end(len(cameras))
    most = max(1e-12, *(row[s.start : s.stop].max() for s in cameras))
    for i, s in enumerate(cameras):
        ax = palette.axes_at(figure, LEFT + i * (side + GAP), top, side, side)
        if s.image in images:
            _draw_camera(ax, s, as_picture(images[s.image or ""]), row[s.start : s.stop], most)
            if asking is not None and s.start <= asking < s.stop:
                _mark_asking(ax, s, asking - s.start)
        else:
            _draw_absent(ax)
        ax.set_title(_camera_name(s, side), fontsize=palette.FONT, fontweight="normal", pad=4)
    _draw_scale(palette.axes_at(figure, LEFT, top + side + 0.1, end - LEFT, 0.08), most, 1 / len(row))


def _camera_name(segment: Segment, side: float) -> str:
    """A camera's name and patches, in two lines where one is too long for a picture `side` inches wide."""
    name, patches = segment.name, "{} × {} patches".format(*(segment.grid or (1, 1)))
    told = f"{name}, {patches}"
    if palette.text_width(told) <= side:
        return told
    patches = patches if palette.text_width(patches) <= side else patches.removesuffix(" patches")
    return f"{palette.shortened(name, side)}\n{patches}"


def _name_lines(cameras: Sequence[Segment]) -> int:
    """Lines above the pictures beyond the first."""
    return max((_camera_name(s, _side(len(cameras))).count("\n") for s in cameras), default=0)


def _scale_label(inches: float) -> str:
    return palette.wrapped(SCALE, inches, palette.FONT, "normal")


def _one_camera(cameras: Sequence[Segment], name: str | None, row: np.ndarray) -> Segment:
    """The camera of that name, or the one with the strongest patch."""
    told = ", ".join(s.name for s in cameras) or "none"
    if not cameras:
        raise ValueError("there is no camera to draw on these axes: no segment has a grid; leave out ax")
    if name is None:
        return max(cameras, key=lambda s: row[s.start : s.stop].max())
    if name not in [s.name for s in cameras]:
        raise MissingKey(f"no camera is called {name!r}; the cameras here are {told}")
    return next(s for s in cameras if s.name == name)


def _draw_alone(
    ax: Axes | None, camera: Segment, images: Mapping[str, Any], row: np.ndarray, title: str
) -> Figure:
    """One camera on axes of the caller's."""
    if ax is None:
        raise ValueError(f"camera is {camera.name!r}, but there is no ax: all cameras are drawn without one")
    weights = row[camera.start : camera.stop]
    with palette.style():
        figure, ax = palette.panel(ax, 0)
        picture = as_picture(images[camera.image or ""])
        _draw_camera(ax, camera, picture, weights, max(1e-12, weights.max()))
        palette.entitle(ax, title, own=False)
    return figure


def _shares_axes(figure: Figure, top: float, cameras: int, segments: Sequence[Segment]) -> Axes:
    """The room that is left beside the cameras, after the segments' names."""
    names = max(palette.text_width(name, palette.FONT - 1) for name in _bar_names(segments))
    left = _end(cameras) + 0.25 + names
    height = _side(cameras) if cameras else BAR * len(segments)
    return palette.axes_at(figure, left, top, palette.WIDTH - 0.2 - left, height)


def _bar_names(segments: Sequence[Segment]) -> list[str]:
    return [palette.shortened(s.name, 1.1, palette.FONT - 1) for s in segments]


def _draw_camera(ax: Axes, segment: Segment, picture: np.ndarray, weights: np.ndarray, most: float) -> None:
    """The image, and on it each patch the more covered by its colour the more attention it gets."""
    rows, columns = segment.grid or (1, segment.length)
    heat = rearrange(weights, "(row column) -> row column", row=rows)
    height, width = picture.shape[:2]
    frame = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(picture, extent=frame)
    veil = 0.1 + 0.5 * np.sqrt(heat / most)
    look: dict[str, Any] = {"cmap": COLOURS, "norm": PowerNorm(0.5, 0, most), "interpolation": "nearest"}
    ax.imshow(heat, extent=frame, alpha=veil, gid="attention", **look)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    if heat[row, column] == most:  # the strongest patch of all cameras
        corner = (column * width / columns - 0.5, row * height / rows - 0.5)
        edge: dict[str, Any] = {"fill": False, "clip_on": False, "zorder": 3}
        for colour, line in ((palette.INK, 3.0), ("white", 1.4)):
            box = Rectangle(corner, width / columns, height / rows, edgecolor=colour, linewidth=line, **edge)
            ax.add_patch(box)
    ax.set(xlim=frame[:2], ylim=frame[2:], xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _draw_absent(ax: Axes) -> None:
    """A camera that was not there: its tokens are padding."""
    ax.add_patch(Rectangle((0, 0), 1, 1, **palette.PADDING, gid="absent"))
    box = {"boxstyle": "square,pad=0.2", "facecolor": palette.PAPER, "edgecolor": "none"}
    ax.text(0.5, 0.5, "absent", ha="center", va="center", fontsize=palette.FONT - 1, bbox=box)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _mark_asking(ax: Axes, segment: Segment, place: int) -> None:
    """A dot on the patch whose query this is."""
    rows, columns = segment.grid or (1, segment.length)
    row, column = divmod(place, columns)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    x, y = left + (column + 0.5) / columns * (right - left), top + (row + 0.5) / rows * (bottom - top)
    dot: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 1.2, "zorder": 4}
    ax.plot(x, y, "o", color=palette.KIND_COLOURS["action"], gid="asking", **dot)


def _draw_scale(ax: Axes, most: float, even: float) -> None:
    """The colour scale, from 0 to the strongest patch; "even" is what all would get if all got the same.

    Half way along stands a quarter of the most, since it goes with the root.
    """
    inches = palette.inches(ax)
    bar = palette.figure_of(ax).colorbar(
        ScalarMappable(PowerNorm(0.5, 0, most), COLOURS), cax=ax, orientation="horizontal"
    )
    bar.outline.set_visible(False)
    bar.set_label(_scale_label(inches), labelpad=1)
    along = inches * np.sqrt(even / most)
    if marked := 0.4 < along < inches - 0.4:
        ax.axvline(even, color="white", linewidth=1.5)
    quarter = {} if marked and abs(along - inches / 2) < 0.4 else {most / 4: f"{most / 4:.2g}"}
    places = {0.0: "0", most: f"{most:.2g}", **quarter, **({even: "even"} if marked else {})}
    places = dict(sorted(places.items()))
    bar.set_ticks(list(places), labels=list(places.values()))
    bar.minorticks_off()
    first, *_, last = ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _draw_shares(ax: Axes, segments: Sequence[Segment], row: np.ndarray) -> None:
    """One bar a segment, as long as its share; a tick where its share would be if all tokens got the same."""
    shares = [row[s.start : s.stop].sum() for s in segments]
    y = np.arange(len(segments))
    ax.barh(y, shares, height=0.62, color=[palette.colour_of(s.kind) for s in segments], gid="shares")
    even = [_even(row, s) for s in segments]
    ax.vlines(even, y - 0.42, y + 0.42, color=palette.INK, linewidth=1.1)
    reach = max(*shares, *even)
    for i, share in enumerate(shares):
        ax.text(max(share, even[i]) + 0.03 * reach, i, f"{share:.2f}", va="center", fontsize=palette.FONT - 1)
    ax.set_yticks(y, _bar_names(segments))
    ax.set(xlim=(0, reach * 1.25), ylim=(len(segments) - 0.4, -0.6))
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.5) if reach / step < 5 or step == 0.5)
    ax.set_xticks(np.arange(0, min(1.0, reach * 1.2) + 1e-9, step))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(
        "share of the attention\n(tick: even)", loc="center" if palette.inches(ax) > 1.4 else "right"
    )


def _texts(segment: Segment, row: np.ndarray, words: Mapping[str, Sequence[str]]) -> list[Word] | None:
    """A segment's words in their places, or None where they are not known; what gets nothing is not seen."""
    if segment.name not in words:
        return None
    seen = row[segment.start : segment.stop] > 0
    return place_words(words[segment.name], palette.WIDTH - 2 * LEFT, seen, empty="not seen")


def _draw_texts(ax: Axes, segment: Segment, placed: Sequence[Word], row: np.ndarray) -> None:
    """Words, the darker the more each gets (root scale), and which gets the most."""
    inches, tall = palette.inches(ax), height_of(placed) + WORDS
    words_axes(ax, inches, tall)
    shares = row[segment.start : segment.stop]
    most, best = shares.max(), int(shares.argmax())
    strong = palette.colour_of(segment.kind)
    colours = [palette.blend(palette.PAPER, strong, float(np.sqrt(shares[w.start] / most))) for w in placed]
    draw_words(ax, placed, colours, tall - 0.38)
    text = next(w.text for w in placed if w.start <= best < w.start + w.count)
    said = f"“{text}” gets most, {_precisely(most)} (even: {_precisely(_even(row))})"
    font: dict[str, Any] = {"fontsize": palette.FONT - 1, "color": palette.MUTED, "va": "top"}
    ax.text(
        0, tall - 0.16, f"{segment.name}, a word the darker the more it gets (root scale): {said}", **font
    )


def _draw_strip(ax: Axes, segment: Segment, weights: np.ndarray, even: float) -> None:
    ax.bar(np.arange(segment.length), weights, width=0.85, color=palette.colour_of(segment.kind))
    ax.axhline(even, color=palette.INK, linewidth=0.9)
    ax.text(1.005, even, "even", transform=ax.get_yaxis_transform(), va="center", fontsize=palette.FONT - 1)
    ax.set(xlim=(-0.6, segment.length - 0.4), ylim=(0, 1.15 * max(weights.max(), even)))
    ax.set(xlabel=f"token of {segment.name}", ylabel="attention")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
