"""The ribbon and the mask hold what the segments and the mask say."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb, to_rgba

import minivla
from minivla.nn.masks import segment_mask
from minivla.segments import Segment, arrange
from minivla.viz import palette, plot_mask, plot_tokens, seen_tokens
from minivla.viz.layout import segment_edges

SMALL = arrange(
    [
        Segment("words", "language", 3),
        Segment("state", "state", 1, block=1),
        Segment("chunk", "action", 4, block=2, rule="causal"),
    ]
)


def written(figure):
    """Everything that is written in a figure."""
    texts = [t.get_text() for t in figure.findobj(plt.Text)]
    return [text for text in texts if text]


def test_ribbon_of_act(seen):
    figure = seen.trace.plot_tokens()
    (ax,) = figure.axes
    assert figure.get_size_inches()[0] == 6.5
    assert {"latent · 1", "state · 1", "instruction · 1", "table · 64", "wrist · 64", "queries · 8"} <= set(
        written(figure)
    )
    assert ax.get_title(loc="left") == "128 of 139 tokens are image patches"
    assert "position" in ax.get_xlabel()
    boxes = {box.get_gid(): box for box in ax.patches}
    assert boxes["state"].get_facecolor() == to_rgba(palette.KIND_COLOURS["state"])
    assert boxes["state"].get_width() > 0.2  # inches: one token can still be seen
    assert boxes["table"].get_width() == pytest.approx(8 * boxes["state"].get_width())
    assert [t.get_text() for t in ax.get_xticklabels()][-1] == "139"


def test_ribbon_hatches_padding_by_segment_and_by_token():
    segments = arrange([Segment("words", "language", 6), Segment("nothing", "padding", 4)])
    valid = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    (ax,) = plot_tokens(segments, valid=valid).axes
    hatched = [box for box in ax.patches if box.get_hatch()]
    assert [box.get_gid() for box in hatched] == ["nothing", "padding"]
    whole = next(box for box in ax.patches if box.get_gid() == "words")
    assert hatched[1].get_width() == pytest.approx(whole.get_width() / 3)


def test_ribbon_finds_padding_where_nobody_may_look(seen):
    mask = segment_mask(SMALL)[0]
    assert seen_tokens(mask).all()
    mask[:, 1:3] = False
    assert seen_tokens(mask).tolist() == [True, False, False, *[True] * 5]
    (ax,) = plot_tokens(SMALL, mask=mask).axes
    assert ax.get_title(loc="left") == "2 of 8 tokens are padding"
    assert "words · 1 of 3" in [t.get_text() for t in ax.texts]
    (hatched,) = [box for box in ax.patches if box.get_hatch()]
    whole = next(box for box in ax.patches if box.get_gid() == "words")
    assert hatched.get_width() == pytest.approx(whole.get_width() * 2 / 3)
    (ax,) = seen.trace.plot_tokens(mask=seen.trace.mask).axes
    assert not [box for box in ax.patches if box.get_hatch()]
    (ax,) = seen.trace.plot_tokens(valid=torch.arange(139) < 135).axes
    assert ax.get_title(loc="left") == "4 of 139 tokens are padding"


def test_ribbon_on_axes_of_ones_own_and_with_a_title():
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2))
    assert plot_tokens(SMALL, ax=left, title="mine") is figure
    assert left.get_title(loc="left") == "mine"
    assert not right.patches
    assert len(left.patches) == 3


def test_ribbon_titles():
    assert plot_tokens(SMALL).axes[0].get_title(loc="left") == "8 tokens in 3 segments"
    assert plot_tokens([Segment("state", "state", 1)]).axes[0].get_title(loc="left") == "1 token in 1 segment"


def test_ribbon_errors():
    with pytest.raises(ValueError, match="no segments to draw"):
        plot_tokens([])
    with pytest.raises(ValueError, match=r"add up to 8 tokens .* has 9"):
        plot_tokens(SMALL, valid=torch.ones(9, dtype=torch.bool))


def picture(ax):
    """The colours of the mask (Q, K, 3)."""
    (mesh,) = (m for m in ax.collections if m.get_gid() == "mask")
    return np.asarray(mesh.get_array())


def test_mask_is_filled_exactly_where_a_query_may_look():
    mask = segment_mask(SMALL)[0]
    figure = plot_mask(mask, SMALL, SMALL)
    (ax,) = figure.axes
    colours = picture(ax)
    assert colours.shape == (8, 8, 3)
    filled = ~np.isclose(colours, to_rgb(palette.FAINT)).all(-1)
    assert (filled == mask.numpy()).all()
    assert np.allclose(colours[7, 7], to_rgb(palette.KIND_COLOURS["action"]))  # coloured by the key ...
    assert np.allclose(colours[7, 0], to_rgb(palette.KIND_COLOURS["language"]))  # ... and not by the query
    assert ax.get_ylim() == (1, 0)  # queries go down
    assert "keys" in ax.get_xlabel()
    assert "queries" in ax.get_ylabel()
    told = written(figure)
    assert {
        "words · 3",
        "state · 1",
        "chunk · 4",
        "words",
        "state",
        "chunk",
        "sees 3",
        "sees 4",
        "sees 5–8",
    } <= set(told)
    assert "Looking goes one way: each may look at itself and back, nobody ahead" in told
    assert figure.get_size_inches()[0] == 6.5


def test_mask_groups_are_ruled_off():
    (ax,) = plot_mask(segment_mask(SMALL)[0], SMALL, SMALL).axes
    ruled = [
        c
        for c in ax.collections
        if c.get_gid() is None and np.allclose(c.get_colors()[0], to_rgba(palette.INK))
    ]
    across = sorted({path.vertices[0, 0] for path in ruled[1].get_paths()})
    assert across == pytest.approx(segment_edges(SMALL).tolist())


def test_mask_titles():
    a, b = arrange([Segment("a", "state", 1), Segment("b", "image", 2)])
    square = torch.ones(3, 3, dtype=torch.bool)
    assert "Every token may look at every token" in written(plot_mask(square, [a, b], [a, b]))
    assert "Nobody may look at b" in written(
        plot_mask(square & torch.tensor([True, False, False]), [a, b], [a, b])
    )
    hole = square.clone()
    hole[1, 2] = False
    assert "1 of 9 places are closed" in written(plot_mask(hole, [a, b], [a, b]))


def test_mask_titles_of_looking_one_way():
    one_way = "Looking goes one way: each may look at itself and back, nobody ahead"
    cameras = arrange([Segment(f"camera {i}", "image", 4, grid=(2, 2)) for i in range(5)])
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    assert one_way in written(plot_mask(causal, cameras, cameras))
    alone = [Segment("words", "language", 20)]
    assert one_way in written(plot_mask(causal, alone, alone))
    pair = arrange([Segment("seen", "image", 3), Segment("chunk", "action", 2, block=1, rule="causal")])
    assert "Only chunk may look at chunk" in written(plot_mask(segment_mask(pair)[0], pair, pair))
    peek = causal.clone()
    peek[0, 19] = True
    assert one_way not in written(plot_mask(peek, cameras, cameras))


def test_mask_of_a_site_has_its_own_queries_and_keys(seen):
    figure = seen.trace.plot_mask("decoder.0.cross")
    assert picture(figure.axes[0]).shape == (8, 131, 3)
    assert {"queries · 8", "table · 64"} <= set(written(figure))


def test_mask_on_axes_of_ones_own():
    figure, axes = plt.subplots(1, 2)
    assert plot_mask(segment_mask(SMALL)[0], SMALL, SMALL, ax=axes[1], title="mine") is figure
    assert axes[1].get_title(loc="left") == "mine"
    assert len(figure.axes) == 2


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (None, ValueError, "no mask to draw"),
        (torch.ones(1, 8, 8, dtype=torch.bool), ValueError, r"\(1, 8, 8\); expected \(Q, K\)"),
        (torch.ones(8, 8), TypeError, "float32; expected bool"),
        (torch.ones(8, 9, dtype=torch.bool), ValueError, "the key segments add up to 8 tokens .* has 9"),
        (torch.ones(7, 8, dtype=torch.bool), ValueError, "the query segments add up to 8 tokens .* has 7"),
    ],
)
def test_mask_errors(mask, error, message):
    with pytest.raises(error, match=message):
        plot_mask(mask, SMALL, SMALL)


def test_an_empty_trace_says_what_to_call(seen):
    empty = minivla.trace(seen.policy)
    for draw in (empty.plot_tokens, empty.plot_mask, empty.plot_attention, empty.plot_chunk):
        with pytest.raises(ValueError, match="this trace is empty"):
            draw()
