"""π0-FAST by itself: what it says, what it is told, what it may see."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minivla
from minivla.actions.fast import to_language_ids
from minivla.actions.sentences import Marks, Sentences
from minivla.policies.pi0_fast import FastPrompt, PI0Fast, PI0FastConfig, TokenizeActions
from minivla.policies.vla_files import EMBEDDING, LM_HEAD
from tests.policies.fast_small import (
    ACTION,
    GOLDEN,
    HORIZON,
    SKIP,
    chunks,
    fast,
    fast_batch,
    statistics,
    tiny_config,
    tiny_fast,
    words,
)
from tests.policies.pi_small import CAMERAS, SIDE, WORDS, Case

PADDED = Case("padded prompts", prompts=(9, 5, 1))
ABSENT = Case("a camera is absent", images=((SIDE, SIDE), None, (SIDE, SIDE)), prompts=(9, 4, 2))
quiet = pytest.mark.filterwarnings("ignore:said is no chunk", "ignore:no observation.images")
PROMPTS = json.loads((GOLDEN / "preprocessing.json").read_text())["prompt_cases"]


def saying(policy: PI0Fast, rows: list[list[int]]) -> mock._patch:
    """Inside, the policy says these ids."""
    size = max(map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    return mock.patch.object(policy, "generate", return_value=ids)


# --- what it says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", ["lerobot", "openpi"])
def test_malformed_samples_are_named_and_others_are_not(upstream):
    policy = tiny_fast(PADDED, n_action_steps=HORIZON, upstream=upstream)
    wanted = chunks(3, seed=2)
    rows = [row if upstream == "openpi" else row[1:] for row in policy.sentences.write(wanted)]
    cut = rows[1][:6] + rows[1][-2:]
    rows[1:] = [cut, rows[2][:-2]]
    with (
        saying(policy, rows),
        minivla.trace(policy) as t,
        pytest.warns(
            UserWarning,
            match=rf"as {upstream} does. sample 1: it does not spell 6 × 4 codes; sample 2: it never says",
        ),
    ):
        chunk = policy.predict_action_chunk(fast_batch(policy, PADDED))
    assert list(policy.malformed) == [1, 2]
    assert t.hidden["malformed"].tolist() == [False, True, True]
    said, _ = fast().decode(fast().encode(wanted))
    assert torch.equal(chunk[0], said[0])
    assert chunk[1].any() == (upstream == "lerobot")  # filled up, or zeros
    assert torch.equal(chunk[2], said[2])
    policy.reset()
    assert policy.malformed == {}


def test_a_chunk_longer_than_what_is_carried_out_is_misread_as_upstream():
    """LeRobot reads H steps as n_action_steps; openpi, and so `upstream`, does not."""
    batch = fast_batch(tiny_fast(PADDED), PADDED)
    ours, theirs = (tiny_fast(PADDED, n_action_steps=4, upstream=name) for name in ("openpi", "lerobot"))
    rows = ours.sentences.write(batch["action"])
    with saying(ours, rows):
        assert ours.predict_action_chunk(batch).shape == (3, HORIZON, ACTION)
    assert not ours.malformed
    with saying(theirs, rows), pytest.warns(UserWarning, match="does not spell 4 × 4 codes"):
        assert theirs.predict_action_chunk(batch).shape == (3, 4, ACTION)


def test_openpi_reads_between_the_first_opening_and_the_bar():
    sentences = tiny_fast(upstream="openpi").sentences
    wanted = chunks(1, seed=4)
    (row,) = sentences.write(wanted)
    said, _ = fast().decode(fast().encode(wanted))
    noisy = [70, 71, *row[:-1], 77, *sentences.marks.opening, 78]
    chunk, reasons = sentences.read(torch.tensor([noisy]), HORIZON, ACTION)
    assert torch.equal(chunk, said)
    assert not reasons
    chunk, reasons = sentences.read(torch.tensor([row[4:]]), HORIZON, ACTION)
    assert not chunk.any()
    assert reasons == {0: "it does not begin with 'Action: '"}


@quiet
def test_openpi_stops_when_all_say_eos_at_once_and_lerobot_when_each_has_said_bar():
    marks = tiny_fast().sentences.marks
    said = [[7, marks.end, 8, marks.stop, 9, marks.stop], [marks.end, 7, marks.stop, 9, 9, marks.stop]]
    lengths = {}
    for upstream in ("lerobot", "openpi"):
        policy = tiny_fast(Case("two", prompts=(9, 5)), upstream=upstream)
        turns = iter(torch.tensor(said).T[..., None])
        with mock.patch.object(policy, "choose", lambda *_, turns=turns: next(turns)):
            lengths[upstream] = policy.generate(fast_batch(policy, Case("two", prompts=(9, 5))), 6).shape[1]
    assert lengths == {"lerobot": 2, "openpi": 6}


@quiet
@pytest.mark.parametrize("upstream", ["lerobot", "openpi"])
def test_chance_comes_from_the_generator(upstream):
    policy = tiny_fast(PADDED, temperature=0.8, upstream=upstream)
    batch = fast_batch(policy, PADDED)
    first, again, other = (policy.generate(batch, 12, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with mock.patch.object(policy.config, "use_kv_cache", False):
        assert torch.equal(policy.generate(batch, 12, torch.Generator().manual_seed(1)), first)


def test_at_least_one_word_is_said():
    policy = tiny_fast(PADDED)
    with pytest.raises(ValueError, match="steps is 0"):
        policy.predict_action_chunk(fast_batch(policy, PADDED), steps=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        tiny_config(temperature=-1)


# --- what it is told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [c for c in PROMPTS if c["kind"].startswith("fast")], ids=lambda c: c["prompt"]
)
def test_prompts_are_openpis(case):
    state = load_file(GOLDEN / "preprocessing.safetensors")[f"digitize/{case['state_case']}/state"][None]
    batch = FastPrompt(openpi=True)({"observation.state": state, "task": case["prompt"]})
    assert batch["task"] == [case["encode_calls"][0]["text"]]
    if case["kind"] == "fast_with_actions":
        assert to_language_ids([case["fast_ids"]], 257_152, 128) == [case["paligemma_ids"]]
        spoken = SimpleNamespace(encode=lambda _: [case["fast_ids"]])
        (row,) = Sentences(spoken, Marks.of(words()), 257_152, 128, openpi=True).write(chunks(1))
        opening, end = (words().encode(c["text"], add_special_tokens=False) for c in case["encode_calls"][1:])
        assert row == [*opening, *case["paligemma_ids"], *end, words().eos_token_id]


def test_a_chunk_that_cannot_be_spelled_or_is_too_long_is_told():
    step = TokenizeActions(max_action_tokens=8, fast_skip_tokens=SKIP, vocab_size=WORDS)
    step.use(text=words(), fast=fast())
    with pytest.warns(UserWarning, match="max_action_tokens is 8"):
        assert step({"action": chunks(2)})["action.tokens"].shape == (2, 8)
    step.max_action_tokens = 32
    with pytest.warns(UserWarning, match="written damaged"):
        step({"action": chunks(2) * 30})
    with pytest.raises(ValueError, match="NaN"):
        step({"action": chunks(2) * float("nan")})


def test_a_tokenizer_out_of_reach_is_named(tmp_path):
    missing = str(tmp_path / "nowhere")
    step = TokenizeActions(missing, paligemma_tokenizer_name=missing)
    assert step({"observation.state": torch.zeros(1, 5)}).keys() == {"observation.state"}  # nothing is loaded
    with pytest.raises(FileNotFoundError, match="nowhere"):
        step({"action": chunks(1)})
    step.use(text=words())
    with pytest.raises(FileNotFoundError, match=r"nowhere.*FAST"):
        step({"action": chunks(1)})
    with pytest.raises(ValueError, match=r"lacks '\|'"):
        Marks.of(
            SimpleNamespace(convert_tokens_to_ids=lambda _: 3, bos_token_id=2, eos_token_id=1, unk_token_id=3)
        )


def test_a_batch_without_words_is_refused():
    policy = tiny_fast(PADDED)
    batch = fast_batch(policy, PADDED)
    del batch["action.tokens"]
    with pytest.raises(KeyError, match=r"no action.tokens; .*policy.preprocess"):
        policy(batch)


@quiet
@pytest.mark.filterwarnings("ignore:.*fields only minivla knows", "ignore:a chunk is written damaged")
@pytest.mark.parametrize("upstream", ["lerobot", "openpi"])
def test_a_saved_folder_loads_with_its_tokenizers_and_says_the_same(tmp_path, upstream):
    policy = tiny_fast(stats=statistics(), upstream=upstream)
    draw = torch.Generator().manual_seed(1)
    raw = {camera: torch.rand(2, 3, SIDE, SIDE, generator=draw) for camera in CAMERAS}
    raw |= {"observation.state": torch.randn(2, 5, generator=draw), "action": chunks(2)}
    raw["task"] = ["Push the red_block", "wait"]
    batch = policy.preprocess(raw)
    assert (batch["action.tokens"].shape, batch["observation.language.tokens"].shape) == ((2, 32), (2, 200))
    assert "action.tokens" not in policy.preprocess({k: v for k, v in raw.items() if k != "action"})
    loaded = minivla.load(policy.save(tmp_path / "one"))
    assert loaded.receipt.ok
    again = minivla.load(loaded.save(tmp_path / "two"))
    for other in (loaded, again):
        found = other.preprocess(raw)
        assert found.keys() == batch.keys()
        assert all(torch.equal(found[k], v) for k, v in batch.items() if isinstance(v, Tensor))
        assert torch.equal(other(found)[0], policy(batch)[0])
        assert torch.equal(other.predict_action_chunk(found), policy.predict_action_chunk(batch))


@pytest.mark.filterwarnings("ignore:.*fields only minivla knows")
def test_where_a_file_holds_one_table_for_two_it_fills_both(tmp_path):
    """As LeRobot's published files, of which the loader upstream makes the same."""
    tiny_fast().save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[EMBEDDING]
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()},
        tmp_path / "model.safetensors",
    )
    loaded = minivla.load(tmp_path, stats=None)
    assert torch.equal(loaded.paligemma.embedding.weight, loaded.lm_head.weight)
    assert loaded.paligemma.embedding.weight is not loaded.lm_head.weight


