"""Curves are drawn where they are, and named where they end."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from minivla.viz import plot_curves
from minivla.viz.curves import COLOURS

X = torch.tensor([1.0, 2.0, 4.0])
AXES = {"xlabel": "calls", "ylabel": "error"}


def line(ax, name):
    (found,) = [line for line in ax.lines if line.get_gid() == name]
    return found


def test_each_curve_is_drawn_where_it_is():
    figure = plot_curves({"euler": (X, 1 / X), "heun": (X, X**-2)}, log="xy", title="Errors fall", **AXES)
    (ax,) = figure.axes
    assert np.allclose(line(ax, "euler").get_xydata(), [[1, 1], [2, 0.5], [4, 0.25]])
    assert np.allclose(line(ax, "heun").get_ydata(), [1, 0.25, 0.0625])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("calls", "error")
    assert figure.get_suptitle() == "Errors fall"


def test_names_stand_in_the_order_of_the_ends_and_apart():
    same = {name: (X, torch.full((3,), level)) for name, level in (("b", 1.0), ("c", 1.01), ("a", 0.0))}
    (ax,) = plot_curves(same, **AXES).axes
    place = {text.get_text(): text.xy[1] for text in ax.texts}
    assert all(0 <= height <= 1 for height in place.values())
    assert place["a"] < place["b"] < place["c"]
    assert (place["c"] - place["b"]) * ax.get_window_extent().height / ax.figure.dpi > 0.15


def test_of_several_runs_the_mean_is_drawn_and_the_range():
    runs = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    (ax,) = plot_curves({"runs": (X, runs)}, **AXES).axes
    assert np.allclose(line(ax, "runs").get_ydata(), [2, 3, 4])
    (band,) = ax.collections
    extent = band.get_paths()[0].get_extents()
    assert (extent.ymin, extent.ymax) == (1, 5)


def test_on_axes_of_ones_own():
    figure, axes = plt.subplots(1, 2)
    assert plot_curves({"one": (X, X)}, ax=axes[1], title="Here", **AXES) is figure
    assert axes[1].get_title() == "Here" or axes[1].get_title(loc="left") == "Here"


@pytest.mark.parametrize(
    ("curves", "log", "says"),
    [
        ({}, "", "0 curves were given; expected 1 to"),
        ({str(i): (X, X) for i in range(len(COLOURS) + 1)}, "", "6 curves were given"),
        ({"short": (X, X[:2])}, "", r"curve 'short' has x \(3,\) and y \(2,\)"),
        ({"zero": (X, X - 1)}, "y", "curve 'zero' has y = 0, on a logarithmic axis"),
        ({"zero": (X - 1, X)}, "x", "curve 'zero' has x = 0, on a logarithmic axis"),
    ],
)
def test_what_cannot_be_drawn_is_refused(curves, log, says):
    with pytest.raises(ValueError, match=says):
        plot_curves(curves, log=log, **AXES)
