"""Windows: seconds to frames, and the frames of a window. LeRobot's: test_against_lerobot.py."""

import doctest
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivla.data import PolicyFeature, delta_frames, delta_timestamps, open_dataset, window_indices, windows


def config(observations, actions):
    return SimpleNamespace(
        input_features={"observation.state": PolicyFeature("STATE", (2,))},
        output_features={"action": PolicyFeature("ACTION", (2,))},
        observation_delta_indices=observations,
        action_delta_indices=actions,
    )


def test_doctest():
    assert doctest.testmod(windows).failed == 0
    assert doctest.testmod(windows).attempted == 2


@given(
    st.integers(0, 30),
    st.integers(1, 30),
    st.integers(0, 29),
    st.lists(st.integers(-40, 40), min_size=1, max_size=9),
)
def test_a_window_repeats_the_ends_and_marks_what_it_repeats(start, length, offset, deltas):
    index = start + offset % length
    indices, is_pad = window_indices(index, start, start + length, deltas)
    for delta, found, padded in zip(deltas, indices.tolist(), is_pad.tolist(), strict=True):
        inside = start <= index + delta < start + length
        assert padded == (not inside)
        assert found == (index + delta if inside else start if delta < 0 else start + length - 1)


def test_many_windows_at_once():
    frames, start, stop = torch.tensor([0, 4, 5]), torch.tensor([0, 0, 5]), torch.tensor([5, 5, 9])
    indices, is_pad = window_indices(frames, start, stop, [-1, 0, 1])
    assert indices.tolist() == [[0, 0, 1], [3, 4, 4], [5, 5, 6]]
    assert is_pad.tolist() == [[True, False, False], [False, False, True], [True, False, False]]


def test_seconds_and_frames():
    seconds = delta_timestamps(config([-1, 0], range(3)), 10)
    assert seconds == {"observation.state": [-0.1, 0.0], "action": [0.0, 0.1, 0.2]}
    assert delta_frames(seconds, 10) == {"observation.state": [-1, 0], "action": [0, 1, 2]}
    assert delta_timestamps(config(None, [0]), 10) == {"action": [0.0]}
    keys = ["observation.extra", "action", "timestamp"]
    assert list(delta_timestamps(config([0], [0]), 10, keys)) == ["observation.extra", "action"]


def test_wrong_numbers_are_refused():
    with pytest.raises(
        ValueError, match=r"holds \[0.05\], between two frames at 10 fps; expected multiples of 1/10 s. Take"
    ):
        delta_frames({"action": [0.0, 0.05]}, 10)
    with pytest.raises(ValueError, match=r"fps is 0; expected .*above 0. Pass dataset.fps"):
        delta_timestamps(config(None, [0]), 0)
    with pytest.raises(
        ValueError, match=r"frame 9 is outside its episode, 0 ≤ i < 9; expected one inside. Give absolute"
    ):
        window_indices(9, 0, 9, [0])


def test_without_lerobot_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lerobot.datasets", None)
    with pytest.raises(ImportError, match=r"needs LeRobot 0.6 .*pip install 'minivla\[lerobot\]'"):
        open_dataset("lerobot/pusht")
