"""What a trace of π0, π0.5 and π0-FAST holds."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import minivla
from minivla import recorder
from minivla.nn import decoder
from minivla.nn.decoder import Decoder
from minivla.nn.masks import segment_mask
from minivla.proof import prove_masks
from tests.policies.fast_small import fast_batch, tiny_fast, words
from tests.policies.small_vla import WordTokenizer, statistics, tiny_pi, tiny_raw

pytestmark = pytest.mark.filterwarnings("ignore:said is no chunk")


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def seen(request):
    """A policy, its batch, and a trace of a chunk and of a loss."""
    policy = tiny_pi(request.param, statistics())
    batch = policy.preprocess(tiny_raw())
    with minivla.trace(policy) as trace:
        policy.predict_action_chunk(batch, generator=torch.Generator().manual_seed(0))
        policy(batch, generator=torch.Generator().manual_seed(0))
    return policy, batch, trace


def test_the_sequence_is_prefix_and_suffix_in_blocks(seen):
    policy, _, trace = seen
    call = trace.calls[0]
    state = [("state", 1, 1)] * (policy.name == "pi0")
    told = [(s.name, s.length, s.block) for s in call.segments]
    assert told == [
        ("table", 16, 0),
        ("wrist", 16, 0),
        ("prompt", 24, 0),
        *state,
        ("actions", 6, 1 + len(state)),
    ]
    assert call.stacks == ("prefix", "suffix")
    assert [s.grid for s in call.segments[:2]] == [(4, 4)] * 2
    assert not call.mask[:32, -6:].any() and call.mask[-6:, -6:].all()


def test_the_rows_of_prefill_and_of_the_last_step_are_one_picture(seen):
    _, _, trace = seen
    for call in trace.calls:
        for i in range(3):
            mask, attention = call.masks[f"joint.{i}"], call.attention[f"joint.{i}"]
            assert torch.equal(mask[0], call.mask)
            torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
            assert not attention.masked_select(~mask[:, None].expand_as(attention)).any()


def test_the_attention_drawn_is_the_attention_computed(seen):
    """Weights as drawn, times values, are what attention brought: the last step's rows of the actions."""
    policy, batch, trace = seen
    values, brought, attend = [], [], decoder.attend

    def watched(query, key, value, mask, *, site, **more):
        values.append(value)
        brought.append(attend(query, key, value, mask, site=site, **more))
        return brought[-1]

    with mock.patch.object(decoder, "attend", watched), minivla.trace(policy):
        policy.predict_action_chunk(batch, noise=trace.calls[0].hidden["noise"])
    weights, last = trace.calls[0].attention["joint.2"][:, :, -6:], brought[-1][:, :, -6:]
    assert values[-1].shape[1] == 1
    torch.testing.assert_close(weights @ values[-1], last)


def test_each_camera_has_its_own_vision(seen):
    policy, batch, trace = seen
    call = trace.calls[0]
    for camera in ("table", "wrist"):
        site = f"vision.{camera}.1"
        (segment,), _ = call.sites[site]
        assert (segment.name, segment.start, segment.image) == (camera, 0, f"observation.images.{camera}")
        assert call.attention[site].shape == (2, 4, 16, 16)
        alone = policy.paligemma.vision(batch[f"observation.images.{camera}"] * 2 - 1)
        torch.testing.assert_close(call.hidden[f"vision.{camera}"], alone)


def test_the_flow_has_the_robots_dimensions_and_the_noise_all(seen):
    _, _, trace = seen
    call = trace.calls[0]
    assert call.flow.x.shape == (5, 2, 6, 4) and call.flow.v.shape == (4, 2, 6, 4)
    assert call.hidden["noise"].shape == (2, 6, 7)
    torch.testing.assert_close(call.flow.x[-1], call.chunk)
    torch.testing.assert_close(call.steps["time"][:, 0], call.flow.times[:-1])
    assert trace.calls[1].flow is None


def test_what_steers_the_norms_is_kept_at_each_step(seen):
    policy, _, trace = seen
    steps = trace.calls[0].steps
    names = [name for name in steps if name != "time"]
    if policy.name == "pi0":
        assert not names
        return
    assert len(names) == 3 * (2 * 3 + 1)
    norm = policy.paligemma.decoder.stream("suffix").layer(1).post_norm
    for k, time in enumerate(steps["time"]):
        code = policy.embed_suffix(torch.zeros(1, 8), torch.zeros(1, 6, 7), time).condition
        scale, shift, gate = norm.dense(code).chunk(3, dim=-1)
        for part, value in (("scale", scale), ("shift", shift), ("gate", gate)):
            torch.testing.assert_close(steps[f"suffix.1.post_norm.{part}"][k], value)
    assert trace.calls[1].steps["suffix.norm.gate"].shape[:2] == (1, 2)  # a time for each sample


def test_the_prefix_is_computed_once_and_read_at_every_step(seen):
    policy, _, trace = seen
    prefill, *steps = trace.calls[0].passes
    suffix = 6 + (policy.name == "pi0")
    assert (prefill.computed, prefill.read, prefill.written, prefill.token) == (56, 0, 56, 2 * 3 * 8 * 4)
    assert [(p.computed, p.read, p.written) for p in steps] == [(suffix, 56, 0)] * 4
    (loss,) = trace.calls[1].passes
    assert (loss.computed, loss.read, loss.written) == (56 + suffix, 0, 0)


