"""One decoder is Gemma, Llama, Qwen2 and Qwen3 of transformers; its streams, its cache, its masks by
perturbation.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minivla import recorder
from minivla.nn.decoder import Cache, Decoder, DecoderConfig, RMSNorm, rotate, rotation, valid_positions
from minivla.nn.masks import segment_mask
from minivla.segments import Segment, arrange
from tests.parity import redraw, relative_error

TINY = DecoderConfig(width=32, layers=3, mlp=48, heads=4, kv_heads=2, head_dim=8)
WORDS = 50


@dataclass(frozen=True)
class Family:
    """A family of transformers, and the fields of our config that make us one of it."""

    name: str
    ours: dict[str, Any] = field(default_factory=dict)


PLAIN: dict[str, Any] = {"norm_offset": 0.0, "activation": "silu"}
MODELS = [
    Family("Gemma"),
    Family("Llama", PLAIN | {"eps": 1e-5}),
    Family("Qwen2", PLAIN | {"qkv_bias": True, "rope_base": 5_000.0}),
    Family("Qwen3", PLAIN | {"qk_norm": True, "rope_base": 1_000_000.0}),
]
NAMES = (
    (r"input_norm", "input_layernorm"),
    (r"post_norm", "post_attention_layernorm"),
    (r"\.([qkvo]_proj|[qk]_norm)\.", r".self_attn.\1."),
    (r"\.(gate|up|down)_proj\.", r".mlp.\1_proj."),
)


def recentre(model: nn.Module) -> None:
    """Redraw; a norm's weight, which Gemma adds to 1, around 0."""
    redraw(model)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.sub_(1.0)


def make_theirs(family: Family) -> Any:
    import transformers

    c = replace(TINY, **family.ours)
    config = getattr(transformers, f"{family.name}Config")(
        vocab_size=WORDS, hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.eps,
        max_position_embeddings=100, rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = getattr(transformers, f"{family.name}ForCausalLM")(config).eval()
    (recentre if family.name == "Gemma" else redraw)(model)
    return model


def make_ours(family: Family, theirs: Any) -> Decoder:
    ours, state = Decoder({"text": replace(TINY, **family.ours)}), theirs.model.state_dict()
    names = {}
    for name in ours.state_dict():
        upstream = name.removeprefix("streams.text.")
        for pattern, replacement in NAMES:
            upstream = re.sub(pattern, replacement, upstream)
        names[name] = upstream
    ours.load_state_dict({name: state[upstream] for name, upstream in names.items()}, strict=True)
    assert set(state) - set(names.values()) == {"embed_tokens.weight"}
    return ours


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(1, queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.name)
def test_every_layer_and_the_logits_equal_transformers_with_and_without_a_cache(family):
    theirs = make_theirs(family)
    ours, table = make_ours(family, theirs), theirs.model.embed_tokens.weight
    ids = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(1))
    words = table[ids] * (TINY.width**0.5 if family.name == "Gemma" else 1.0)
    upstream = theirs(ids, output_hidden_states=True)
    positions = torch.arange(9)[None].expand(2, 9)
    call = recorder.Call("forward", {})
    with recorder.recording(call), torch.no_grad():
        whole = ours({"text": words}, causal(9, 9), positions)["text"]
    for i in range(TINY.layers - 1):
        assert relative_error(call.hidden[f"text.{i}"], upstream.hidden_states[i + 1]) < 2e-6
    assert relative_error(whole, upstream.hidden_states[-1]) < 2e-6
    assert relative_error(whole @ theirs.lm_head.weight.T, upstream.logits) < 5e-6
    cache, past, parts = Cache(), None, []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        shape = slice(start, stop)
        parts.append(
            ours({"text": words[:, shape]}, causal(stop - start, stop), positions[:, shape], cache=cache)[
                "text"
            ]
        )
        given = theirs(ids[:, shape], past_key_values=past, use_cache=True)
        past = given.past_key_values
        assert relative_error(parts[-1] @ theirs.lm_head.weight.T, given.logits) < 5e-6
    assert len(cache) == 9
    for i, (key, value, _) in enumerate(past):
        assert relative_error(cache.keys[i], key) < 2e-6
        assert relative_error(cache.values[i], value) < 2e-6
    assert relative_error(torch.cat(parts, dim=1), whole) < 2e-6


# --- streams -----------------------------------------------------------------------------------------------


def two_streams(**suffix: Any) -> Decoder:
    model = Decoder({"prefix": TINY, "suffix": replace(TINY, width=24, mlp=40, **suffix)})
    recentre(model)
    return model


