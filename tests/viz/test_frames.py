"""Strips hold the frames they name, contact sheets tell keys, sizes and ranges."""

import numpy as np
import pytest
import torch

from minivla.viz import plot_cameras, plot_frames


def film(count, shade=0.0):
    """Frames that brighten, step by step."""
    return [np.full((8, 8, 3), shade + 0.05 * i) for i in range(count)]


def shown(figure):
    return [np.asarray(ax.images[0].get_array()) for ax in figure.axes]


def test_a_long_film_is_thinned_evenly_and_keeps_both_ends():
    frames = film(11)
    figure = plot_frames(frames, [0.1 * i for i in range(11)], title="it brightens")
    assert [picture[0, 0, 0] for picture in shown(figure)] == [f[0, 0, 0] for f in frames[::2]]
    assert [ax.get_xlabel() for ax in figure.axes] == ["0 s", "0.2 s", "0.4 s", "0.6 s", "0.8 s", "1 s"]
    assert figure.get_size_inches()[0] == 6.5
    assert [ax.get_xlabel() for ax in plot_frames(film(3)).axes] == ["step 0", "1", "2"]
    assert [ax.get_xlabel() for ax in plot_frames(film(2), labels=["open", "shut"]).axes] == ["open", "shut"]


def test_several_films_are_rows():
    figure = plot_frames({"table": film(4), "wrist": film(4, 0.5)}, most=2)
    assert [picture[0, 0, 0] for picture in shown(figure)] == pytest.approx([0, 0.15, 0.5, 0.65])
    assert [t.get_text() for ax in figure.axes for t in ax.texts] == ["table", "wrist"]
    tops = [ax.get_position().y1 for ax in figure.axes]
    assert tops[0] == tops[1] > tops[2] == tops[3]


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([], {}, r"have \[0\] frames"),
        ({"a": film(2), "b": film(3)}, {}, r"have \[2, 3\] frames"),
        (film(2), {"times": [0.0]}, "times has 1 entries for 2 frames"),
        (film(2), {"labels": ["a"]}, "labels has 1 entries"),
    ],
)
def test_frame_errors(frames, options, message):
    with pytest.raises(ValueError, match=message):
        plot_frames(frames, **options)


def test_a_contact_sheet_of_a_normalised_batch_says_that_it_is_stretched(seen):
    figure = plot_cameras(seen.batch)
    assert figure.get_suptitle() == "2 cameras, normalised, as the network sees them"
    for ax, name in zip(figure.axes, ("table", "wrist"), strict=True):
        image = seen.batch[f"observation.images.{name}"][0]
        key, size, reach = ax.get_xlabel().split("\n")
        assert key == f"observation.images.{name}"
        assert size == "64 × 64 float32, sample 0 of 1"
        told = f"{image.min():.3g} to {image.max():.3g} (stretched to show)"
        assert reach.replace("−", "-") == told
    drawn = shown(figure)[0]
    assert (drawn.min(), drawn.max()) == (0, 1)


def test_raw_pictures_are_drawn_as_they_are():
    table = np.zeros((4, 6, 3), np.uint8)
    table[0, 0] = 255
    figure = plot_cameras({"observation.image": table, "observation.state": 1, "action": 2})
    assert figure.get_suptitle() == "1 camera, bytes, as a camera gives them"
    assert figure.axes[0].get_xlabel() == "observation.image\n4 × 6 uint8\n0 to 255"
    assert np.allclose(shown(figure)[0], table / 255)
    pale = torch.full((3, 4, 4), 0.25)
    assert np.allclose(shown(plot_cameras({"observation.images.a": pale}))[0], 0.25)  # not stretched


def test_mixed_ranges_histories_and_broken_values_are_told():
    history = torch.zeros(2, 3, 3, 4, 4)
    history[1, -1] = 1
    broken = torch.full((2, 3, 4, 4), -1.0)
    broken[1, 0, 0, 0] = float("nan")
    batch = {"observation.images.a": history, "observation.images.b": broken}
    figure = plot_cameras(batch, sample=1)
    first, second = (ax.get_xlabel().split("\n") for ax in figure.axes)
    assert first[1:] == ["4 × 4 float32, sample 1 of 2, newest of 3", "1 to 1"]
    assert second[2] == "−1 to −1 (stretched to show), 1 not finite"
    assert "several kinds of range: 0 to 1 and normalised" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": {"action": 1}}, KeyError, "no camera at all; the batch has action"),
        ({"cameras": ["observation.images.top"]}, KeyError, "no camera observation.images.top"),
        ({"sample": 3}, ValueError, "sample is 3; observation.images.a has 2"),
        ({"batch": {"observation.images.a": np.zeros((4, 4))}}, ValueError, r"\(4, 4\); expected"),
    ],
)
def test_camera_errors(options, error, message):
    with pytest.raises(error, match=message):
        plot_cameras(**{"batch": {"observation.images.a": torch.zeros(2, 3, 4, 4)}, **options})
