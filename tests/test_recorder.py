"""A trace sees what the policy does, changes nothing, and says what is wrong when it is asked wrongly."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import minivla
from minivla import recorder
from minivla.nn.attention import MultiheadAttention
from tests.policies.small import tiny_act, tiny_batch, tiny_raw


def traced(**options):
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    with minivla.trace(policy, **options) as t:
        chunk = policy.predict_action_chunk(batch)
    return policy, batch, chunk, t


def test_a_trace_changes_nothing_and_leaves_nothing_behind():
    policy, batch, chunk, t = traced()
    assert torch.equal(policy.predict_action_chunk(batch), chunk)
    assert torch.equal(t.chunk, chunk)
    assert len(t.calls) == 1
    assert recorder.current() is None
    assert "forward" not in vars(policy)


def test_act_tells_what_its_tokens_are():
    *_, t = traced()
    expected = ["latent", "state", "instruction", "table", "wrist", "queries"]
    assert [s.name for s in t.segments] == expected
    assert [s.length for s in t.segments] == [1, 1, 1, 64, 64, 6]
    assert t.segments[3].grid == (8, 8)
    assert t.segments[3].image == "observation.images.table"
    assert t.mask.shape == (137, 137)
    assert t.mask[:131, :131].all()
    assert not t.mask[:131, 131:].any()
    assert t.mask[131:].all()


def test_attention_rows_sum_to_one_and_every_site_knows_its_tokens():
    *_, t = traced()
    assert set(t.attention) == {"encoder.0", "decoder.0.self", "decoder.0.cross"}
    for site, weight in t.attention.items():
        queries, keys = t.sites[site]
        assert weight.shape[-2:] == (queries[-1].stop, keys[-1].stop)
        torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)))
        assert t.masks[site].shape == (2, *weight.shape[-2:])


def test_recorded_attention_is_the_attention_that_was_used():
    policy, batch, _, t = traced()
    layer = policy.encoder.layers[0].self_attn
    seen = {}
    handle = layer.register_forward_hook(lambda module, inputs, out: seen.update(inputs=inputs, out=out))
    policy.predict_action_chunk(batch)
    handle.remove()
    value = torch.nn.functional.linear(seen["inputs"][2], layer.in_proj_weight[32:], layer.in_proj_bias[32:])
    heads = value.unflatten(-1, (2, 8)).transpose(1, 2)
    again = layer.out_proj((t.attention["encoder.0"] @ heads).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(again, seen["out"])


def test_a_loss_shows_the_vae_and_its_padding():
    policy = tiny_act().train()
    batch = tiny_batch(policy)
    with minivla.trace(policy) as t:
        policy(batch)
    weight, (queries, _) = t.attention["vae_encoder.0"], t.sites["vae_encoder.0"]
    assert [s.name for s in queries] == ["class", "state", "chunk"]
    assert (weight[..., 6:] == 0).all()
    assert not t.masks["vae_encoder.0"][..., 6:].any()
    assert t.chunk is None
    assert set(t.hidden) >= {"latent", "encoder", "decoder", "vae_encoder"}


def test_calls_add_up_and_plain_attributes_mean_the_last():
    policy = tiny_act()
    first, second = policy.preprocess(tiny_raw()), policy.preprocess(tiny_raw(1))
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(first)
        policy.reset()
        policy.select_action(second)
    assert [len(call.chunk) for call in t.calls] == [2, 1]
    assert len(t.chunk) == 1


def test_only_the_sites_asked_for_are_kept():
    *_, t = traced(attention=["decoder.*.cross"])
    assert list(t.attention) == ["decoder.0.cross"]
    assert "encoder.0" in t.masks
    *_, t = traced(attention=False)
    assert not t.attention
    assert t.mask is not None


def test_inference_mode_and_other_policies():
    policy, other = tiny_act(), tiny_act(seed=1)
    batch = policy.preprocess(tiny_raw())
    with torch.inference_mode(), minivla.trace(policy) as t:
        other.predict_action_chunk(batch)
        assert not t.calls
        policy.predict_action_chunk(batch)
    assert len(t.calls) == 1
    assert "encoder.0" in t.attention


def test_another_thread_is_not_seen():
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    with minivla.trace(policy) as t:
        thread = threading.Thread(target=policy.predict_action_chunk, args=(batch,))
        thread.start()
        thread.join()
    assert not t.calls


def test_traces_nest():
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    with minivla.trace(policy) as outer:
        with minivla.trace(policy) as inner:
            policy.predict_action_chunk(batch)
        policy.predict_action_chunk(batch)
    assert (len(inner.calls), len(outer.calls)) == (1, 1)


def test_a_copy_made_inside_a_trace_is_its_own_policy():
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    with minivla.trace(policy) as t:
        other = copy.deepcopy(policy)
        for parameter in other.parameters():
            parameter.data.zero_()
        chunk = other.predict_action_chunk(batch)
    assert not chunk.any()
    assert not t.calls
    assert other.predict_action_chunk.__self__ is other


def test_an_error_in_the_policy_ends_the_trace_cleanly():
    policy = tiny_act()
    with pytest.raises(KeyError), minivla.trace(policy):
        policy.predict_action_chunk({"observation.state": torch.zeros(1, 3)})
    assert recorder.current() is None
    assert "forward" not in vars(policy)


def test_an_empty_trace_says_what_to_do():
    with minivla.trace(tiny_act()) as t:
        pass
    with pytest.raises(ValueError, match=r"this trace is empty: inside `with minivla\.trace\(policy\)"):
        t.segments  # noqa: B018


def test_segments_that_do_not_add_up_are_refused():
    call = recorder.Call("forward", {})
    call.lay_out("encoder.*", [minivla.segments.Segment("state", "state", 2)], [])
    with pytest.raises(
        ValueError, match=r"site 'encoder\.0': the query segments add up to 2 \(state 2\), the sequence has 3"
    ):
        call.segments_at("encoder.0", 3, 3)


def test_blocks_record_nothing_when_no_trace_is_on():
    attention = MultiheadAttention(8, 2)
    tokens = torch.randn(1, 3, 8)
    assert recorder.current() is None
    assert attention(tokens, tokens, tokens).shape == (1, 3, 8)
