"""FAST, against vectors that the published class made, against LeRobot's copy of it, and by itself."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minivla.actions import fast
from minivla.actions.fast import (
    FastTokenizer,
    _byte_symbols,
    dct,
    dct_matrix,
    from_language_ids,
    inverse_dct,
    to_language_ids,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "pi"
STORED = json.loads((GOLDEN / "fast_tokenizer.json").read_text())
TENSORS = load_file(GOLDEN / "fast_tokenizer.safetensors")
FAITHFUL = 7  # the chunk of this number holds codes that the vocabulary cannot spell, those before it none
HORIZON, ACTIONS, VOCABULARY, LOWEST = 16, 4, 384, -36
PUBLISHED_FILES = [
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
MARK = "executed"


def golden() -> FastTokenizer:
    bpe = Tokenizer.from_file(str(GOLDEN / "fast_tokenizer_bpe.json"))
    return FastTokenizer(bpe, 10, VOCABULARY, LOWEST, HORIZON, ACTIONS)


def bytewise(scale: float = 10, lowest: int = -5000) -> FastTokenizer:
    """A vocabulary that spells everything, a token a byte."""
    bpe = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(_byte_symbols())}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return FastTokenizer(bpe, scale, 256, lowest)


def swings(count: int = 200, horizon: int = HORIZON, seed: int = 0) -> torch.Tensor:
    """Smooth chunks: sums of a few slow waves, in [-1, 1]. (count, horizon, 3)."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, horizon)
    pace, phase = 3 * torch.rand(2, count, 1, 3, 2, generator=generator)
    return torch.sin(time[:, None, None] * pace + phase).mean(-1)


def upstream(file: str, name: str, **names: object):
    """One class or function of LeRobot's, out of its installed source: importing the file itself takes a
    quarter of a minute.
    """
    found = importlib.util.find_spec("lerobot") or pytest.skip("LeRobot is not installed")
    path = Path(found.origin).parent / file
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    body = [node for node in tree if getattr(node, "name", None) == name]
    exec(compile(ast.Module(body, []), str(path), "exec"), names)
    return names[name]


@pytest.fixture(scope="module")
def their_class():
    """LeRobot's copy of the published class, without what only saves it."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    pytest.importorskip("scipy")

    class Base:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    quiet = logging.getLogger("silent")
    quiet.disabled = True
    return upstream(
        "policies/molmoact2/molmoact2_hf_model/action_tokenizer.py",
        "UniversalActionProcessor",
        np=np, logging=logging, logger=quiet, Path=Path, ClassVar=ClassVar, ProcessorMixin=Base,
        PreTrainedTokenizerFast=transformers.PreTrainedTokenizerFast,
        ByteLevelBPETokenizer=tokenizers.ByteLevelBPETokenizer, BpeTrainer=tokenizers.trainers.BpeTrainer,
        _resolve_tokenizer_location=lambda path, **_: path,
    )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(their_class):
    """The same vocabulary in LeRobot's hands."""
    text = sys.modules["transformers"].PreTrainedTokenizerFast(
        tokenizer_object=golden().bpe, clean_up_tokenization_spaces=False
    )
    return their_class(text, 10, VOCABULARY, LOWEST, action_dim=ACTIONS, time_horizon=HORIZON)


@pytest.fixture(scope="module")
def their_padding(theirs):
    """How LeRobot's pi0_fast decodes."""
    scipy = pytest.importorskip("scipy.fft")
    quiet = SimpleNamespace(warning=lambda *_: None)
    decode = upstream(
        "policies/pi0_fast/modeling_pi0_fast.py", "decode_actions_with_fast",
        np=np, idct=scipy.idct, logging=quiet,
    )  # fmt: skip
    policy = SimpleNamespace(action_tokenizer=theirs)
    return lambda tokens, horizon=HORIZON: decode(policy, tokens, horizon, ACTIONS)


# The transform


