"""Text to tokens: an ending of its own, texts that are too long, tokenizers that travel with a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import pytest
import torch

from minivla.data import read_pipeline, write_pipeline
from minivla.data.processors import Pipeline
from minivla.data.steps import Tokenize
from minivla.data.text import train_tokenizer

TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"
TEXTS = ["put the red block on the green square", "push the ring"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS)


def ids(tokenizer, text, **options):
    return tokenizer(text, **options)["input_ids"]


# An ending


def test_an_ending_is_encoded_alone_and_stands_before_the_padding(tokenizer):
    step = Tokenize(tokenizer=tokenizer, max_length=16, ending="\n")
    out = step({"task": TEXTS})
    ending = ids(tokenizer, "\n", add_special_tokens=False)
    for row, valid, text in zip(out[TOKENS], out[MASK], TEXTS, strict=True):
        expected = ids(tokenizer, text) + ending
        assert row[valid].tolist() == expected
        assert valid.tolist() == [True] * len(expected) + [False] * (16 - len(expected))
        assert row[~valid].eq(tokenizer.pad_token_id).all()


def test_without_an_ending_tokens_are_as_before(tokenizer):
    one, other = (
        Tokenize(tokenizer=tokenizer, max_length=16),
        Tokenize(tokenizer=tokenizer, max_length=16, ending=" "),
    )
    assert "ending" not in one.to_json()
    assert other.to_json()["ending"] == " "
    theirs = tokenizer(TEXTS, max_length=16, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(one({"task": TEXTS})[TOKENS], theirs["input_ids"])


@pytest.mark.parametrize(("padding", "size"), [("max_length", 20), ("longest", 11)])
def test_an_ending_on_the_left_side(tokenizer, padding, size):
    step = Tokenize(tokenizer=tokenizer, max_length=20, ending="\n", padding_side="left", padding=padding)
    out = step({"task": TEXTS})
    assert out[TOKENS].shape == (2, size)
    assert out[MASK][:, -1].all()
    row = out[TOKENS][1][out[MASK][1]].tolist()
    assert row == ids(tokenizer, TEXTS[1]) + ids(tokenizer, "\n", add_special_tokens=False)


# Too long


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_text_that_is_too_long_warns_once_and_names_what_is_cut(tokenizer, ending):
    step = Tokenize(tokenizer=tokenizer, max_length=6, ending=ending)
    long = ["push the ring", TEXTS[0]]
    with pytest.warns(
        UserWarning, match=r"text of sample 1 has \d+ tokens, 6 are read; .* are cut: .*green square"
    ) as seen:
        out = step({"task": long})
    assert len(seen) == 1
    assert out[TOKENS][1].tolist() == ids(tokenizer, TEXTS[0])[:6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step({"task": long})


def test_a_text_that_just_fits_does_not_warn(tokenizer):
    size = len(ids(tokenizer, TEXTS[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenize(tokenizer=tokenizer, max_length=size)({"task": TEXTS})[MASK][0].all()


# Files


def saved(step, folder):
    write_pipeline(Pipeline([step]), folder)
    return json.loads((folder / "policy_preprocessor.json").read_text())["steps"][0]["config"]


def test_a_tokenizer_given_as_an_object_travels_with_the_checkpoint(tokenizer, tmp_path, monkeypatch):
    step = Tokenize("org/gated", tokenizer=tokenizer, max_length=16)
    assert saved(step, tmp_path / "a")["tokenizer_name"] == "tokenizer"
    shutil.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(os.sep)
    again = read_pipeline(tmp_path / "b")
    assert torch.equal(again({"task": TEXTS})[TOKENS], step({"task": TEXTS})[TOKENS])
    fresh = read_pipeline(tmp_path / "b").steps[0]  # saved anew before its tokenizer was loaded, and after
    for number, each in enumerate((fresh, again.steps[0])):
        assert saved(each, tmp_path / str(number))["tokenizer_name"] == "tokenizer"
    shutil.rmtree(tmp_path / "b")
    for number in range(2):
        assert torch.equal(
            read_pipeline(tmp_path / str(number))({"task": TEXTS})[TOKENS], step({"task": TEXTS})[TOKENS]
        )


def test_a_saved_tokenizer_is_what_lerobot_reads(tokenizer, tmp_path, monkeypatch):
    from lerobot.processor import PolicyProcessorPipeline

    step = Tokenize(tokenizer=tokenizer, max_length=16)
    saved(step, tmp_path)
    monkeypatch.chdir(tmp_path)  # LeRobot looks for the relative name where it runs
    theirs = PolicyProcessorPipeline.from_pretrained(tmp_path, config_filename="policy_preprocessor.json")
    out = theirs({"observation.state": torch.zeros(2, 3), "task": TEXTS})
    assert torch.equal(out[TOKENS], step({"task": TEXTS})[TOKENS])
    assert torch.equal(out[MASK], step({"task": TEXTS})[MASK])


def test_a_tokenizer_by_name_stays_a_name(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "words")
    step = Tokenize(str(tmp_path / "words"))
    step({"task": TEXTS})
    assert saved(step, tmp_path / "a")["tokenizer_name"] == str(tmp_path / "words")
    assert not (tmp_path / "a" / "tokenizer").exists()


def test_a_tokenizer_that_cannot_be_saved_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"function has no save_pretrained, so it is not saved"):
        assert "tokenizer_name" not in saved(Tokenize("org/words", tokenizer=lambda *_, **__: None), tmp_path)


def test_a_missing_tokenizer_is_named_when_it_is_needed(tmp_path):
    saved(Tokenize("google/paligemma-3b-pt-224"), tmp_path)
    pipeline = read_pipeline(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"'google/paligemma-3b-pt-224' could not be loaded.*gated.*hf auth login"
    ):
        pipeline({"task": "push"})


def test_a_name_never_leads_out_of_the_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = saved(Tokenize("x"), tmp_path / "a")
    assert config["tokenizer_name"] == "x"
    assert not list((tmp_path / "a").glob("tok*"))
