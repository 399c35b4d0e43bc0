"""What cameras saw: a film as a strip of pictures, and a contact sheet of what the policy is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivla.data.features import MissingKey
from minivla.viz import palette
from minivla.viz.flow import spread_over
from minivla.viz.pictures import as_array, as_picture, finite

EDGE, GAP = 0.15, 0.1  # inches
SMALL = palette.FONT - 1


def plot_frames(
    frames: Sequence[Any] | Mapping[str, Sequence[Any]],
    times: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    *,
    most: int = 6,
    title: str | None = None,
) -> Figure:
    """A film on paper: pictures side by side, the moment below each; with several films, a row for each.

    frames   images (3, H, W) or (H, W, 3), as `as_picture` takes them, or {name: such a list}, the films
             then being of one length. Of more than `most`, that many are shown, evenly spread.
    times    seconds, one a frame; without them frames are counted from 0
    labels   what to write under the frames in place of their moments, one a frame

    Raises ValueError for no frames, films of several lengths, or times or labels that are not one a frame.
    """
    rows = dict(frames) if isinstance(frames, Mapping) else {"": frames}
    length = _one_length(rows, times, labels)
    shown = spread_over(length, most)
    if labels is None:
        moments = range(length) if times is None else times
        labels = [f"{moment:.3g}{'' if times is None else ' s'}" for moment in moments]
        labels = [f"step {text}" if times is None and i == 0 else text for i, text in enumerate(labels)]
    head = _head(title)
    names = max(palette.text_width(name, SMALL) for name in rows) + (0.1 if any(rows) else 0)
    side = min(1.9, (palette.WIDTH - 2 * EDGE - names + GAP) / len(shown) - GAP)
    tall = side * max(_ratio(film[0]) for film in rows.values())
    with palette.style():
        figure = palette.sheet(head + len(rows) * (tall + GAP) + 0.22, layout=None)
        for row, (name, film) in enumerate(rows.items()):
            for column, i in enumerate(shown):
                place = (EDGE + names + column * (side + GAP), head + row * (tall + GAP), side, tall)
                ax = _picture(palette.axes_at(figure, *place), as_picture(film[i]))
                if row == len(rows) - 1:
                    ax.set_xlabel(labels[i], fontsize=SMALL, labelpad=3)
                if column == 0 and name:
                    style: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": SMALL}
                    ax.text(-0.08 / side, 0.5, name, transform=ax.transAxes, **style)
        if title is not None:
            palette.headline(figure, title)
    return figure


def plot_cameras(
    batch: Mapping[str, Any],
    cameras: Sequence[str] | None = None,
    *,
    sample: int = 0,
    title: str | None = None,
) -> Figure:
    """A contact sheet of what a policy is given to see: each camera with its key, size and range of values.

    batch: raw or preprocessed. Of a batch `sample` is shown, of a history the newest picture. Values outside
    [0, 1], as normalised pictures have them, cannot be shown as colours: such a picture is stretched from its
    darkest to its brightest value, and the note below it says so.
    cameras: keys, all that begin with "observation.image" when None.

    Raises KeyError for a camera that is not there or a batch without any, ValueError for a sample out of
    range and for values that are not pictures with three channels.
    """
    keys = [k for k in batch if k.startswith("observation.image")] if cameras is None else list(cameras)
    absent = [key for key in keys if key not in batch]
    if absent or not keys:
        raise MissingKey(
            f"no camera {', '.join(absent) or 'at all'}; the batch has {', '.join(batch)}; "
            "expected observation.images.<camera>, or give cameras=(key, …)"
        )
    images = {key: _newest(as_array(batch[key]), key, sample) for key in keys}
    head, columns = _head("title"), min(3, len(keys))
    side = min(2.3, (palette.WIDTH - 2 * EDGE + GAP) / columns - GAP)
    tall, below = side * max(_ratio(image) for image, _ in images.values()), 0.58
    with palette.style():
        rows = -(-len(keys) // columns)
        figure = palette.sheet(head + rows * (tall + below), layout=None)
        for i, (key, (image, note)) in enumerate(images.items()):
            place = (EDGE + i % columns * (side + GAP), head + i // columns * (tall + below), side, tall)
            ax = _picture(palette.axes_at(figure, *place), _displayed(image))
            ax.set_xlabel(_caption(key, image, note), fontsize=SMALL - 1, loc="left", labelpad=3)
        palette.headline(figure, _cameras_title(images) if title is None else title)
    return figure


def _one_length(rows: Mapping[str, Sequence[Any]], *others: Sequence[Any] | None) -> int:
    lengths = {len(film) for film in rows.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"the films have {sorted(lengths)} frames; expected one length, above 0")
    (length,) = lengths
    for what, given in zip(("times", "labels"), others, strict=True):
        if given is not None and len(given) != length:
            raise ValueError(f"{what} has {len(given)} entries for {length} frames; expected one a frame")
    return length


def _head(title: str | None) -> float:
    """Inches above the first picture."""
    return (
        EDGE if title is None else 0.24 + 0.17 * len(palette.wrapped(title, palette.WIDTH - 0.25).split("\n"))
    )


def _ratio(image: Any) -> float:
    """Height over width."""
    picture = as_array(image[0] if isinstance(image, tuple) else image)
    height, width = picture.shape[1:] if picture.shape[0] == 3 else picture.shape[:2]
    return float(height / width)


def _picture(ax: Axes, picture: np.ndarray) -> Axes:
    ax.imshow(picture, interpolation="nearest")
    ax.set(xticks=[], yticks=[], anchor="NW")
    ax.spines[:].set_visible(False)
    return ax


def _newest(values: np.ndarray, key: str, sample: int) -> tuple[np.ndarray, str]:
    """One picture (3, H, W) or (H, W, 3) of a camera's values, and which one it is."""
    note = ""
    if values.ndim > 3:
        if not 0 <= sample < len(values):
            raise ValueError(f"sample is {sample}; {key} has {len(values)}: expected 0 to {len(values) - 1}")
        note, values = f"sample {sample} of {len(values)}", values[sample]
    if values.ndim > 3:
        note, values = f"{note}, newest of {len(values)}", values[-1]
    return values, note


