"""Masks by construction, by property, and by perturbation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivla.nn.attention import MultiheadAttention
from minivla.nn.masks import key_mask, segment_mask
from minivla.segments import Segment, arrange

SEGMENTS = st.lists(
    st.builds(
        Segment,
        name=st.just("s"),
        kind=st.sampled_from(["image", "state", "action"]),
        length=st.integers(0, 4),
        block=st.integers(0, 3),
        rule=st.sampled_from(["full", "causal"]),
    ),
    min_size=1,
    max_size=5,
).filter(lambda segments: any(s.length for s in segments))


@given(SEGMENTS)
def test_a_token_sees_exactly_its_own_and_lower_blocks_and_causally_no_later_ones(segments):
    laid = arrange(segments)
    mask = segment_mask(laid)[0]
    where = [(s, s.start + i) for s in laid for i in range(s.length)]
    assert mask.shape == (len(where), len(where))
    for query, i in where:
        for key, j in where:
            later = query is key and query.rule == "causal" and j > i
            assert mask[i, j] == (key.block <= query.block and not later)


def test_segments_stand_one_after_another_and_empty_ones_fall_out():
    laid = arrange([Segment("a", "state", 2), Segment("none", "image", 0), Segment("b", "action", 3)])
    assert [(s.name, s.start, s.stop) for s in laid] == [("a", 0, 2), ("b", 2, 5)]


def test_nobody_looks_at_padding():
    segments = arrange([Segment("state", "state", 1), Segment("chunk", "action", 3)])
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    mask = segment_mask(segments, valid)
    assert mask.shape == (2, 4, 4)
    assert not mask[0, :, 2:].any()
    assert mask[1].all()
    assert torch.equal(key_mask(valid)[:, 0], valid)


@pytest.mark.parametrize("rule", ["full", "causal"])
def test_changing_a_token_that_must_not_be_seen_changes_nothing_to_the_bit(rule):
    segments = arrange([Segment("image", "image", 3), Segment("chunk", "action", 4, block=1, rule=rule)])
    mask = segment_mask(segments)
    torch.manual_seed(0)
    attention = MultiheadAttention(8, 2)
    tokens = torch.randn(1, 7, 8)
    keys = tokens.clone()  # one and the same thing would be projected in one go, and rounded otherwise
    before = attention(tokens, keys, keys, mask)
    for changed in range(7):
        other = tokens.clone()
        other[:, changed] += 5
        moved = (attention(tokens, other, other, mask) != before).any(-1)[0]
        assert torch.equal(moved, mask[0, :, changed]), f"token {changed}"


def test_the_gradient_is_zero_exactly_where_the_mask_is_closed():
    segments = arrange([Segment("state", "state", 2), Segment("chunk", "action", 3, block=1, rule="causal")])
    mask = segment_mask(segments)
    torch.manual_seed(0)
    attention = MultiheadAttention(8, 2).double()
    query, tokens = torch.randn(1, 5, 8).double(), torch.randn(1, 5, 8).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: attention(query, x, x, mask), tokens)
    reached = jacobian.abs().sum(dim=(0, 2, 3, 5)) > 0  # (Q, K)
    assert torch.equal(reached, mask[0])
