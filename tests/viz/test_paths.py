"""Ways are drawn from where they start to where they end, at one scale."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from minivla.viz import plot_paths
from minivla.viz.flow import ACTION

POINTS = torch.randn(5, 70, 2, generator=torch.Generator().manual_seed(0)).cumsum(0)


def named(ax, gid):
    return [artist for artist in (*ax.lines, *ax.collections, *ax.patches) if artist.get_gid() == gid]


def test_starts_pieces_and_results_are_where_they_are():
    figure = plot_paths({"lines": POINTS, "ways": 2 * POINTS}, obstacle=1.0, title="Two ways")
    for ax, points in zip(figure.axes, (POINTS, 2 * POINTS), strict=True):
        (noise,), (results,), (obstacle,) = (named(ax, gid) for gid in ("noise", "results", "obstacle"))
        assert np.allclose(noise.get_xydata(), points[0, :60])
        assert np.allclose(results.get_xydata(), points[-1])
        assert obstacle.get_radius() == 1
        ways = named(ax, "ways")
        assert len(ways) == 4
        for k, way in enumerate(ways):
            assert np.allclose(way.get_segments(), points[k : k + 2, :60].transpose(0, 1))
        assert to_hex(ways[-1].get_colors()[0]).lower() == ACTION.lower()
        assert to_hex(ways[0].get_colors()[0]).lower() != ACTION.lower()
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert figure.get_suptitle() == "Two ways"


def test_no_circle_unless_asked_for_and_names_of_the_axes():
    (ax,) = plot_paths({"only": POINTS}, names=("ahead", "left")).axes
    assert not named(ax, "obstacle")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("ahead", "left")
    plt.close("all")


@pytest.mark.parametrize(
    ("panels", "says"),
    [
        ({}, "there are no panels"),
        ({"flat": POINTS[0]}, r"the points of 'flat' have shape \(70, 2\)"),
        ({"short": POINTS[:1]}, r"have shape \(1, 70, 2\); expected \(N \+ 1, B, 2\) with N ≥ 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(panels, says):
    with pytest.raises(ValueError, match=says):
        plot_paths(panels)
