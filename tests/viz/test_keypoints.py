"""Keypoints are drawn where the encoder says, each under its own number, on the picture that was seen."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import minivla
from minivla.viz import keypoints_of, plot_keypoints
from minivla.viz.keypoints import COLOURS, TOGETHER, places
from minivla.viz.palette import PAPER, contrast
from tests.policies.test_diffusion import WRIST, batch_of, moment, policy_of
from tests.policies.test_vqbet import batch as vqbet_batch
from tests.policies.test_vqbet import vqbet

CORNERS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])
PIXELS = np.array([[1.5, 1.5], [57.5, 1.5], [29.5, 29.5], [57.5, 57.5]])  # cells 8 apart, the first at 1.5


def traced(policy, batch, points=None, method="predict_action_chunk"):
    """A trace of one chunk, whose keypoints are those given, (B, T, K, 2), for every camera."""
    with minivla.trace(policy) as t:
        getattr(policy, method)(batch, generator=torch.Generator().manual_seed(0))
    if points is not None:
        t.calls[-1].hidden.update({name: points for name in t.hidden if name.startswith("keypoints.")})
    return t


def known(policy=None):
    """Now the corners, a moment ago all in the middle; the other sample has the mirror image."""
    points = torch.stack((torch.zeros(4, 2), CORNERS))
    policy = policy or policy_of()
    return traced(policy, batch_of(policy), torch.stack((points, -points)))


def drawn(ax):
    """Where each keypoint is drawn, (K, 2)."""
    found = {line.get_gid(): line for line in ax.lines if str(line.get_gid()).startswith("keypoint ")}
    return np.array([found[f"keypoint {i}"].get_xydata()[0] for i in range(len(found))])


def numbers(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(
    ("options", "pixels"), [({}, PIXELS), ({"ago": 1}, [[29.5, 29.5]] * 4), ({"sample": 1}, 59 - PIXELS)]
)
def test_known_keypoints_land_at_their_pixels(options, pixels):
    figure = known().plot_keypoints(**options)
    assert [ax.get_title() for ax in figure.axes] == ["table", "wrist"]
    for ax in figure.axes:
        np.testing.assert_allclose(drawn(ax), pixels, atol=1e-5)
        (image,) = ax.images
        assert tuple(image.get_extent()) == (-0.5, 63.5, 63.5, -0.5)  # pixel 0's middle is at 0


def test_the_picture_is_the_one_seen_with_the_normalisation_undone():
    policy = policy_of()
    t = traced(policy, batch_of(policy, 3, 4))
    for ago, seed in ((0, 4), (1, 3)):
        pictures, points = keypoints_of(policy, t.calls[-1], sample=1, ago=ago)
        raw = moment(seed=seed)[WRIST][1].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(pictures["wrist"], raw, atol=1e-5)
        assert points["wrist"].shape == (4, 2)


def test_without_statistics_pictures_are_stretched():
    policy = policy_of()
    t = known(policy)
    policy.preprocessor = None
    pictures, _ = keypoints_of(policy, t.calls[-1])
    assert pictures["table"].min() == 0 and pictures["table"].max() == 1


def test_a_central_crop_moves_the_keypoints_with_it():
    policy = policy_of(crop_shape=(32, 48))
    ax = known(policy).plot_keypoints(camera="table").axes[0]
    np.testing.assert_allclose(drawn(ax)[0], [8 + 1.5, 16 + 1.5], atol=1e-5)
    np.testing.assert_allclose(drawn(ax)[3], [8 + 1.5 + 40, 16 + 1.5 + 24], atol=1e-5)
    policy.train()
    t = traced(policy, batch_of(policy), method="__call__")
    with pytest.raises(ValueError, match="nobody knows where"):
        t.plot_keypoints()


@pytest.mark.parametrize("cameras", [1, 2])
def test_vqbet_has_them_too(cameras):
    policy = vqbet(cameras, several_cameras=cameras > 1, finished=True)
    figure = traced(policy, vqbet_batch(policy)).plot_keypoints(ago=2)
    assert len(figure.axes) == cameras
    assert drawn(figure.axes[0]).shape == (4, 2)


def test_every_keypoint_has_its_number_and_its_colour_and_no_two_numbers_touch():
    generator = np.random.default_rng(0)
    spots = generator.uniform(0, 63, (32, 2))
    spots[:9] = generator.normal(20, 0.5, (9, 2))
    figure = plot_keypoints(
        {"table": np.zeros((64, 64, 3)), "wrist": np.ones((64, 64, 3))}, {"table": spots, "wrist": spots + 0}
    )
    figure.canvas.draw()
    for ax in figure.axes:
        assert sorted(map(int, numbers(ax))) == list(range(32))
        assert {t.get_text(): t.get_color() for t in ax.texts} == {str(i): COLOURS[i % 6] for i in range(32)}
        boxes = [text.get_window_extent() for text in ax.texts]
        page = figure.bbox
        assert all(page.x0 <= b.x0 and b.x1 <= page.x1 and page.y0 <= b.y0 for b in boxes)
        overlaps = [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes[:i]) if overlap(a, b) > 2]
        assert not overlaps
        groups = len(places(spots, 64 * TOGETHER))
        assert len([line for line in ax.lines if line.get_gid() == "leader"]) == groups
    assert (
        figure.get_suptitle() == f"32 keypoints sit on {groups} places of table and {groups} places of wrist"
    )


def overlap(one, other):
    """Pixels by which two boxes overlap, in the direction in which they do so least."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    return min(across, min(one.y1, other.y1) - max(one.y0, other.y0))


