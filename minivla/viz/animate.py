"""Moving pictures for notebooks: GIFs of rollouts and of flows, below a megabyte, through Pillow."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from minivla.data.features import MissingKey
from minivla.files import atomic_write
from minivla.recorder import Flow
from minivla.viz import flow as flow_figures
from minivla.viz import palette
from minivla.viz.pictures import as_picture, finite

MOST = 1_000_000  # bytes of a GIF in a notebook
SIDE = 256  # small pictures are enlarged to about this height, by a whole factor
GAP = 6  # pixels between pictures side by side
HOLD = 0.8  # seconds that the last frame stays


@dataclass(frozen=True)
class Gif:
    """A film that a notebook shows by itself: the bytes of a GIF, and `alt`, what is seen in words."""

    data: bytes
    frames: int
    width: int
    height: int
    fps: float
    alt: str

    def _repr_html_(self) -> str:
        source = f"data:image/gif;base64,{base64.b64encode(self.data).decode('ascii')}"
        alt = html.escape(self.alt, quote=True)
        style = "max-width:100%;height:auto;image-rendering:pixelated;border-radius:4px"
        return f'<img src="{source}" alt="{alt}" width="{self.width}" height="{self.height}" style="{style}">'

    def __repr__(self) -> str:
        size = f"{self.frames} frames of {self.width} x {self.height}"
        return f"Gif({size} at {self.fps:g} per second: {self.alt})"


def show_gif(frames: Iterable[Any], fps: float = 10, *, alt: str = "a rollout", most: int = MOST) -> Gif:
    """The frames as a film, embedded in the notebook when it is a cell's last expression.

    frames: images (H, W, 3) or (3, H, W), uint8 or float in [0, 1], of one size; small ones are enlarged
    without blurring. The film is made of fewer colours, and then of every second frame (shown twice as
    long), until it has at most `most` bytes. Raises ValueError for no frames, frames of several sizes, a
    rate that is not positive, or a film that stays too large.
    """
    film = check_film(frames, fps)
    for step, colours in ((1, 128), (1, 48), (2, 48), (2, 24), (4, 24), (4, 12)):
        kept = film[:-1:step] + film[-1:]
        data = _encode(kept, fps / step, colours)
        if len(data) <= most:
            height, width = film[0].shape[:2]
            return Gif(data, len(kept), width, height, fps / step, alt)
    raise ValueError(
        f"{len(film)} frames of {film[0].shape[1]} × {film[0].shape[0]} make {len(data):,} bytes, "
        f"expected at most {most:,}; give fewer or smaller frames: frames[::4]"
    )


def save_gif(
    frames: Iterable[Any], path: str | os.PathLike[str], fps: float = 10, *, most: int = MOST
) -> Path:
    """Write the frames to `path` (.gif), whole or not at all. Otherwise as `show_gif`. Returns the path."""
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path is {os.fspath(path)!r}; expected a name ending in .gif")
    return atomic_write(path, show_gif(frames, fps, most=most).data)


def rollout_frames(
    observations: Iterable[Mapping[str, Any]], cameras: Sequence[str] | None = None
) -> list[np.ndarray]:
    """One frame an observation, its cameras side by side. Returns uint8 (H, W, 3) each.

    observations: what an environment gave, step by step.
    cameras: keys, or their last parts ("table"), all when None.

    Raises KeyError for a camera that is not there, ValueError when there are no observations or no cameras.
    """
    listed = list(observations)
    if not listed:
        raise ValueError("there are no observations; expected one for each step of an episode")
    found = [key for key in listed[0] if key.startswith("observation.image")]
    short = {key.rsplit(".", 1)[-1]: key for key in found}
    keys = found if cameras is None else [short.get(name, name) for name in cameras]
    if absent := [key for key in keys if key not in listed[0]]:
        raise MissingKey(f"no camera {', '.join(absent)}; the observations have {', '.join(found) or 'none'}")
    if not keys:
        raise ValueError(
            f"the observations have no camera, only {', '.join(listed[0])}; "
            "expected observation.images.<camera>"
        )
    return [tile([observation[key] for key in keys]) for observation in listed]


def animate_flow(
    flow: Flow | None,
    *,
    sample: int = 0,
    dimensions: tuple[int, int] = (0, 1),
    step: int = 0,
    field: Callable[[Any, float], Any] | None = None,
    fps: float = 4,
    moments: int = 24,
    alt: str | None = None,
    most: int = MOST,
) -> Gif:
    """A sampler at work: the batch moves from noise to actions and, beside it, the chunk takes shape.

    One frame a sampler step, at most `moments` of them; `field`, a function (points (N, 2), time) -> (N, 2),
    is drawn anew at each. Other arguments as in `plot_flow`. Raises ValueError as `plot_flow` and `show_gif`
    do.
    """
    times, x, _ = flow_figures.check_flow(flow, sample, dimensions, step)
    plane, long = x[:, :, step][..., dimensions], x.shape[2] > 1
    frames = []
    for k in flow_figures.spread_over(len(times), moments):
        with palette.style():
            figure = palette.sheet(3.0, width=palette.WIDTH if long else 3.3, layout=None)
            ax = palette.axes_at(figure, 0.6, 0.42, 2.1, 2.1)
            flow_figures.frame_square(ax, plane)
            ax.set(xlabel=f"action {dimensions[0]} at step {step}", ylabel=f"action {dimensions[1]}")
            if field is not None:
                flow_figures.draw_field(ax, field, float(times[k]))
            flow_figures.draw_paths(ax, plane[: k + 1], sample, times[: k + 1], named=False)
            if long:
                _draw_chunk(palette.axes_at(figure, 3.5, 0.42, 2.85, 2.1), x, k, dimensions, sample)
            palette.headline(
                figure, f"Sampler step {k} of {len(times) - 1}, time {flow_figures.clock(times[k])}"
            )
        frames.append(figure_frame(figure, round(100 * figure.get_size_inches()[0])))
        plt.close(figure)
    who, steps = palette.counted(x.shape[1], "sample"), palette.counted(len(times) - 1, "sampler step")
    told = f"{who} {'move' if x.shape[1] > 1 else 'moves'} from noise to actions in {steps}"
    return show_gif(frames, fps, alt=told if alt is None else alt, most=most)


def tile(images: Sequence[Any], columns: int | None = None) -> np.ndarray:
    """Images of one height in a row, or in rows of `columns`, on white. Returns uint8 (H, W, 3)."""
    pictures = [enlarged(image) for image in images]
    columns = columns or len(pictures)
    height, width = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def enlarged(image: Any, side: int = SIDE) -> np.ndarray:
    """A picture enlarged by a whole factor to about `side` pixels, uint8 (H, W, 3); pixels stay squares."""
    picture = np.round(as_picture(image) * 255).astype(np.uint8)
    factor = max(1, round(side / picture.shape[0]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def figure_frame(figure: Figure, width: int = 650) -> np.ndarray:
    """A figure as a frame, uint8 (H, W, 3), `width` pixels wide: for films of figures."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=width / figure.get_size_inches()[0])
    return np.asarray(Image.open(buffer).convert("RGB"))


