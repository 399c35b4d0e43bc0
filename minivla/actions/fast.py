"""FAST: a chunk of actions becomes a short text, and back.

Neighbouring actions are nearly the same, so a token for each would say little. FAST turns every dimension
into frequencies, rounds them, writes the integers as characters, low frequencies of all dimensions first, and
lets byte-pair encoding (BPE) name the strings that come often: a smooth chunk takes few tokens.

    chunk (H, A) → dct → round(scale × ·) → minus min_token → H × A characters → tokens

Source: Pertsch et al. 2025, "FAST: Efficient Action Tokenization for Vision-Language-Action Models" (arXiv
2501.09747); the class UniversalActionProcessor that travels with the hub's `physical-intelligence/fast`, of
which LeRobot 0.6 has a copy (`policies/molmoact2/molmoact2_hf_model/action_tokenizer.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minivla.actions.flow import expect_one_of
from minivla.files import atomic_folder, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Rows = Sequence[Sequence[int]] | Tensor  # ids of B samples; as lists, each with a length of its own

WRONG_LENGTH = ("pad", "zeros")
BROKEN = "\ufffd"  # what half a character is read as
NO_CHARACTER = 0xD800  # from here on Unicode has gaps, and no code of a normalised chunk comes near
TOO_LARGE = 2**31  # no code, even before min_token is taken off
NO_TOKEN = 2**32  # ids are unsigned and this wide: on others upstream's decoder fails

PROCESSOR, VOCABULARY = "processor_config.json", "tokenizer.json"
BELOW = f"bpe_tokenizer/{VOCABULARY}"  # where transformers 5 puts it when it saves the published class
PUBLISHED, UPSTREAM = "physical-intelligence/fast", "UniversalActionProcessor"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
STRICT = "for what a network said, read it with strict=False"
MEND = "write the folder again (FastTokenizer.save, lerobot-train-tokenizer) or copy it whole"


def dct_matrix(horizon: int) -> Tensor:
    """The orthonormal DCT-II: row k is a cosine of k half turns over the H steps. (H, H), float64."""
    step = torch.arange(horizon, dtype=torch.float64)
    waves = torch.cos(torch.outer(step, step + 0.5) * (math.pi / horizon)) * math.sqrt(2 / horizon)
    waves[0] /= math.sqrt(2)
    return waves


def dct(chunk: Tensor) -> Tensor:
    """How much of each frequency is in a chunk: (B, H, A) over time to (B, H, A) over frequency.

    Computed in float64, returned in the chunk's (floating) dtype.
    """
    return (dct_matrix(chunk.shape[-2]) @ chunk.cpu().double()).to(chunk)


def inverse_dct(coefficients: Tensor) -> Tensor:
    """The chunk (B, H, A) of given frequencies (B, H, A): the inverse of `dct`."""
    return (dct_matrix(coefficients.shape[-2]).T @ coefficients.cpu().double()).to(coefficients)


@dataclass(frozen=True, eq=False)
class FastTokenizer:
    """Chunks to tokens and back.

    bpe: the vocabulary; scale: codes to a unit of the coefficients; vocab_size: how many tokens were asked
    for; min_token: the code that character 0 stands for; horizon H and action_dim A: what `decode` makes
    unless told (upstream also remembers the shape it saw last; here nothing is remembered). Raises ValueError
    for sizes and scales that are none.
    """

    bpe: Tokenizer = field(repr=False)
    scale: float = 10
    vocab_size: int = 1024
    min_token: int = 0
    horizon: int | None = None
    action_dim: int | None = None

    def __post_init__(self) -> None:
        sizes = [n for n in (self.vocab_size, self.horizon, self.action_dim) if n is not None]
        whole = all(type(n) is int for n in (*sizes, self.min_token)) and min(sizes) > 0
        if not whole or type(self.scale) not in (int, float) or not 0 < self.scale < math.inf:
            raise ValueError(
                f"{self}: expected scale above 0, vocab_size, horizon and action_dim whole numbers above 0 "
                "(the latter two may be None), min_token a whole number"
            )

    @classmethod
    def fit(cls, chunks: Tensor, scale: float = 10, vocab_size: int = 1024) -> FastTokenizer:
        """A tokenizer whose vocabulary is learned from normalised chunks (B, H, A).

        As upstream, BPE begins with the characters themselves as its alphabet, though it then works on
        symbols for their bytes: most of these entries are never used, and a code that `chunks` lack may have
        no symbol (see `encode`). Raises ValueError as `encode`, and when vocab_size cannot hold alphabet and
        symbols, where upstream may make a larger vocabulary than it was asked for.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        codes = _quantise(chunks, scale)
        low, high = int(codes.min()), int(codes.max())
        texts = [_spell(row - low) for row in codes.flatten(1)]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(code) for code in range(high - low + 1)],
            max_token_length=10_000,
        )
        bpe.train_from_iterator(texts, trainer=trainer)
        if (needed := bpe.get_vocab_size()) > vocab_size:
            raise ValueError(
                f"vocab_size is {vocab_size}, and codes from {low} to {high} need {needed} before anything "
                "is merged. Normalise the chunks to about [-1, 1], then raise vocab_size or lower scale"
            )
        return cls(bpe, scale, vocab_size, low, *chunks.shape[1:])

    def codes(self, chunks: Tensor) -> Tensor:
        """The rounded coefficients, frequency by dimension: (B, H, A) in, (B, H, A) int64 out.

        A coefficient on the border of two codes, to the last bit, may go either way: upstream adds up in
        another order, and in float32 when given that. Errors as `encode`.
        """
        return _quantise(chunks, self.scale)

    def encode(self, chunks: Tensor, *, lossy: bool = False) -> list[list[int]]:
        """The tokens of normalised chunks (B, H, A): B lists of ids.

        Raises ValueError for chunks that are not (B, H, A) and finite, and for codes that this vocabulary
        cannot spell. With `lossy` those pass as they do upstream, which says nothing: a code below min_token
        is raised to it, and one without a symbol is left out, so that what follows it moves up and `decode`
        finds too few.
        """
        shifted = self.codes(chunks).flatten(1) - self.min_token
        texts = [_spell(row) for row in shifted]
        tokens = [self.bpe.encode(text).ids for text in texts]
        for sample, row in enumerate(shifted if not lossy else ()):
            if row.min() < 0 or self._read(tokens[sample]) != texts[sample]:
                raise ValueError(self._unspellable(row, sample))
        return tokens

    def decode(
        self,
        tokens: Rows,
        horizon: int | None = None,
        action_dim: int | None = None,
        *,
        wrong_length: str = "pad",
        strict: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The chunks that B lists of tokens stand for: (chunks (B, H, A) float32, malformed (B,) bool).

        Where they read as too few or too many codes, "pad" (LeRobot's pi0_fast) fills up with codes of 0 or
        cuts off, "zeros" (openpi) makes the whole chunk zeros. Half a character reads as a code of some
        65,000, a wild action, and stays, as in both. All these samples are `malformed`.

        Raises ValueError for an id outside the vocabulary, and for an H or A unknown or below 1. With
        `strict=False`, for what a network said, no id raises: as upstream, one too high is skipped, one below
        0 makes the chunk zeros, and the sample is malformed.
        """
        expect_one_of("wrong_length", wrong_length, WRONG_LENGTH)
        horizon = self.horizon if horizon is None else horizon
        action_dim = self.action_dim if action_dim is None else action_dim
        if not horizon or not action_dim or min(horizon, action_dim) < 1:
            raise ValueError(f"horizon is {horizon}, action_dim is {action_dim}; give both, each at least 1")
        size = horizon * action_dim
        read = [self._coefficients(row, size, wrong_length) for row in self._ids(tokens, strict)]
        codes = torch.tensor([row for row, _ in read], dtype=torch.float64).reshape(-1, horizon, action_dim)
        malformed = torch.tensor([repaired for _, repaired in read], dtype=torch.bool)
        return inverse_dct(codes / self.scale).float(), malformed

    def token_spans(self, tokens: Sequence[int], *, strict: bool = True) -> list[list[int]]:
        """Which coefficients each token of one sample spells: for each token, the flat indices k × A + a.

        A code from 128 on takes two bytes or more; tokens that share them all name it.
        Raises ValueError for an id outside the vocabulary; with `strict=False` it spells nothing.
        """
        symbols, spans, begun = _byte_symbols(), list[list[int]](), 0
        for token in self._ids([tokens], strict)[0]:
            spelled, first = self._bytes(token, symbols), begun
            begun += sum(map(_begins, spelled))
            shared = bool(spelled) and not _begins(spelled[0]) and first > 0
            spans.append(list(range(first - shared, begun)))
        return spans

    def save(self, folder: str | Path) -> None:
        """Write the folder in the published format, whole or not at all; what was in the folder is gone.

        No code is written: `auto_map` names the repository that has it, for transformers' AutoProcessor.
        """
        named = {"processor_class": UPSTREAM}
        config = {
            **{name: getattr(self, name) for name in ("scale", "vocab_size", "min_token", "action_dim")},
            "time_horizon": self.horizon,
            "auto_map": {"AutoProcessor": f"{PUBLISHED}--processing_action_tokenizer.{UPSTREAM}"},
        }
        text = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # it would drop spaces, which are codes here
        }
        files = {
            PROCESSOR: named | config,
            "tokenizer_config.json": named | text,
            "special_tokens_map.json": {},
        }
        with atomic_folder(folder) as fresh:
            self.bpe.save(str(fresh / VOCABULARY))
            for name, content in files.items():
                (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> FastTokenizer:
        """Read a folder in the published format, or fetch it from the hub: "owner/name", with its `revision`.

        Folders of `save`, of `lerobot-train-tokenizer` and of the published class load alike; no code in them
        is fetched or run. Raises FileNotFoundError for what is missing or out of reach, ValueError for what
        is damaged.
        """
        folder = _locate(source, revision)
        config = _read_file(folder / PROCESSOR)
        if missing := [name for name in ("scale", "vocab_size", "min_token") if name not in config]:
            raise ValueError(f"{folder / PROCESSOR} lacks {', '.join(missing)}: no FAST tokenizer's; {MEND}")
        numbers = config["scale"], config["vocab_size"], config["min_token"]
        try:
            return cls(_read_bpe(folder), *numbers, config.get("time_horizon"), config.get("action_dim"))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; {MEND}") from error

    def _ids(self, tokens: Rows, strict: bool) -> list[list[int]]:
        rows = _rows(tokens)
        if strict:
            _expect_below(self.bpe.get_vocab_size(), rows, STRICT)
        return rows

    def _read(self, row: list[int]) -> str:
        return str(self.bpe.decode(row, skip_special_tokens=False))

    def _coefficients(self, row: list[int], size: int, wrong_length: str) -> tuple[list[int], bool]:
        """`size` codes, and whether they are malformed."""
        if any(not 0 <= token < NO_TOKEN for token in row):
            return [0] * size, True
        text, skipped = self._read(row), max(row, default=0) >= self.bpe.get_vocab_size()
        kept = "" if len(text) != size and wrong_length == "zeros" else text[:size]
        codes = [ord(letter) + self.min_token for letter in kept] + [0] * (size - len(kept))
        return codes, skipped or len(text) != size or BROKEN in text

    def _bytes(self, token: int, symbols: dict[str, int]) -> bytes:
        spelled = (0 <= token < NO_TOKEN and self.bpe.id_to_token(token)) or ""
        if all(letter in symbols for letter in spelled):
            return bytes(symbols[letter] for letter in spelled)
        return spelled.encode()  # a raw character of the alphabet

    def _unspellable(self, row: Tensor, sample: int) -> str:
        codes = sorted(set(row.tolist()))
        lost = [code for code in codes if code < 0 or self._read(self.bpe.encode(chr(code)).ids) != chr(code)]
        named = ", ".join(str(code + self.min_token) for code in lost[:8]) + ", …" * (len(lost) > 8)
        return (
            f"sample {sample} holds codes that this vocabulary cannot spell: {named} (its lowest is "
            f"{self.min_token}). Normalise the chunks as those it was fitted on, fit it on chunks like "
            "these, or pass lossy=True to lose them as upstream does"
        )


def to_language_ids(tokens: Rows, vocabulary: int, skip: int = 128) -> list[list[int]]:
    """FAST tokens as ids of a language model: they take over the end of its vocabulary, in reverse order.

    `vocabulary`: how many ids the language model has; `skip`: how many at its end stay what they are (of
    PaliGemma's 257,152 the 128 that name segments). Raises ValueError for a token that finds no room.
    Source: openpi `models/tokenizer.py`, FASTTokenizer.
    """
    rows, room = _rows(tokens), vocabulary - skip
    mend = f"take a FAST tokenizer with a vocab_size of at most {room}, or another skip than {skip}"
    _expect_below(room, rows, mend)
    return [[room - 1 - token for token in row] for row in rows]


def from_language_ids(ids: Rows, vocabulary: int, skip: int = 128, *, strict: bool = True) -> list[list[int]]:
    """The inverse of `to_language_ids`.

    Raises ValueError for an id that stands for no token. With `strict=False`, for what a network said, it
    becomes one below 0, which `FastTokenizer.decode(…, strict=False)` takes.
    """
    rows, room = _rows(ids), vocabulary - skip
    if strict:
        _expect_below(room, rows, STRICT, "language id")
    return [[room - 1 - each for each in row] for row in rows]


def _quantise(chunks: Tensor, scale: float) -> Tensor:
    if chunks.dim() != 3 or not chunks.numel() or not chunks.is_floating_point():
        kind = f"{tuple(chunks.shape)} of {chunks.dtype}"
        raise ValueError(f"chunks are {kind}; expected (B, H, A), none of them 0, of floating point")
    scaled = dct(chunks.detach().cpu().double()) * scale
    if len(wild := (~(scaled.abs() < TOO_LARGE)).flatten(1).any(1).nonzero()):
        raise ValueError(
            f"sample {int(wild[0])} holds NaN, infinity or far too large a number; normalise the chunks first"
        )
    return scaled.round().long()  # half to even, as numpy


def _spell(shifted: Tensor) -> str:
    if (highest := int(shifted.max())) >= NO_CHARACTER:
        raise ValueError(
            f"a code lies {highest} above the lowest, and only {NO_CHARACTER} have a character; normalise "
            "the chunks first"
        )
    return "".join(map(chr, shifted.clamp(min=0).tolist()))


def _rows(given: Rows) -> list[list[int]]:
    return [[int(each) for each in row] for row in given]


def _expect_below(size: int, rows: list[list[int]], mend: str, what: str = "token") -> None:
    wrong = [(each, sample) for sample, row in enumerate(rows) for each in row if not 0 <= each < size]
    for each, sample in wrong[:1]:
        raise ValueError(f"{what} {each} of sample {sample} is outside 0 … {size - 1}; {mend}")


def _byte_symbols() -> dict[str, int]:
    """The printable letter by which byte-level BPE, since GPT-2, writes each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _begins(byte: int) -> bool:
    return byte & 0b1100_0000 != 0b1000_0000  # the first byte of a character in UTF-8


def _locate(source: str | Path, revision: str | None) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not (isinstance(source, str) and HUB_ID.fullmatch(source)):
        raise FileNotFoundError(f"no folder '{source}'; expected a FAST tokenizer's, or a hub 'owner/name'")
    from huggingface_hub import constants, snapshot_download

    wanted, offline = [PROCESSOR, VOCABULARY, BELOW], constants.HF_HUB_OFFLINE
    try:
        path = snapshot_download(source, revision=revision, allow_patterns=wanted, local_files_only=offline)
    except Exception as error:
        why = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else "the hub did not give it"
        said = next(iter(str(error).strip().splitlines()), "")
        raise FileNotFoundError(
            f"no folder '{source}', nor a hub repository: {why} ({type(error).__name__}: {said}). Where the "
            f"hub can be reached: `hf download {source} --local-dir FOLDER`; copy FOLDER here and load that"
        ) from error
    return Path(path)


def _read_bpe(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    path = folder / (BELOW if (folder / BELOW).is_file() else VOCABULARY)
    content = _read_file(path)
    try:
        bpe = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no narrower kind
        raise ValueError(f"{path.name} is no tokenizer ({error})") from error
    if not isinstance(bpe.model, models.BPE) or not isinstance(bpe.decoder, decoders.ByteLevel):
        kind = f"{type(bpe.model).__name__} with a decoder {type(bpe.decoder).__name__}"
        raise ValueError(f"{path.name} holds {kind}, expected byte-level BPE")
    bpe.no_truncation()  # transformers, and so upstream, sets both aside
    bpe.no_padding()
    return bpe


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        wanted = f"a FAST tokenizer's folder holds {PROCESSOR} and {VOCABULARY}"
        raise FileNotFoundError(f"{error}; {wanted}; {MEND}") from error
