"""The loss counts real actions only; the KL is the closed form; the ensemble is the weighted mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivla.actions.regression import TemporalEnsembler, kl_to_standard_normal, masked_l1


def test_padding_does_not_touch_the_loss():
    torch.manual_seed(0)
    predicted, action = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    is_pad = torch.tensor([[False, False, True, True], [False] * 4])
    before = masked_l1(predicted, action, is_pad)
    action[0, 2:] = 1e6
    assert torch.equal(masked_l1(predicted, action, is_pad), before)
    real = torch.cat([(predicted - action)[0, :2], (predicted - action)[1]]).abs().mean()
    torch.testing.assert_close(before, real)
    assert masked_l1(predicted, action, torch.ones(2, 4, dtype=torch.bool)) == 0


def test_kl_is_torchs():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(4, 5), torch.randn(4, 5)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.integers(1, 6), st.integers(1, 12))
def test_the_ensemble_is_the_weighted_mean_of_every_prediction_made_for_now(coefficient, horizon, steps):
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(steps, 2, horizon, 3, generator=generator, dtype=torch.float64)
    ensemble = TemporalEnsembler(coefficient, horizon)
    for now in range(steps):
        action = ensemble.update(chunks[now])
        made = range(max(0, now - horizon + 1), now + 1)  # oldest first
        weight = torch.exp(-coefficient * torch.arange(len(made), dtype=torch.float64))
        predictions = torch.stack([chunks[then][:, now - then] for then in made])
        expected = torch.einsum("n,nba->ba", weight / weight.sum(), predictions)
        torch.testing.assert_close(action, expected, rtol=1e-5, atol=1e-5)


def test_reset_forgets():
    ensemble = TemporalEnsembler(0.01, 3)
    ensemble.update(torch.ones(1, 3, 2))
    ensemble.reset()
    assert ensemble.update(torch.zeros(1, 3, 2)).tolist() == [[0.0, 0.0]]
    with pytest.raises(RuntimeError):
        ensemble.update(torch.zeros(1, 5, 2))
