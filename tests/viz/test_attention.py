"""Shares add up to one, the patches lit are the patches looked at."""

from copy import deepcopy
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import minivla
from minivla.recorder import NotKept
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


def figure_scale(row, keys, images):
    """The colour scale's axes."""
    figure = plot_look(row, keys, images)
    figure.canvas.draw()
    return next(ax for ax in figure.axes if "root scale" in ax.get_xlabel().replace("\n", " "))


def test_a_patch_is_named_although_another_camera_gets_more():
    cameras = [Segment(name, "image", 64, grid=(8, 8), image=name) for name in ("table", "wrist")]
    keys = arrange([Segment("state", "state", 3), *cameras])
    row = np.full(131, 0.5 / 64)
    row[:3], row[67:], row[67 + 34] = 0.01 / 3, 0.01 / 63, 0.48
    shares = attention_shares(row, keys)
    assert shares["table"] > shares["wrist"]
    assert striking_patch(row, keys) == ("wrist", 4, 2)
    images = {name: np.zeros((8, 8, 3)) for name in ("table", "wrist")}
    title = plot_look(row, keys, images).get_suptitle()
    assert title == "This query gives 48 % to one patch: wrist, row 4, column 2 (even: 0.8 %)"
    assert [t.get_text() for t in figure_scale(row, keys, images).get_xticklabels()] == [
        "0",
        "even",
        "0.12",
        "0.48",
    ]


def test_the_overlay_keeps_what_one_strong_patch_would_hide():
    """On a linear scale a hundredth of the most is the tint of nothing; on this one it is a tenth of it."""
    figure = plot_look(np.array([0.0, 0.9, 0.009, 0.091, 0.0]), KEYS, IMAGES)
    image = next(i for i in figure.axes[0].images if i.get_gid() == "attention")
    assert image.norm([0, 0.009, 0.9]).tolist() == pytest.approx([0, 0.1, 1])
    assert np.ravel(image.get_alpha()) == pytest.approx(
        0.1 + 0.5 * np.sqrt([1, 0.01, 0.0911 / 0.9, 0]), abs=1e-2
    )
    scale = figure_scale(np.array([0.0, 0.9, 0.009, 0.091, 0.0]), KEYS, IMAGES)
    assert [t.get_text() for t in scale.get_xticklabels()] == ["0", "even", "0.9"]


def test_the_scale_marks_what_would_be_even():
    keys = arrange([Segment("table", "image", 64, grid=(8, 8), image="t"), Segment("state", "state", 1)])
    row = np.full(65, 0.9 / 64)
    row[0] = 0.1
    scale = figure_scale(row, keys, {"t": np.zeros((8, 8, 3))})
    assert "even" in [t.get_text() for t in scale.get_xticklabels()]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(8, 8, 3), (48, 64, 3)])
def test_no_text_is_cut_off_or_runs_into_another(count, shape):
    names = ["table", "wrist", "front side", "left_shoulder_camera"][:count]
    cameras = [Segment(name, "image", 300, grid=(15, 20), image=name) for name in names]
    segments = arrange([Segment("state", "state", 1), *cameras])
    row = np.full(300 * count + 1, 1 / (300 * count + 1))
    figure = plot_look(row, segments, {name: np.zeros(shape) for name in names})
    figure.canvas.draw()
    page = figure.get_window_extent()
    titles = [ax.get_title(loc="left") and ax._left_title.get_window_extent() for ax in figure.axes]
    labels = [ax.xaxis.label.get_window_extent() for ax in figure.axes if ax.get_xlabel()]
    boxes = [box for box in titles if box] + labels
    assert len(boxes) == count + 2
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("three", [np.int64(3), torch.tensor(3)])
def test_any_whole_number_is_a_position(seen, three):
    call = seen.trace.calls[-1]
    assert torch.equal(attention_weights(call, SITE, query=three), attention_weights(call, SITE, query=3))
    assert plot_attention(call, SITE, query=three).get_suptitle().startswith("Queries[3] ")
    assert plot_rollout(call, query=three).get_suptitle().startswith("Queries[3] ")
    with pytest.raises(TypeError, match="integer"):
        plot_attention(call, SITE, query=1.5)


def test_one_camera_on_axes_of_ones_own(seen):
    call = seen.trace.calls[-1]
    own, axes = plt.subplots(1, 2, figsize=(8, 3))
    assert plot_attention(call, SITE, query=3, camera="wrist", ax=axes[1], title="mine") is own
    wrist = next(s for s in call.sites[SITE][1] if s.name == "wrist")
    weights = attention_weights(call, SITE, query=3)
    assert np.allclose(lit(axes[1]).ravel(), weights[wrist.start : wrist.stop])
    assert axes[1].get_title(loc="left") == "mine"
    assert not axes[0].images
    assert len(own.axes) == 2
    plot_look(np.array([0.1, 0.05, 0.6, 0.15, 0.1]), KEYS, IMAGES, ax=axes[0])
    assert lit(axes[0]).tolist() == [[0.05, 0.6], [0.15, 0.1]]
    with pytest.raises(KeyError, match="no camera is called 'ceiling'; the cameras here are table, wrist"):
        plot_attention(call, SITE, camera="ceiling", ax=axes[0])
    with pytest.raises(ValueError, match="there is no ax: all cameras are drawn without one"):
        plot_attention(call, SITE, camera="wrist")
    with pytest.raises(ValueError, match="no segment has a grid; leave out ax"):
        plot_attention(call, "decoder.0.self", ax=axes[0])


def test_a_policy_in_bfloat16_is_drawn_too(seen):
    policy = deepcopy(seen.policy).to(torch.bfloat16)
    batch = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in seen.batch.items()
    }
    with minivla.trace(policy) as trace:
        policy.predict_action_chunk(batch)
    assert trace.chunk.dtype == torch.bfloat16
    assert "Queries[3] gives" in trace.plot_attention(SITE, query=3).get_suptitle()
    assert "rollout" in plot_rollout(trace, query=3).get_suptitle()
    assert trace.plot_chunk().get_suptitle() == "8 actions from one look"
    assert "data-minivla-explorer" in trace.explore().html
    assert float(attention_weights(trace.calls[-1], SITE).sum()) == pytest.approx(1, abs=1e-5)


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


def test_a_site_that_is_not_there_is_one_error_from_trace_and_figure(seen):
    for ask in (seen.trace.plot_attention, lambda site: plot_attention(seen.trace.calls[-1], site)):
        with pytest.raises(NotKept, match=r"encoder\.9.*decoder\.0\.cross"):
            ask("encoder.9")
    with pytest.raises(ValueError, match="was not kept"):
        attention_weights(seen.trace.calls[-1], "encoder.9")


def test_weights_that_are_no_softmax_row():
    with pytest.raises(ValueError, match="add up to 2; expected 1"):
        plot_look(np.full(5, 0.4), KEYS, IMAGES)
    with pytest.raises(ValueError, match="the key segments add up to 5 tokens"):
        plot_look(np.full(4, 0.25), KEYS, IMAGES)
    with pytest.raises(ValueError, match=r"\(1, 5\); expected \(K,\)"):
        plot_look(np.full((1, 5), 0.2), KEYS, IMAGES)
    with pytest.raises(ValueError, match="rollout needs self-attention"):
        attention_rollout([torch.ones(1, 1, 2, 3)])