def test_colours_can_be_read():
    assert all(contrast(colour, PAPER) >= 4.5 for colour in COLOURS)


def test_places_are_where_several_sit():
    spots = np.array([[0, 0], [10, 10], [0.5, 0], [10, 10.5], [0, 0.5], [30, 5]])
    assert places(spots, 1.0) == [[0, 2, 4], [1, 3], [5]]
    assert places(spots, 0.0) == [[0], [1], [2], [3], [4], [5]]
    assert places(spots, 100.0) == [[0, 1, 2, 3, 4, 5]]


def test_following_a_few():
    figure = known().plot_keypoints(follow=(1, 3), camera="wrist")
    assert figure.get_suptitle() == "Keypoints 1 and 3 of 4"
    (ax,) = figure.axes
    assert sorted(numbers(ax)) == ["1", "3"]
    faint = {line.get_gid(): line.get_alpha() for line in ax.lines if "keypoint" in str(line.get_gid())}
    assert [faint[f"keypoint {i}"] < 1 for i in range(4)] == [True, False, True, False]


def test_on_axes_of_ones_own_the_numbers_are_inside():
    _, axes = plt.subplots(1, 2)
    figure = known().plot_keypoints(ax=axes[1], camera="wrist", title="mine")
    assert figure is axes[1].figure
    assert not axes[0].lines
    np.testing.assert_allclose(drawn(axes[1]), PIXELS, atol=1e-5)
    assert sorted(numbers(axes[1])) == ["0", "1", "2", "3"]


def test_what_cannot_be_drawn_is_said(seen):
    with pytest.raises(ValueError, match=r"this call of ACT has no keypoints.*plot_attention"):
        seen.trace.plot_keypoints()
    t = known()
    policy, t.policy = t.policy, torch.nn.Identity()
    with pytest.raises(TypeError, match=r"Identity looks through .* with no ImageVector"):
        t.plot_keypoints()
    t.policy = policy
    for options, told in (
        ({"ago": 2}, "ago is 2; the call has 2: expected 0 to 1"),
        ({"sample": 2}, "sample is 2; the call has 2"),
        ({"follow": [4]}, r"follow has \[4\]; the keypoints are numbered from 0 to 3"),
    ):
        with pytest.raises(ValueError, match=told):
            t.plot_keypoints(**options)
    with pytest.raises(KeyError, match="no camera is called 'top'; there are table, wrist"):
        t.plot_keypoints(camera="top")
    with pytest.raises(KeyError, match="expected the same cameras"):
        plot_keypoints({"table": np.zeros((4, 4, 3))}, {"wrist": np.zeros((1, 2))})
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(K, 2\)"):
        plot_keypoints(np.zeros((4, 4, 3)), np.zeros(3))


def test_half_precision_is_drawn():
    policy = policy_of().to(torch.bfloat16)
    batch = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in batch_of(policy).items()
    }
    t = traced(policy, batch)
    assert np.isfinite(drawn(t.plot_keypoints(camera="table").axes[0])).all()