def test_at_full_size_the_names_are_those_published():
    """604 tensors, and 2,923,335,408 numbers and a second table of words: what LeRobot 0.6.1 has."""
    with torch.device("meta"):
        policy = PI0Fast(PI0FastConfig())
    names = {policy.upstream_name(name): value for name, value in policy.state_dict().items()}
    table = names[LM_HEAD]
    assert len(names) == 604
    assert table.shape == names[EMBEDDING].shape == (257_152, 2048)
    assert sum(value.numel() for value in names.values()) == 2_923_335_408 + table.numel()


def test_the_config_is_lerobots():
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig as Theirs

    ours, theirs = PI0FastConfig(), Theirs(device="cpu")
    for name, value in ours.to_json().items():
        if name not in ("type", "device", "input_features", "output_features", "normalization_mapping"):
            given = getattr(theirs, name)
            assert value == (tuple(given) if isinstance(given, list) else given), name
    modes = {kind: str(mode.value) for kind, mode in theirs.normalization_mapping.items()}
    assert ours.to_json()["normalization_mapping"] == modes


# --- what it may see ---------------------------------------------------------------------------------------


def logits(policy: PI0Fast, batch: dict[str, Tensor]) -> Tensor:
    with minivla.trace(policy) as t:
        policy(batch)
    return t.hidden["logits"]


