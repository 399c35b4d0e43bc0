"""Shares add up to one, the patches lit are the patches looked at."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import minivla
from minivla.segments import Segment, arrange
from minivla.viz import (
    attention_rollout,
    attention_shares,
    attention_weights,
    plot_attention,
    plot_look,
    plot_rollout,
    rollout_weights,
    striking_patch,
)

SITE = "decoder.0.cross"
KEYS = arrange(
    [
        Segment("state", "state", 1),
        Segment("table", "image", 4, grid=(2, 2), image="observation.images.table"),
    ]
)
IMAGES = {"observation.images.table": np.linspace(0, 1, 6 * 6 * 3).reshape(6, 6, 3)}


def lit(ax):
    """The weights laid over a camera's picture."""
    return next(np.asarray(image.get_array()) for image in ax.images if image.get_gid() == "attention")


def bars(figure):
    """The bars of the shares."""
    (ax,) = (ax for ax in figure.axes if "share" in ax.get_xlabel())
    return ax, [patch.get_width() for patch in ax.patches]


def test_the_figure_holds_the_traced_weights(seen):
    call = seen.trace.calls[-1]
    figure = seen.trace.plot_attention(SITE, query=3)
    mean = call.attention[SITE][0, :, 3].mean(0)
    segments = {s.name: s for s in call.sites[SITE][1]}
    for ax, name in zip(figure.axes[:2], ("table", "wrist"), strict=True):
        weights = mean[segments[name].start : segments[name].stop]
        assert np.allclose(lit(ax), weights.reshape(8, 8), atol=1e-6)
        assert name in ax.get_title(loc="left")
    ax, shares = bars(figure)
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "latent",
        "state",
        "instruction",
        "table",
        "wrist",
    ]
    assert SITE in figure.get_suptitle()
    assert "Queries[3] gives" in figure.get_suptitle()
    assert figure.get_size_inches()[0] == 6.5


def test_weights_of_a_head_and_the_mean_of_a_segment(seen):
    call = seen.trace.calls[-1]
    attention = call.attention[SITE]
    assert torch.allclose(attention_weights(call, SITE, query=2, head=1), attention[0, 1, 2])
    assert torch.allclose(attention_weights(call, SITE, query="queries"), attention[0].mean((0, 1)))
    assert "head 1" in plot_attention(call, SITE, head=1).get_suptitle()
    shares = attention_shares(attention_weights(call, SITE, query="queries"), call.sites[SITE][1])
    assert list(shares) == ["latent", "state", "instruction", "table", "wrist"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


def test_images_are_the_batch_stretched_or_those_given(seen):
    call = seen.trace.calls[-1]
    normalised = call.batch["observation.images.table"][0].permute(1, 2, 0).numpy()
    drawn = np.asarray(plot_attention(call, SITE).axes[0].images[0].get_array())
    assert (drawn.min(), drawn.max()) == (0, 1)
    assert np.corrcoef(drawn.ravel(), normalised.ravel())[0, 1] == pytest.approx(1)
    raw = {key: seen.item[key] for key in seen.item if "images" in key}
    drawn = np.asarray(plot_attention(call, SITE, images=raw).axes[0].images[0].get_array())
    assert np.allclose(drawn, raw["observation.images.table"].permute(1, 2, 0))


def test_patches_lie_on_the_image_in_reading_order():
    figure = plot_look(np.array([0.1, 0.05, 0.6, 0.15, 0.1]), KEYS, IMAGES)
    camera = figure.axes[0]
    assert lit(camera).tolist() == [[0.05, 0.6], [0.15, 0.1]]
    frame = camera.patches[-1]  # the strongest patch: upper right quarter of 6 × 6 pixels
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (2.5, -0.5, 3, 3)
    assert camera.get_ylim()[0] > camera.get_ylim()[1]
    assert figure.get_suptitle() == "This query gives 90 % of its attention to table (even: 80 %)"


def test_a_patch_that_stands_out_is_named_by_row_and_column():
    wide = arrange([Segment("state", "state", 1), Segment("table", "image", 60, grid=(6, 10), image="t")])
    row = np.full(61, 0.8 / 60)
    row[1 + 4 * 10 + 7] = 0.2  # of 61 tokens, so 12 times the even share
    assert striking_patch(row, wide) == ("table", 4, 7)
    title = plot_look(row, wide, {"t": np.zeros((12, 20, 3))}).get_suptitle()
    assert title == "This query gives 20 % to one patch: table, row 4, column 7 (even: 1.6 %)"
    assert striking_patch(row, wide, times=20) is None
    dimmer = np.append(0.25, row[1:] * 0.75 / row[1:].sum())
    assert striking_patch(dimmer, wide) == ("table", 4, 7)  # the state is brighter, but no patch
    dimmer = np.append(0.6, row[1:] * 0.4 / row[1:].sum())
    assert striking_patch(dimmer, wide, times=1) is None  # most goes to the state: that is the finding
    title = plot_look(dimmer, wide, {"t": np.zeros((12, 20, 3))}).get_suptitle()
    assert "60 % of its attention to state" in title


def test_attention_without_cameras_is_drawn_by_position(seen):
    figure = seen.trace.plot_attention("decoder.0.self", query=1)
    (ax,) = figure.axes
    heights = [patch.get_height() for patch in ax.patches]
    assert sum(heights) == pytest.approx(1, abs=1e-5)
    assert "looks most at queries[" in figure.get_suptitle()
    assert ax.get_xlabel() == "token of queries"
    assert ax.get_ylabel() == "attention"


def test_a_query_that_ignores_the_cameras():
    figure = plot_look(np.array([1.0, 0, 0, 0, 0]), KEYS, IMAGES)
    assert (lit(figure.axes[0]) == 0).all()
    assert bars(figure)[1] == [1, 0]


def test_rollout_of_one_layer_and_of_two():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(2, 4, 5, 5, generator=generator).softmax(-1) for _ in range(2)]
    one, two = (0.5 * torch.eye(5) + 0.5 * layer.mean(1) for layer in layers)
    assert torch.allclose(attention_rollout(layers[:1]), one)
    assert torch.allclose(
        attention_rollout(layers), two @ one, atol=1e-6
    )  # the last layer reads what the first wrote
    assert torch.allclose(attention_rollout(layers).sum(-1), torch.ones(2, 5))
    assert torch.allclose(attention_rollout(layers, residual=1.0), torch.eye(5).expand(2, -1, -1))