def two_parts(size: int = 2) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tokens of two streams, the mask (the first sees nothing of the second), positions."""
    segments = arrange([Segment("seen", "image", 5), Segment("done", "action", 3, block=1)])
    valid = torch.ones(size, 8, dtype=torch.bool)
    valid[0, 3] = False
    tokens = {"prefix": drawn(size, 5, TINY.width), "suffix": drawn(size, 3, 24, seed=1)}
    return tokens, segment_mask(segments, valid), valid_positions(valid)


@pytest.mark.parametrize("condition", [0, 7])
def test_on_the_prefixes_cache_the_suffix_comes_out_as_together(condition):
    model = two_streams(condition=condition)
    tokens, mask, positions = two_parts()
    told = {"suffix": drawn(2, 7, seed=2)} if condition else {}
    joint = model(tokens, mask, positions, conditions=told)
    cache = Cache()
    alone = model({"prefix": tokens["prefix"]}, mask[:, :5, :5], positions[:, :5], cache=cache)
    torch.testing.assert_close(alone["prefix"], joint["prefix"], atol=2e-6, rtol=0)
    for _ in range(2):  # nothing of the suffix stays
        later = model(
            {"suffix": tokens["suffix"]}, mask[:, 5:], positions[:, 5:],
            conditions=told, cache=cache, keep=False,
        )  # fmt: skip
        torch.testing.assert_close(later["suffix"], joint["suffix"], atol=2e-6, rtol=0)
        assert len(cache) == 5


def test_two_streams_of_equal_weights_are_one():
    one, two = Decoder({"all": TINY}), Decoder({"first": TINY, "second": TINY})
    recentre(one)
    state = one.state_dict()
    two.load_state_dict({name: state[re.sub("first|second", "all", name)] for name in two.state_dict()})
    tokens, mask, positions = drawn(2, 8, TINY.width), causal(8, 8), torch.arange(8)[None].expand(2, 8)
    out = two({"first": tokens[:, :3], "second": tokens[:, 3:]}, mask, positions)
    whole = one({"all": tokens}, mask, positions)["all"]
    torch.testing.assert_close(torch.cat((out["first"], out["second"]), dim=1), whole, atol=2e-6, rtol=0)


def test_a_stream_nobody_asks_for_lends_its_keys_and_values_and_does_not_come_out():
    model = two_streams()
    tokens, mask, positions = two_parts()
    asked = model(tokens, mask, positions, outcome=("suffix",))
    assert list(asked) == ["suffix"]
    whole = model(tokens, mask, positions)["suffix"]
    torch.testing.assert_close(asked["suffix"], whole, atol=2e-6, rtol=0)
    cache, kept = Cache(), Cache()
    first = ({"prefix": tokens["prefix"]}, mask[:, :5, :5], positions[:, :5])
    assert model(*first, cache=cache, outcome=()) == {}
    model(*first, cache=kept)
    for ours, other in ((cache.keys, kept.keys), (cache.values, kept.values)):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_the_order_in_which_outcomes_are_asked_for_changes_nothing():
    model = two_streams()
    tokens, mask, positions = two_parts()
    whole = model(tokens, mask, positions)
    for outcome in (("prefix", "suffix"), ("suffix", "prefix"), ["suffix", "prefix", "suffix"]):
        asked = model(tokens, mask, positions, outcome=outcome)
        assert list(asked) == ["prefix", "suffix"]
        assert all(torch.equal(asked[name], x) for name, x in whole.items())


@pytest.mark.parametrize("traced", [False, True])
def test_an_outcome_that_is_no_stream_given_is_refused(traced):
    model = two_streams()
    tokens, mask, positions = two_parts()
    for outcome, named in ((("suffix", "sufix"), "'sufix'"), ("suffix", "'s', 'u'")):
        with (
            recorder.recording(recorder.Call("forward", {})) if traced else nullcontext(),
            pytest.raises(ValueError, match=f"outcome names {named}.*expected some of 'prefix', 'suffix'"),
        ):
            model(tokens, mask, positions, outcome=outcome)
    alone = {"prefix": tokens["prefix"]}
    with pytest.raises(ValueError, match="outcome names 'suffix', expected some of 'prefix'"):
        model(alone, mask[:, :5, :5], positions[:, :5], outcome=("suffix",))


@pytest.mark.parametrize("condition", [0, 7])
def test_checkpointing_changes_no_gradient(condition):
    model = two_streams(condition=condition).train()
    tokens, mask, positions = two_parts()
    told = {"suffix": drawn(2, 7, seed=2)} if condition else {}
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.checkpointing = checkpointing
        out = model(tokens, mask, positions, conditions=told, outcome=("suffix",))["suffix"]
        (out * drawn(2, 3, 24, seed=3)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


@pytest.mark.parametrize(
    "other",
    [
        {"layers": 2}, {"heads": 2}, {"kv_heads": 4}, {"head_dim": 4}, {"rope_base": 500.0},
        {"rope_rounds": True},
    ],
)  # fmt: skip
def test_streams_that_do_not_fit_are_refused(other):
    with pytest.raises(ValueError, match="streams share one attention") as refused:
        Decoder({"prefix": TINY, "suffix": replace(TINY, **other)})
    ((name, value),) = other.items()
    prefix, suffix = str(refused.value).split("suffix: ")
    assert f"{name}={getattr(TINY, name)}" in prefix.split("prefix: ")[1]
    assert f"{name}={value}" in suffix


def test_a_decoder_without_streams_is_refused():
    with pytest.raises(ValueError, match="got no stream"):
        Decoder({})


# --- masks -------------------------------------------------------------------------------------------------

SEGMENT = st.builds(
    Segment,
    name=st.just("s"),
    kind=st.just("query"),
    length=st.integers(1, 3),
    block=st.integers(0, 2),
    rule=st.sampled_from(["full", "causal"]),
)
MODEL = two_streams(condition=5)


@settings(max_examples=25, deadline=None)
@given(st.lists(SEGMENT, min_size=2, max_size=4), st.data())
def test_a_token_that_is_not_seen_changes_nothing_to_the_bit(segments, data):
    """Whom a token reaches in three layers follows from the mask; all others stay as they are."""
    laid = arrange([Segment("always", "query", 1), *segments])
    length = laid[-1].stop
    real = data.draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))
    valid = torch.tensor([[True, *real]])
    mask, positions = segment_mask(laid, valid), valid_positions(valid)
    split = data.draw(st.integers(1, length - 1))
    changed = data.draw(st.integers(0, length - 1))
    tokens = {"prefix": drawn(1, split, TINY.width), "suffix": drawn(1, length - split, 24, seed=1)}
    stream, place = ("prefix", changed) if changed < split else ("suffix", changed - split)
    other = {name: x.clone() for name, x in tokens.items()}
    other[stream][0, place] += 1.0
    told = {"suffix": drawn(1, 5, seed=2)}
    with torch.no_grad():
        before, after = (
            [row for x in MODEL(t, mask, positions, conditions=told).values() for row in x[0]]
            for t in (tokens, other)
        )
    sees = mask[0].float() + torch.eye(length)
    reached = (torch.linalg.matrix_power(sees, TINY.layers) > 0)[:, changed]
    same = torch.tensor([torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert torch.equal(same, ~reached)


def test_positions_count_only_real_tokens():
    valid = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert valid_positions(valid).tolist() == [[0, 0, 1, 2], [-1, 0, 1, 1]]
    assert valid_positions(valid, torch.tensor([[10], [20]])).tolist() == [[10, 10, 11, 12], [19, 20, 21, 21]]


def test_attention_depends_on_the_distance_between_positions_alone():
    query, key = drawn(1, 2, 6, 8), drawn(1, 2, 6, 8, seed=1)
    scores = []
    for start in (0, 31):
        turn = rotation(torch.arange(start, start + 6)[None], 8, 10_000.0, torch.float32)
        scores.append(rotate(query, turn) @ rotate(key, turn).transpose(-1, -2))
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


# --- norms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [0, 5])
def test_a_norm_of_bfloat16_reckons_in_float32(condition):
    norm = RMSNorm(64, condition=condition)
    recentre(norm)
    x, told = 3 * drawn(2, 4, 64).bfloat16(), drawn(2, 5) if condition else None
    short, gate = norm(x, told)
    exact, exact_gate = norm(x.float(), told)
    assert short.dtype == torch.bfloat16
    assert torch.equal(short, exact.bfloat16())
    if condition:
        assert gate.dtype == torch.bfloat16
        assert torch.equal(gate, exact_gate.bfloat16())
    norm.bfloat16()
    assert norm(x, told)[0].dtype == torch.bfloat16


def test_an_adaptive_norm_scales_shifts_and_gates_by_its_condition():
    norm = RMSNorm(6, condition=4)
    recentre(norm)
    x, told = drawn(2, 3, 6), drawn(2, 4, seed=1)
    scale, shift, gate = norm.dense(told)[:, None].chunk(3, dim=-1)
    plain = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    out, given = norm(x, told)
    torch.testing.assert_close(out, plain * (1 + scale) + shift)
    assert torch.equal(given, gate)
    with pytest.raises(ValueError, match="an adaptive norm needs its condition"):
        norm(x)


def test_a_new_adaptive_norm_is_a_plain_one_but_for_its_bias():
    norm, x = RMSNorm(6, condition=4), drawn(2, 3, 6)
    norm.dense.bias.data.zero_()
    out, gate = norm(x, drawn(2, 4))
    torch.testing.assert_close(out, RMSNorm(6)(x)[0])
    assert not gate.any()