@quiet
@pytest.mark.parametrize("upstream", ["lerobot", "openpi"])
def test_what_is_hidden_changes_nothing(upstream):
    policy = tiny_fast(PADDED, upstream=upstream).eval()
    batch = fast_batch(policy, PADDED)
    before = logits(policy, batch)
    key = "observation.language.tokens"
    padding = ~batch["observation.language.attention_mask"]
    assert torch.equal(before, logits(policy, batch | {key: batch[key].masked_fill(padding, 42)}))
    later = batch["action.tokens"].clone()
    later[:, 7:] = 42
    shown = 7 if upstream == "lerobot" else 8  # openpi's first logits are the prompt's
    after = logits(policy, batch | {"action.tokens": later})
    assert torch.equal(before[:, :shown], after[:, :shown])
    assert not torch.equal(before[:, shown], after[:, shown])


@quiet
@pytest.mark.parametrize("upstream", ["lerobot", "openpi"])
def test_an_absent_camera_is_masked_and_openpi_shows_black(upstream):
    policy = tiny_fast(ABSENT, upstream=upstream)
    batch = fast_batch(policy, ABSENT)
    black = batch | {CAMERAS[1]: torch.zeros(3, 3, SIDE, SIDE)}
    same = torch.equal(policy(batch)[0], policy(black)[0])
    assert same == (upstream == "openpi")
    real = policy.paligemma.embed_prefix

    def spoilt(*args: object) -> object:
        prefix = real(*args)
        prefix.tokens[:, 4:8] = 7.0
        return prefix

    with minivla.trace(policy), mock.patch.object(policy.paligemma, "embed_prefix", spoilt):
        unmoved = torch.equal(policy(batch)[0], policy(batch)[0])
    assert unmoved
    if upstream == "lerobot":
        with minivla.trace(policy):
            whole = policy(batch)[0]
            with mock.patch.object(policy.paligemma, "embed_prefix", spoilt):
                assert torch.equal(policy(batch)[0], whole)
        assert torch.allclose(policy(batch)[0], whole, rtol=1e-5)  # padding left out


