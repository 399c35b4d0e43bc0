"""Normalisation: there and back, and the statistics that are refused."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivla.data import MissingKey, NormalizationMode, PolicyFeature
from minivla.data.normalize import (
    STATISTICS,
    as_stats,
    check_statistics,
    constant_dimensions,
    normalize,
    unnormalize,
)

MODES = [mode for mode in NormalizationMode if mode != NormalizationMode.IDENTITY]
STATE = PolicyFeature("STATE", (3,))
GOOD = {
    "mean": [0.0, 1.0, 2.0],
    "std": [1.0, 1.0, 1.0],
    "min": [-2.0, -1.0, 0.0],
    "max": [2.0, 3.0, 4.0],
    "q01": [-1.0, 0.0, 1.0],
    "q99": [1.0, 2.0, 3.0],
    "q10": [-0.5, 0.5, 1.5],
    "q90": [0.5, 1.5, 2.5],
}


def stats(**changes):
    return as_stats({"observation.state": GOOD | changes})


def check(table, mode, **options):
    check_statistics(table, "observation.state", STATE, mode, **options)


numbers = st.floats(-1e3, 1e3, width=32)


@settings(deadline=None)
@given(
    st.sampled_from(list(NormalizationMode)),
    st.lists(numbers, min_size=3, max_size=3),
    numbers,
    st.floats(2**-7, 1e3, width=32),
)
def test_there_and_back(mode, x, center, spread):
    low, high = (
        ("mean", "std") if mode == NormalizationMode.MEAN_STD else (STATISTICS[mode] or ("min", "max"))
    )
    table = {low: torch.tensor([center]), high: torch.tensor([spread if high == "std" else center + spread])}
    x = torch.tensor(x)
    back = unnormalize(normalize(x, mode, table), mode, table)
    scale = float(x.abs().max()) + abs(center) + spread
    torch.testing.assert_close(back, x, rtol=0, atol=4e-6 * scale)


def test_the_formulas_on_numbers_done_by_hand():
    table = as_stats({"x": {"mean": [2.0], "std": [4.0], "min": [0.0], "max": [8.0]}})["x"]
    x = torch.tensor([0.0, 4.0, 8.0])
    assert normalize(x, NormalizationMode.MEAN_STD, table).tolist() == [-0.5, 0.5, 1.5]
    assert normalize(x, NormalizationMode.MIN_MAX, table).tolist() == [-1.0, 0.0, 1.0]
    assert normalize(x, NormalizationMode.IDENTITY, {}) is x


def test_images_broadcast_over_pixels():
    table = {"mean": torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1), "std": torch.ones(3, 1, 1)}
    out = normalize(torch.ones(2, 3, 4, 4), NormalizationMode.MEAN_STD, table)
    assert out[:, :, 0, 0].tolist() == [[1.0, 0.5, 0.0]] * 2


def test_integers_and_absent_numbers_are_refused():
    with pytest.raises(TypeError, match=r"got torch.uint8; expected floating point.*to_batch"):
        normalize(torch.zeros(3, dtype=torch.uint8), NormalizationMode.MEAN_STD, {})
    with pytest.raises(MissingKey, match="QUANTILES needs q01 and q99; q99 absent"):
        normalize(torch.zeros(3), NormalizationMode.QUANTILES, {"q01": torch.zeros(3)})


@pytest.mark.parametrize("mode", NormalizationMode)
def test_good_statistics_pass_without_a_word(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(stats(), mode)


def test_absent_statistics_name_what_there_is_and_the_nearest():
    table = as_stats({"observation.states": GOOD, "action": GOOD})
    with pytest.raises(
        MissingKey,
        match=r"no statistics for 'observation.state', which MIN_MAX needs; found action, observation.states"
        r". Mend: stats\['observation.state'\] = stats\['observation.states'\].*compute_stats.*'IDENTITY'",
    ):
        check(table, NormalizationMode.MIN_MAX)
    with pytest.raises(
        MissingKey, match=r"has no q10 and no q90, which QUANTILE10 needs; found max, mean.*compute_stats"
    ):
        check(
            as_stats({"observation.state": {k: v for k, v in GOOD.items() if k not in ("q10", "q90")}}),
            "QUANTILE10",
        )
    check({}, NormalizationMode.IDENTITY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(value):
    with pytest.raises(
        ValueError, match=r"observation.state.std is not finite at \[1\] .*expected numbers.*compute_stats"
    ):
        check(stats(std=[1.0, value, 1.0]), NormalizationMode.MEAN_STD)
    check(stats(std=[1.0, value, 1.0]), NormalizationMode.MIN_MAX)


def test_another_robots_statistics_are_refused():
    with pytest.raises(
        ValueError, match=r"mean has shape \(2,\); expected \(3,\).*another dataset's.*use those of the data"
    ):
        check(stats(mean=[0.0, 1.0]), NormalizationMode.MEAN_STD)


@pytest.mark.parametrize(
    ("mode", "changes", "scale"),
    [
        ("MEAN_STD", {"std": [1.0, 1.0, 0.0]}, "std = 0"),
        ("MIN_MAX", {"min": [-2.0, -1.0, 4.0]}, "max-min = 0"),
        ("QUANTILES", {"q01": [-1.0, 0.0, 3.0]}, "q99-q01 = 0"),
        ("QUANTILE10", {"q10": [-1.0, 0.0, 2.5]}, "q90-q10 = 0"),
        # a constant 0.8, whose std is the rounding of a float32 sum
        ("MEAN_STD", {"std": [1.0, 1.0, 2e-4], "min": [-2.0, -1.0, 0.8], "max": [2.0, 3.0, 0.8]}, "std = 0"),
    ],
)
def test_a_constant_dimension_is_refused_by_name_unless_allowed(mode, changes, scale):
    with pytest.raises(
        ValueError,
        match=rf"observation.state\[2\]: constant, {scale}, so {mode} divides by zero.*drop the dimension.*"
        r"normalization_mapping\['STATE'\] = 'IDENTITY'.*allow_constant=True",
    ):
        check(stats(**changes), NormalizationMode(mode))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(stats(**changes), NormalizationMode(mode), allow_constant=True)


def test_a_spread_that_is_small_only_in_the_pixels_is_not_constant():
    """ImageNet's std beside a black camera's min and max: nothing blows up."""
    table = as_stats({"x": {"mean": [0.485], "std": [0.229], "min": [0.0], "max": [0.0]}})["x"]
    assert constant_dimensions(table, NormalizationMode.MEAN_STD) == []
    assert constant_dimensions(table, NormalizationMode.MIN_MAX) == [0]


def test_a_dimension_that_blows_up_is_warned_about():
    """The −3200 of the field: quantiles that miss the rare values of a nearly constant dimension."""
    with pytest.warns(
        UserWarning,
        match=r"observation.state\[1\] is nearly constant: its max, 3, becomes 5999 under QUANTILES.*Drop",
    ):
        check(
            stats(q01=[-1.0, 0.0, 1.0], q99=[1.0, 1e-3, 3.0], min=[-2.0, 0.0, 0.0]),
            NormalizationMode.QUANTILES,
        )


def test_as_stats_copies_and_leaves_none_out():
    array = np.zeros(2)
    table = as_stats({"x": {"mean": array, "std": None}})
    array[:] = 1
    assert table["x"]["mean"].tolist() == [0.0, 0.0]
    assert table["x"]["mean"].dtype == torch.float32
    assert list(table["x"]) == ["mean"]