def test_words_come_from_the_tokenizer_at_hand(seen):
    policy, batch, trace = seen
    first = {"pi0": ["<bos>", " push"], "pi05": ["<bos>", " Task:"]}[policy.name]
    assert trace.words["prompt"][0][:2] == first and trace.words["prompt"][1][-1] == "<pad>"
    (step,) = (s for s in policy.preprocessor.steps if hasattr(s, "tokenizer"))
    own, step.tokenizer = step.tokenizer, None
    with minivla.trace(policy) as bare, minivla.trace(policy, tokenizer=WordTokenizer()) as strange:
        policy.predict_action_chunk(batch)
    step.tokenizer = own
    assert not bare.calls and strange.words["prompt"][0][:2] == ["<bos>", "?"]
    with minivla.trace(policy) as trace:
        step.tokenizer = None
        policy.predict_action_chunk(batch)
        step.tokenizer = own
    assert trace.words == {} and "prompt" in trace.calls[0].ids


def test_sites_can_be_chosen(seen):
    policy, batch, _ = seen
    with minivla.trace(policy, attention=["joint.2", "vision.wrist.*"]) as trace:
        policy.predict_action_chunk(batch)
    assert set(trace.attention) == {"joint.2", "vision.wrist.0", "vision.wrist.1"}
    assert set(trace.masks) > set(trace.attention)


def test_several_draws_of_noise_share_the_rows_of_what_is_seen():
    policy = tiny_pi("pi05", statistics(), noise_draws=3)
    batch = policy.preprocess(tiny_raw())
    with minivla.trace(policy) as trace:
        policy(batch)
    assert trace.attention["joint.1"].shape == (6, 4, 62, 62)
    torch.testing.assert_close(trace.attention["joint.1"][0, :, :56], trace.attention["joint.1"][2, :, :56])


# --- masks proven ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pi0", "pi05"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_masks_are_proven_across_streams_of_different_width(name, checkpointing):
    policy = tiny_pi(name, statistics(), gradient_checkpointing=checkpointing)
    proof = prove_masks(policy, policy.preprocess(tiny_raw()))
    assert proof.ok, str(proof)
    assert [p.sequence for p in proof.sequences] == ["prefix → suffix", "vision.table", "vision.wrist"]
    assert proof.sequences[0].closed > 0 and proof.sequences[0].largest_closed == 0.0
    assert policy.paligemma.decoder.checkpointing is checkpointing


def told_as(monkeypatch, change):
    told = recorder.Call.describe

    def describe(call, segments, mask, stacks):
        told(call, segments, change(mask.clone(), segments), stacks)

    monkeypatch.setattr(recorder.Call, "describe", describe)


def too_open(mask, segments):
    mask[: segments[0].stop, segments[-1].start] = True
    return mask


def too_closed(mask, segments):
    mask[segments[-1].start :, segments[1].start] = False
    return mask


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_mask_told_too_open_is_silent(name, monkeypatch):
    told_as(monkeypatch, too_open)
    policy = tiny_pi(name, statistics())
    proof = prove_masks(policy, policy.preprocess(tiny_raw()))
    assert not proof.ok and proof.sequences[0].silent[0] == "table[0] sees actions[0]"


def test_a_mask_told_too_closed_leaks_second_hand_or_by_name(monkeypatch):
    """What reaches the actions by way of other patches is no leak; where no way is left it is."""
    told_as(monkeypatch, too_closed)
    policy = tiny_pi("pi0", statistics())
    proof = prove_masks(policy, policy.preprocess(tiny_raw()))
    assert proof.ok and proof.sequences[0].second_hand == 6

    def no_way(mask, segments):
        mask[:, segments[1].start] = False
        return mask

    monkeypatch.undo()
    told_as(monkeypatch, no_way)
    proof = prove_masks(policy, policy.preprocess(tiny_raw()))
    assert not proof.ok and proof.sequences[0].leaks[0] == "table[0] sees wrist[0]"


def test_a_prefix_that_sees_the_actions_leaks(monkeypatch):
    monkeypatch.setattr("minivla.policies.pi.segment_mask", lambda s, v: torch.ones_like(segment_mask(s, v)))
    told_as(monkeypatch, lambda mask, segments: segment_mask(segments)[0])
    policy = tiny_pi("pi05", statistics())
    proof = prove_masks(policy, policy.preprocess(tiny_raw()))
    assert not proof.ok and proof.sequences[0].leaks[0] == "table[0] sees actions[0]"


def test_the_shortcut_of_the_last_layer_is_off_while_a_trace_is_open(seen):
    policy, batch, trace = seen
    assert trace.hidden["prefix.2"].shape[1] == 56
    rows, layer = [], Decoder.layer

    def watched(self, i, tokens, joint, asking):
        rows.append(tuple(asking))
        return layer(self, i, tokens, joint, asking)

    Decoder.layer = watched
    try:
        policy(batch)
        without, rows[:] = list(rows), []
        with minivla.trace(policy):
            policy(batch)
    finally:
        Decoder.layer = layer
    assert without[-1] == ("suffix",) and rows[-1] == ("prefix", "suffix")


# --- π0-FAST -----------------------------------------------------------------------------------------------


def test_what_fast_says_grows_word_by_word():
    policy = tiny_fast()
    batch = fast_batch(policy)
    with minivla.trace(policy, tokenizer=words()) as trace:
        policy.predict_action_chunk(batch)
    said = trace.hidden["action tokens"]
    assert [p.computed for p in trace.passes][1:] == [1] * (said.shape[1] - 1)
    assert trace.passes[-1].read + 1 == trace.segments[-1].stop
    assert len(trace.words["action tokens"][0]) == trace.segments[-1].length
    assert torch.equal(trace.masks["joint.0"][0], trace.mask)
    assert trace.steps["logits"].shape[:2] == (said.shape[1], len(said))
    assert prove_masks(policy, batch).ok