def _displayed(image: np.ndarray) -> np.ndarray:
    known = np.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0) if image.dtype.kind == "f" else image
    return as_picture(known, rescale=_stretched(known))


def _stretched(image: np.ndarray) -> bool:
    """Can its values not be shown as colours?"""
    values = finite(image)
    return image.dtype != np.uint8 and values.size > 0 and bool(values.min() < 0 or values.max() > 1)


def _caption(key: str, image: np.ndarray, note: str) -> str:
    """Key, size and range of a camera, one below the other."""
    height, width = image.shape[1:] if image.shape[0] == 3 else image.shape[:2]
    values = finite(image)
    reach = f"{values.min():.3g} to {values.max():.3g}".replace("-", "−") if values.size else "no number"
    shown = " (stretched to show)" if _stretched(image) else ""
    wrong = f", {image.size - values.size} not finite" if values.size < image.size else ""
    size = f"{height} × {width} {image.dtype}" + (f", {note}" if note else "")
    return f"{key}\n{size}\n{reach}{shown}{wrong}"


def _cameras_title(images: Mapping[str, tuple[np.ndarray, str]]) -> str:
    """The finding: how many cameras, and whether their values share one kind of range."""
    count = f"{len(images)} camera{'s' * (len(images) != 1)}"
    kinds = {_kind(image) for image, _ in images.values()}
    if len(kinds) > 1:
        return f"{count}, but their values have several kinds of range: {' and '.join(sorted(kinds))}"
    told = {
        "uint8": "bytes, as a camera gives them",
        "0 to 1": "values from 0 to 1",
        "normalised": "normalised, as the network sees them",
    }
    return f"{count}, {told[kinds.pop()]}"


def _kind(image: np.ndarray) -> str:
    return "uint8" if image.dtype == np.uint8 else "normalised" if _stretched(image) else "0 to 1"
