"""The palette, the sheet, and where labels go."""

import itertools
from typing import get_args

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from minivla.segments import Kind, Segment, arrange
from minivla.viz import palette
from minivla.viz.layout import check_segments, place_labels, segment_edges, spread, token_edges


def test_every_kind_has_the_colour_of_the_guide():
    assert set(palette.KIND_COLOURS) == set(get_args(Kind))
    assert palette.KIND_COLOURS["image"] == "#0072B2"
    assert palette.KIND_COLOURS["action"] == "#D55E00"
    assert palette.KIND_COLOURS["padding"] == "#DDDDDD"


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"'sound'.*image, language"):
        palette.colour_of("sound")


def test_text_is_legible_on_paper_and_paper_on_both_pages():
    assert palette.contrast(palette.INK, palette.PAPER) > 12
    assert palette.contrast(palette.MUTED, palette.PAPER) > 4.5
    assert palette.contrast(palette.PAPER, "#1a1a1a") > 12  # a card that stands out on a dark page
    assert palette.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    for colour in palette.KIND_COLOURS.values():
        assert palette.contrast(palette.text_on(colour), colour) > 3.9


def test_style_leaves_no_trace():
    before = dict(mpl.rcParams)
    with palette.style():
        assert mpl.rcParams["font.size"] == 9
        figure = palette.sheet(2)
    assert dict(mpl.rcParams) == before
    assert figure.get_size_inches().tolist() == [6.5, 2]
    assert figure.dpi == 200
    assert figure.get_facecolor() == mpl.colors.to_rgba(palette.PAPER)


def test_a_backend_that_goes_interactive_inside_stays_so():
    assert not mpl.is_interactive()
    try:
        with palette.style():
            mpl.interactive(True)
        assert mpl.is_interactive()
    finally:
        mpl.interactive(False)


def test_a_notebook_shows_a_figure_once_and_at_its_true_width(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", lambda data, **options: shown.append((data, options)))
    with palette.style():
        figure = palette.sheet(2)
    assert plt.get_fignums()
    figure._ipython_display_()
    assert not plt.get_fignums()  # so that neither plt.show() nor the end of the cell shows it again
    ((data, options),) = shown
    assert options["metadata"]["image/png"] == {"width": 650, "height": 200}
    assert data["text/plain"] == "Figure(650x200)"  # no address of an object: the same in every run


def test_titles_are_broken_between_words():
    text = "every token may look at every other token of the sequence but for padding"
    lines = palette.wrapped(text, 3.0).split("\n")
    assert len(lines) > 1
    assert " ".join(lines) == text
    assert all(palette.text_width(line, palette.FONT + 1, "bold") <= 3.0 for line in lines)
    assert palette.wrapped("one\ntwo", 3.0) == "one\ntwo"


def test_lists_in_prose():
    assert palette.listed(["a"]) == "a"
    assert palette.listed(["a", "b"]) == "a and b"
    assert palette.listed(["a", "b", "c", "d", "e"]) == "a, b and 3 more"


PI = arrange(
    [
        Segment("base camera", "image", 256),
        Segment("left wrist", "image", 256),
        Segment("empty camera", "padding", 256),
        Segment("instruction", "language", 48),
        Segment("state", "state", 1),
        Segment("actions", "action", 50),
    ]
)  # fmt: skip
ACT = arrange(
    [
        Segment("latent", "latent", 1), Segment("state", "state", 1), Segment("instruction", "language", 1),
        Segment("table", "image", 64), Segment("wrist", "image", 64), Segment("queries", "query", 16),
    ]
)  # fmt: skip
ONES = arrange([Segment(f"segment {i}", "state", 1) for i in range(9)])


@pytest.mark.parametrize("segments", [PI, ACT, ONES], ids=["pi", "act", "ones"])
@pytest.mark.parametrize("inches", [3.4, 6.2])
def test_labels_do_not_overlap_and_no_leader_runs_through_one(segments, inches):
    labels = place_labels(segments, inches)
    assert [label.text for label in labels] == [f"{s.name} · {s.length}" for s in segments]
    for one, other in itertools.permutations(labels, 2):
        if one.level == other.level:
            assert one.right <= other.left or other.right <= one.left
        if one.level < other.level and segments is not ONES:  # there, some leader must run behind a name
            assert not one.left < other.anchor < one.right
    assert max(label.level for label in labels) < len(segments)
    edges = segment_edges(segments) * inches
    for label, left, right in zip(labels, edges[:-1], edges[1:], strict=True):
        assert left < label.anchor < right


def test_one_token_stays_visible_beside_hundreds():
    edges = segment_edges(PI)
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(1)
    assert np.diff(edges).min() > 0.015
    tokens = token_edges(PI)
    assert len(tokens) == 868
    assert np.allclose(tokens[[0, 256, 512, 768, 816, 817, 867]], edges)
    assert (np.diff(tokens) > 0).all()


def test_spread_keeps_order_and_gap():
    at = spread([0.1, 0.11, 0.12, 0.8], 0.05)
    assert np.diff(at).min() >= 0.05 - 1e-12
    assert spread([0.1, 0.5, 0.9], 0.05).tolist() == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize(
    ("segments", "length", "message"),
    [
        ([], None, "no query segments"),
        (ACT, 150, r"add up to 147 tokens \(latent 1, .*\), but the sequence has 150"),
        (
            [Segment("a", "state", 1), Segment("b", "state", 2)],
            None,
            "b do not start where the one before ends",
        ),
        ([Segment("table", "image", 64, grid=(8, 9))], None, "64 tokens and a grid of 8 × 9"),
    ],
)
def test_segments_that_do_not_add_up(segments, length, message):
    with pytest.raises(ValueError, match=message):
        check_segments(segments, length, "query ")