def test_masks_are_proven():
    policy = tiny_fast(PADDED)
    assert minivla.prove_masks(policy, fast_batch(policy, PADDED)).ok


@pytest.mark.parametrize("upstream", ["lerobot", "openpi"])
def test_every_tensor_learns(upstream):
    policy = tiny_fast(PADDED, upstream=upstream).train()
    policy(fast_batch(policy, PADDED))[0].backward()
    still = {name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set(policy.inert) == set()
    assert (policy.lm_head.weight is policy.paligemma.embedding.weight) == (upstream == "openpi")


@quiet
@pytest.mark.parametrize("cache", [True, False])
def test_a_trace_of_decoding_is_one_picture(cache):
    policy = tiny_fast(PADDED, use_kv_cache=cache)
    with minivla.trace(policy, tokenizer=words()) as t:
        policy.predict_action_chunk(fast_batch(policy, PADDED), steps=5)
    names = [(s.name, s.kind, s.length) for s in t.segments]
    assert names[-2:] == [("prompt", "language", 10), ("action tokens", "action", 4)]
    assert [kind for _, kind, _ in names[:3]] == ["image"] * 3
    size = 3 * 4 + 10 + 4
    for i in range(3):
        assert torch.equal(t.masks[f"joint.{i}"][0], t.mask)
        assert t.attention[f"joint.{i}"].shape == (3, 8, size, size)
        assert torch.allclose(t.attention[f"joint.{i}"].sum(-1), torch.ones(()))
    computed = [run.computed for run in t.passes]
    assert computed == ([size - 4, 1, 1, 1, 1] if cache else [size - 4 + i for i in range(5)])
    assert t.steps["logits"].shape == (5, 3, WORDS)
    assert [len(row) for row in t.words["action tokens"]] == [4, 4, 4]