def test_rollout_chains_the_encoder_and_ends_in_the_cross_attention(seen):
    call = seen.trace.calls[-1]
    weights, keys = rollout_weights(call, query=3)
    rolled = attention_rollout([call.attention[f"encoder.{i}"] for i in range(2)])[0]
    assert torch.allclose(weights, call.attention[SITE][0, :, 3].mean(0) @ rolled, atol=1e-6)
    assert keys == call.sites["encoder.0"][0]
    for traced in (call, seen.trace):
        figure = plot_rollout(traced, query=3)
        assert np.allclose(lit(figure.axes[0]).ravel(), weights[3:67], atol=1e-6)
        assert sum(bars(figure)[1]) == pytest.approx(1, abs=1e-5)
        assert figure.get_suptitle().startswith("Queries[3] gives")
        assert "rollout through encoder.0 … encoder.1 → decoder.0.cross" in figure.get_suptitle()


def test_rollout_of_one_stack_without_cross_attention(seen):
    call = replace(seen.trace.calls[-1])
    call.attention = {k: v for k, v in call.attention.items() if k.startswith("encoder")}
    rolled = attention_rollout(list(call.attention.values()))[0]
    assert torch.allclose(rollout_weights(call, query="state")[0], rolled[1])
    assert "rollout through encoder.0 … encoder.1" in plot_rollout(call, query="state").get_suptitle()
    with pytest.raises(ValueError, match=r"sample is 1; site 'encoder\.1' has 1"):
        plot_rollout(call, sample=1)
    with pytest.raises(KeyError, match="no query segment is called 'queries'"):
        plot_rollout(call, query="queries")
    call.attention = {SITE: seen.trace.attention[SITE]}
    with pytest.raises(ValueError, match=r"this call holds decoder\.0\.cross\. Trace with attention=True"):
        plot_rollout(call)
    with pytest.raises(ValueError, match="this trace is empty"):
        plot_rollout(minivla.trace(seen.policy))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"site": "encoder.9"}, KeyError, "'encoder.9' was not kept; this call holds encoder.0, encoder.1"),
        ({"query": 8}, ValueError, "query is 8; this site has 8 queries: expected 0 to 7"),
        ({"query": "gripper"}, KeyError, "no query segment is called 'gripper'; this site has queries"),
        ({"head": 4}, ValueError, "head is 4; site .* has 4"),
        ({"sample": 1}, ValueError, "sample is 1"),
        ({"images": {}}, KeyError, "no image for observation.images.table, observation.images.wrist"),
    ],
)
def test_attention_errors(seen, options, error, message):
    with pytest.raises(error, match=message):
        plot_attention(seen.trace.calls[-1], **{"site": SITE, **options})


def test_weights_that_are_no_softmax_row():
    with pytest.raises(ValueError, match="add up to 2; expected 1"):
        plot_look(np.full(5, 0.4), KEYS, IMAGES)
    with pytest.raises(ValueError, match="the key segments add up to 5 tokens"):
        plot_look(np.full(4, 0.25), KEYS, IMAGES)
    with pytest.raises(ValueError, match=r"\(1, 5\); expected \(K,\)"):
        plot_look(np.full((1, 5), 0.2), KEYS, IMAGES)
    with pytest.raises(ValueError, match="rollout needs self-attention"):
        attention_rollout([torch.ones(1, 1, 2, 3)])
