"""The small world's tokenizer: every word of its sentences and every bin of a state is one token."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivla.data import text
from minivla.data.steps import Tokenize
from minivla.data.text import train_tokenizer
from minivla.policies.vla import StatePrompt
from minivla.world.language import TEMPLATES, VOCABULARY, words

SENTENCES = [
    "put the red cube on the green pad, then put the blue disc on the yellow square",
    "carry the wedge around the obstacle to the target",
    f"Task: , State: {StatePrompt.ending}",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES)


def test_doctest():
    assert doctest.testmod(text).failed == 0
    assert doctest.testmod(text).attempted == 3


def test_a_word_and_an_integer_are_one_token(tokenizer):
    for piece in [*words(" ".join(SENTENCES[:2])), *range(-1, 256)]:
        assert len(tokenizer.tokenize(str(piece))) == 1, piece


def test_every_word_of_tabletop_is_one_token():
    templates = [template for kind in TEMPLATES.values() for template in kind]
    tokenizer = train_tokenizer([*templates, *VOCABULARY])
    assert [word for word in VOCABULARY if len(tokenizer.tokenize(word)) > 1] == []


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer("put the red cube").input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer("é", add_special_tokens=False).input_ids[-1] == tokenizer.unk_token_id


def test_pi05_prompt_is_short_and_comes_back(tokenizer):
    prompt = f"Task: put the red cube on the green pad, State: 12 255 -1{StatePrompt.ending}"
    assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt
    assert tokenizer.tokenize(prompt)[-10:] == [
        "▁State", ":", "▁12", "▁255", "▁-1", ";", "\n", "Action", ":", "▁",
    ]  # fmt: skip


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n"), min_size=1))
@settings(deadline=None)
def test_any_ascii_text_comes_back(sentence):
    tokenizer = _trained()
    ids = tokenizer(sentence).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


_kept = []


def _trained():
    if not _kept:
        _kept.append(train_tokenizer(SENTENCES))
    return _kept[0]


def test_reserved_tokens_stand_last_and_are_read_whole():
    tokenizer, plain = train_tokenizer(SENTENCES, reserved=3), train_tokenizer(SENTENCES)
    last = [len(plain), len(plain) + 1, len(plain) + 2]
    assert tokenizer("<extra_0><extra_1><extra_2>", add_special_tokens=False).input_ids[-3:] == last
    assert len(tokenizer) == len(plain) + 3


def test_same_sentences_in_any_order_give_the_same_tokens(tokenizer):
    again = train_tokenizer([*reversed(SENTENCES), SENTENCES[0]])
    assert again.get_vocab() == tokenizer.get_vocab()


def test_it_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for sentence in SENTENCES:
        assert again(sentence).input_ids == tokenizer(sentence).input_ids


def test_in_a_policy_step(tokenizer):
    step = Tokenize(max_length=12, tokenizer=tokenizer)
    batch = step({"task": ["put the red cube on the green pad\n", "carry the wedge"]})
    valid = batch["observation.language.attention_mask"]
    assert valid.sum(dim=1).tolist() == [10, 4]
    assert (batch["observation.language.tokens"][~valid] == tokenizer.pad_token_id).all()
