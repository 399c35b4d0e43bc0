"""π0-FAST is LeRobot's, block by block: loss, gradients, every word that is said, chunks; and openpi's."""

from __future__ import annotations

import functools
import json
import logging
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import minivla
from minivla.nn.paligemma import Prefix
from minivla.policies.pi0_fast import PI0Fast, PI0FastConfig, TokenizeActions
from tests.parity import LEDGER, Row, compare, first_red, relative_error, write_ledger
from tests.policies.fast_small import (
    ACTION,
    GOLDEN,
    HORIZON,
    SKIP,
    chunks,
    fast,
    fast_batch,
    in_their_hands,
    make_ours,
    make_theirs,
    their_fast,
    tiny_fast,
    words,
)
from tests.policies.openpi_weights import from_openpi
from tests.policies.pi_small import CAMERAS, LANGUAGE, SIDE, VISION, WORDS, Case, features

pytestmark = [
    pytest.mark.filterwarnings("ignore:no observation.images"),
    pytest.mark.filterwarnings("ignore:said is no chunk"),
]
SQUARE = (SIDE, SIDE)
CASES = [
    Case("every camera"),
    Case("padded prompts", prompts=(9, 5, 1)),
    Case("a camera is absent", images=(SQUARE, None, SQUARE), prompts=(9, 4, 2)),
    Case("images of other sizes", images=((20, 28), (41, 30), (9, 14))),
    Case("2 key/value heads", kv_heads=2, prompts=(6, 9, 3)),
    Case("an empty camera", prompts=(9, 9, 7), settings={"empty_cameras": 1}),
]
P = "model.paligemma_with_expert.paligemma."
GRADIENTS = {
    "gradient of SigLIP": (f"{P}model.vision_tower", f"{P}model.multi_modal_projector"),
    "gradient of the language model": (f"{P}model.language_model",),
    "gradient of the head": (f"{P}lm_head",),
}
SEED = 7
DECODING = {
    "greedy": {"use_kv_cache": True},
    "greedy, no cache": {"use_kv_cache": False},
    "drawn at 0.7": {"temperature": 0.7},
    "drawn, no cache": {"temperature": 0.7, "use_kv_cache": False},
}


# --- what is compared --------------------------------------------------------------------------------------


@contextmanager
def kept(*modules: tuple[str, Any], method: tuple[Any, str] | None = None) -> Any:
    """Inside is kept what modules return, by name; and what one method is called with, under "called"."""
    seen: dict[str, list[Any]] = {name: [] for name, _ in modules} | {"called": []}
    with ExitStack() as stack:
        for name, module in modules:
            hook = module.register_forward_hook(lambda _, inputs, out, name=name: seen[name].append(out))
            stack.callback(hook.remove)
        if method is not None:
            real = getattr(*method)

            def spy(*args: Any, **named: Any) -> Any:
                seen["called"].append((args, named))
                return real(*args, **named)

            stack.enter_context(mock.patch.object(*method, spy))
        yield seen


def open_places(mask: Tensor, valid: Tensor) -> Tensor:
    """The rows of real queries of a mask (B, L, L), real keys only: what else is open nobody reads. LeRobot
    puts absent cameras behind the others.
    """
    return torch.cat([m[v][:, v].flatten() for m, v in zip(mask, valid, strict=True)]).float()


def gradients(named: dict[str, Tensor | None]) -> dict[str, Tensor]:
    out = {}
    for row, starts in GRADIENTS.items():
        parts = [named[name] for name in sorted(named) if name.startswith(starts) and named[name] is not None]
        out[row] = torch.cat([part.flatten() for part in parts])
    return out


# --- upstream ----------------------------------------------------------------------------------------------


