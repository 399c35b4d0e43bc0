"""The U-Net's own promises: length, what FiLM is told, and a convolution that is a matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minivla.nn.unet import ConditionalUnet1d, Conv1d
from tests.parity import redraw, relative_error


def make(**options) -> ConditionalUnet1d:
    unet = ConditionalUnet1d(3, 10, widths=(16, 24), time_width=8, **options)
    redraw(unet)
    return unet


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 8, 3, generator=generator), torch.randn(4, 2, 5, generator=generator)


@pytest.mark.parametrize("scale", [True, False])
def test_a_chunk_comes_out_and_each_sample_follows_its_own_condition(scale):
    unet, (x, seen) = make(scale=scale), inputs()
    out = unet(x, torch.tensor([0, 1, 2, 3]), unet.observe(seen))
    assert out.shape == x.shape
    seen[1] += 1
    changed = (unet(x, torch.tensor([0, 1, 2, 3]), unet.observe(seen)) != out).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False, False]


def test_one_timestep_for_all_is_the_same_as_one_each():
    unet, (x, seen) = make(), inputs()
    one, each = (unet(x, torch.full((n,), 7), unet.observe(seen)) for n in (1, 4))
    torch.testing.assert_close(one, each)


@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (3, 2), (1, 1)])
def test_the_matrix_product_is_the_convolution(kernel, stride):
    ours = Conv1d(6, 9, kernel, stride=stride, padding=kernel // 2)
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(ours(x), nn.Conv1d.forward(ours, x)) < 1e-6


def test_a_length_that_cannot_be_halved_comes_back_as_another():
    """Why the horizon is checked."""
    unet = make()
    assert unet(torch.zeros(1, 7, 3), torch.tensor([0]), unet.observe(torch.zeros(1, 2, 5))).shape[1] == 8
