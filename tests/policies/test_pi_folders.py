"""π's folders travel between LeRobot and minivla, both ways, in every layout that was published."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minivla
from minivla.checkpoints import CheckpointError, receipt, write_headers
from minivla.data.text import train_tokenizer
from minivla.policies.pi import PI0, PI0Config
from minivla.policies.pi0_fast import PI0FastConfig
from minivla.policies.vla_files import EMBEDDING, EXPERT_HEAD, LM_HEAD, P
from tests.parity import relative_error
from tests.policies.pi_layouts import (
    FORMER_SETTINGS,
    STATISTICS,
    former_nesting,
    head_alone,
    other_time,
    without_prefix,
)
from tests.policies.pi_published import rounding_as_lerobot
from tests.policies.pi_small import (
    EVERYTHING,
    EXPERT,
    FAMILIES,
    LANGUAGE,
    VISION,
    WORDS,
    at_tiny_size,
    draws,
    make_batch,
    make_theirs,
    observation,
    their_module,
    tiny_config,
    tiny_pi,
)

SIZES: dict[str, Any] = {
    "vision_size": VISION,
    "language_size": LANGUAGE,
    "expert_size": EXPERT,
    "vocab_size": WORDS,
}
ROBOT = {"observation.state": 5, "action": 4}
SENTENCES = ["put the red block on the green square", "Task: push the ring, State: 1 2 3;\nAction: "]


def statistics() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    drawn = {key: torch.rand(size, generator=generator) for key, size in ROBOT.items()}
    kinds = {
        "mean": 0.5,
        "std": -0.5,
        "min": 2.0,
        "max": -1.0,
        "q01": 1.5,
        "q99": -0.8,
        "q10": 1.0,
        "q90": -0.4,
    }
    return {key: {kind: value - less for kind, less in kinds.items()} for key, value in drawn.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(SENTENCES)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Any:
    """PaliGemma's tokenizer, which is gated, is a small one of ours, on either side."""
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained

    def load(name: str, *args: Any, **options: Any) -> Any:
        return tokenizer if str(name).startswith("google/") else real(name, *args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    return tokenizer


@functools.cache
def made(family: str, dtype: str) -> tuple[Any, Path]:
    theirs, folder = make_theirs(family, dtype=dtype), Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    theirs.save_pretrained(folder)
    return theirs, folder


def lerobots_folder(family: str, folder: Path, dtype: str = "float32") -> Any:
    """Save a policy of LeRobot's, made once, into `folder`; the policy comes back."""
    theirs, source = made(family, dtype)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return theirs


def load_tiny(folder: Path, **options: Any) -> PI0:
    policy = minivla.load(folder, **{"stats": None} | SIZES | options)
    assert isinstance(policy, PI0)
    return policy


def chunks(ours: PI0, theirs: Any) -> tuple[Tensor, Tensor]:
    noise, _ = draws()
    batch = observation(make_batch())
    return (
        ours.predict_action_chunk(batch, noise=noise, steps=2),
        theirs.predict_action_chunk(batch, noise=noise, num_steps=2),
    )


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(
        change(load_file(folder / "model.safetensors")),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


# --- published layouts, from today's file -------------------------------------------------------------------


def before_04(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LeRobot before 0.4: other names for PaliGemma's parts, the statistics among the weights."""
    out, stats = former_nesting(tensors), statistics()
    for place in STATISTICS:
        table = stats["action" if place.endswith("action") else "observation.state"]
        out |= {f"{place}.{name}": table[name].clone() for name in ("mean", "std")}
    return out


def pi0s_rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """π0.5's, with what a π0 leaves behind: LeRobot drops it."""
    layer = f"{P}gemma_expert.model.layers.0."
    rest = [f"{layer}{norm}_layernorm.weight" for norm in ("input", "post_attention")]
    rest += [f"{P}gemma_expert.model.norm.weight", "model.state_proj.weight", "model.state_proj.bias"]
    return tensors | {name: torch.ones(3) for name in rest}


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lerobots_folder_loads_and_computes_the_same(family, tmp_path):
    theirs = lerobots_folder(family, tmp_path)
    ours = load_tiny(tmp_path)
    assert {entry.key for entry in ours.receipt.ignored} == {LM_HEAD, EXPERT_HEAD}
    assert len(ours.receipt.matched) == len(theirs.state_dict()) - 2
    assert relative_error(*chunks(ours, theirs)) < 1e-5


LAYOUTS = [
    ("pi0", without_prefix), ("pi0", head_alone), ("pi0", before_04), ("pi0", other_time),
    ("pi05", without_prefix), ("pi05", head_alone), ("pi05", other_time), ("pi05", pi0s_rest),
]  # fmt: skip


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_every_layout_loads_and_computes_the_same(family, layout, tmp_path):
    theirs = lerobots_folder(family, tmp_path)
    rewrite(tmp_path, layout)
    if layout in (head_alone, before_04):  # there the table is the head
        table = theirs.state_dict()[EMBEDDING]
        assert not torch.equal(table, theirs.state_dict()[LM_HEAD])
    ours = load_tiny(tmp_path)
    assert relative_error(*chunks(ours, theirs)) < 1e-5
    headers = write_headers(tmp_path, tmp_path / "headers")
    assert receipt(headers, **SIZES).entries == ours.receipt.entries


def test_the_head_fills_the_table_where_there_is_none_and_only_there(tmp_path):
    lerobots_folder("pi0", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_tiny(tmp_path).paligemma.embedding.weight, stored[EMBEDDING])
    rewrite(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if key != EMBEDDING})
    ours = load_tiny(tmp_path)
    assert torch.equal(ours.paligemma.embedding.weight, stored[LM_HEAD])
    assert [e.ours for e in ours.receipt.entries if e.key == LM_HEAD] == ["paligemma.embedding.weight"]


def test_one_tensor_under_two_names_is_refused(tmp_path):
    lerobots_folder("pi0", tmp_path)
    rewrite(tmp_path, lambda t: t | {EMBEDDING.removeprefix("model."): t[EMBEDDING].clone()})
    with pytest.raises(CheckpointError, match=r"unexpected .*embed_tokens.* is the same tensor"):
        load_tiny(tmp_path)


def test_a_pi0_is_no_pi05(tmp_path):
    lerobots_folder("pi0", tmp_path)
    edit_config(tmp_path, type="pi05")
    with pytest.raises(
        CheckpointError, match=r"missing .*gemma_expert\.model\.layers\.0\.input_layernorm\.dense"
    ):
        load_tiny(tmp_path)


def test_nothing_that_is_ignored_is_read(tmp_path, monkeypatch):
    from minivla.checkpoints import loading

    lerobots_folder("pi0", tmp_path)
    read, real = [], loading.read_tensor
    monkeypatch.setattr(loading, "read_tensor", lambda found, **k: read.append(found.key) or real(found, **k))
    ours = load_tiny(tmp_path)
    assert sorted(read) == sorted(entry.key for entry in ours.receipt.matched)


# --- statistics among the weights ---------------------------------------------------------------------------


def test_a_folder_from_before_04_brings_its_statistics(tmp_path, reads):
    from lerobot.policies.factory import make_pre_post_processors

    theirs = lerobots_folder("pi0", tmp_path)
    rewrite(tmp_path, before_04)
    former = FORMER_SETTINGS | {"resize_imgs_with_padding": [28, 28]}
    late = (
        "image_resolution",
        "num_inference_steps",
        "dtype",
        "paligemma_variant",
        "rtc_config",
        "min_period",
    )
    edit_config(tmp_path, **former, **dict.fromkeys(late, ...))
    ours = minivla.load(tmp_path, **SIZES)
    assert ours.config.image_resolution == (28, 28)
    assert "config.json  num_steps: now num_inference_steps" in str(ours.receipt)
    assert len(ours.receipt.notes) == len(former)
    assert sum(entry.reason.startswith("statistics") for entry in ours.receipt.ignored) == 6
    before, after = make_pre_post_processors(theirs.config, dataset_stats=statistics())
    raw = {"observation.state": torch.rand(5), "task": "push the ring"}
    raw |= {key: torch.rand(3, 28, 28) for key in ours.config.image_features}
    theirs_in, ours_in = before(raw), ours.preprocess(raw)
    assert torch.equal(ours_in["observation.state"], theirs_in["observation.state"])
    chunk = torch.rand(1, 6, 4)
    assert torch.equal(ours.postprocess(chunk), after(chunk))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapt_to_pi_aloha", True),
        ("use_delta_joint_actions_aloha", True),
        ("proj_width", 512),
        ("precision", "float16"),
    ],
)
def test_former_settings_that_cannot_be_followed_are_refused_by_name(tmp_path, field, value):
    lerobots_folder("pi0", tmp_path)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=rf"{field} is {value!r}, a setting of an older upstream"):
        load_tiny(tmp_path)


