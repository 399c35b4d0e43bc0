"""Films of episodes: frames side by side, as GIF (Pillow) or MP4 (the ffmpeg program)."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LARGEST = 8_000_000  # bytes of a GIF
FILMED = 6  # how many episodes a film shows
TILE, LARGE = 128, 192  # pictures below the first are enlarged, those of twice the second are thinned
GREEN, RED = (
    (0, 158, 115),
    (213, 94, 0),
)  # success and failure, of the palette that colour-blind eyes tell apart


def check_video(path: str | Path | None) -> Path | None:
    """The path of a film. Raises ValueError for another ending than .gif and .mp4, or for want of ffmpeg."""
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"video={str(path)!r}; expected a name ending in .gif or .mp4")
    if path.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise ValueError(
            f"video={str(path)!r} needs the ffmpeg program, which is not installed; give a .gif instead"
        )
    return path


def write_video(
    episodes: Sequence[Sequence[np.ndarray]], successes: Sequence[bool], path: Path, fps: float
) -> None:
    """Write the episodes, each a list of frames uint8 (H, W, 3), side by side, each kept at its end."""
    from minivla.viz.animate import save_gif

    film = _tiled(episodes, successes)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        if path.suffix.lower() == ".gif":
            save_gif(film, fresh, fps, most=LARGEST)
        else:
            _write_mp4(film, fresh, fps)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _tiled(episodes: Sequence[Sequence[np.ndarray]], successes: Sequence[bool]) -> np.ndarray:
    """One film (T, rows H, columns W, 3) out of several; H and W are even, as video codecs want."""
    length = max(len(frames) for frames in episodes)
    columns = math.ceil(math.sqrt(len(episodes)))
    tiles = [_tile(frames, success, length) for frames, success in zip(episodes, successes, strict=True)]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=2) for i in range(0, len(tiles), columns)]
    film = np.concatenate(rows, axis=1)
    return film[:, : film.shape[1] // 2 * 2, : film.shape[2] // 2 * 2]


def _tile(frames: Sequence[np.ndarray], success: bool, length: int) -> np.ndarray:
    """One episode (T, H, W, 3), resized, in a white frame that takes the outcome's colour at the end."""
    height = frames[0].shape[0]
    stride, scale = max(1, height // LARGE), max(1, round(TILE / height))
    film = np.stack([*frames, *[frames[-1]] * (length - len(frames))])[:, ::stride, ::stride]
    film = film.repeat(scale, axis=1).repeat(scale, axis=2)
    film = np.pad(film, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255)
    edge = np.ones(film.shape[1:3], dtype=bool)
    edge[4:-4, 4:-4] = False
    film[len(frames) - 1 :, edge] = GREEN if success else RED
    return film


def _write_mp4(film: np.ndarray, path: Path, fps: float) -> None:
    height, width = film.shape[1:3]
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -"
    command = f"ffmpeg -y -loglevel error {source} -pix_fmt yuv420p -movflags +faststart".split()
    done = subprocess.run([*command, str(path)], input=film.tobytes(), capture_output=True, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()}; try a .gif"
        )