@pytest.mark.parametrize("horizon", [1, 2, 5, 16, 50])
def test_the_transform_is_scipys(horizon):
    scipy = pytest.importorskip("scipy.fft")
    chunk = torch.randn(3, horizon, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = torch.from_numpy(scipy.dct(chunk.numpy(), axis=1, norm="ortho"))
    torch.testing.assert_close(dct(chunk), frequencies, rtol=0, atol=1e-13)
    torch.testing.assert_close(inverse_dct(frequencies), chunk, rtol=0, atol=1e-13)


def test_the_matrix_is_orthonormal_and_its_first_row_the_mean():
    waves = dct_matrix(7)
    torch.testing.assert_close(waves @ waves.T, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(waves[0], torch.full((7,), 7**-0.5, dtype=torch.float64))
    assert dct(torch.zeros(1, 7, 2)).dtype == torch.float32


# The stored vectors


def test_stored_codes():
    ours = golden().codes(TENSORS["actions"])
    assert ours.tolist() == TENSORS["coefficients"].tolist()


def test_half_codes_go_to_the_even_one():
    halves = torch.tensor([0.25, 0.75, -0.25, -0.75]).reshape(4, 1, 1)
    assert golden().codes(halves).flatten().tolist() == [2, 8, -2, -8]


def test_stored_characters_and_tokens():
    tokens = golden().encode(TENSORS["actions"], lossy=True)
    assert tokens == STORED["tokens"]
    assert golden().encode(TENSORS["actions"][:FAITHFUL]) == tokens[:FAITHFUL]
    read = [[ord(letter) for letter in golden().bpe.decode(row)] for row in tokens]
    assert read[:FAITHFUL] == STORED["text_code_points"][:FAITHFUL]


def test_stored_actions():
    chunks, malformed = golden().decode(STORED["tokens"], wrong_length="zeros")
    torch.testing.assert_close(chunks.double(), TENSORS["decoded_actions"], rtol=0, atol=1e-6)
    assert malformed.tolist() == [not lossless for lossless in STORED["lossless"]]
    assert chunks.dtype == torch.float32


def test_stored_failures():
    cases = [case["tokens"] for case in STORED["bad_cases"]]
    chunks, malformed = golden().decode(cases, wrong_length="zeros")
    assert torch.equal(chunks, TENSORS["bad/decoded_actions"].float())
    assert malformed.all()


# Round trips


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rounding_is_the_only_loss(data):
    """Each of H coefficients is off by at most half a code, 1 / (2 scale); a time step is their sum weighted
    by a unit vector, so it is off by at most √H times that (Cauchy and Schwarz)."""
    horizon, actions = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    scale = data.draw(st.sampled_from([1, 10, 33.3]))
    numbers = st.lists(st.floats(-9, 9, width=32), min_size=horizon * actions, max_size=horizon * actions)
    chunk = torch.tensor(data.draw(numbers)).reshape(1, horizon, actions)
    tokenizer = bytewise(scale)
    back, malformed = tokenizer.decode(tokenizer.encode(chunk), horizon, actions)
    assert not malformed.any()
    assert (chunk - back).abs().max() <= horizon**0.5 / (2 * scale) + 1e-5


def test_a_learned_vocabulary_is_shorter_than_a_token_for_each_number():
    chunks = swings()
    tokenizer = FastTokenizer.fit(chunks, vocab_size=512)
    tokens = tokenizer.encode(chunks)
    assert sum(map(len, tokens)) < len(tokens) * HORIZON * 3 / 3
    back, malformed = tokenizer.decode(tokens)
    assert not malformed.any()
    assert (chunks - back).abs().max() <= HORIZON**0.5 / 20 + 1e-5
    assert (tokenizer.horizon, tokenizer.action_dim) == chunks.shape[1:]


def test_one_tokenizer_reads_other_shapes():
    chunks = swings(horizon=8)
    tokenizer = FastTokenizer.fit(swings(horizon=8), vocab_size=512)
    rows = tokenizer.encode(chunks[:2, :5])
    assert tokenizer.decode(rows, 5)[0].shape == (2, 5, 3)
    assert tokenizer.decode([], 5, 1)[0].shape == (0, 5, 1)


# What a vocabulary cannot spell


def test_codes_without_a_symbol_are_refused_by_name():
    with pytest.raises(ValueError, match=r"sample 7 holds codes .* cannot spell: -90, .*lossy=True"):
        golden().encode(TENSORS["actions"])
    below = golden().codes(TENSORS["actions"])[FAITHFUL] < LOWEST
    assert below.any()  # raised to the lowest, where upstream says nothing


def test_a_code_below_the_lowest_is_refused_even_where_its_replacement_can_be_spelled():
    tokenizer = bytewise(lowest=0)
    chunk = torch.full((1, 1, 1), -0.3)
    with pytest.raises(ValueError, match=r"cannot spell: -3 \(its lowest is 0\)"):
        tokenizer.encode(chunk)
    assert tokenizer.decode(tokenizer.encode(chunk, lossy=True), 1, 1)[0].item() == 0


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (torch.zeros(4, 2), r"\(4, 2\) of torch.float32; expected \(B, H, A\)"),
        (torch.zeros(0, 4, 2), "none of them 0"),
        (torch.zeros(1, 4, 2, dtype=torch.long), "of floating point"),
        (torch.tensor([[[0.0]], [[float("nan")]]]), "sample 1 holds NaN"),
        (torch.full((1, 2, 1), float("inf")), "sample 0 holds NaN, infinity"),
        (torch.full((1, 1, 1), 1e12), "far too large"),
        (torch.full((1, 1, 1), 1e4), "only 55296 have a character"),
    ],
)
def test_chunks_that_make_no_sense_are_refused(chunks, message):
    with pytest.raises(ValueError, match=message):
        golden().encode(chunks, lossy=True)


