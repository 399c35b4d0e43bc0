"""Counts and perplexity are what the codes are."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from minivla.viz import perplexity, plot_code_grid, plot_code_usage


def usage(ax):
    """The heights of the histogram."""
    return next(p for p in ax.patches if p.get_gid() == "usage").get_data().values


def dead(ax):
    return [p.get_x() + 0.5 for p in ax.patches if p.get_gid() == "dead"]


def test_perplexity_of_even_use_is_the_size_and_of_one_code_one():
    assert perplexity(torch.arange(64).reshape(4, 16), 64) == pytest.approx(64)
    assert perplexity(torch.full((5, 5), 3), 64) == pytest.approx(1)
    assert perplexity(np.array([0, 1, 0, 1]), 64) == pytest.approx(2)
    assert perplexity(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(np.exp(0.5623351), rel=1e-6)


def test_the_histogram_by_usage_and_by_id():
    codes = torch.tensor([[5, 5, 5], [2, 2, 0]])
    (ax,) = plot_code_usage(codes, 6).axes
    assert usage(ax).tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0, 0, 0])
    assert dead(ax) == [3, 4, 5]
    figure = plot_code_usage(codes, 6, order="id")
    (ax,) = figure.axes
    assert usage(ax).tolist() == pytest.approx([1 / 6, 0, 1 / 3, 0, 0, 1 / 2])
    assert dead(ax) == [1, 3, 4]
    assert figure.get_suptitle() == f"3 of 6 codes are never used; perplexity {perplexity(codes, 6):.3g}"
    assert figure.get_size_inches()[0] == 6.5


def test_levels_of_a_residual_quantiser_are_counted_apart():
    codes = torch.stack((torch.arange(8), torch.zeros(8, dtype=torch.long)), dim=-1)
    figure = plot_code_usage(codes, 8, levels=True)
    first, second = figure.axes
    assert usage(first).tolist() == pytest.approx([1 / 8] * 8)
    assert usage(second).tolist() == [1, *[0] * 7]
    assert "level 1" in first.get_ylabel() and "level 2" in second.get_ylabel()
    assert figure.get_suptitle() == "7 of 16 codes are never used; perplexity 8 and 1"
    assert usage(plot_code_usage(codes, 8).axes[0])[0] == pytest.approx(9 / 16)


def test_codes_on_axes_of_ones_own():
    figure, axes = plt.subplots(1, 2)
    assert plot_code_usage(np.arange(4), 4, ax=axes[0]) is figure
    assert axes[0].get_title(loc="left").split("\n") == ["Every code is used;", "perplexity 4"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 3}, ValueError, r"between 0 and 3; expected 0 to 2"),
        ({"codes": torch.tensor([-1, 2])}, ValueError, r"between -1 and 2; .* codes\[valid\]"),
        ({"codes": torch.rand(4)}, TypeError, "float32; expected integers"),
        ({"codes": torch.zeros(0, dtype=torch.long)}, ValueError, "no codes to count"),
        ({"order": "name"}, ValueError, "order is 'name'; expected 'usage' or 'id'"),
        ({"codes": torch.zeros(3, 2, dtype=torch.long), "levels": True, "ax": 0}, ValueError, "2 levels"),
    ],
)
def test_code_errors(options, error, message):
    with pytest.raises(error, match=message):
        plot_code_usage(**{"codes": torch.arange(4), "size": 4, **options})


PAIRS = torch.tensor([[0, 2], [0, 2], [0, 2], [2, 0], [2, 1], [2, 1]])


def counted(figure):
    """The map's counts, 0 where it is masked, and the codes that its sides name: down, across."""
    ax = next(ax for ax in figure.axes if ax.images)
    names = [[label.get_text() for label in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis)]
    return ax.images[0].get_array().filled(0).tolist(), *([int(name) for name in side] for side in names)


def test_the_grid_counts_pairs_and_names_dead_codes():
    figure = plot_code_grid(PAIRS, 3)
    counts, down, across = counted(figure)
    assert counts == [[0, 0, 3], [0, 0, 0], [1, 2, 0]]
    assert down == across == [0, 1, 2]
    top, right = (ax for ax in figure.axes if any(p.get_gid() == "usage" for p in ax.patches))
    assert usage(top).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert usage(right).tolist() == pytest.approx([3 / 6, 0, 3 / 6])
    assert [text.xy for text in right.texts] == [(0, 1)] and not top.texts
    alone = [perplexity(PAIRS[:, level], 3) for level in (0, 1)]
    both = perplexity(3 * PAIRS[:, 0] + PAIRS[:, 1], 9)
    assert figure.get_suptitle().split("\n") == [
        "3 of 9 pairs occur",
        f"Perplexity {alone[0]:.3g} and {alone[1]:.3g}, together {both:.3g} "
        f"(independent levels: {alone[0] * alone[1]:.3g})",
    ]


def test_the_grid_by_usage_of_other_levels_and_sizes():
    codes = torch.cat((PAIRS, torch.tensor([[3], [3], [1], [3], [3], [3]])), dim=-1)
    counts, down, across = counted(plot_code_grid(codes, (3, 3, 4), levels=(2, 3), order="usage"))
    assert (down, across) == ([2, 1, 0], [3, 1, 0, 2])
    assert counts == [[2, 1, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0]]


def test_a_large_grid_names_some_codes():
    codes = torch.randint(0, 100, (500, 2), generator=torch.Generator().manual_seed(0))
    counts, down, _ = counted(plot_code_grid(codes, 100))
    assert np.sum(counts) == 500 and np.shape(counts) == (100, 100)
    assert down == list(range(0, 100, 5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sizes": 2}, ValueError, "between 0 and 2; expected 0 to 1"),
        ({"sizes": (3, 3, 3)}, ValueError, r"shape \(6, 2\); expected \(..., 3\)"),
        ({"levels": (1, 1)}, ValueError, r"levels are \(1, 1\); expected two of 1 to 2"),
        ({"levels": (0, 1)}, ValueError, r"levels are \(0, 1\)"),
        ({"codes": torch.arange(3)[:, None]}, ValueError, "expected two of 1 to 1"),
        ({"order": "name"}, ValueError, "order is 'name'"),
        ({"codes": torch.rand(4, 2)}, TypeError, "expected integers"),
    ],
)
def test_grid_errors(options, error, message):
    with pytest.raises(error, match=message):
        plot_code_grid(**{"codes": PAIRS, "sizes": 3, **options})
