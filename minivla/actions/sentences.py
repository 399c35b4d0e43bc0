"""A chunk of actions as a sentence of a language model, and back.

    <bos> "Action: " [FAST tokens, as the last ids of the vocabulary] "|" <eos>

What a model says may be no such sentence. Both code bases that talk like this make some chunk of it all the
same, each in its own way; here the reason is told beside the chunk.
Sources: LeRobot 0.6 `processor/tokenizer_processor.py` and `policies/pi0_fast/modeling_pi0_fast.py`; openpi
`models/tokenizer.py`, FASTTokenizer.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minivla.actions.fast import FastTokenizer, from_language_ids, to_language_ids

OPENING, END, PAD = "Action: ", "|", 0


@dataclass(frozen=True)
class Marks:
    """Ids around the actions: a sentence's first, "Action: ", "|" and a sentence's last."""

    begin: int
    opening: list[int]
    end: int
    stop: int

    @classmethod
    def of(cls, text: Any) -> Marks:
        """Those of a tokenizer of words. Raises ValueError when it lacks one."""
        end, begin, stop = text.convert_tokens_to_ids(END), text.bos_token_id, text.eos_token_id
        if end in (None, text.unk_token_id) or begin is None or stop is None:
            raise ValueError(f"the text tokenizer lacks '{END}', bos or eos; expected one like PaliGemma's")
        return cls(begin, text.encode(OPENING, add_special_tokens=False), end, stop)


@dataclass(frozen=True)
class Sentences:
    """Chunks (B, H, A), normalised, to B rows of ids, and back.

    fast, marks: FAST's tokens, and what stands around them; vocabulary, skip: how many ids the language model
    has, and how many of the last FAST leaves alone; openpi: whose way, openpi's or LeRobot's.
    """

    fast: FastTokenizer
    marks: Marks
    vocabulary: int
    skip: int
    openpi: bool = False

    def write(self, chunks: Tensor) -> list[list[int]]:
        """Chunks (B, H, A) as B rows of ids; openpi's lack <bos>, since they go on from a prompt.

        Warns of chunks that the FAST vocabulary cannot spell, and writes them damaged, as upstream. Raises
        ValueError for chunks of another shape or not finite.
        """
        try:
            tokens = self.fast.encode(chunks)
        except ValueError as error:
            tokens = self.fast.encode(chunks, lossy=True)
            warnings.warn(f"a chunk is written damaged, as upstream does: {error}", stacklevel=3)
        words, marks = to_language_ids(tokens, self.vocabulary, self.skip), self.marks
        begin = [] if self.openpi else [marks.begin]
        return [[*begin, *marks.opening, *row, marks.end, marks.stop] for row in words]

    def read(self, ids: Tensor, horizon: int, action_dim: int) -> tuple[Tensor, dict[int, str]]:
        """What ids (B, L) say, without <bos>: chunks (B, H, A), and for each malformed sample the reason.

        "|" ends a sentence. LeRobot takes every "Action: " out of it, openpi takes what follows the first.
        Too few or too many codes are filled up or cut off; openpi makes that chunk zeros.
        """
        rows, length = ids.tolist(), "zeros" if self.openpi else "pad"
        tokens = self.tokens(ids)
        chunks, wrong = self.fast.decode(tokens, horizon, action_dim, wrong_length=length, strict=False)
        reasons = {int(i): f"it does not spell {horizon} × {action_dim} codes" for i in wrong.nonzero()}
        reasons |= {i: f"it never says '{END}'" for i, row in enumerate(rows) if self.marks.end not in row}
        reasons |= dict.fromkeys(self.without_opening(ids), f"it does not begin with '{OPENING}'")
        return chunks.to(ids.device), reasons

    def tokens(self, ids: Tensor) -> list[list[int]]:
        """FAST's tokens in what ids (B, L) say; an id that stands for none becomes one below 0."""
        said = [self._said_by_openpi(row) if self.openpi else self._said(row) for row in ids.tolist()]
        return from_language_ids(said, self.vocabulary, self.skip, strict=False)

    def without_opening(self, ids: Tensor) -> list[int]:
        """Samples of ids (B, L) that do not begin as they should. LeRobot looks at the first two ids; in
        openpi "Action: " may stand anywhere.
        """
        opening, rows = self.marks.opening, ids.tolist()
        if self.openpi:
            return [i for i, row in enumerate(rows) if _until(row, opening) == row]
        return [i for i, row in enumerate(rows) if row[:2] != opening[:2]]

    def _said(self, row: list[int]) -> list[int]:
        row, opening, kept = _until(row, [self.marks.end]), self.marks.opening, list[int]()
        while row:
            found = row[: len(opening)] == opening
            kept += [] if found else row[:1]
            row = row[len(opening) if found else 1 :]
        return kept

    def _said_by_openpi(self, row: list[int]) -> list[int]:
        """openpi goes through the text, where <pad>, <bos> and <eos> do not show; the same, if text and ids
        translate into each other without loss.
        """
        marks = self.marks
        after = row[len(_until(row, marks.opening)) + len(marks.opening) :]
        shown = _until(_until(after, marks.opening), [marks.end])
        return [each for each in shown if each not in (PAD, marks.begin, marks.stop)]


def _until(row: list[int], wanted: list[int]) -> list[int]:
    """What comes before the first place where `wanted` stands; all, when it stands nowhere."""
    size = len(wanted)
    return row[: next((i for i in range(len(row)) if row[i : i + size] == wanted), len(row))]