# What a network may say


def test_wrong_length_is_padded_or_cut_or_zeroed():
    """A sequence of known codes, one too few, one too many: decoded by hand."""
    tokenizer = bytewise(lowest=0)
    text = [tokenizer.bpe.token_to_id(letter) for letter in "!#%"]
    for row, kept in ((text, 3), (text[:2], 2), ([*text, text[0]], 3)):
        whole = torch.tensor([float(ord(letter)) for letter in "!#%"[:kept]] + [0.0] * (3 - kept))
        padded, malformed = tokenizer.decode([row], 3, 1)
        torch.testing.assert_close(padded[0], inverse_dct(whole[:, None] / 10))
        zeroed, same = tokenizer.decode([row], 3, 1, wrong_length="zeros")
        assert torch.equal(malformed, same)
        assert malformed.item() == (row != text) == (not zeroed.any())


def test_half_a_character_is_malformed_even_at_the_right_length():
    tokenizer = bytewise(lowest=0)
    first_byte = tokenizer.bpe.token_to_id(next(s for s, byte in _byte_symbols().items() if byte == 0xC3))
    chunk, malformed = tokenizer.decode([[first_byte]], 1, 1)
    assert malformed.item() and chunk.item() == pytest.approx(6553.3)


def test_ids_outside_the_vocabulary_are_a_callers_mistake():
    for token in (VOCABULARY, -1):
        with pytest.raises(ValueError, match=rf"token {token} of sample 1 is outside 0 … 383.*strict=False"):
            golden().decode([[0], [5, token]])
        with pytest.raises(ValueError, match=f"token {token} of sample 0"):
            golden().token_spans([token])
    fine, extra = STORED["tokens"][0], [VOCABULARY + 7, *STORED["tokens"][0]]
    chunks, malformed = golden().decode([fine, extra, [*fine, -1]], strict=False)
    assert torch.equal(chunks[0], chunks[1]) and not chunks[2].any()
    assert malformed.tolist() == [False, True, True]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="wrong_length is 'drop', expected one of pad, zeros"):
        golden().decode([[0]], wrong_length="drop")
    for horizon, actions in ((0, 4), (4, -1)):
        with pytest.raises(ValueError, match=f"horizon is {horizon}, action_dim is {actions}; give both"):
            golden().decode([[0]], horizon, actions)
    with pytest.raises(ValueError, match="horizon is None"):
        bytewise().decode([[0]])
    for wrong in ({"scale": 0}, {"scale": "10"}, {"vocab_size": 0}, {"min_token": 0.5}, {"horizon": -1}):
        with pytest.raises(ValueError, match="expected scale above 0"):
            FastTokenizer(golden().bpe, **wrong)


