"""The U-Net's short cuts while sampling: each is what it replaces, and is really taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minivla.nn.unet import ConditionalUnet1d, Conv1d
from tests.parity import redraw, relative_error


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (3, 2), (1, 1)])
def test_wide_weights_are_a_matrix_product(kernel, stride, batch, monkeypatch):
    ours = Conv1d(6, 9, kernel, stride=stride, padding=kernel // 2)
    x = torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = nn.Conv1d.forward(ours, x).detach()
    monkeypatch.setattr(nn.Conv1d, "forward", lambda *_: pytest.fail("torch's convolution was called"))
    monkeypatch.setattr(Conv1d, "WIDE", ours.weight.numel())
    with torch.no_grad():
        assert relative_error(ours(x), expected) < 1e-6


def test_narrow_weights_and_gradients_are_left_to_torch(monkeypatch):
    ours, x = Conv1d(6, 9, 3, padding=1), torch.randn(1, 6, 8)
    called = []
    monkeypatch.setattr(nn.Conv1d, "forward", lambda *_: called.append(1))
    with torch.no_grad():
        ours(x)
    monkeypatch.setattr(Conv1d, "WIDE", 0)
    ours(x)
    assert called == [1, 1]


@pytest.mark.parametrize(("samples", "times"), [(1, 1), (4, 1), (4, 4), (1, 4)])
def test_film_told_in_two_parts_is_film_told_at_once(samples, times):
    """Sampling tells observation and timestep apart, training together; one of either serves many."""
    unet = ConditionalUnet1d(3, 10, widths=(16, 24), time_width=8)
    redraw(unet)
    seen, timestep = torch.randn(samples, 2, 5), torch.arange(times)
    at_once = unet.observe(seen)
    with torch.no_grad():
        in_parts = unet.observe(seen)
    assert at_once.film is None and in_parts.film is not None
    for one, other in zip(unet.modulate(timestep, at_once), unet.modulate(timestep, in_parts), strict=True):
        assert relative_error(other, one.detach()) < 1e-5
