"""What the explorer says of a look, and how far its pictures are darkened, in a real browser."""

import re

import numpy as np
import pytest
import torch

from minivla.segments import Segment, arrange
from minivla.viz.explorer import explore
from tests.browser import Browser
from tests.viz.explorer_view import View, bare

SITE = "cross"
INKS = "[...n.getContext('2d').getImageData(0, 0, n.width, n.height).data].filter((_, i) => i % 4 == 3)"


@pytest.fixture(scope="module")
def tab():
    with Browser() as browser:
        yield browser.open("about:blank")


@pytest.fixture
def show(tab, tmp_path):
    def load(call):
        tab.load(explore(call).save(tmp_path / "page.html").as_uri())
        assert tab.problems == []
        return View(tab)

    return load


def looking(row):
    """Two queries that look at a state and two cameras of 64 patches, at one site."""
    cameras = [Segment(name, "image", 64, grid=(8, 8), image=name) for name in ("table", "wrist")]
    keys = arrange([Segment("state", "state", 1), *cameras])
    queries = arrange([Segment("queries", "query", 2)])
    batch = {name: torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16) for name in ("table", "wrist")}
    call = bare([*keys, Segment("queries", "query", 2)], batch=batch, mask=torch.ones(131, 131).bool())
    call.sites[SITE] = queries, keys
    call.masks[SITE] = torch.ones(1, 2, 129, dtype=torch.bool)
    call.attention[SITE] = torch.as_tensor(row / row.sum()).float().expand(1, 1, 2, 129)
    return call


@pytest.fixture
def finger():
    """Nearly half of the attention on one patch of the wrist camera, the rest on the table."""
    row = np.full(129, 0.5 / 64)
    row[0], row[65:], row[65 + 34] = 0.01, 0.01 / 63, 0.48
    return looking(row)


def test_the_sequence_and_what_a_site_shows_of_it_are_two_sentences(show, finger):
    view = show(finger)
    said = view.text(".say").replace("\u00a0", " ")
    assert "queries[0] may look at 131 of 131 tokens of the sequence. At cross it is shown 129 tokens" in said
    assert view.text(".mask h3") == "May look at 131 of 131 tokens"
    view.choose(1)
    view.click(".choice input[value=from]")
    said = view.text(".say").replace("\u00a0", " ")
    assert "may be looked at by 131 of 131 tokens of the sequence. At cross 2 tokens look" in said


def test_one_strong_patch_is_named_although_another_camera_gets_more(show, finger):
    view = show(finger)
    found = re.search(r"^(\d+)\u00a0% goes to one patch, wrist\[34\]$", view.text(".attention h3"))
    assert int(found[1]) == pytest.approx(48, abs=1)  # weights are stored in 255 steps
    said = view.text(".say").replace("\u00a0", " ")
    assert "of its attention goes to table" in said
    assert f"{found[1]} % to one patch, wrist[34]" in said


def test_a_patch_is_not_named_beside_a_state_that_gets_most(show):
    row = np.full(129, 0.2 / 127)
    row[0], row[65 + 34] = 0.7, 0.1
    view = show(looking(row))
    assert view.text(".attention h3").replace("\u00a0", " ") == "70 % goes to state"
    assert "one patch" not in view.text(".say")


def test_pictures_stay_bright_enough_to_be_recognised(show, finger):
    """The darkest patch keeps half of its light; the clearest all; between them it goes with the root."""
    view = show(finger)
    table, wrist = (np.array(a).reshape(480, 480) for a in view.all(".frame canvas", INKS))
    patch = wrist[30::60, 30::60] / 255
    assert patch.shape == (8, 8)
    assert patch[4, 2] == 0
    assert 0.4 < patch[0, 0] <= 0.5
    expected = 0.5 * (1 - np.sqrt(0.5 / 64 / 0.48))
    assert table[30::60, 30::60] / 255 == pytest.approx(np.full((8, 8), expected), abs=0.02)
    assert "root scale" in view.text(".pictures .scale")