# LeRobot's copy of the published class


def test_lerobots_class_encodes_alike(theirs):
    chunks = torch.cat((TENSORS["actions"], TENSORS["train_actions"].double()))
    assert golden().encode(chunks, lossy=True) == theirs(chunks.numpy())


IDS = st.one_of(st.integers(0, VOCABULARY - 1), st.sampled_from([-1, VOCABULARY, 2**31, 2**32, -(2**40)]))
SAYINGS = st.lists(st.lists(st.one_of(st.integers(0, VOCABULARY - 1), IDS), max_size=70), max_size=4)


@settings(deadline=None, max_examples=60)
@given(SAYINGS)
def test_whatever_a_network_says_decodes_as_in_lerobot(theirs, their_padding, said):
    """Neither raises; ours tells every sample that is not a chunk."""
    zeros, malformed = golden().decode(said, wrong_length="zeros", strict=False)
    padded, same = golden().decode(said, strict=False)
    assert torch.equal(malformed, same) and len(zeros) == len(said)
    for row, zeroed, filled, wrong in zip(said, zeros, padded, malformed, strict=True):
        expected = torch.from_numpy(theirs.decode([row])[0]).float()
        torch.testing.assert_close(zeroed, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            filled, torch.from_numpy(their_padding([row])[0]).float(), rtol=1e-5, atol=1e-5
        )
        known = all(0 <= token < VOCABULARY for token in row)
        text = golden().bpe.decode(row) if known else ""
        assert wrong.item() == (len(text) != HORIZON * ACTIONS or "\ufffd" in text)


def test_padding_is_lerobots_at_other_horizons(their_padding):
    for horizon in (10, 20):
        ours, malformed = golden().decode(STORED["tokens"], horizon)
        torch.testing.assert_close(ours, torch.from_numpy(their_padding(STORED["tokens"], horizon)).float())
        assert malformed.all()


def test_fitting_finds_upstreams_vocabulary(their_class):
    ours = FastTokenizer.fit(TENSORS["train_actions"], vocab_size=VOCABULARY)
    stored = json.loads((GOLDEN / "fast_tokenizer_bpe.json").read_text())
    assert json.loads(ours.bpe.to_str()) == stored
    assert (ours.scale, ours.vocab_size, ours.min_token) == (10, VOCABULARY, LOWEST)
    for scale, size in ((2, 120), (7, 300)):
        theirs = their_class.fit(list(swings().numpy()), scale=scale, vocab_size=size)
        ours = FastTokenizer.fit(swings(), scale, size)
        assert ours.bpe.get_vocab() == theirs.tokenizer.get_vocab()
        assert ours.min_token == theirs.min_token


def test_a_vocabulary_too_small_for_the_codes_is_refused():
    span = int(FastTokenizer.fit(swings()).codes(swings()).max()) + 1
    for scale, size in ((10, 20), (10, span + 30), (1000, 1024)):
        with pytest.raises(ValueError, match=f"vocab_size is {size}, and codes from .* need"):
            FastTokenizer.fit(swings(), scale, size)


# Which coefficients a token spells


