"""A trace sees what the policy does, changes nothing, and says what is wrong when it is asked wrongly."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings

import pytest
import torch

import minivla
from minivla import recorder, tracing
from minivla.nn.attention import MultiheadAttention
from minivla.proof import prove_masks
from minivla.segments import Segment, camera_names
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
    assert set(t.hidden) >= {"latent", "encoder", "decoder", "vae_encoder", "posterior"}


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


def test_one_name_will_do_and_one_that_matches_nothing_is_told():
    *_, t = traced(attention="decoder.0.cross")
    assert list(t.attention) == ["decoder.0.cross"]
    with pytest.warns(UserWarning, match=r"\['decodr\.\*'\] matches no site that was used: encoder\.0, dec"):
        traced(attention=["decodr.*", "encoder.0"])


def test_traces_and_calls_print_in_a_line():
    *_, t = traced()
    assert repr(t.calls[0]) == (
        "Call(predict_action_chunk: 137 tokens in 6 segments, attention at encoder.0, decoder.0.self, "
        "decoder.0.cross, chunk (2, 6, 2))"
    )
    assert repr(t) == f"Trace of ACT, 1 calls: [{t.calls[0]!r}]"


def test_what_is_done_to_a_chunk_afterwards_does_not_reach_the_trace():
    _, batch, chunk, t = traced()
    chunk.zero_()
    assert t.chunk.any()
    assert t.batch is not batch


def test_a_padded_sample_and_an_earlier_call_can_be_drawn():
    policy = tiny_act().train()
    with minivla.trace(policy) as t:
        policy(tiny_batch(policy))
        policy.predict_action_chunk(policy.preprocess(tiny_raw()))
    assert t.plot_mask("vae_encoder.0", call=0, sample=1)
    with pytest.raises(ValueError, match="sample is 2; the batch has 2"):
        t.plot_mask("encoder.0", sample=2)
    with pytest.raises(ValueError, match="that call was a loss"):
        t.plot_chunk(call=0)


@pytest.mark.parametrize("traced_too", [False, True])
def test_a_policy_inside_another_has_calls_of_its_own(traced_too):
    """A student that asks its teacher last: what is shown as the student's is the student's."""
    student, teacher = tiny_act(), tiny_act(seed=1)
    batch = student.preprocess(tiny_raw())
    with minivla.trace(student) as alone:
        student.predict_action_chunk(batch)
    student.teacher, own = teacher, student.predict_action_chunk
    student.predict_action_chunk = lambda batch: (own(batch), teacher.predict_action_chunk(batch))[0]
    with contextlib.ExitStack() as stack:
        hers = stack.enter_context(minivla.trace(teacher)) if traced_too else None
        t = stack.enter_context(minivla.trace(student))
        student.predict_action_chunk(batch)
    assert len(t.calls) == 1
    torch.testing.assert_close(t.attention["encoder.0"], alone.attention["encoder.0"])
    assert hers is None or len(hers.calls) == 1
    assert "forward" not in vars(teacher)


def test_a_trace_closed_in_another_thread_lets_go_of_the_policy():
    policy = tiny_act()
    t = minivla.trace(policy)
    thread = threading.Thread(target=t.__enter__)
    thread.start()
    thread.join()
    t.__exit__(None, None, None)
    assert "forward" not in vars(policy)


def test_cameras_whose_last_names_are_alike_keep_apart():
    names = camera_names(["observation.images.left.rgb", "observation.images.right.rgb"])
    assert list(names.values()) == ["left.rgb", "right.rgb"]
    assert list(camera_names(["observation.image"]).values()) == ["image"]
    assert camera_names([]) == {}


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


def test_blocks_record_nothing_when_no_trace_is_on(monkeypatch):
    monkeypatch.setattr(recorder.Call, "record_attention", lambda *args, **options: pytest.fail("recorded"))
    attention, tokens = MultiheadAttention(8, 2), torch.randn(1, 3, 8)
    assert recorder.current() is None
    attention(tokens, tokens, tokens)
    with pytest.raises(pytest.fail.Exception), recorder.recording(recorder.Call("forward", {})):
        attention(tokens, tokens, tokens)


def test_a_segment_list_that_does_not_add_up_to_the_sequence_is_refused():
    call = recorder.Call("forward", {})
    with pytest.raises(
        ValueError, match=r"segments add up to 2 tokens \(state 2\), the mask .* shape \(3, 3\)"
    ):
        call.describe([Segment("state", "state", 2)], torch.ones(3, 3, dtype=torch.bool))


def test_a_layer_that_was_not_kept_is_named_with_those_that_were():
    *_, t = traced(attention=["decoder.*.cross"])
    with pytest.raises(KeyError, match=r"nothing was kept at 'encoder\.0', only at decoder"):
        t.attention["encoder.0"]
    with pytest.raises(ValueError, match=r"nothing was kept at 'encoder\.0', only at decoder\.0\.cross"):
        t.plot_attention("encoder.0")
    with pytest.raises(ValueError, match=r"nothing was kept at 'encoder\.7', only at encoder\.0, decoder"):
        t.plot_mask("encoder.7")
    with pytest.raises(ValueError, match="no attention was kept in this call: trace with attention=True"):
        traced(attention=False)[-1].plot_attention()
    with pytest.raises(ValueError, match="call is 3; this trace holds 1 calls"):
        t.plot_tokens(call=3)
    with pytest.raises(ValueError, match="integrated no flow"):
        t.plot_flow()


def test_two_threads_trace_one_policy_at_once():
    policy = tiny_act()
    batches = [policy.preprocess(tiny_raw()), policy.preprocess(tiny_raw(1))]
    inside, traces = threading.Barrier(2), [None, None]

    def look(i):
        with minivla.trace(policy) as traces[i]:
            inside.wait()
            for _ in range(3):
                policy.predict_action_chunk(batches[i])
            inside.wait()

    threads = [threading.Thread(target=look, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[len(call.chunk) for call in t.calls] for t in traces] == [[2, 2, 2], [1, 1, 1]]
    assert "forward" not in vars(policy)


def test_one_trace_may_be_open_in_two_threads_and_twice_in_one():
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    t = minivla.trace(policy)

    def look():
        with t, t:
            policy.predict_action_chunk(batch)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(t.calls) == 4
    assert "forward" not in vars(policy)


def test_a_trace_of_another_policy_inside_does_not_blind_the_outer_one():
    policy, other = tiny_act(), tiny_act(seed=1)
    batch = policy.preprocess(tiny_raw())
    with minivla.trace(policy) as outer, minivla.trace(other) as inner:
        policy.predict_action_chunk(batch)
        other.predict_action_chunk(batch)
    assert (len(inner.calls), len(outer.calls)) == (1, 1)


def test_a_method_the_policy_was_given_is_run_and_put_back():
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    own, ran = policy.predict_action_chunk, []
    policy.predict_action_chunk = lambda batch: (ran.append(1), own(batch))[1]
    given = policy.predict_action_chunk
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch)
    assert ran == [1]
    assert len(t.calls) == 1
    assert policy.predict_action_chunk is given


def test_a_cache_adds_up_to_one_picture():
    """Prefill, then rows one after another, as a decoder with a cache makes them: the whole causal triangle.
    A row computed again, as by a sampler's next step, replaces the older one.
    """
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)  # four query heads share two key heads
    causal = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    whole = recorder.Call("forward", {})
    whole.record_attention("joint.0", query, key, causal)
    whole.finish()
    call = recorder.Call("forward", {})
    call.record_attention("joint.0", query[:, :, :3], key[:, :, :3], causal[:, :3, :3], start=0)
    call.record_attention("joint.0", torch.randn(2, 4, 1, 8), key[:, :, :4], None, start=3)
    for row in (3, 4):
        call.lay_out("joint.*", *[[Segment("words", "language", row + 1)]] * 2)
        call.record_attention("joint.0", query[:, :, [row]], key[:, :, : row + 1], None, start=row)
    call.finish()
    torch.testing.assert_close(call.attention["joint.0"], whole.attention["joint.0"])
    assert torch.equal(call.masks["joint.0"], causal.expand(2, 5, 5))
    assert call.sites["joint.0"][1] == [Segment("words", "language", 5)]


def test_a_row_that_may_see_nothing_is_shown_empty():
    call = recorder.Call("forward", {})
    call.record_attention(
        "a", torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), torch.tensor([[[True], [False]]])
    )
    call.finish()
    assert call.attention["a"][0, 0, 1].tolist() == [0.0, 0.0]


def test_everything_of_a_big_model_warns_with_the_memory_it_takes(monkeypatch):
    monkeypatch.setattr(tracing, "MUCH", 100_000)
    with pytest.warns(UserWarning, match=r"of 4 sites takes about .* GiB .*attention=\['encoder\.0'\]"):
        traced()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(attention=["decoder.*.cross"])


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match="Linear has no predict_action_chunk"):
        minivla.trace(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("how", ["wrapped", "in place", "a layer", "a method", "inside the trace"])
def test_compiled_code_runs_eagerly_while_it_is_looked_into(how):
    """The backend "eager" captures like any other, and needs no C++ compiler."""
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    chunk = policy.predict_action_chunk(batch)
    called = policy
    if how == "wrapped":
        called = torch.compile(policy, backend="eager")
    if how == "in place":
        policy.compile(backend="eager")
    if how == "a layer":
        policy.encoder.compile(backend="eager")
    if how == "a method":
        policy.predict_action_chunk = torch.compile(policy.predict_action_chunk, backend="eager")
    torch.testing.assert_close(called.predict_action_chunk(batch), chunk)  # compiled, if it ever is
    answer = {"action": torch.zeros(2, 6, 2), "action_is_pad": torch.zeros(2, 6, dtype=torch.bool)}
    with minivla.trace(called) as t:
        if how == "inside the trace":
            policy.encoder.compile(backend="eager")
        torch.testing.assert_close(called.predict_action_chunk(batch), chunk)
        called.eval()(batch | answer)
    assert len(t.calls) == 2
    assert all(set(call.attention) == {"encoder.0", "decoder.0.self", "decoder.0.cross"} for call in t.calls)
    assert called.predict_action_chunk(batch).shape == chunk.shape


def test_tracing_lerobots_act_shows_what_tracing_ours_shows(monkeypatch):
    """Same weights, same batch: sites, segments, masks, attention and hidden states agree."""
    pytest.importorskip("lerobot")
    from tests.policies.test_act_parity import CASES, NOISE, make_batch, make_ours, make_theirs

    case = next(case for case in CASES if case.cameras == 2 and case.settings.get("use_vae", True))
    theirs = make_theirs(case)
    ours, batch = make_ours(case, theirs), make_batch(case)
    with minivla.trace(theirs) as told, minivla.trace(ours) as t, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: NOISE[: len(like)].to(like))
        theirs.train()(batch)
        ours.train()(batch, noise=NOISE)
        observation = {key: value for key, value in batch.items() if not key.startswith("action")}
        theirs.select_action(observation)
        ours.select_action(observation)
    assert [call.method for call in told.calls] == ["forward", "predict_action_chunk"]
    assert prove_masks(theirs, batch).ok
    monkeypatch.setattr(tracing, "MUCH", 10_000)
    with pytest.warns(UserWarning, match=f"of {len(told.calls[0].masks)} sites"), minivla.trace(theirs):
        theirs.predict_action_chunk(observation)
    theirs.model = torch.compile(theirs.model, backend="eager")
    with minivla.trace(theirs) as compiled:
        theirs.predict_action_chunk(observation)
    assert set(compiled.attention) == set(told.calls[1].attention)
    for hers, mine in zip(told.calls, t.calls, strict=True):
        assert hers.segments == mine.segments
        assert torch.equal(hers.mask, mine.mask)
        assert hers.sites == mine.sites
        for name, table in (("masks", hers.masks), ("attention", hers.attention), ("hidden", hers.hidden)):
            for key, value in table.items():
                torch.testing.assert_close(
                    value.float(), getattr(mine, name)[key].float(), rtol=1e-4, atol=1e-5
                )
        assert set(hers.attention) == set(mine.attention)
    theirs = theirs.model._orig_mod
    assert not theirs.encoder._forward_hooks
    assert not theirs.decoder.layers[0].self_attn._forward_pre_hooks


def test_a_family_of_lerobots_that_is_not_mapped_is_refused():
    from minivla import upstream

    class Other:
        name = "tdmpc"

    with pytest.raises(TypeError, match="'tdmpc' policy cannot be looked into yet, only act"):
        upstream.open_eyes(Other())
