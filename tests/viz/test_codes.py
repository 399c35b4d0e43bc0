"""Counts and perplexity are what the codes are."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from minivla.viz import perplexity, plot_code_usage


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
    assert "level 1" in second.get_ylabel()
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
