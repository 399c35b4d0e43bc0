"""GIFs hold the frames, stay small and are written whole."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from minivla.segments import Segment
from minivla.viz import figure_frame, palette, plot_tokens, rollout_frames, save_gif, show_gif, tile
from minivla.viz.animate import GAP, enlarged
from minivla.viz.pictures import as_picture


def moving(count=12, size=64):
    """A red square on grey that walks to the right."""
    frames = np.full((count, size, size, 3), 200, np.uint8)
    for i in range(count):
        frames[i, 20:30, 2 * i : 2 * i + 10] = (214, 48, 39)
    return list(frames)


def read(data):
    film = Image.open(io.BytesIO(data))
    pictures = []
    for i in range(film.n_frames):
        film.seek(i)
        pictures.append(np.asarray(film.convert("RGB")).astype(int))
    return film, pictures


def test_a_film_holds_its_frames_enlarged_without_blurring():
    frames = moving()
    gif = show_gif(frames, 10)
    film, pictures = read(gif.data)
    assert (gif.frames, gif.width, gif.height) == (12, 256, 256)
    assert film.size == (256, 256)
    for picture, frame in zip(pictures, frames, strict=True):
        assert abs(picture[2::4, 2::4] - frame.astype(int)).max() <= 8  # few colours, but the right ones
    film.seek(0)
    assert film.info["duration"] == 100
    film.seek(11)
    assert film.info["duration"] == 900  # the end is held


def test_a_notebook_gets_one_image_tag():
    gif = show_gif(moving(3), alt='the gripper "reaches"')
    html = gif._repr_html_()
    assert re.fullmatch(r"<img [^>]*>", html)
    assert base64.b64decode(re.search(r"base64,([^\"]+)\"", html)[1]) == gif.data
    assert 'alt="the gripper &quot;reaches&quot;"' in html
    assert repr(gif) == 'Gif(3 frames of 256 x 256 at 10 per second: the gripper "reaches")'


def test_the_same_frames_give_the_same_bytes():
    assert show_gif(moving()).data == show_gif(moving()).data


def test_a_film_too_large_loses_colours_and_frames_but_not_its_end():
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    whole = show_gif(noise, most=10**9)
    small = show_gif(noise, most=len(whole.data) // 3)
    assert len(small.data) <= len(whole.data) // 3
    assert small.frames < whole.frames
    assert small.fps * whole.frames == pytest.approx(whole.fps * small.frames, rel=0.5)  # about as long
    with pytest.raises(ValueError, match=r"8 frames of 256 × 256 make .* expected at most 1,000"):
        show_gif(noise, most=1000)


def test_a_rollout_in_tabletop_is_below_a_megabyte(seen):
    start, stop = seen.dataset.episodes[0]
    frames = rollout_frames([seen.dataset[i] for i in range(start, stop)])
    assert frames[0].shape == (256, 2 * 256 + GAP, 3)
    assert len(show_gif(frames).data) < 400_000
    assert rollout_frames([seen.item], ["wrist"])[0].shape == (256, 256, 3)


def test_save_writes_the_film_or_nothing(tmp_path):
    path = save_gif(moving(), tmp_path / "film.gif")
    assert path.read_bytes() == show_gif(moving()).data
    with pytest.raises(ValueError, match=r"name ending in \.gif"):
        save_gif(moving(), tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="there are no frames"):
        save_gif([], tmp_path / "none.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["film.gif"]


def test_frames_of_several_kinds_look_the_same():
    frame = moving(1)[0]
    tensor = torch.from_numpy(frame).permute(2, 0, 1) / 255
    assert (enlarged(frame) == enlarged(tensor)).all()
    assert (enlarged(frame)[::4, ::4] == frame).all()


def test_tiles_are_laid_in_rows():
    one, two = np.zeros((256, 256, 3), np.uint8), np.full((256, 256, 3), 9, np.uint8)
    sheet = tile([one, two, two], columns=2)
    assert sheet.shape == (2 * 256 + GAP, 2 * 256 + GAP, 3)
    assert (sheet[:256, :256] == 0).all()
    assert (sheet[256 + GAP :, :256] == 9).all()
    assert (sheet[256 + GAP :, 256 + GAP :] == 255).all()


def test_a_figure_can_be_a_frame():
    frame = figure_frame(plot_tokens([Segment("state", "state", 1)]), width=325)
    assert frame.shape[1:] == (325, 3)
    paper = tuple(int(palette.PAPER[i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(frame[0, 0]) == paper


def test_pictures():
    flat = as_picture(np.full((3, 4, 5), 7.0), rescale=True)
    assert flat.shape == (4, 5, 3)
    assert (flat == 0.5).all()
    assert as_picture(np.full((4, 5, 3), 255, np.uint8)).max() == 1
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\); expected"):
        as_picture(np.zeros((2, 3, 4, 5)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: show_gif(moving(), 0), ValueError, "fps is 0"),
        (lambda: show_gif([*moving(1), *moving(1, 300)]), ValueError, "several sizes"),
        (lambda: rollout_frames([]), ValueError, "there are no observations"),
        (
            lambda: rollout_frames([{"observation.state": 1}]),
            ValueError,
            "have no camera, only observation.state",
        ),
        (
            lambda: rollout_frames([{"observation.image": moving(1)[0]}], ["wrist"]),
            KeyError,
            "no camera wrist",
        ),
    ],
)
def test_animation_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
