"""Real samplers at work: chunks in robot units, and where they lead on the table, step by step."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import minivla
from minivla.viz import plot_denoising_paths
from minivla.viz.flow import spread_over
from minivla.viz.plane import Plane
from minivla.viz.scene import commanded_paths, same_scene, table_picture
from tests.policies.test_diffusion import (
    FLOW,
    HORIZON,
    STATE,
    TABLE,
    TRANSFORMER,
    batch_of,
    moment,
    policy_of,
)

SPEC = Plane(max_step=0.04, unit="table widths")
MOVES = ("dx", "dy")
SAMPLERS = [
    {},
    {"noise_scheduler_type": "DDIM"},
    {"prediction_type": "sample"},
    FLOW,
    TRANSFORMER,
    TRANSFORMER | FLOW,
]


def traced(policy, batch=None):
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch or batch_of(policy), generator=torch.Generator().manual_seed(0))
    return t


def repeated(batch, count, sample=0):
    """One scene of a batch, several times."""
    return {
        key: [v[sample]] * count if isinstance(v, list) else v[[sample] * count] for key, v in batch.items()
    }


def texts(figure):
    """All that a figure says, one text after the other."""
    return " ".join(text.get_text() for text in figure.findobj(Text))


def named(ax, gid):
    return [line.get_xydata() for line in ax.lines if line.get_gid() == gid]


@pytest.mark.parametrize("settings", SAMPLERS)
def test_every_sampler_is_drawn_in_robot_units(settings):
    policy = policy_of(**settings)
    t = traced(policy)
    figure = t.plot_denoising(sample=1, dimension=1, moments=3)
    steps = spread_over(len(t.flow.times), 3)
    for ax, k in zip(figure.axes, steps, strict=True):
        (line,) = named(ax, f"step {k}")
        np.testing.assert_allclose(line[:, 1], policy.postprocess(t.flow.x[k])[1, :, 1], rtol=1e-4, atol=1e-4)
    assert figure.axes[0].get_ylabel() == "action 1\n(robot units)"
    figure.canvas.draw()
    for options in ({}, {"step": 3}, {"step": None}):
        assert (
            "path" in {line.get_gid() for line in t.plot_flow(**options).axes[0].lines} or "step" in options
        )
    policy.postprocessor = None
    assert t.plot_denoising().axes[0].get_ylabel() == "action 0\n(normalised)"


def test_paths_start_where_the_gripper_is_and_add_the_moves_up():
    policy = policy_of()
    t = traced(policy, repeated(batch_of(policy), 3, sample=1))
    figure = t.plot_denoising(sample=2, meaning=MOVES, moments=3)
    here = moment(seed=1)[STATE][1, :2]
    for ax, k in zip(figure.axes, spread_over(len(t.flow.times), 3), strict=True):
        chunks = policy.postprocess(t.flow.x[k])[:, 1:]  # the first action belongs to the observation before
        for found, i in zip([*named(ax, "path"), *named(ax, "companion")], (2, 0, 1), strict=True):
            np.testing.assert_allclose(found, torch.cat((here[None], chunks[i])).cumsum(0), atol=1e-3)
        assert {len(part) for part in named(ax, "carried")} == {1 + policy.config.n_action_steps}
        assert len(found) == HORIZON
    assert figure.get_suptitle() == "From noise to 3 paths in 10 steps"


def test_only_samples_of_the_same_scene_are_drawn_together():
    policy = policy_of()
    batch = batch_of(policy)
    assert same_scene(batch, 1) == [1]
    assert same_scene(repeated(batch, 3), 1) == [1, 0, 2]
    assert same_scene(repeated(batch, 2) | {"task": ["this", "that"]}, 0) == [0]
    (ax, *_) = traced(policy).plot_denoising(meaning=MOVES).axes
    assert not named(ax, "companion")


def test_the_world_takes_shares_of_its_largest_step():
    policy = policy_of()
    policy.postprocess = lambda action: action
    chunk = torch.zeros(1, HORIZON, 2)
    chunk[0, 1:, 0], chunk[0, 1:, 1] = 5.0, 0.5  # dx beyond what it can do
    (path,) = commanded_paths(policy, batch_of(policy), chunk, SPEC)
    start = moment(seed=1)[STATE][0, :2].numpy()
    np.testing.assert_allclose(path[-1] - start, [7 * 0.04, 7 * 0.5 * 0.04], rtol=1e-5)


def test_the_table_is_below_where_paths_are_in_table_widths():
    policy = policy_of()
    batch, plain = batch_of(policy), traced(policy).plot_denoising(meaning=MOVES)
    assert not plain.axes[0].images  # "dx", "dy": units unknown
    picture = table_picture(policy, batch, SPEC, "table", 1)
    np.testing.assert_allclose(picture, moment(seed=1)[TABLE][1].permute(1, 2, 0), atol=1e-5)
    assert table_picture(policy, batch, SPEC, "side") is None
    figure = traced(policy).plot_denoising(meaning=SPEC, sample=1, moments=3)
    assert [tuple(ax.images[0].get_extent()) for ax in figure.axes] == [(0, 1, 0, 1)] * 3
    assert np.array_equal(figure.axes[0].images[0].get_array(), picture)


@pytest.mark.parametrize(
    ("paths", "times", "sample", "told"),
    [
        (np.zeros((3, 2, 4)), range(3), 0, r"paths have shape \(3, 2, 4\)"),
        (np.zeros((3, 2, 4, 2)), range(4), 0, r"times \(4,\); expected \(N \+ 1, B, L, 2\)"),
        (np.zeros((3, 2, 4, 2)), range(3), 2, "sample is 2; there are 2"),
    ],
)
def test_errors(paths, times, sample, told):
    with pytest.raises(ValueError, match=told):
        plot_denoising_paths(paths, times, sample=sample)


def test_paths_need_statistics():
    policy = policy_of()
    t = traced(policy)
    policy.preprocessor = None
    with pytest.raises(ValueError, match="DiffusionPolicy has no statistics"):
        t.plot_denoising(meaning=SPEC)


def test_a_call_without_a_sampler_has_no_denoising(seen):
    with pytest.raises(ValueError, match="there is no flow to draw"):
        seen.trace.plot_denoising()
    with pytest.raises(ValueError, match="there is no flow to draw"):
        seen.trace.plot_denoising(meaning=SPEC)


def test_the_transformer_denoiser_has_tokens_a_mask_and_attention():
    t = traced(policy_of(**TRANSFORMER))
    assert [s.name for s in t.segments] == ["time", "observations", "chunk"]
    assert "8 of 11 tokens are actions" in texts(t.plot_tokens())
    assert "Only chunk may look at chunk" in texts(t.plot_mask())
    assert "Looking goes one way" in texts(t.plot_mask("denoiser.1.self", sample=1))
    figure = t.plot_attention("denoiser.1.cross", query=3, sample=1)
    weights = t.attention["denoiser.1.cross"][1, :, 3].mean(0)
    assert "denoiser.1.cross" in figure.get_suptitle()
    shares = sorted(float(bar.get_width()) for bar in figure.axes[0].patches)
    assert shares == pytest.approx(sorted([float(weights[0]), float(weights[1:].sum())]), abs=1e-5)