def test_former_padding_of_images_that_are_not_square_warns():
    features = {"observation.images.top": {"type": "VISUAL", "shape": [3, 480, 640]}}
    with pytest.warns(
        UserWarning, match=r"images \(observation.images.top\) are not square.*above and on the left"
    ):
        PI0Config.modernise({"input_features": features, "resize_imgs_with_padding": [224, 224]})


def test_openpis_own_config_needs_a_type_and_no_more(tmp_path):
    policy = tiny_pi("pi0")
    policy.save(tmp_path)
    openpi = {
        "action_dim": 32, "action_horizon": 6, "paligemma_variant": "gemma_2b", "precision": "float32",
        "action_expert_variant": "gemma_300m",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(openpi))
    with pytest.raises(ValueError, match=r"type None.*openpi.*\"type\": \"pi0\" or \"pi05\""):
        load_tiny(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(openpi | {"type": "pi0"}))
    again = load_tiny(tmp_path, image_resolution=(28, 28))
    assert (again.config.chunk_size, again.config.n_action_steps, again.config.max_state_dim) == (6, 6, 32)
    assert torch.equal(again.action_in_proj.weight, policy.action_in_proj.weight)


# --- saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_ours_opens_in_lerobot(family, tmp_path, monkeypatch, reads):
    """LeRobot's loader prints that keys are missing and goes on with random weights: here it must not."""
    from lerobot.policies.factory import make_pre_post_processors

    module = their_module(family)
    policy_class = module.PI0Policy if family == "pi0" else module.PI05Policy
    monkeypatch.setattr(PI0Config, "unusual", lambda self: {})  # but for its sizes this is a plain folder
    ours = FAMILIES[family][0](tiny_config(family), statistics())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.save(tmp_path)
    with at_tiny_size(module, EVERYTHING):
        theirs = policy_class.from_pretrained(tmp_path, strict=True)
    state = theirs.state_dict()
    assert all(torch.equal(state[ours.upstream_name(key)], value) for key, value in ours.state_dict().items())
    assert torch.equal(state[LM_HEAD], ours.paligemma.embedding.weight)
    assert not state[EXPERT_HEAD].any()
    assert set(load_file(tmp_path / "model.safetensors")) == set(state)
    assert relative_error(*chunks(ours.eval(), theirs)) < 1e-5
    read = make_pre_post_processors(policy_cfg=theirs.config, pretrained_path=str(tmp_path))
    chunk = torch.rand(2, 6, 4)
    assert torch.equal(read[1](chunk), ours.postprocess(chunk))
    again = load_tiny(tmp_path, stats=statistics())
    assert torch.equal(again.state_dict()["paligemma.embedding.weight"], state[EMBEDDING])


