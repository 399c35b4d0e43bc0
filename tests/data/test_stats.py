"""Statistics from first principles, and out of old checkpoints (LeRobot's: test_against_lerobot.py)."""

import numpy as np
import pytest
import torch

from minivla.data import PolicyFeature, compute_stats, legacy_stats
from minivla.data.stats import LEGACY_KEY

FLOAT = {"x": {"dtype": "float32"}}
FEATURES = {
    "observation.images.wrist_left": PolicyFeature("VISUAL", (3, 4, 4)),
    "observation.environment_state": PolicyFeature("ENV", (2,)),
    "action": PolicyFeature("ACTION", (2,)),
}


def test_mean_and_std_of_the_whole_come_out_right_whatever_the_episodes():
    rng = np.random.default_rng(0)
    parts = [rng.normal(i, 1 + i, (10 + 30 * i, 3)).astype(np.float32) for i in range(4)]
    whole = np.concatenate(parts).astype(np.float64)
    stats = compute_stats([{"x": part} for part in parts], FLOAT)["x"]
    for name, expected in (
        ("mean", whole.mean(0)),
        ("std", whole.std(0)),
        ("min", whole.min(0)),
        ("max", whole.max(0)),
    ):
        np.testing.assert_allclose(stats[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert stats["count"].tolist() == [len(whole)]
    assert stats["mean"].dtype == torch.float64


def test_quantiles_of_one_episode_are_quantiles_to_a_bin():
    values = np.random.default_rng(1).uniform(0, 1, (5000, 2)).astype(np.float32)
    stats = compute_stats([{"x": values}], FLOAT)["x"]
    for name, quantile in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        np.testing.assert_allclose(stats[name].numpy(), np.quantile(values, quantile, axis=0), atol=1e-3)


def test_quantiles_of_several_episodes_are_averaged_as_the_docstring_warns():
    """Two flat episodes at 0 and at 1: the data fill [0, 1], the quantiles say that they never leave 0.5."""
    flat = [{"x": np.full((100, 1), level) + np.linspace(0, 1e-3, 100)[:, None]} for level in (0.0, 1.0)]
    stats = compute_stats(flat, FLOAT)["x"]
    assert 0.49 < stats["q01"].item() < stats["q99"].item() < 0.51
    assert (stats["min"].item(), round(stats["max"].item(), 2)) == (0.0, 1.0)


def test_image_statistics_are_per_channel_in_the_unit_interval():
    frames = np.zeros((5, 8, 8, 3), np.uint8)
    frames[..., 1], frames[:, :4, :, 2] = 255, 255
    stats = compute_stats([{"x": frames}], {"x": {"dtype": "video"}})["x"]
    assert stats["mean"].shape == (3, 1, 1)
    torch.testing.assert_close(stats["mean"].flatten(), torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(stats["std"].flatten(), torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64))


def test_text_is_passed_over_and_nothing_at_all_is_refused():
    columns = {"x": {"dtype": "float32"}, "note": {"dtype": "string"}}
    assert list(compute_stats([{"x": np.ones((2, 1)), "note": np.array(["a", "b"])}], columns)) == ["x"]
    with pytest.raises(ValueError, match=r"no episodes.*expected at least one. Record"):
        compute_stats([], columns)


def test_broken_data_are_named():
    bad = np.ones((6, 3), np.float32)
    bad[4, 2] = np.nan
    with pytest.raises(
        ValueError,
        match=r"'x' of episode 1 holds NaN or inf, first at frame 4, dimension \[2\]; expected.*drop",
    ):
        compute_stats([{"x": np.ones((6, 3), np.float32)}, {"x": bad}], FLOAT)
    with pytest.raises(
        ValueError, match=r"got frames of float32 \(2, 3, 8, 8\); expected uint8 \(N, H, W, 3\). Move"
    ):
        compute_stats([{"x": np.ones((2, 3, 8, 8), np.float32)}], {"x": {"dtype": "image"}})


def old(module, feature, name, value):
    return {f"{module}.buffer_{feature}.{name}": torch.as_tensor(value)}


def test_underscores_of_old_buffers_find_their_way_back():
    tensors = {
        "model.encoder.weight": torch.ones(1),
        **old("normalize_inputs", "observation_images_wrist_left", "mean", torch.zeros(3, 1, 1)),
        **old("normalize_inputs", "observation_environment_state", "min", [0.0, 1.0]),
        **old("normalize_targets", "action", "mean", [1.0, 2.0]),
        **old("unnormalize_outputs", "action", "mean", [1.0, 2.0]),
    }
    stats = legacy_stats(tensors, FEATURES)
    assert set(stats) == set(FEATURES)
    assert stats["observation.environment_state"]["min"].tolist() == [0.0, 1.0]
    assert stats["action"]["mean"].tolist() == [1.0, 2.0]
    assert [key for key in tensors if not LEGACY_KEY.match(key)] == ["model.encoder.weight"]


def test_buffers_never_set_count_as_absent():
    assert legacy_stats(old("normalize_inputs", "action", "mean", [float("inf")] * 2), FEATURES) == {}


def test_old_buffers_that_make_no_sense_are_refused():
    with pytest.raises(
        KeyError, match=r"holds statistics of 'observation_tail', and the config knows.*Add the feature"
    ):
        legacy_stats(old("normalize_inputs", "observation_tail", "mean", [0.0]), FEATURES)
    two = old("normalize_targets", "action", "mean", [1.0, 2.0]) | old(
        "unnormalize_outputs", "action", "mean", [1.0, 3.0]
    )
    with pytest.raises(
        ValueError,
        match=r"differs from another buffer of the same statistic; expected one value.*take the other",
    ):
        legacy_stats(two, FEATURES)
