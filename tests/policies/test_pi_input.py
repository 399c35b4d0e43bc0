"""What does not fit π0, π0.5 or π0-FAST is refused by name; what is overridden is followed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minivla
from minivla.checkpoints.hub import CHECKPOINTS
from minivla.data.features import MissingKey
from minivla.data.steps import Tokenize
from minivla.policies.pi import PI0, PI0Config, PI05Config
from minivla.policies.pi0_fast import PI0FastConfig, TokenizeActions
from tests.policies.fast_small import chunks, fast_batch, tiny_fast
from tests.policies.small_vla import features, statistics, tiny_pi, tiny_raw

NAMES = ("pi0", "pi05")
WRIST, HAND = "observation.images.wrist", "observation.images.hand"
FOLDER = CHECKPOINTS / "pi0-tabletop"


def prepared(name: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    policy = tiny_pi(name, statistics(), **settings)
    return policy, policy.preprocess(tiny_raw())


def step_of(policy: Any, kind: type) -> Any:
    return next(step for step in policy.preprocessor.steps if isinstance(step, kind))


# --- noise, time, actions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"noise": torch.randn(2, 1, 7)}, r"noise has shape \(2, 1, 7\), expected \(2, 6, 7\)"),
        ({"noise": torch.randn(2, 6, 1)}, r"noise has shape \(2, 6, 1\)"),
        ({"noise": torch.randn(2, 6, 7), "time": torch.rand(1)}, r"expected \(2,\)"),
        ({"time": torch.rand(2, 1)}, r"time has shape \(2, 1\)"),
        ({"time": torch.tensor([0.5, 5.0])}, r"lies in \[0.5, 5\]"),
        ({"time": torch.tensor([0.5, float("nan")])}, r"lies in \[nan, nan\], expected"),
        ({"time": torch.rand(3)}, "3 rows, the batch 2 samples"),
    ],
)
def test_noise_and_time_of_another_shape(name: str, given: dict[str, Any], error: str) -> None:
    policy, batch = prepared(name)
    with pytest.raises(ValueError, match=error):
        policy(batch, **given)


@pytest.mark.parametrize("name", NAMES)
def test_noise_for_a_chunk(name: str) -> None:
    policy, batch = prepared(name)
    for shape in ((2, 5, 7), (2, 6, 4), (1, 6, 7)):
        with pytest.raises(ValueError, match=r"expected \(2, 6, 7\): \(B, chunk_size, max_action_dim\)"):
            policy.predict_action_chunk(batch, noise=torch.randn(*shape))
    noise = torch.randn(2, 6, 7)
    assert torch.equal(
        policy.predict_action_chunk(batch, noise=noise),
        policy.predict_action_chunk(batch, noise=noise.double()),
    ), "another precision is no other noise"


@pytest.mark.parametrize("name", NAMES)
def test_numbers_as_wide_as_they_come(name: str) -> None:
    """float64 noise and whole times are taken, in bfloat16 too."""
    for dtype in ("float32", "bfloat16"):
        policy, batch = prepared(name, dtype=dtype)
        loss, metrics = policy(batch, noise=torch.randn(2, 6, 7).double(), time=torch.tensor([0, 1]))
        assert loss.isfinite()
        assert metrics["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("name", NAMES)
def test_actions_that_are_absent_or_too_short(name: str) -> None:
    policy, batch = prepared(name)
    without = {key: value for key, value in batch.items() if key != "action"}
    with pytest.raises(MissingKey, match="no 'action' in the batch, which holds observation"):
        policy(without)
    with pytest.raises(ValueError, match=r"action has shape \(2, 5, 7\), expected \(2, 6, 7\)"):
        policy(batch | {"action": batch["action"][:, :5]})
    with pytest.raises(ValueError, match=r"action has shape \(4, 6, 7\), expected \(2, 6, 7\)"):
        policy(batch | {"action": batch["action"].repeat(2, 1, 1)})
    with pytest.raises(
        ValueError, match="action has 9 numbers, the policy takes 7 at most; raise max_action"
    ):
        policy(batch | {"action": torch.zeros(2, 6, 9)})


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_integers_is_one_of_booleans(name: str) -> None:
    policy, batch = prepared(name)
    key, noise = "observation.language.attention_mask", torch.randn(2, 6, 7)
    chunks = [
        policy.predict_action_chunk(batch | {key: mask}, noise=noise)
        for mask in (batch[key], batch[key].long())
    ]
    assert torch.equal(*chunks)


def test_a_state_that_is_absent() -> None:
    policy, batch = prepared("pi0")
    with pytest.raises(MissingKey, match=r"no 'observation\.state' in the batch"):
        policy.predict_action_chunk({k: v for k, v in batch.items() if k != "observation.state"})


# --- cameras -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_camera_where_one_is_absent(name: str) -> None:
    policy, raw = tiny_pi(name, statistics()), tiny_raw()
    raw[HAND] = raw.pop(WRIST)
    with pytest.raises(ValueError, match=f"the batch has {HAND}, which the policy does not know, and no"):
        policy.predict_action_chunk(policy.preprocess(raw))
    policy.preprocessor.rename_map.update({HAND: WRIST})
    policy.predict_action_chunk(policy.preprocess(raw))


def test_a_camera_too_many_is_let_alone() -> None:
    policy, raw = tiny_pi("pi0", statistics()), tiny_raw()
    raw[HAND] = raw[WRIST].clone()
    policy.predict_action_chunk(policy.preprocess(raw))


def test_each_policy_warns_of_its_own() -> None:
    for policy in (tiny_pi("pi0", statistics()), tiny_pi("pi0", statistics())):
        raw = tiny_raw()
        del raw[WRIST]
        with pytest.warns(UserWarning, match=f"no {WRIST} in the batch"):
            policy.predict_action_chunk(policy.preprocess(raw))
    assert not replace(policy.config).warned  # a copy warns of its own, too


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"noise_draws": 0}, "noise_draws is 0, expected 1 or more"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1, expected 1 or more"),
        ({"vision_size": {"image_size": 32}}, "image_size 32, image_resolution is .* leave image_size out"),
        ({"expert_size": {"widht": 2}}, "a size names widht; expected some of width, layers"),
        ({"vision_size": {"depth": 2}}, "a size names depth; expected some of"),
        ({"expert_size": {"width": 31}}, "the expert's width is 31, expected an even one"),
        ({"language_size": {"heads": 3, "kv_heads": 2}}, "heads is 3 and kv_heads 2; expected kv_heads to"),
        ({"language_size": {"head_dim": 7}}, "head_dim is 7, expected an even number"),
        ({"language_size": {"activation": "relu"}}, "activation is 'relu', expected one of gelu_tanh, silu"),
        ({"rtc_config": {"execution_horizn": 4}}, "rtc_config has unknown fields execution_horizn"),
        ({"rtc_config": "LINEAR"}, "rtc_config is 'LINEAR', expected an RTCConfig or a mapping"),
        ({"rtc_config": {"execution_horizon": -4}}, "execution_horizon is -4"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PI0(PI0Config(**features(), **settings))


def test_a_tokenizer_of_more_words_than_the_table() -> None:
    policy, batch = prepared("pi0")
    batch["observation.language.tokens"][0, 0] = 400
    with pytest.raises(ValueError, match="token ids go from 0 to 400, and the table has 400 words"):
        policy.predict_action_chunk(batch)


def test_a_config_does_not_write_into_what_it_is_given() -> None:
    given = features()
    before = {key: dict(value) for key, value in given.items()}
    PI0Config(**given, empty_cameras=2)
    assert given == before
    assert not [key for key in PI05Config(**given).input_features if "empty" in key]


def test_fast_wants_as_many_actions_carried_out_as_said() -> None:
    with pytest.warns(UserWarning, match="n_action_steps is 3 and chunk_size 6"):
        PI0FastConfig(**features(), chunk_size=6, n_action_steps=3)


# --- overriding a checkpoint's settings --------------------------------------------------------------------


def test_the_prompts_length_is_followed() -> None:
    policy = minivla.load(FOLDER, tokenizer_max_length=64)
    assert step_of(policy, Tokenize).max_length == 64
    assert (
        minivla.load(FOLDER).config.tokenizer_max_length == step_of(minivla.load(FOLDER), Tokenize).max_length
    )


def test_another_upstreams_prompt_is_followed() -> None:
    raw = {"task": ["pick_up  the block"]}
    told = {side: minivla.load(FOLDER, upstream=side).preprocessor.steps for side in ("lerobot", "openpi")}
    texts = {}
    for side, steps in told.items():
        (line,) = (step for step in steps if step.registry_name == "pi0_new_line_processor")
        (tokens,) = (step for step in steps if isinstance(step, Tokenize))
        texts[side] = (line(raw)["task"], tokens.ending)
    assert texts == {
        "lerobot": (["pick_up  the block\n"], ""),
        "openpi": (["pick up  the block"], "\n"),
    }


def test_relative_actions_want_new_statistics() -> None:
    with pytest.raises(ValueError, match=r"use_relative_actions cannot be overridden alone"):
        minivla.load(FOLDER, use_relative_actions=True)


def test_words_are_written_and_read_with_the_same_ids(tmp_path: Path) -> None:
    """LeRobot's files do not tell a step how many ids FAST skips: the config does."""
    policy = tiny_fast(stats=statistics(), fast_skip_tokens=4)
    policy.save(tmp_path / "p")
    path = tmp_path / "p" / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    for step in content["steps"]:
        if step["registry_name"] == "action_tokenizer_processor":
            step["config"].pop("fast_skip_tokens")
    path.write_text(json.dumps(content))
    for settings, skip in (({}, 4), ({"fast_skip_tokens": 7, "max_action_tokens": 33}, 7)):
        loaded: Any = minivla.load(tmp_path / "p", **settings)
        step = step_of(loaded, TokenizeActions)
        assert step.fast_skip_tokens == skip == loaded.sentences.skip
        batch = step({"action": chunks(2)})
        assert batch["action.tokens"].shape[1] == loaded.config.max_action_tokens
        made, wrong = loaded.sentences.read(batch["action.tokens"][:, 1:], *chunks(2).shape[1:])
        assert not wrong
        assert (made - chunks(2)).abs().max() < 0.3


def test_metrics_have_lerobots_names() -> None:
    policy = tiny_fast()
    assert set(policy(fast_batch(policy))[1]) == {"loss", "ce_loss"}


# --- a checkpoint without its tokenizer --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pi0", "pi0_fast"])
def test_a_checkpoint_that_lost_its_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    if kind == "pi0":
        shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("tokenizer"))
    else:
        tiny_fast(stats=statistics()).save(folder)
        shutil.rmtree(folder / "tokenizer")
    policy = minivla.load(folder)
    with pytest.raises(FileNotFoundError, match=r"no folder 'tokenizer' in .*copy the checkpoint whole"):
        step_of(policy, Tokenize)({"task": ["go"]})
