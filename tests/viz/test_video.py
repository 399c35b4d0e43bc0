"""A film comes back out of the video with its frames; without ffmpeg it is a GIF."""

import base64
import re
import shutil
import subprocess

import numpy as np
import pytest

from minivla.viz import Gif, Video, show_video, video

needs_ffmpeg = pytest.mark.skipif(not video.encoders(), reason="no ffmpeg with H.264 or VP9 on the path")


def moving(count=12, size=64):
    """A red square on grey that walks to the right."""
    frames = np.full((count, size, size, 3), 200, np.uint8)
    for i in range(count):
        frames[i, 20:40, 3 * i : 3 * i + 20] = (214, 48, 39)
    return list(frames)


def decoded(film, folder):
    """The frames of a video, uint8 (T, H, W, 3), through ffmpeg."""
    path = folder / "film"
    path.write_bytes(film.data)
    command = ["ffmpeg", "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, film.height, film.width, 3)


@needs_ffmpeg
@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_the_frames_come_back_out(ending, tmp_path, monkeypatch):
    mime, encoder, _ = video.CODECS[ending]
    if encoder not in video.encoders():
        pytest.skip(f"this ffmpeg has no {encoder}")
    monkeypatch.setattr(video, "encoders", lambda: (encoder,))
    film = show_video(moving(), 10, alt="it walks")
    assert isinstance(film, Video)
    assert (film.mime, film.frames, film.width, film.height, film.fps) == (mime, 12, 256, 256, 10)
    pictures = decoded(film, tmp_path)
    assert len(pictures) == 12
    for picture, frame in zip(pictures, moving(), strict=True):
        off = abs(picture[2::4, 2::4].astype(int) - frame.astype(int))
        assert off.mean() < 6  # lossy, but this frame and no other: a step of the square is worth twice that
    assert len(film.data) < 30_000
    assert show_video(moving(), 10).data == film.data


@needs_ffmpeg
def test_a_notebook_gets_a_video_with_controls_and_words(tmp_path):
    film = show_video(moving(3), alt='the gripper "reaches"')
    html = film._repr_html_()
    assert html.startswith("<video controls loop muted playsinline ")
    assert html.endswith("</video>")
    assert base64.b64decode(re.search(r"base64,([^\"]+)\"", html)[1]) == film.data
    assert 'aria-label="the gripper &quot;reaches&quot;"' in html
    assert "cannot play it" in html
    assert repr(film).startswith("Video(3 frames of 256 x 256 at 10 per second, video/")


@needs_ffmpeg
def test_odd_sides_get_a_white_edge(tmp_path):
    film = show_video(np.zeros((4, 301, 303, 3), np.uint8))
    pictures = decoded(film, tmp_path)
    assert pictures.shape[1:3] == (302, 304)
    assert pictures[:, -1, -1].min() > 200
    assert pictures[:, 5, 5].max() < 30


@needs_ffmpeg
def test_a_film_too_large_loses_quality_and_is_then_refused():
    noise = list(np.random.default_rng(0).integers(0, 256, (6, 256, 256, 3), dtype=np.uint8))
    whole = show_video(noise, most=10**9)
    small = show_video(noise, most=len(whole.data) // 2)
    assert len(small.data) <= len(whole.data) // 2
    assert small.frames == whole.frames
    with pytest.raises(ValueError, match=r"6 frames of 256 × 256 make .* expected at most 1,000; .*\[::4\]"):
        show_video(noise, most=1000)


def test_without_ffmpeg_it_is_a_gif(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ffmpeg") is None
    film = show_video(moving(), 10, alt="it walks")
    assert isinstance(film, Gif)
    assert (film.frames, film.alt) == (12, "it walks")


def test_an_ffmpeg_without_encoders_is_a_gif_too(monkeypatch, tmp_path):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho ' V..... mpeg4'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert isinstance(show_video(moving(2)), Gif)


@needs_ffmpeg
def test_what_ffmpeg_complains_of_is_passed_on(monkeypatch):
    monkeypatch.setitem(video.CODECS, "mp4", ("video/mp4", "libx264", "-nonsense 1"))
    monkeypatch.setattr(video, "encoders", lambda: ("libx264",))
    with pytest.raises(ValueError, match=r"(?s)ffmpeg could not make the film: .*nonsense.*; use show_gif"):
        show_video(moving(2))


def test_video_errors():
    with pytest.raises(ValueError, match="fps is 0"):
        show_video(moving(), 0)
    with pytest.raises(ValueError, match="there are no frames"):
        show_video([])
