"""Chunks, paths and ensembling: lines hold the numbers, and the ensemble is the policy's own."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import minivla.world
from minivla.actions.regression import TemporalEnsembler
from minivla.viz import ensemble_weights, gripper_path, plot_chunk, plot_ensemble, plot_gripper_path

NAMES = ("dx", "dy", "grip")


def lines(ax, gid):
    """The data of the lines of one name."""
    return [np.asarray(line.get_xydata()) for line in ax.lines if line.get_gid() == gid]


def test_chunk_of_a_trace(seen):
    chunk = seen.policy.postprocess(seen.trace.chunk)[0].numpy()
    valid = ~seen.item["action_is_pad"]
    figure = seen.trace.plot_chunk(names=NAMES, expert=seen.item["action"], valid=valid, n_action_steps=4)
    assert valid.sum() == 5
    for i, ax in enumerate(figure.axes[:3]):
        assert np.allclose(lines(ax, "predicted")[0][:, 1], chunk[:, i])
        expert = lines(ax, "expert")[0][:, 1]
        assert np.allclose(expert[:5], seen.item["action"][:5, i])
        assert np.isnan(expert[5:]).all()
        hatched = [p for p in ax.patches if p.get_hatch()]
        assert len(hatched) == 3
        assert ax.get_ylabel() == NAMES[i]
    assert figure.axes[2].get_xlabel() == "step of the chunk"
    assert "from the expert" in figure.get_suptitle()
    assert figure.get_size_inches()[0] == 6.5


def test_the_right_axis_tells_normalised_units():
    normalised = torch.linspace(-1, 1, 6)[None, :, None]
    figure = plot_chunk(normalised, 3 * normalised + 10)
    (ax,) = figure.axes
    (right,) = ax.child_axes
    figure.canvas.draw()
    low, high = ax.get_ylim()
    assert right.get_ylim() == pytest.approx(((low - 10) / 3, (high - 10) / 3))
    assert right.get_ylabel() == "normalised"
    assert (
        not plot_chunk(normalised, torch.full((1, 6, 1), 2.0)).axes[0].child_axes
    )  # no line through one point


def test_the_dimension_furthest_from_the_expert_is_judged_in_normalised_units():
    normalised = torch.stack((torch.linspace(-1, 1, 6), torch.linspace(1, -1, 6)), dim=-1)
    robot = normalised * torch.tensor([100.0, 1.0])
    expert = robot + torch.tensor([5.0, 2.0])  # 0.05 and 2 normalised
    assert (
        "b strays furthest" in plot_chunk(normalised, robot, names=("a", "b"), expert=expert).get_suptitle()
    )
    assert plot_chunk(normalised, robot).get_suptitle() == "6 actions from one look"


def test_without_robot_units_everything_is_normalised():
    figure = plot_chunk(torch.linspace(-1, 1, 6)[None, :, None], names=("dx",))
    (ax,) = figure.axes
    assert ax.get_ylabel() == "dx\n(normalised)"
    assert not ax.child_axes


def test_long_units_are_broken_and_panels_do_not_overlap():
    units = ("share of the largest step", "share of the largest step", "incommensurable")
    figure = plot_chunk(torch.zeros(1, 4, 3), torch.rand(1, 4, 3), names=NAMES, units=units)
    figure.canvas.draw()
    boxes = [ax.yaxis.label.get_window_extent() for ax in figure.axes]
    for above, below in itertools.pairwise(boxes):
        assert above.y0 > below.y1
    assert figure.axes[0].get_ylabel().replace("\n", " ") == "dx (share of the largest step)"
    ends = figure.get_window_extent()
    assert all(ends.y0 <= box.y0 and box.y1 <= ends.y1 for box in boxes)


def test_many_dimensions_go_into_two_columns():
    figure = plot_chunk(torch.zeros(1, 4, 14), torch.rand(1, 4, 14), names=[f"j{i}" for i in range(14)])
    columns = {round(ax.get_position().x0, 1) for ax in figure.axes}
    assert len(columns) == 2
    assert {ax.get_ylabel() for ax in figure.axes} == {f"j{i}" for i in range(14)}
    left = sorted((ax.get_position().y0, ax.get_ylabel()) for ax in figure.axes if ax.get_position().x0 < 0.3)
    assert [name for _, name in left] == [f"j{i}" for i in reversed(range(7))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("dx",)}, r"names has 1 entries \(dx\), the chunk 3 dimensions"),
        ({"expert": torch.zeros(2, 5, 3)}, r"expert has shape \(5, 3\)"),
        ({"valid": torch.ones(2, 7, dtype=torch.bool)}, "valid has 7 steps, the chunk 6"),
        ({"sample": 2}, "sample is 2; normalised holds 2"),
    ],
)
def test_chunk_errors(options, message):
    with pytest.raises(ValueError, match=message):
        plot_chunk(torch.zeros(2, 6, 3), torch.zeros(2, 6, 3), **options)
    with pytest.raises(ValueError, match=r"expected \(B, H, A\) or \(H, A\)"):
        plot_chunk(torch.zeros(6), torch.zeros(6))


def test_gripper_path_is_where_the_world_takes_the_gripper():
    env = minivla.world.Tabletop("reach", cameras=())
    observation, _ = env.reset(seed=3)
    start, actions = observation["observation.state"], np.tile(np.float32([0.5, -2.0, -1.0]), (4, 1))
    path = gripper_path(start, actions, max_step=env.action_spec.max_step[0])
    for place, action in zip(path[1:], actions, strict=True):
        observation, *_ = env.step(action)
        assert observation["observation.state"][:2] == pytest.approx(place, abs=1e-5)


def test_paths_lie_on_the_table_with_y_up(seen):
    image = seen.item["observation.images.table"]
    paths = [np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([[0.5, 0.5], [0.6, 0.9]])]
    figure = plot_gripper_path(image, paths, driven=paths[0], expert=paths[1])
    (ax,) = figure.axes
    assert ax.images[0].get_extent() == [0, 1, 0, 1]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 1), (0, 1))
    assert lines(ax, "predicted")[0].tolist() == paths[1].tolist()
    older, newest = (
        next(line for line in ax.lines if line.get_gid() == gid) for gid in ("earlier looks", "predicted")
    )
    assert older.get_alpha() < newest.get_alpha() == 1
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {
        "predicted",
        "earlier looks",
        "driven",
        "expert",
    }
    assert "table widths" in ax.get_xlabel()
    assert "table widths" in ax.get_ylabel()


def test_named_paths_differ_in_colour_and_then_in_dash(seen):
    image = seen.item["observation.images.table"]
    paths = [np.array([[0.1, 0.1 * i], [0.6, 0.1 * i]]) for i in range(6)]
    (ax,) = plot_gripper_path(image, paths, labels=list("abcdef")).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list("abcdef")
    drawn = [next(line for line in ax.lines if line.get_gid() == name) for name in "abcdef"]
    assert [line.get_xydata().tolist() for line in drawn] == [path.tolist() for path in paths]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 6
    assert {line.get_alpha() for line in drawn} == {None}
    assert ax.get_title(loc="left") == "6 chunks of 1 step"
    with pytest.raises(ValueError, match="labels has 1 entries for 6 paths"):
        plot_gripper_path(image, paths, labels=["a"])


def test_paths_on_axes_of_ones_own(seen):
    image, driven = seen.item["observation.images.table"], np.array([[0.1, 0.2], [0.3, 0.4]])
    figure, axes = plt.subplots(1, 3)
    assert (
        plot_gripper_path(image, driven[:1], driven=driven, title="a title too long for it", ax=axes[1])
        is figure
    )
    assert [t.get_text() for t in axes[1].get_legend().get_texts()] == ["driven"]
    assert "\n" in axes[1].get_title(loc="left")
    assert not axes[0].lines


def test_path_errors(seen):
    image = seen.item["observation.images.table"]
    with pytest.raises(ValueError, match=r"expected \(N, 2\)"):
        plot_gripper_path(image, np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"floats from -.* Give the raw image"):
        plot_gripper_path(image * 2 - 1, np.zeros((4, 2)))


@pytest.mark.parametrize("coefficient", [0.01, 0.5, -0.3, 0.0])
def test_the_ensemble_is_the_policys_own(coefficient):
    chunks = torch.randn(10, 4, 2, generator=torch.Generator().manual_seed(0))
    ensembler = TemporalEnsembler(coefficient, 4)
    executed = torch.stack([ensembler.update(chunk[None])[0] for chunk in chunks])
    for dimension in range(2):
        _, below = plot_ensemble(chunks, coefficient, dimension=dimension).axes
        assert np.allclose(lines(below, "executed")[0][:, 1], executed[:, dimension], atol=1e-5)


def test_weights_of_a_moment_add_up_and_come_from_the_chunks_that_speak_of_it():
    weights = ensemble_weights(6, 3, 0.5)
    assert np.allclose(weights.sum(0), 1)
    assert weights[:, 3].nonzero()[0].tolist() == [1, 2, 3]
    assert weights[1, 3] / weights[2, 3] == pytest.approx(np.exp(0.5))


def test_ensemble_figure_writes_the_weights_of_one_moment():
    figure = plot_ensemble(np.zeros((6, 3)), 0.5, name="dx")
    above, below = figure.axes
    told = [t.get_text() for t in above.texts]
    assert told[1:] == [f"{w:.2f}" for w in ensemble_weights(6, 3, 0.5)[:3, 2]]
    assert len([p for p in above.patches if (p.get_gid() or "").startswith("chunk")]) == 18
    assert below.get_ylabel() == "dx"
    assert below.get_xlabel() == "step of the episode"
    assert (
        figure.get_suptitle()
        == "The action of step 2 is a mean of 3 predictions: the oldest has the most say"
    )
    assert "newest" in plot_ensemble(np.zeros((6, 3)), -0.5).get_suptitle()
    assert "the same say" in plot_ensemble(np.zeros((6, 3)), 0.0).get_suptitle()
    assert plot_ensemble(np.zeros((1, 3))).get_suptitle() == "Step 0 has one prediction to go by"


def test_ensemble_errors():
    with pytest.raises(ValueError, match=r"expected \(T, H, A\) or \(T, H\)"):
        plot_ensemble(np.zeros(5))
    with pytest.raises(ValueError, match="at is 6; 6 chunks"):
        plot_ensemble(np.zeros((6, 3)), at=6)
    with pytest.raises(ValueError, match="dimension is 2; the chunks have 2"):
        plot_ensemble(np.zeros((6, 3, 2)), dimension=2)


def test_figures_are_pyplots_so_that_show_shows_them():
    plot_ensemble(np.zeros((6, 3)))
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_leaves_a_gap_and_is_counted(lost):
    normalised = torch.linspace(-1, 1, 18).view(1, 6, 3).clone()
    normalised[0, 2, 1] = normalised[0, 3, 1] = lost
    expert = torch.zeros(1, 6, 3)
    figure = plot_chunk(normalised, 3 * normalised + 10, names=NAMES, expert=expert)
    assert figure.get_suptitle() == "6 actions from one look; 2 of 18 values not finite"
    figure.canvas.draw()
    drawn = [lines(ax, "predicted")[0][:, 1] for ax in figure.axes[:3]]
    assert np.isnan(drawn[1]).tolist() == [False, False, True, True, False, False]
    assert np.isfinite(drawn[0]).all()
    assert [len(ax.child_axes) for ax in figure.axes[:3]] == [1, 1, 1]  # the scale is that of the others
    assert "6 of 6 values" in plot_chunk(torch.full((1, 6, 1), lost)).get_suptitle()
    unknown = plot_chunk(normalised.nan_to_num(0, 0, 0), expert=torch.full((6, 3), lost))
    assert unknown.get_suptitle() == "6 actions from one look"


def test_one_dimension_and_axes_of_ones_own():
    chunk = torch.linspace(-1, 1, 12).view(4, 3)
    figure = plot_chunk(chunk, 2 * chunk, names=NAMES, dimension=2)
    assert [ax.get_ylabel() for ax in figure.axes] == ["grip"]
    own, axes = plt.subplots(1, 2, figsize=(8, 2))
    assert plot_chunk(chunk, names=NAMES, dimension=1, ax=axes[1], title="mine") is own
    assert np.allclose(lines(axes[1], "predicted")[0][:, 1], chunk[:, 1])
    assert (axes[1].get_title(loc="left") or axes[1].get_title()) == "mine"
    assert not axes[0].lines
    plot_chunk(chunk, names=NAMES, ax=axes[0])
    assert axes[0].get_ylabel().startswith("dx")
    with pytest.raises(ValueError, match="dimension is 3; the chunk has 3: expected 0 to 2"):
        plot_chunk(chunk, dimension=3)


def test_bfloat16_is_drawn_as_what_it_holds():
    chunk = torch.linspace(-1, 1, 12).view(1, 4, 3).bfloat16()
    figure = plot_chunk(chunk, 2 * chunk)
    assert np.allclose(lines(figure.axes[0], "predicted")[0][:, 1], 2 * chunk[0, :, 0].float())


def test_one_action_is_one_action():
    assert plot_chunk(torch.zeros(1, 1, 2)).get_suptitle() == "1 action from one look"