def test_spans_are_the_tokenizers_own_offsets():
    tokenizer = golden()
    for row, codes in zip(STORED["tokens"][:FAITHFUL], STORED["text_code_points"], strict=False):
        encoding = tokenizer.bpe.encode("".join(map(chr, codes)))
        assert encoding.ids == row
        assert tokenizer.token_spans(row) == [list(range(*offsets)) for offsets in encoding.offsets]


def test_spans_share_a_code_of_two_bytes():
    tokenizer = bytewise(scale=1, lowest=0)
    (row,) = tokenizer.encode(torch.tensor([[[65.0, 233.0, 66.0]]]))
    assert tokenizer.token_spans(row) == [[0], [1], [1], [2]]


def test_spans_of_raw_characters_and_of_junk():
    tokenizer = golden()
    raw = tokenizer.bpe.token_to_id("\x01")  # in the alphabet, though never in what is encoded
    assert tokenizer.token_spans([raw, 53]) == [[0], [1]]
    assert tokenizer.token_spans([53, 999, -1, 53], strict=False) == [[0], [], [], [1]]


def test_byte_symbols_are_the_librarys():
    assert set(_byte_symbols()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_byte_symbols().values()) == list(range(256))


# Folders


def test_a_folder_comes_back_as_it_was(tmp_path):
    golden().save(tmp_path / "fast")
    assert sorted(path.name for path in (tmp_path / "fast").iterdir()) == PUBLISHED_FILES
    assert (
        '"clean_up_tokenization_spaces": false' in (tmp_path / "fast" / "tokenizer_config.json").read_text()
    )
    back = FastTokenizer.load(tmp_path / "fast")
    assert repr(back) == repr(golden())
    assert back.encode(TENSORS["actions"], lossy=True) == STORED["tokens"]


def test_lerobots_class_loads_our_folder(their_class, tmp_path):
    golden().save(tmp_path)
    back = their_class.from_pretrained_local(str(tmp_path))
    assert back(TENSORS["actions"].numpy()) == STORED["tokens"]
    assert (back.time_horizon, back.action_dim, back.min_token) == (HORIZON, ACTIONS, LOWEST)


