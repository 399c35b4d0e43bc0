"""π0 and π0.5 are LeRobot's: block by block, loss, gradients, cache, every step of the sampler."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minivla
from minivla.policies.pi import PI0, NewLine
from minivla.policies.vla import StatePrompt
from tests.parity import LEDGER, Row, compare, first_red, relative_error, write_ledger
from tests.policies.pi_small import (
    CAMERAS,
    FAMILIES,
    SIDE,
    UNUSED,
    Case,
    draws,
    make_batch,
    make_ours,
    make_theirs,
    observation,
    their_module,
)

pytestmark = pytest.mark.filterwarnings("ignore:no observation.images")
SQUARE = (SIDE, SIDE)
CASES = [
    Case("every camera"),
    Case("padded prompts", prompts=(9, 5, 1)),
    Case("a camera is absent", images=(SQUARE, None, SQUARE), prompts=(9, 4, 2)),
    Case("images of other sizes", images=((20, 28), (41, 30), (9, 14))),
    Case("2 key/value heads", kv_heads=2, prompts=(6, 9, 3)),
    Case("an empty camera", prompts=(9, 9, 7), settings={"empty_cameras": 1}),
]
STEPS, ACTION = (10, 4), 4
EYES, GEMMA = "model.paligemma_with_expert.paligemma.model.", "model.paligemma_with_expert.gemma_expert."
GRADIENTS = {
    "gradient of SigLIP": (f"{EYES}vision_tower", f"{EYES}multi_modal_projector"),
    "gradient of the language model": (f"{EYES}language_model",),
    "gradient of the expert": (f"{GEMMA}model",),
    "gradient of the heads": tuple(f"model.{name}" for name in ("action_", "state_", "time_")),
}


# --- what is compared --------------------------------------------------------------------------------------


def open_places(mask: Tensor, valid: Tensor) -> Tensor:
    """The rows of real queries in a mask (B, L, L), real keys first (LeRobot puts absent cameras last)."""
    order = (~valid).long().argsort(dim=1, stable=True)
    return torch.cat([m[v][:, o].flatten() for m, v, o in zip(mask, valid, order, strict=True)]).float()


def by_step(path: Tensor, scale: Tensor) -> Tensor:
    """Points of a path (N, B, H, A), each in parts of upstream's largest value at that step."""
    return path / scale.abs().amax(dim=(1, 2, 3), keepdim=True)


