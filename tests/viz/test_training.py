"""Loss, normalisation and windows are drawn as they are."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from minivla.data.normalize import normalize
from minivla.data.windows import window_indices
from minivla.training.evaluation import Evaluation, wilson
from minivla.viz import palette, plot_loss, plot_normalisation, plot_success, plot_windows
from minivla.viz.training import smoothed

LOG = [{"step": 10 * i, "loss": 2.0 / i, "lr": 1e-4} for i in range(1, 101)]


def test_loss_from_records_and_from_a_file(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in LOG) + "\n")
    for figure in (plot_loss(LOG), plot_loss(path), plot_loss(str(path))):
        (ax,) = figure.axes
        raw, smooth = (line for line in ax.lines if line.get_gid())
        assert raw.get_xydata().tolist() == [[r["step"], r["loss"]] for r in LOG]
        assert np.allclose(smooth.get_ydata(), smoothed(np.array([r["loss"] for r in LOG])))
        assert ax.get_yscale() == "log"
        assert ax.get_xlabel() == "training step"
        assert "loss" in ax.get_ylabel()
        assert "loss fell from" in ax.get_title(loc="left")
        assert figure.get_size_inches()[0] == 6.5


def test_success_is_drawn_below_with_its_interval():
    rounds = [
        {"step": 500 * i, "success": 0.3 * i, "low": 0.3 * i - 0.1, "high": 0.3 * i + 0.1} for i in (1, 2, 3)
    ]
    _, below = plot_loss(LOG + rounds).axes
    line = below.containers[0]
    assert np.allclose(line.lines[0].get_xydata(), [[500, 0.3], [1000, 0.6], [1500, 0.9]])
    assert np.allclose(line.lines[2][0].get_segments()[0], [[500, 0.2], [500, 0.4]])
    assert "success" in below.get_ylabel()


def test_loss_of_another_name_on_axes_of_ones_own():
    figure, axes = plt.subplots(1, 2)
    log = [{"step": i, "l1_loss": float(i) - 3} for i in range(5)]
    assert plot_loss(log, key="l1_loss", ax=axes[0]) is figure
    assert axes[0].get_yscale() == "linear"  # not all positive
    assert "l1 loss rose from -3 to 1 in 4 steps" in axes[0].get_title(loc="left")


def test_smoothing_keeps_constants_and_means():
    assert smoothed(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    noisy = np.arange(100) % 2
    assert abs(smoothed(noisy)[40] - 0.5) < 0.15
    assert smoothed(np.array([1.0, 2.0])).tolist() == [1, 2]


def test_loss_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the log\.jsonl"):
        plot_loss(tmp_path / "absent.jsonl")
    with pytest.raises(
        ValueError, match="no record has step and 'kl'; the log's records have loss, lr, step"
    ):
        plot_loss(LOG, key="kl")
    broken = tmp_path / "log.jsonl"
    broken.write_text('{"step": 1')
    with pytest.raises(ValueError, match="is not JSON lines"):
        plot_loss(broken)


def evaluation(successes, episodes=100):
    return Evaluation(successes / episodes, *wilson(successes, episodes), episodes, 0.0)


def test_success_is_a_dot_with_wilsons_range():
    results = {"reach": evaluation(92), "again": evaluation(61), "none": evaluation(0, 40)}
    figure = plot_success(results)
    (ax,) = figure.axes
    (dots,) = (line for line in ax.lines if line.get_gid() == "success")
    assert np.allclose(dots.get_xydata(), [[0.92, 0], [0.61, 1], [0, 2]])
    (ranges,) = (c for c in ax.collections if c.get_gid() == "interval")
    ends = [(path[0, 0], path[1, 0]) for path in ranges.get_segments()]
    assert np.allclose(ends, [(r.low, r.high) for r in results.values()])
    assert [t.get_text() for t in ax.texts] == ["92 % of 100", "61 % of 100", "0 % of 40"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["reach", "again", "none"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # from the top down
    assert figure.get_suptitle() == "reach succeeds in 92 % of 100 episodes, more than the rest"
    assert figure.get_size_inches()[0] == 6.5


def test_success_titles_do_not_claim_what_chance_explains():
    close = {"a": evaluation(61), "b": evaluation(55), "c": evaluation(2)}
    assert plot_success(close).get_suptitle() == "a succeeds in 61 % of 100 episodes; b may be as good"
    assert plot_success({"a": evaluation(61)}).get_suptitle() == "a succeeds in 61 % of 100 episodes"
    figure, ax = plt.subplots(figsize=(6, 2))
    assert plot_success(close, ax=ax, title="mine") is figure
    assert ax.get_title(loc="left") == "mine"
    with pytest.raises(ValueError, match=r"no results to draw; expected \{name"):
        plot_success({})


def counts(ax):
    """The heights of a histogram."""
    return np.array([p.get_height() for p in ax.patches if p.get_width() < 1])


def test_each_mode_is_a_histogram_of_what_the_network_sees():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 7
    stats = {
        "mean": 7.0,
        "std": 3.0,
        "min": 0.0,
        "max": 20.0,
        "q01": 1.0,
        "q99": 14.0,
        "q10": 3.0,
        "q90": 11.0,
    }
    figure = plot_normalisation(x, stats=stats, name="joint", unit="degrees")
    raw, *modes = figure.axes
    assert len(modes) == 4
    assert counts(raw).sum() == 500
    assert raw.get_xlabel() == "joint (degrees)"
    told = [ax.get_ylabel().split("\n")[0] for ax in modes]
    assert told == ["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"]
    for ax, mode in zip(modes, told, strict=True):
        seen = normalize(x, mode, {k: torch.tensor(v) for k, v in stats.items()}).numpy()
        inside = abs(seen) <= 4
        expected, _ = np.histogram(seen[inside], bins=np.linspace(-4, 4, 97))
        assert abs(counts(ax) - expected).sum() <= 4  # a value on a border may fall to either side
    assert "under MIN_MAX" in figure.get_suptitle()


def test_values_far_out_are_counted_at_the_edge():
    x = torch.cat((torch.linspace(0, 1, 99), torch.tensor([1000.0])))
    _, mean_std, quantile10 = plot_normalisation(x, ("MEAN_STD", "QUANTILE10")).axes
    assert [t.get_text() for t in mean_std.texts] == ["1.0 % beyond"]
    assert [t.get_text() for t in quantile10.texts] == ["1.0 % beyond"]


def test_normalisation_errors():
    with pytest.raises(ValueError, match=r"\(5, 2\); expected \(N,\)"):
        plot_normalisation(torch.zeros(5, 2))
    with pytest.raises(KeyError, match="needs mean and std"):
        plot_normalisation(torch.rand(5), ("MEAN_STD",), {"min": 0.0})


def test_windows_hatch_padding_where_the_frames_would_be():
    indices, is_pad = window_indices(torch.arange(4, 8), 0, 8, range(3))
    figure = plot_windows(indices, is_pad)
    (ax,) = figure.axes
    cells = [
        (round(p.get_x() + p.get_width() / 2), round(p.get_y() + p.get_height() / 2), p.get_gid())
        for p in ax.patches
    ]
    wanted = [
        (frame + delta, row, "padding" if frame + delta > 7 else "action")
        for row, frame in enumerate(range(4, 8))
        for delta in range(3)
    ]
    assert cells == wanted
    assert all(bool(p.get_hatch()) == (p.get_gid() == "padding") for p in ax.patches)
    assert [t.get_text() for t in ax.texts if t.get_text().isdigit()] == [
        str(i) for i in indices.flatten().tolist()
    ]
    assert ax.get_title(loc="left") == "3 of 12 actions in these windows are padding"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4", "5", "6", "7"]
    assert ax.get_xlabel() == "frame of the episode"
    assert "the episode has ended" in [t.get_text() for t in ax.texts]


def test_windows_with_observations():
    frames = torch.arange(0, 3)
    seen, actions = window_indices(frames, 0, 9, [-1, 0]), window_indices(frames, 0, 9, range(4))
    (ax,) = plot_windows(*actions, observations=seen).axes
    by_kind = {
        kind: [p for p in ax.patches if p.get_gid() == kind] for kind in ("state", "action", "padding")
    }
    assert {kind: len(cells) for kind, cells in by_kind.items()} == {"state": 5, "action": 12, "padding": 1}
    assert by_kind["state"][0].get_facecolor() == to_rgba(palette.KIND_COLOURS["state"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2"]


def test_window_errors():
    with pytest.raises(ValueError, match=r"is_pad \(1, 3\); expected the same"):
        plot_windows(np.zeros((1, 4), int), np.zeros((1, 3), bool))
    with pytest.raises(ValueError, match="all padding"):
        plot_windows(np.zeros((1, 4), int), np.ones((1, 4), bool))
    with pytest.raises(ValueError, match="observations has 1 rows, the actions 2"):
        plot_windows(
            np.zeros((2, 4), int),
            np.zeros((2, 4), bool),
            observations=(np.zeros((1, 2), int), np.zeros((1, 2), bool)),
        )