def check_film(frames: Iterable[Any], fps: float) -> list[np.ndarray]:
    """The frames enlarged, uint8 (H, W, 3). Raises ValueError as `show_gif` does."""
    if not fps > 0:
        raise ValueError(f"fps is {fps}; expected frames per second, above 0")
    film = [enlarged(frame) for frame in frames]
    if not film:
        raise ValueError("there are no frames; expected a list of images, one for each step")
    if sizes := {f.shape[:2] for f in film} - {film[0].shape[:2]}:
        raise ValueError(
            f"frames are of several sizes: {film[0].shape[:2]} and {', '.join(map(str, sizes))}; expected one"
        )
    return film


def _draw_chunk(ax: Axes, values: np.ndarray, k: int, dimensions: tuple[int, int], sample: int) -> None:
    """Two dimensions of the chunks (N + 1, B, H, A) over the horizon, at sampler step k."""
    steps, shown = np.arange(values.shape[2]), values[:, sample][..., dimensions]
    known = finite(shown) if np.isfinite(shown).any() else np.zeros(1)
    low, high = known.min(), max(known.max(), known.min() + 1e-6)
    ax.set(xlim=(0, len(steps) - 1), ylim=(low - 0.05 * (high - low), high + 0.2 * (high - low)))
    ax.set(xlabel="step of the chunk", ylabel="action (normalised)")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for i, (d, dash) in enumerate(zip(dimensions, ("-", (0, (3, 1.5))), strict=True)):
        colour = (flow_figures.ACTION, palette.INK)[i]
        ax.plot(steps, shown[-1, :, i], color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(steps, shown[k, :, i], color=colour, linewidth=1.8, linestyle=dash, gid=f"action {d}")
        palette.say(ax, i, f"action {d}", colour)


def _encode(film: Sequence[np.ndarray], fps: float, colours: int) -> bytes:
    """One palette for the whole film, so that nothing flickers and only changes are stored."""
    sample = np.concatenate(
        [film[i] for i in sorted({*range(0, len(film), max(1, len(film) // 8)), len(film) - 1})]
    )
    shared = Image.fromarray(sample).quantize(colours, method=Image.Quantize.MEDIANCUT)
    pictures = [Image.fromarray(frame).quantize(palette=shared, dither=Image.Dither.NONE) for frame in film]
    # Browsers slow a GIF down when its frames last less than 20 ms.
    each = max(20, round(1000 / fps))
    times = [each] * (len(film) - 1) + [each + round(1000 * HOLD)]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True
    )
    return buffer.getvalue()