def test_small_sizes_say_that_lerobot_will_refuse_and_write_no_heads(tmp_path):
    with pytest.warns(UserWarning, match=r"vision_size.*LeRobot will refuse it"):
        tiny_pi("pi0").save(tmp_path)
    assert not {LM_HEAD, EXPERT_HEAD} & load_file(tmp_path / "model.safetensors").keys()
    assert minivla.load(tmp_path, stats=None).receipt.ok


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_folder_loads_as_stored_and_runs(family, tmp_path):
    theirs = lerobots_folder(family, tmp_path, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32, torch.bfloat16}
    ours = load_tiny(tmp_path)
    assert ours.config.dtype == "bfloat16"
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == stored[ours.upstream_name(name)].dtype, name
    exact = load_tiny(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert exact.config.dtype == "float32"
    mine, other = chunks(ours, theirs)
    own = relative_error(other, chunks(exact, theirs)[0])
    assert relative_error(mine, other) <= 2 * own
    with rounding_as_lerobot():
        assert relative_error(chunks(ours, theirs)[0], other) <= own


def test_the_configs_precision_is_what_a_policy_computes_in(tmp_path):
    """LeRobot copies whatever is stored into the network that config.json describes."""
    lerobots_folder("pi0", tmp_path)
    rewrite(tmp_path, lambda tensors: {key: value.bfloat16() for key, value in tensors.items()})
    assert {p.dtype for p in load_tiny(tmp_path).parameters()} == {torch.float32}
    mixed = load_tiny(tmp_path, dtype=torch.bfloat16)
    assert mixed.config.dtype == "bfloat16"
    assert {p.dtype for p in mixed.parameters()} == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in load_tiny(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}


# --- config.json --------------------------------------------------------------------------------------------


def their_configs() -> list[Any]:
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as Theirs0
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig as TheirsFast
    from lerobot.policies.pi05.configuration_pi05 import PI05Config as Theirs05
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    options: dict[str, Any] = {
        "device": "cpu", "rtc_config": RTCConfig(execution_horizon=7, max_guidance_weight=5.0),
        "relative_exclude_joints": ["gripper", "wrist"], "action_feature_names": ["x", "gripper.pos"],
        "use_relative_actions": True, "empty_cameras": 1, "dtype": "bfloat16", "chunk_size": 20,
        "n_action_steps": 10, "optimizer_betas": (0.8, 0.9), "min_period": 0.01, "max_action_tokens": 99,
        "freeze_vision_encoder": True, "temperature": 0.5,
    }  # fmt: skip
    kinds = (Theirs0, Theirs05, TheirsFast)
    chosen = [{k: v for k, v in options.items() if k in kind.__dataclass_fields__} for kind in kinds]
    return [kind(**s) for kind, own in zip(kinds, chosen, strict=True) for s in ({"device": "cpu"}, own)]


@pytest.mark.parametrize("which", range(6))
def test_configs_travel_both_ways_field_by_field(which, tmp_path):
    from lerobot.configs import PreTrainedConfig

    theirs = their_configs()[which]
    theirs.validate_features()
    theirs._save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    kind = PI0FastConfig if theirs.type == "pi0_fast" else FAMILIES[theirs.type][1]
    ours = kind.from_json(written)
    assert ours.unusual() == {}
    bookkeeping = written.keys() - ours.to_json().keys()
    assert bookkeeping == {
        "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path",
        "pretrained_revision",
    }  # fmt: skip
    ours_written = json.loads(json.dumps(ours.to_json()))
    assert ours_written == {key: written[key] for key in ours_written}
    (tmp_path / "config.json").write_text(json.dumps(ours_written))
    assert PreTrainedConfig.from_pretrained(tmp_path) == theirs


# --- what does not fit --------------------------------------------------------------------------------------


def test_another_camera_set_is_named_on_both_sides():
    policy = tiny_pi("pi0")
    batch = observation(make_batch())
    named = {key.replace("images.", "images.my_"): value for key, value in batch.items()}
    with pytest.raises(
        ValueError,
        match=r"observation.images.my_front.*none of the policy's cameras.*observation.images.front",
    ):
        policy.predict_action_chunk(named)


def test_an_unknown_variant_is_named(tmp_path):
    lerobots_folder("pi0", tmp_path)
    edit_config(tmp_path, paligemma_variant="gemma_7b")
    with pytest.raises(ValueError, match=r"paligemma_variant.*gemma_7b.*gemma_2b"):
        load_tiny(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    lerobots_folder("pi0", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short: expected .* bytes"):
        load_tiny(tmp_path)


def test_a_gated_repository_says_what_to_do(monkeypatch):
    import httpx
    from huggingface_hub import constants, errors

    def refuse(*_: Any, **__: Any) -> None:
        raise errors.GatedRepoError(
            "gated", response=httpx.Response(403, request=httpx.Request("GET", "https://hub"))
        )

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"'lerobot/pi0_base' is gated: accept its licence first"):
        minivla.load("lerobot/pi0_base")