def test_no_code_of_a_folder_is_run(tmp_path):
    folder = tmp_path / "fast"
    golden().save(folder)
    for name in ("processing_action_tokenizer.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(f"open({str(tmp_path / MARK)!r}, 'w').close()\n")
    config = json.loads((folder / "processor_config.json").read_text())
    config["auto_map"] = {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(config))
    assert FastTokenizer.load(folder).encode(TENSORS["actions"][:1]) == STORED["tokens"][:1]
    assert not (tmp_path / MARK).exists()
    exec((folder / "conftest.py").read_text())
    assert (tmp_path / MARK).exists()  # the trap works


def test_settings_for_texts_change_nothing(tmp_path):
    """Truncation and padding in the file are set aside, as transformers does; the file may lie below."""
    tokenizer = golden()
    tokenizer.bpe.enable_truncation(3)
    tokenizer.bpe.enable_padding(length=99)
    tokenizer.save(tmp_path)
    (tmp_path / "bpe_tokenizer").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "bpe_tokenizer" / "tokenizer.json")
    assert FastTokenizer.load(tmp_path).encode(TENSORS["actions"], lossy=True) == STORED["tokens"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("processor_config.json", None, "no file processor_config.json in .*copy it whole"),
        ("tokenizer.json", None, "no file tokenizer.json in .* which holds processor_config.json"),
        ("processor_config.json", "{", "processor_config.json is not JSON"),
        ("tokenizer.json", "[]", "tokenizer.json holds a JSON value read as list"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer .*copy it whole"),
        ("tokenizer.json", Tokenizer(models.WordLevel()).to_str(), "WordLevel .* expected byte-level BPE"),
        ("processor_config.json", '{"scale": 10}', "lacks vocab_size, min_token"),
        (
            "processor_config.json",
            '{"scale": -1, "vocab_size": 2, "min_token": 0}',
            "scale=-1.*expected scale above 0.*write the folder again",
        ),
    ],
)
def test_damaged_folders_say_what_is_wrong(tmp_path, file, content, message):
    golden().save(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FastTokenizer.load(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for source in (tmp_path / "absent", tmp_path / "file", "no such thing"):
        with pytest.raises(FileNotFoundError, match="expected a FAST tokenizer's, or a hub 'owner/name'"):
            FastTokenizer.load(source)


def test_the_hub_is_asked_for_no_code(tmp_path, monkeypatch):
    golden().save(tmp_path)
    asked = {}

    def snapshot(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    FastTokenizer.load("physical-intelligence/fast", revision="abc")
    assert (asked["repository"], asked["revision"]) == ("physical-intelligence/fast", "abc")
    assert all(pattern.endswith(".json") and "*" not in pattern for pattern in asked["allow_patterns"])


def test_the_hub_out_of_reach_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set.*`hf download nobody/nothing"):
        FastTokenizer.load("nobody/nothing")


@pytest.mark.slow
def test_folders_of_transformers_load(tmp_path):
    """As the published class and LeRobot's copy write them, each with its own name for the vocabulary."""
    action_tokenizer = pytest.importorskip("lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer")
    copy = action_tokenizer.UniversalActionProcessor

    class Published(action_tokenizer.ProcessorMixin):
        def __init__(self, bpe_tokenizer, scale=10, vocab_size=1024, min_token=0, *, time_horizon=None):
            self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
            self.time_horizon = time_horizon
            super().__init__(bpe_tokenizer)

    text = action_tokenizer.PreTrainedTokenizerFast(
        tokenizer_object=golden().bpe, clean_up_tokenization_spaces=False
    )
    for number, kind in enumerate((copy, Published)):
        folder = tmp_path / str(number)
        kind(text, 10, VOCABULARY, LOWEST, time_horizon=HORIZON).save_pretrained(folder)
        back = FastTokenizer.load(folder)
        assert back.encode(TENSORS["actions"], lossy=True) == STORED["tokens"]
        assert (back.min_token, back.horizon, back.action_dim) == (LOWEST, HORIZON, None)
    assert (tmp_path / "1" / "bpe_tokenizer" / "tokenizer.json").exists()
    golden().save(tmp_path / "ours")
    assert copy.from_pretrained(tmp_path / "ours")(TENSORS["actions"].numpy()) == STORED["tokens"]


# A language model's ids


def test_language_ids_are_openpis():
    """PaliGemma's 257,152 ids, of which FAST leaves the last 128."""
    tokens, language = [[5, 0, 2047, 300]], [[257018, 257023, 254976, 256723]]
    assert to_language_ids(tokens, 257_152) == language
    assert from_language_ids(language, 257_152) == tokens
    assert from_language_ids(torch.tensor(language), 257_152) == tokens
    assert to_language_ids(tokens, 3000, skip=0) == [[2994, 2999, 952, 2699]]


def test_language_ids_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"token 872 of sample 1 is outside 0 … 871") as refused:
        to_language_ids([[0], [872]], 1000)
    assert "vocab_size of at most 872, or another skip than 128" in str(refused.value)
    assert "strict" not in str(refused.value)  # there is no such thing here
    assert to_language_ids([[0], [872]], 1000, skip=127) == [[872], [0]]
    with pytest.raises(ValueError, match=r"language id 900 of sample 0 is outside 0 … 871.*strict=False"):
        from_language_ids([[900]], 1000)
    assert from_language_ids([[900]], 1000, strict=False) == [[-29]]
    assert golden().decode([[-29]], strict=False)[1].item()


def test_importing_fast_leaves_the_tokenizers_library_alone():
    """Nothing heavier than torch at the top of the file."""
    body = ast.parse(Path(fast.__file__).read_text(encoding="utf-8")).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    assert "torch" in names
    assert not {"tokenizers", "transformers", "huggingface_hub", "scipy"} & {n.split(".")[0] for n in names}
