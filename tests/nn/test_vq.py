"""The quantiser is LeRobot's over many updates, options included, and keeps its own promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minivla.nn.vq import ResidualVQ, VectorQuantizer
from tests.parity import relative_error

WIDTH, SIZE = 6, 5


def pair(levels: int = 2, **options: Any) -> tuple[ResidualVQ, Any]:
    """Ours and LeRobot's with the same codebooks."""
    from lerobot.policies.vqbet.vqbet_utils import ResidualVQ as Theirs

    renamed = {"threshold_ema_dead_code" if k == "dead_code_threshold" else k: v for k, v in options.items()}
    torch.manual_seed(0)
    ours = ResidualVQ(WIDTH, SIZE, levels=levels, **options)
    theirs = Theirs(dim=WIDTH, num_quantizers=levels, codebook_size=SIZE, **renamed)
    theirs.load_state_dict(as_theirs(ours))
    return ours, theirs


def as_theirs(ours: ResidualVQ) -> dict[str, Tensor]:
    names = ("initted", "cluster_size", "embed_avg", "embed")
    state = {name.rpartition("."): value.clone() for name, value in ours.state_dict().items()}
    return {f"{head}._codebook.{leaf}" if leaf in names else leaf: v for (head, _, leaf), v in state.items()}


def vectors(step: int, size: int = 40) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(step))


def assert_same_step(ours: ResidualVQ, theirs: Any, step: int) -> None:
    mine, given = vectors(step).requires_grad_(), vectors(step).requires_grad_()
    torch.manual_seed(step)
    expected, expected_codes, expected_losses = theirs(given[:, None])
    torch.manual_seed(step)
    quantised, codes, losses = ours(mine)
    assert torch.equal(codes, expected_codes[:, 0])
    assert relative_error(quantised, expected[:, 0]) < 1e-6
    if ours.training:
        assert relative_error(losses, expected_losses[0]) < 1e-6
        (quantised.square().sum() + losses.sum()).backward()
        (expected.square().sum() + expected_losses.sum()).backward()
        assert relative_error(mine.grad, given.grad) < 1e-6
    else:
        assert not losses.any()
        assert not expected_losses.any()
    for name, value in as_theirs(ours).items():
        their_value = theirs.state_dict()[name]
        assert torch.allclose(value, their_value, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"kmeans_init": True}, {"dead_code_threshold": 2}, {"kmeans_init": True, "dead_code_threshold": 4}],
)
def test_codes_losses_gradients_and_buffers_equal_upstream_over_ten_updates(levels, options):
    ours, theirs = pair(levels, **options)
    for step in range(10):
        assert_same_step(ours, theirs, step)
    ours.eval()
    theirs.eval()
    before = as_theirs(ours)
    assert_same_step(ours, theirs, 10)
    assert all(torch.equal(value, before[name]) for name, value in as_theirs(ours).items())
    codes = ours(vectors(11))[1]
    vector = theirs.get_codebook_vector_from_indices(codes).sum(0)
    assert relative_error(ours.look_up(codes), vector) < 1e-6


def test_a_frozen_codebook_does_not_move_in_training():
    ours, theirs = pair()
    for policy in (ours, theirs):
        policy.freeze_codebook.fill_(True)
    before = as_theirs(ours)
    assert_same_step(ours, theirs, 0)
    assert all(torch.equal(value, before[name]) for name, value in as_theirs(ours).items())


def test_the_nearest_entry_is_the_nearest_entry():
    quantizer = VectorQuantizer(WIDTH, SIZE).eval()
    x = vectors(0)
    quantised, codes, _ = quantizer(x)
    distance = (x[:, None] - quantizer.codebook).norm(dim=-1)
    assert torch.equal(distance.argmin(-1), codes)
    assert torch.equal(quantised, quantizer.codebook[codes])


def test_more_levels_leave_less_over():
    def left_over(levels: int) -> float:
        torch.manual_seed(0)
        quantizer = ResidualVQ(WIDTH, SIZE, levels=levels, kmeans_init=True)
        for step in range(60):
            quantizer(vectors(step, 256))
        x = vectors(99, 256)
        return (quantizer.eval()(x)[0] - x).square().mean().item()

    errors = [left_over(levels) for levels in (1, 2, 4)]
    assert errors[0] > errors[1] > errors[2]


def test_dead_codes_live_again_when_asked():
    def used(threshold: float) -> int:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(WIDTH, 32, dead_code_threshold=threshold)
        for step in range(40):
            quantizer(10 + vectors(step, 256))  # far from where the entries start
        return len(quantizer.eval()(10 + vectors(99, 256))[1].unique())

    assert used(0) < 8
    assert used(1) > 24


def test_bfloat16_around_it_does_not_stop_the_averages():
    ours, other = pair()[0], pair()[0]
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(3):
            ours(vectors(step))
    for step in range(3):
        other(vectors(step))
    assert torch.equal(ours.layers[1].embed, other.layers[1].embed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "0 entries of width 6; expected at least 1"),
        ({"size": 4, "levels": 0}, "0 levels; expected at least 1"),
    ],
)
def test_bad_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ResidualVQ(WIDTH, **settings)
