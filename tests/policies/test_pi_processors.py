"""π's processors beside LeRobot's own: the same steps, equal batches, and files that either side reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivla.data.processors import Pipeline, make_pipelines, read_pipeline, write_pipeline
from minivla.data.relative import link
from minivla.data.text import train_tokenizer
from tests.parity import their_features
from tests.policies.pi_small import FAMILIES, SETTINGS, features, tiny_config

FILES = ("policy_preprocessor.json", "policy_postprocessor.json")
TEXTS = ["put the red block_on the\ngreen square ", "push the ring"]
KINDS = {"mean": 0.5, "std": -0.5, "min": 2.0, "max": -1.0, "q01": 1.5, "q99": -0.8, "q10": 1.0, "q90": -0.4}
NAMES = ["x.pos", "y.pos", "gripper.pos", "z.pos"]
RELATIVE = {"use_relative_actions": True, "action_feature_names": NAMES}
CASES = [(family, settings) for family in FAMILIES for settings in ({}, RELATIVE)]


def statistics() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    drawn = {
        key: torch.rand(n, generator=generator) for key, n in {"observation.state": 5, "action": 4}.items()
    }
    return {key: {kind: value - less for kind, less in KINDS.items()} for key, value in drawn.items()}


def raw(actions: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    inputs, _ = features()
    batch: dict[str, Any] = {
        key: torch.rand(2, *feature.shape, generator=generator) for key, feature in inputs.items()
    }
    batch["observation.state"] = batch["observation.state"] * 3 - 1.5
    batch["task"] = list(TEXTS)
    return batch | ({"action": torch.rand(2, 6, 4, generator=generator)} if actions else {})


@pytest.fixture(scope="module", autouse=True)
def _tokenizer():
    """PaliGemma's tokenizer, which is gated, is a small one of ours, on either side."""
    from transformers import AutoTokenizer

    small, patch = train_tokenizer(TEXTS), pytest.MonkeyPatch()
    patch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: small)
    yield
    patch.undo()


def theirs_of(family: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    from lerobot.policies.factory import make_policy_config, make_pre_post_processors

    inputs, outputs = their_features(*features())
    config = make_policy_config(
        family, input_features=inputs, output_features=outputs, device="cpu", **SETTINGS, **settings
    )
    return make_pre_post_processors(config, dataset_stats=statistics())


def ours_of(family: str, settings: dict[str, Any]) -> tuple[Pipeline, Pipeline]:
    return make_pipelines(tiny_config(family, device="cpu", **settings), statistics())


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key in raw().keys() | {"observation.language.tokens", "observation.language.attention_mask"}:
        if isinstance(theirs[key], Tensor):
            assert torch.equal(ours[key], theirs[key]), key
        else:
            assert ours[key] == theirs[key], key


def written(folder: Path) -> list[Any]:
    content = [json.loads((folder / name).read_text()) for name in FILES]
    return [
        [(s["registry_name"], s["config"], s.get("state_file")) for s in each["steps"]] for each in content
    ]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_equal_batches_files_and_actions(family, settings, tmp_path):
    theirs, ours = theirs_of(family, settings), ours_of(family, settings)
    same(ours[0](raw()), theirs[0](raw()))
    chunk = torch.rand(2, 6, 4)
    assert torch.equal(ours[1](chunk), theirs[1](chunk))
    for pipeline in theirs:
        pipeline.save_pretrained(tmp_path / "theirs")
    for pipeline, name in zip(ours, FILES, strict=True):
        write_pipeline(pipeline, tmp_path / "ours", name)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")

    before, after = (read_pipeline(tmp_path / "theirs", name) for name in FILES)
    link(before.steps, after.steps)
    same(before(raw()), theirs[0](raw()))
    assert torch.equal(after(chunk), theirs[1](chunk))

    from lerobot.policies.factory import make_pre_post_processors

    config = type("Config", (), {"type": family})()
    again = make_pre_post_processors(config, pretrained_path=str(tmp_path / "ours"))
    same(ours[0](raw()), again[0](raw()))
    assert torch.equal(again[1](chunk), ours[1](chunk))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_actions_the_state_is_kept_for_what_comes_after(family):
    theirs, ours = theirs_of(family, RELATIVE), ours_of(family, RELATIVE)
    theirs[0](raw(actions=False))
    ours[0](raw(actions=False))
    chunk = torch.rand(2, 6, 4)
    assert torch.equal(ours[1](chunk), theirs[1](chunk))
    assert torch.equal(ours[0].relative_to, raw()["observation.state"])


def test_openpis_prompt_is_cleaned_and_its_new_line_encoded_alone(tmp_path):
    from transformers import AutoTokenizer

    small = AutoTokenizer.from_pretrained("any")
    before, _ = make_pipelines(tiny_config("pi0", upstream="openpi", device="cpu"), statistics())
    out = before(raw())
    for text, ids, valid in zip(
        ("put the red block on the green square", "push the ring"),
        out["observation.language.tokens"],
        out["observation.language.attention_mask"],
        strict=True,
    ):
        expected = small(text).input_ids + small("\n", add_special_tokens=False).input_ids
        assert ids[valid].tolist() == expected
    write_pipeline(before, tmp_path)
    assert torch.equal(
        read_pipeline(tmp_path)(raw())["observation.language.tokens"], out["observation.language.tokens"]
    )
