"""Masks proven: true ones pass, and each way of breaking one is caught and named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minivla
import minivla.world
from minivla import recorder
from minivla.nn import attention
from minivla.nn.masks import segment_mask
from minivla.nn.transformer import TransformerLayer
from minivla.proof import prove_masks
from minivla.segments import Segment, arrange
from tests.policies.small import tiny_act, tiny_batch


def test_the_shipped_policys_masks_are_proven():
    policy = minivla.load("act-tabletop")
    item = minivla.world.demonstrations("pick_place", 1, 0)[0]
    proof = minivla.prove_masks(policy, policy.preprocess(item))
    assert proof.ok
    assert [p.sequence for p in proof.sequences] == ["encoder → decoder", "vae_encoder"]
    assert all(p.largest_closed == 0.0 for p in proof.sequences)
    assert proof.sequences[0].closed == 131 * 16  # no observation sees a query
    assert "2,096 closed places, largest gradient 0;" in str(proof)


def test_proving_leaves_everything_as_it_was():
    policy = tiny_act().train()
    policy.encoder.eval()
    batch, rng = tiny_batch(policy), torch.get_rng_state()
    modes = [module.training for module in policy.modules()]
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    with torch.no_grad():
        assert prove_masks(policy, batch).ok
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert recorder.current() is None


def test_an_attention_that_forgets_its_mask_leaks_by_name(monkeypatch):
    true = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *a, attn_mask, **o: true(*a, **o))
    policy = tiny_act()
    proof = prove_masks(policy, tiny_batch(policy))
    assert not proof.ok
    assert [p.ok for p in proof.sequences] == [True, False]
    assert proof.sequences[1].leaks[0] == "class sees chunk[4]"
    assert proof.sequences[1].largest_closed > 0
    assert "BROKEN vae_encoder" in str(proof)


def test_a_mask_told_too_open_is_silent_where_nothing_passes(monkeypatch):
    told = recorder.Call.describe
    monkeypatch.setattr(
        recorder.Call, "describe", lambda call, s, mask, stacks: told(call, s, torch.ones_like(mask), stacks)
    )
    policy = tiny_act()
    proof = prove_masks(policy, tiny_batch(policy))
    assert not proof.ok
    assert proof.sequences[0].silent[0] == "latent sees queries[0]"
    assert proof.sequences[0].silent[-1] == "and 781 more"


def test_a_long_sequence_is_asked_at_the_ends_of_its_segments_and_between():
    policy = tiny_act()
    proof = prove_masks(policy, tiny_batch(policy), rows=20)
    assert proof.ok
    assert proof.sequences[0].rows < 25
    assert proof.sequences[0].tokens == 137


def test_a_policy_without_stacks_has_nothing_to_prove(monkeypatch):
    monkeypatch.setattr(recorder, "enter", lambda name, tokens: tokens)
    policy = tiny_act()
    with pytest.raises(
        ValueError, match=r"ACT has no masks to prove: none of its stacks calls recorder\.enter"
    ):
        prove_masks(policy, tiny_batch(policy))


class Sequence(nn.Module):
    """Two layers over any list of segments: the smallest policy whose masks can be proven."""

    def __init__(self, segments):
        super().__init__()
        self.config = SimpleNamespace(input_features={"tokens": None})
        self.segments = arrange(segments)
        self.layers = nn.ModuleList(TransformerLayer(8, 2, 16, site=f"joint.{i}") for i in range(2))

    def predict_action_chunk(self, batch):
        return self(batch)

    def forward(self, batch):
        mask = segment_mask(self.segments)
        if (call := recorder.current()) is not None:
            call.describe(self.segments, mask[0], stacks=("joint",))
            call.lay_out("joint.*", self.segments, self.segments)
        tokens = recorder.enter("joint", batch["tokens"])
        for layer in self.layers:
            tokens = layer(tokens, torch.zeros(1), mask=mask)
        recorder.keep("joint", tokens)
        return tokens


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.builds(
            Segment,
            name=st.just("part"),
            kind=st.just("state"),
            length=st.integers(1, 3),
            block=st.integers(0, 2),
            rule=st.sampled_from(["full", "causal"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_mask_the_builder_makes_is_kept_by_the_layers(segments):
    torch.manual_seed(0)
    policy = Sequence(segments)
    length = sum(s.length for s in segments)
    batch = {"tokens": torch.randn(2, length, 8), "action_is_pad": torch.zeros(2, 1)}
    proof = prove_masks(policy, batch)
    assert all(p.largest_closed == 0.0 for p in proof.sequences)
    assert proof.ok, proof


def test_what_is_seen_through_others_is_counted_apart():
    """A causal segment in a block with one that sees all of it: its first token learns of its last one."""
    segments = [Segment("all", "state", 1), Segment("ordered", "state", 2, rule="causal")]
    batch = {"tokens": torch.randn(1, 3, 8), "action_is_pad": torch.zeros(1, 1)}
    (sequence,) = prove_masks(Sequence(segments), batch).sequences
    assert (sequence.closed, sequence.second_hand, sequence.ok) == (1, 1, True)
    assert "1 closed places are reached through tokens in between" in str(sequence)


def test_a_wrapped_policy_is_proven_and_a_poor_batch_refused():
    policy = tiny_act()
    batch = tiny_batch(policy)
    assert prove_masks(torch.compile(policy, backend="eager"), batch).ok
    with pytest.raises(
        ValueError, match=r"the batch has nothing; expected observation\.images\.table, .*: give"
    ):
        prove_masks(policy, {})
    with pytest.raises(TypeError, match=r"is a ndarray, expected a tensor: give policy\.preprocess"):
        prove_masks(policy, {key: value.numpy() for key, value in batch.items() if key != "task"})


def test_without_a_copy_rounding_is_a_note_and_a_leak_is_not():
    """The shipped policy's first head is so sure of itself that float32 knows no other place."""
    policy = minivla.load("act-tabletop")
    demos = minivla.world.demonstrations("pick_place", 4, 4321)
    batch = policy.preprocess(torch.utils.data.default_collate([demos[i] for i in (0, 30, 60, 90)]))
    proof = prove_masks(policy, batch, exact=False)
    assert proof.ok
    assert proof.sequences[0].silent
    assert "nothing passes (or float32 rounds it to 0)" in str(proof)
    assert prove_masks(policy, batch, rows=30).ok