def their_blocks(theirs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    gemma = theirs.model.paligemma_with_expert.paligemma
    layers = [(f"prefix.{i}", layer) for i, layer in enumerate(gemma.model.language_model.layers)]
    modules = [*layers, ("prefix", gemma.model.language_model.norm), ("logits", gemma.lm_head)]
    theirs.train().zero_grad()
    with kept(*modules, method=(theirs.model.paligemma_with_expert, "forward")) as seen:
        loss, parts = theirs.forward(dict(batch))
    loss.backward()
    _, given = seen["called"][0]
    mask, positions = given["attention_mask"][:, 0] == 0, given["position_ids"]
    valid = mask.any(dim=2)
    out = {"embeddings": given["inputs_embeds"][0][valid], "mask": open_places(mask, valid)}
    out |= {"positions": positions[valid].float()}
    out |= {name: seen[name][0][valid] for name, _ in layers} | {"prefix": seen["prefix"][0][0][valid]}
    out["logits"] = seen["logits"][0][:, :-1][batch["action.token_mask"][:, 1:]]
    out |= {"loss": loss, "ce_loss": torch.tensor(parts["ce_loss"])}
    out |= gradients({name: p.grad for name, p in theirs.named_parameters()})
    return {name: value.detach() for name, value in out.items()} | their_words_said(theirs, batch)


def their_words_said(theirs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, options in DECODING.items():
        head = theirs.model.paligemma_with_expert.paligemma.lm_head
        detokenise = mock.patch.object(theirs, "detokenize_actions", wraps=theirs.detokenize_actions)
        changed = mock.patch.multiple(theirs.config, **options)
        torch.manual_seed(SEED)
        with changed, kept(("logits", head)) as seen, detokenise as spoken:
            chunk = theirs.predict_action_chunk(batch)
        steps = torch.stack([logits[:, -1] for logits in seen["logits"]])
        out |= {f"logits of each word, {name}": steps, f"chunk, {name}": chunk}
        out[f"words, {name}"] = spoken.call_args[0][0].float()
    return out


@functools.cache
def upstream(case: Case) -> tuple[Any, dict[str, Tensor]]:
    """LeRobot's policy of a case, and its blocks."""
    theirs = make_theirs(case)
    return theirs, their_blocks(theirs, fast_batch(tiny_fast(case), case))


# --- ours --------------------------------------------------------------------------------------------------


def our_blocks(ours: PI0Fast, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    ours.train()
    spy = kept(method=(ours.paligemma.decoder, "forward"))
    with minivla.trace(ours) as t, spy as seen:
        loss, parts = ours(batch)
    loss.backward()
    (tokens, mask, positions), _ = seen["called"][0]
    valid = torch.cat((ours.embed_prefix_valid, batch["action.token_mask"]), dim=1)
    out = {name: t.hidden[name][valid] for name in ("prefix", *(f"prefix.{i}" for i in range(3)))}
    out |= {"embeddings": tokens["prefix"][valid], "mask": open_places(mask, valid)}
    out |= {"positions": positions[valid].float()}
    out |= {"logits": t.hidden["logits"][batch["action.token_mask"][:, 1:]]}
    out |= {"loss": loss, "ce_loss": torch.tensor(parts["ce_loss"])}
    out |= gradients({ours.upstream_name(name): p.grad for name, p in ours.named_parameters()})
    return {name: value.detach() for name, value in out.items()} | our_words_said(ours, batch)


def our_words_said(ours: PI0Fast, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, options in DECODING.items():
        with mock.patch.multiple(ours.config, **options), minivla.trace(ours) as t:
            chunk = ours.predict_action_chunk(batch, generator=torch.Generator().manual_seed(SEED))
        said = t.hidden["action tokens"]
        out |= {f"logits of each word, {name}": t.steps["logits"], f"chunk, {name}": chunk}
        out[f"words, {name}"] = F.pad(said, (0, ours.config.max_decoding_steps - said.shape[1])).float()
    return out


def rows_of(case: Case, *, spoil: Any = None) -> list[Row]:
    import lerobot

    theirs, blocks = upstream(case)
    ours = make_ours(theirs, case)
    if spoil is not None:
        spoil(ours)
    real = ours.paligemma.embed_prefix

    def spy(*args: Any) -> Prefix:
        prefix = real(*args)
        vars(ours).setdefault("embed_prefix_valid", prefix.valid)  # the loss's, which comes first
        return prefix

    with mock.patch.object(ours.paligemma, "embed_prefix", spy):
        mine = our_blocks(ours, fast_batch(ours, case))
    where = {"family": "pi0_fast", "upstream": "LeRobot", "version": lerobot.__version__, "case": case.name}
    return compare(mine, blocks, **where)


# --- openpi ------------------------------------------------------------------------------------------------

CAMERA_NAMES = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")


@functools.cache
def golden() -> tuple[PI0Fast, dict[str, Tensor]]:
    """Ours with openpi's weights, and what openpi computed."""
    stored = load_file(GOLDEN / "pi0_fast.safetensors")
    inputs, outputs = features()
    images = {
        f"observation.images.{name}": inputs[camera]
        for name, camera in zip(CAMERA_NAMES, CAMERAS, strict=True)
    }
    config = PI0FastConfig(
        input_features=images, output_features=outputs, upstream="openpi", vocab_size=128,
        image_resolution=(SIDE, SIDE), vision_size=VISION, language_size=LANGUAGE,
    )  # fmt: skip
    ours = PI0Fast(config)
    ours.use_tokenizers(text=words(), fast=fast())
    weights = from_openpi({name[7:]: value for name, value in stored.items() if name.startswith("params/")})
    ours.load_state_dict(weights | {"lm_head.weight": weights["paligemma.embedding.weight"]})
    return ours, stored


def parts_of(row: Tensor, chosen: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The chosen tokens of a row, padded, and which are real."""
    found = row[chosen].long()
    valid = torch.arange(size) < len(found)
    return F.pad(found, (0, size - len(found))), valid


def golden_batch(stored: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    """openpi's one sequence of prompt and actions as our two."""
    batch = {
        f"observation.images.{name}": (stored[f"inputs/image/{name}"].movedim(-1, 1) + 1) / 2
        for name in CAMERA_NAMES
    }
    ids, valid = stored[f"{which}/tokenized_prompt"], stored[f"{which}/tokenized_prompt_mask"]
    said = stored["loss/token_ar_mask"].bool() & valid if which == "loss" else torch.zeros_like(valid)
    keys = ("observation.language.tokens", "observation.language.attention_mask")
    for names, chosen in ((keys, valid & ~said), (("action.tokens", "action.token_mask"), said)):
        size = int(chosen.sum(dim=1).max())
        rows = [parts_of(row, which, size) for row, which in zip(ids, chosen, strict=True)]
        batch |= {name: torch.stack(part) for name, part in zip(names, zip(*rows, strict=True), strict=True)}
    return batch


def golden_loss(ours: PI0Fast, stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss by sample, hidden states and logits at real tokens, mask: (ours, theirs)."""
    batch, real = golden_batch(stored, "loss"), ours.paligemma.embed_prefix
    seen = torch.stack([stored[f"inputs/image_mask/{name}"] for name in CAMERA_NAMES], dim=1)

    def masked(*args: Any) -> Prefix:
        prefix = real(*args)
        prefix.valid[:, :12] = seen[-len(prefix.valid) :].repeat_interleave(4, dim=1)
        return prefix

    spy = kept(method=(ours.paligemma.decoder, "forward"))
    with mock.patch.object(ours.paligemma, "embed_prefix", masked), minivla.trace(ours) as t, spy as called:
        both = ours(batch)[0]
        second = ours({name: value[1:] for name, value in batch.items()})[0]
    call, (_, mask, _) = t.calls[0], called["called"][0][0]
    spoken, prompt = batch["action.token_mask"], batch["observation.language.attention_mask"]
    valid = torch.cat((seen.repeat_interleave(4, dim=1), prompt, spoken), dim=1)
    theirs = torch.cat((seen.repeat_interleave(4, dim=1), stored["loss/tokenized_prompt_mask"]), dim=1)
    said = stored["loss/token_loss_mask"][:, 1:]
    last = valid & (valid.long().cumsum(1) == valid.sum(1, keepdim=True))  # openpi does not feed the last one
    theirs_last = theirs & (theirs.long().cumsum(1) == theirs.sum(1, keepdim=True))
    mine = {
        "mask": open_places(mask, valid),
        "hidden states": call.hidden["prefix"][valid & ~last],
        "logits": call.hidden["logits"][spoken],
        "loss": torch.stack((2 * both - second, second)),
    }
    return mine, {
        "mask": open_places(stored["loss/attn_mask"], theirs),
        "hidden states": stored["loss/pre_logits"][(theirs & ~theirs_last)[:, :-1]],
        "logits": stored["loss/logits"][said],
        "loss": stored["loss/loss"],
    }


def golden_rows() -> list[Row]:
    """To 1e-5 of the largest value, as everywhere, although stored JAX vectors may be further away: 1.5e-5,
    absolute, for what each part computes, 2e-4 for a loss (section 10 of the reference page).
    """
    ours, stored = golden()
    mine, theirs = golden_loss(ours, stored)
    with minivla.trace(ours) as t:
        ours.predict_action_chunk(golden_batch(stored, "sample"), steps=10)
    mine |= {
        "logits of each word, greedy": t.steps["logits"],
        "words, greedy": t.hidden["action tokens"].float(),
    }
    theirs["logits of each word, greedy"] = stored["sample/step_logits"].transpose(0, 1)
    theirs["words, greedy"] = stored["sample/output_tokens"].float()
    where = {"family": "pi0_fast", "upstream": "openpi", "version": "15a9616a", "case": "golden vectors"}
    return compare(mine, {block: value.float() for block, value in theirs.items()}, **where)


def test_openpi_computes_the_same():
    rows = golden_rows()
    assert first_red(rows) is None, [row for row in rows if not row.ok]


# --- what is shown -----------------------------------------------------------------------------------------


def test_every_block_of_every_case_equals_upstream():
    rows = [row for case in CASES for row in rows_of(case)] + golden_rows()
    write_ledger("pi0_fast", rows)
    assert first_red(rows) is None, [row for row in rows if not row.ok]
    table = json.loads((LEDGER / "pi0_fast.json").read_text())
    assert [(r["case"], r["block"]) for r in table] == [(r.case, r.block) for r in rows], "run `make ledger`"
    assert all(r["ok"] for r in table)


STREAM = "paligemma.decoder.streams.prefix."


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("paligemma.vision.layers.0.fc1.weight", "embeddings"),
        ("paligemma.embedding.weight", "embeddings"),
        (f"{STREAM}layers.1.k_proj.weight", "prefix.1"),
        (f"{STREAM}layers.2.down_proj.weight", "prefix.2"),
        (f"{STREAM}norm.weight", "prefix"),
        ("lm_head.weight", "logits"),
    ],
)
def test_a_flipped_sign_turns_its_block_red(tensor, block):
    assert first_red(rows_of(CASES[1], spoil=lambda ours: ours.state_dict()[tensor].neg_())) == block


def test_every_tensor_that_learns_does_so_upstream_and_in_the_same_type():
    theirs = make_theirs(CASES[0], dtype="bfloat16")
    ours = make_ours(theirs, CASES[0], dtype="bfloat16")
    assert {ours.upstream_name(n): (p.dtype, p.requires_grad) for n, p in ours.named_parameters()} == {
        name: (p.dtype, p.requires_grad) for name, p in theirs.named_parameters()
    }
    batch = fast_batch(ours, CASES[0])
    exact = make_theirs(CASES[0]).forward(dict(batch))[0]
    away = [abs(loss - exact).item() for loss in (ours(batch)[0], theirs.forward(dict(batch))[0])]
    assert away[0] < 1.25 * away[1] + 1e-3 * exact


# --- words -------------------------------------------------------------------------------------------------

SENTENCE = st.lists(st.sampled_from(["opening", "end", "fast", "any"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(SENTENCE, min_size=2, max_size=2), st.integers(0, 1000))
def test_what_is_said_is_read_as_upstream_does(plans, seed):
    theirs, _ = upstream(CASES[0])
    ours = tiny_fast(CASES[0]).sentences
    draw = torch.Generator().manual_seed(seed)
    pieces = {
        "opening": lambda: ours.marks.opening,
        "end": lambda: [ours.marks.end],
        "fast": lambda: ours.write(chunks(1, int(torch.randint(99, (1,), generator=draw))))[0][4:-2],
        "any": lambda: torch.randint(WORDS, (2,), generator=draw).tolist(),
    }
    rows = [[token for piece in plan for token in pieces[piece]()] for plan in plans]
    size = max(1, *map(len, rows))
    ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
    logging.disable()
    wanted = theirs.detokenize_actions(ids, HORIZON, ACTION)
    logging.disable(logging.NOTSET)
    assert torch.allclose(ours.read(ids, HORIZON, ACTION)[0], wanted, atol=1e-4, rtol=1e-5)


def test_an_answer_without_its_opening_is_an_error_in_both():
    theirs, _ = upstream(CASES[0])
    ours = make_ours(theirs, CASES[0], validate_action_token_prefix=True)
    batch = fast_batch(ours, CASES[0])
    with pytest.raises(ValueError, match=r"do not begin with 'Action: '.*validate_action_token_prefix=False"):
        ours.predict_action_chunk(batch)
    with (
        mock.patch.object(theirs.config, "validate_action_token_prefix", True),
        pytest.raises(AssertionError, match="does not start with"),
    ):
        theirs.predict_action_chunk(batch)


@pytest.mark.parametrize("places", [32, 12])
@pytest.mark.filterwarnings("ignore:a chunk takes")
def test_chunks_are_written_as_upstream_does(places, caplog):
    import lerobot.processor.tokenizer_processor as module
    from lerobot.lerobot_types import TransitionKey

    with in_their_hands(module):
        theirs = module.ActionTokenizerProcessorStep(
            "a folder", max_action_tokens=places, fast_skip_tokens=SKIP
        )
    ours = TokenizeActions(max_action_tokens=places, fast_skip_tokens=SKIP, vocab_size=WORDS)
    ours.use(text=words(), fast=fast())
    action = chunks(4, seed=3)
    done = theirs({TransitionKey.ACTION: action, TransitionKey.COMPLEMENTARY_DATA: {}})
    wanted = done[TransitionKey.COMPLEMENTARY_DATA]
    mine = ours({"action": action})
    assert torch.equal(mine["action.tokens"], wanted["action.tokens"])
    assert torch.equal(mine["action.token_mask"], wanted["action.token_mask"])
    saved = ours.to_json() | {"action_tokenizer_name": "a folder"}
    own = {"paligemma_tokenizer_name", "fast_skip_tokens", "vocab_size"}  # LeRobot forgets the first two
    assert {key: saved[key] for key in saved.keys() - own} == theirs.get_config()
    assert their_fast().min_token == fast().min_token


@pytest.mark.parametrize("task", ["Pick up the red_block\n", "  fold\nthe T-shirt "])
def test_prompts_are_written_as_upstream_does(task):
    from lerobot.lerobot_types import TransitionKey
    from lerobot.policies.pi0_fast import processor_pi0_fast as module

    from minivla.policies.pi0_fast import FastPrompt

    state = torch.tensor([[-2.0, -1.0, 0.3, 0.999, 1.0]])
    theirs = module.Pi0FastPrepareStateAndLanguageTokenizerProcessorStep()
    done = theirs(
        {
            TransitionKey.OBSERVATION: {"observation.state": state},
            TransitionKey.COMPLEMENTARY_DATA: {"task": [task]},
        }
    )
    mine = FastPrompt()({"observation.state": state, "task": [task]})
    assert mine["task"] == done[TransitionKey.COMPLEMENTARY_DATA]["task"]


def test_the_queue_equals_upstream():
    theirs, _ = upstream(CASES[0])
    ours = make_ours(theirs, CASES[0])
    theirs.reset()
    batches = [fast_batch(ours, CASES[0], seed=seed) for seed in range(6)]
    chosen = [torch.stack([policy.select_action(b) for b in batches]) for policy in (ours, theirs)]
    assert relative_error(*chosen) < 1e-5