def gradients(named: Mapping[str, Tensor | None], like: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Gradients by upstream's names in four rows; only what `like`, upstream's, has any of."""
    there = [name for name, value in like.items() if value is not None and value.any()]
    parts = {row: [n for n in there if n.startswith(starts)] for row, starts in GRADIENTS.items()}
    return {row: torch.cat([named[n].flatten() for n in names]) for row, names in parts.items() if names}


@contextmanager
def watched(calls: list[tuple[Any, str]], modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Inside is kept, by name, what functions are called with and return, (args, kwargs, outcome), and what
    modules return.
    """
    seen: dict[str, list[Any]] = defaultdict(list)

    def spy(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            out = real(*args, **kwargs)
            seen[name].append((args, kwargs, out))
            return out

        return mock.patch.object(owner, name, called)

    with ExitStack() as stack:
        for owner, name in calls:
            stack.enter_context(spy(owner, name))
        for name, part in modules.items():
            handle = part.register_forward_hook(lambda _, inputs, out, name=name: seen[name].append(out))
            stack.callback(handle.remove)
        yield seen


# --- upstream ----------------------------------------------------------------------------------------------


def watching(theirs: Any, module: Any) -> Any:
    model = theirs.model
    seeing = model.paligemma_with_expert.paligemma.model
    tower = seeing.vision_tower.vision_model
    modules = {f"vision.{i}": layer for i, layer in enumerate(tower.encoder.layers)}
    modules |= {"vision": tower.post_layernorm, "tokens": seeing.multi_modal_projector}
    methods = ("embed_prefix", "embed_suffix", "denoise_step")
    calls = [(module, "compute_layer_complete"), (model.paligemma_with_expert, "forward")]
    calls += [(model, name) for name in methods]
    return watched(calls, modules | {"velocity": model.action_out_proj})


def their_loss(theirs: Any, batch: dict[str, Tensor], case: Case) -> Tensor:
    noise, time = draws(case)
    with (
        mock.patch.object(theirs.model, "sample_noise", return_value=noise),
        mock.patch.object(theirs.model, "sample_time", return_value=time),
    ):
        return theirs.train().forward(dict(batch))[0]


def their_blocks(theirs: Any, module: Any, case: Case) -> dict[str, Tensor]:
    batch = make_batch(case)
    cameras = [camera for camera in CAMERAS if camera in batch]
    with watching(theirs, module) as seen:
        loss = their_loss(theirs, batch, case)
    loss.backward()
    prefix, valid, _ = seen["embed_prefix"][0][2]
    suffix, suffix_valid, _, condition = seen["embed_suffix"][0][2]
    _, given, ((prefix_out, suffix_out), _) = seen["forward"][0]
    every = torch.cat((valid, suffix_valid), dim=1)
    out = {name: torch.cat(x[: len(cameras)]) for name, x in seen.items() if name.startswith("vision")}
    out |= {f"tokens of {camera}": x for camera, x in zip(cameras, seen["tokens"], strict=False)}
    out |= {
        "prefix embeddings": prefix[valid],
        "mask": open_places(given["attention_mask"][:, 0] == 0, every),
    }
    out |= {"positions": given["position_ids"][every].float(), "suffix embeddings": suffix}
    out |= {} if condition is None else {"condition": condition}
    for i, (_, _, (before, after)) in enumerate(seen["compute_layer_complete"]):
        out |= {f"prefix.{i}": before[valid], f"suffix.{i}": after}
    out |= {"prefix": prefix_out[valid], "suffix": suffix_out, "velocity": seen["velocity"][0], "loss": loss}
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    return out | gradients(grads, grads) | their_samples(theirs, module, batch, case)


def their_samples(theirs: Any, module: Any, batch: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    out = {}
    for steps in STEPS:
        with watching(theirs, module) as seen:
            chunk = theirs.predict_action_chunk(observation(batch), noise=draws(case)[0], num_steps=steps)
        valid = seen["embed_prefix"][0][2][1]
        for i, (key, value, _) in enumerate(seen["forward"][0][2][1]):
            out |= {f"keys.{i}": key.transpose(1, 2)[valid], f"values.{i}": value.transpose(1, 2)[valid]}
        points = [call[1]["x_t"][..., :ACTION] for call in seen["denoise_step"]]
        out |= {f"v, {steps} steps": torch.stack(seen["velocity"]), f"x, {steps} steps": torch.stack(points)}
        out[f"chunk, {steps} steps"] = chunk
    return out


@functools.cache
def upstream(family: str, case: Case) -> tuple[Any, dict[str, Tensor]]:
    """LeRobot's policy of a case, and its blocks."""
    theirs = make_theirs(family, case)
    blocks = their_blocks(theirs, their_module(family), case)
    return theirs, {name: value.detach() for name, value in blocks.items()}


# --- ours --------------------------------------------------------------------------------------------------


def our_blocks(ours: PI0, theirs: Any, case: Case) -> dict[str, Tensor]:
    batch, (noise, time) = make_batch(case), draws(case)
    cameras = [camera for camera in CAMERAS if camera in batch]
    calls = [(ours, name) for name in ("embed_prefix", "embed_suffix", "lay_out")]
    modules = {"tokens": ours.paligemma.projector, "velocity": ours.action_out_proj}
    modules |= {f"vision.{i}": layer for i, layer in enumerate(ours.paligemma.vision.layers)}
    modules["vision"] = ours.paligemma.vision.norm
    with minivla.trace(ours) as t, watched(calls, modules) as seen:
        ours.train()(batch, noise=noise, time=time)
    loss, _ = ours(batch, noise=noise, time=time)  # without a trace, which would show padding too
    loss.backward()
    prefix, suffix = seen["embed_prefix"][0][2], seen["embed_suffix"][0][2]
    valid, positions = prefix.valid, seen["lay_out"][0][2][1]
    every = F.pad(valid, (0, suffix.tokens.shape[1]), value=True)
    out = dict(t.hidden) | {name: x[valid] for name, x in t.hidden.items() if name.startswith("prefix")}
    out |= {name: x[0] for name, x in seen.items() if name.startswith("vision")}
    tokens = seen["tokens"][0].chunk(len(cameras))
    out |= {f"tokens of {camera}": x for camera, x in zip(cameras, tokens, strict=True)}
    out |= {"prefix embeddings": prefix.tokens[valid], "suffix embeddings": suffix.tokens}
    out |= {"mask": open_places(t.masks["joint.0"], every), "positions": positions[every].float()}
    out |= {"velocity": seen["velocity"][0], "loss": loss}
    mine = {ours.upstream_name(name): p.grad for name, p in ours.named_parameters()}
    out |= gradients(mine, {name: p.grad for name, p in theirs.named_parameters()})
    return {name: value.detach() for name, value in out.items()} | our_samples(ours, batch, case)


def our_samples(ours: PI0, batch: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    out = {}
    for steps in STEPS:
        calls = [(ours, "embed_prefix"), (ours.paligemma.decoder, "forward")]
        with minivla.trace(ours) as t, watched(calls, {"velocity": ours.action_out_proj}) as seen:
            ours.predict_action_chunk(observation(batch), noise=draws(case)[0], steps=steps)
        valid, cache = seen["embed_prefix"][0][2].valid, seen["forward"][0][1]["cache"]
        for i, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
            out |= {f"keys.{i}": key.transpose(1, 2)[valid], f"values.{i}": value.transpose(1, 2)[valid]}
        assert torch.equal(t.flow.v, torch.stack(seen["velocity"])[..., :ACTION])
        out |= {f"v, {steps} steps": torch.stack(seen["velocity"]), f"x, {steps} steps": t.flow.x[:-1]}
        chunk = ours.predict_action_chunk(observation(batch), noise=draws(case)[0], steps=steps)
        out[f"chunk, {steps} steps"] = chunk
    return out


def rows_of(family: str, case: Case, *, spoil: Any = None) -> list[Row]:
    import lerobot

    theirs, blocks = upstream(family, case)
    ours = make_ours(family, theirs, case)
    if spoil is not None:
        spoil(ours)
    mine = our_blocks(ours, theirs, case)
    for name in [name for name in blocks if name[:2] in ("v,", "x,")]:
        mine[name], blocks = (
            by_step(mine[name], blocks[name]),
            blocks | {name: by_step(blocks[name], blocks[name])},
        )
    where = {"family": family, "upstream": "LeRobot", "version": lerobot.__version__, "case": case.name}
    long = {name: value for name, value in blocks.items() if name.endswith("10 steps")}
    short = {name: value for name, value in blocks.items() if name not in long}
    return compare(mine, short, **where) + compare(mine, long, tolerance=1e-4, **where)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_case_equals_upstream(family):
    rows = [row for case in CASES for row in rows_of(family, case)]
    write_ledger(family, rows)
    assert first_red(rows) is None, [row for row in rows if not row.ok]
    kept = json.loads((LEDGER / f"{family}.json").read_text())
    assert [(r["case"], r["block"]) for r in kept] == [(r.case, r.block) for r in rows], "run `make ledger`"
    assert all(r["ok"] for r in kept)


PREFIX, SUFFIX = "paligemma.decoder.streams.prefix.", "paligemma.decoder.streams.suffix."


@pytest.mark.parametrize(
    ("family", "tensor", "block"),
    [
        ("pi0", "paligemma.vision.layers.0.fc1.weight", "vision.0"),
        ("pi0", "paligemma.vision.norm.bias", "vision"),
        ("pi0", "paligemma.projector.weight", f"tokens of {CAMERAS[0]}"),
        ("pi0", "paligemma.embedding.weight", "prefix embeddings"),
        ("pi0", "state_proj.weight", "suffix embeddings"),
        ("pi0", f"{PREFIX}layers.1.k_proj.weight", "prefix.1"),
        ("pi0", f"{SUFFIX}layers.2.down_proj.weight", "suffix.2"),
        ("pi0", f"{SUFFIX}norm.weight", "suffix"),
        ("pi0", "action_out_proj.weight", "velocity"),
        ("pi05", "time_mlp_out.weight", "condition"),
        ("pi05", f"{SUFFIX}layers.0.input_norm.dense.weight", "suffix.0"),
        ("pi05", f"{SUFFIX}norm.dense.bias", "suffix"),
    ],
)
def test_a_flipped_sign_turns_its_block_red(family, tensor, block):
    def flip(ours: PI0) -> None:
        ours.state_dict()[tensor].neg_()

    assert first_red(rows_of(family, CASES[1], spoil=flip)) == block


def changed(named: Iterator[tuple[str, nn.Parameter]]) -> set[str]:
    return {name for name, p in named if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", ["train_expert_only", "freeze_vision_encoder", "gradient_checkpointing"])
def test_what_is_trained_equals_upstream(family, frozen):
    case, (noise, time) = CASES[1], draws(CASES[1])
    batch = make_batch(case)
    theirs = make_theirs(family, case, **{frozen: True})
    ours = make_ours(family, theirs, case, **{frozen: True})
    their_loss(theirs, batch, case).backward()
    ours.train()(batch, noise=noise, time=time)[0].backward()
    names = {name: ours.upstream_name(name) for name, _ in ours.named_parameters()}
    wanted = {name for name, p in theirs.named_parameters() if p.requires_grad} - UNUSED
    assert {names[name] for name, p in ours.named_parameters() if p.requires_grad} == wanted
    assert {names[name] for name in changed(ours.named_parameters())} == changed(theirs.named_parameters())
    given = {name: p.grad for name, p in theirs.named_parameters()}
    mine = gradients({names[name]: p.grad for name, p in ours.named_parameters()}, given)
    for row, value in gradients(given, given).items():
        assert relative_error(mine[row], value) < 1e-5, row


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_we_are_as_near_to_float32_as_upstream(family):
    case, noise = CASES[1], draws(CASES[1])[0]
    theirs = make_theirs(family, case, dtype="bfloat16")
    ours = make_ours(family, theirs, case, dtype="bfloat16")
    assert {ours.upstream_name(n): p.dtype for n, p in ours.named_parameters()} == {
        name: p.dtype for name, p in theirs.named_parameters() if name not in UNUSED
    }
    exact = make_theirs(family, case)
    exact.load_state_dict(theirs.state_dict())
    away: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(4):
        seen = observation(make_batch(case, seed))
        right = exact.predict_action_chunk(seen, noise=noise, num_steps=4)
        mine = ours.predict_action_chunk(seen, noise=noise, steps=4)
        away["ours"].append((mine - right).std().item())
        given = theirs.predict_action_chunk(seen, noise=noise, num_steps=4)
        away["theirs"].append((given - right).std().item())
    assert 0 < sum(away["ours"]) < 1.25 * sum(away["theirs"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_queue_equals_upstream(family):
    theirs, _ = upstream(family, CASES[0])
    ours = make_ours(family, theirs, CASES[0])
    theirs.reset()
    chosen = []
    for policy in (ours, theirs):
        torch.manual_seed(5)
        steps = [observation(make_batch(CASES[0], seed=seed)) for seed in range(6)]
        chosen.append(torch.stack([policy.select_action(step) for step in steps]))
    assert relative_error(*chosen) < 1e-4


TEXTS = ["Pick up the red_block\n", "  fold the\tT-shirt ", "open_drawer\nthen close", "Wipe, gently.", ""]


def test_prompts_are_upstreams_to_the_character():
    from lerobot.lerobot_types import TransitionKey
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep

    edges = torch.linspace(-1, 1, 257)
    state = torch.cat((edges, edges + 1e-6, torch.tensor([-1.5, 1.7, 0.0])))[None].expand(len(TEXTS), -1)
    theirs = Pi0NewLineProcessor().complementary_data({"task": list(TEXTS)})["task"]
    assert NewLine()({"task": TEXTS})["task"] == theirs
    transition = {
        TransitionKey.OBSERVATION: {"observation.state": state},
        TransitionKey.COMPLEMENTARY_DATA: {"task": list(TEXTS)},
    }
    given = Pi05PrepareStateTokenizerProcessorStep()(transition)[TransitionKey.COMPLEMENTARY_DATA]["task"]
    assert StatePrompt()({"task": TEXTS, "observation.state": state})["task"] == given
