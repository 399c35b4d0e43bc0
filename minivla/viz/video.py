"""Films as HTML5 video, a fifth of the size of a GIF, through the ffmpeg program where it is installed."""

from __future__ import annotations

import base64
import html
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minivla.viz.animate import MOST, Gif, check_film, show_gif

# By ending: the MIME type, the encoder's name, and its options. Players seek by key frames, so there is one
# at least each second; `faststart` puts the index first, so that a film plays before it is all there.
CODECS = {
    "mp4": ("video/mp4", "libx264", "-preset slow -movflags +faststart"),
    "webm": ("video/webm", "libvpx-vp9", "-b:v 0 -row-mt 0"),
}


@dataclass(frozen=True)
class Video:
    """A film that a notebook shows by itself: the bytes of an MP4 or WebM; `alt` says what is seen."""

    data: bytes
    mime: str
    frames: int
    width: int
    height: int
    fps: float
    alt: str

    def _repr_html_(self) -> str:
        source = f"data:{self.mime};base64,{base64.b64encode(self.data).decode('ascii')}"
        alt = html.escape(self.alt, quote=True)
        style = "max-width:100%;height:auto;border-radius:4px"
        size = f'width="{self.width}" height="{self.height}"'
        return (
            f'<video controls loop muted playsinline aria-label="{alt}" {size} style="{style}">'
            f'<source src="{source}" type="{self.mime}">A film: {alt}. This page cannot play it.</video>'
        )

    def __repr__(self) -> str:
        size = f"{self.frames} frames of {self.width} x {self.height}"
        return f"Video({size} at {self.fps:g} per second, {self.mime}: {self.alt})"


def show_video(
    frames: Iterable[Any], fps: float = 10, *, alt: str = "a rollout", most: int = MOST
) -> Video | Gif:
    """The frames as a film with a slider, embedded in the notebook when it is a cell's last expression.

    frames: as `show_gif` takes them. H.264 where ffmpeg has it, else VP9; where there is no ffmpeg, or it
    has neither, a GIF, which looks alike but has no controls. Quality falls until the film has at most `most`
    bytes. Raises ValueError for no frames, frames of several sizes, a rate that is not positive, or a film
    that stays too large.
    """
    film = check_film(frames, fps)
    ending = next((e for e, (_, encoder, _) in CODECS.items() if encoder in encoders()), None)
    if ending is None:
        return show_gif(film, fps, alt=alt, most=most)
    height, width = film[0].shape[:2]
    for quality in (20, 28, 36, 44):
        data = _encode(film, fps, ending, quality)
        if len(data) <= most:
            return Video(data, CODECS[ending][0], len(film), width + width % 2, height + height % 2, fps, alt)
    raise ValueError(
        f"{len(film)} frames of {width} × {height} make {len(data):,} bytes, "
        f"expected at most {most:,}; give fewer or smaller frames: frames[::4]"
    )


def encoders() -> tuple[str, ...]:
    """The encoders of `CODECS` that the ffmpeg program on the path has; none without the program."""
    program = shutil.which("ffmpeg")
    return _encoders(program) if program else ()


@lru_cache
def _encoders(program: str) -> tuple[str, ...]:
    told = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, check=False).stdout
    return tuple(encoder for _, encoder, _ in CODECS.values() if encoder.encode() in told.split())


def _encode(film: list[np.ndarray], fps: float, ending: str, quality: int) -> bytes:
    """One thread and no dates, so that the same frames give the same bytes."""
    height, width = film[0].shape[:2]
    _, encoder, options = CODECS[ending]
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -"
    # Codecs want even sides; a white row or column is added where one is odd.
    even = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white -pix_fmt yuv420p"
    same = f"-threads 1 -fflags +bitexact -flags:v +bitexact -g {max(1, round(fps))}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"film.{ending}"
        command = f"ffmpeg -y -loglevel error {source} {even} -c:v {encoder} -crf {quality} {options} {same}"
        pixels = b"".join(frame.tobytes() for frame in film)
        done = subprocess.run([*command.split(), str(path)], input=pixels, capture_output=True, check=False)
        if done.returncode != 0:
            raise ValueError(
                f"ffmpeg could not make the film: {done.stderr.decode(errors='replace').strip()}; "
                "use show_gif(frames)"
            )
        return path.read_bytes()
