"""A word-level instruction encoder, for families that came without language.

A few hundred sentences over a few dozen words need no language model: word embeddings, one convolution over
neighbouring words (so that "red block" and "green square" are told from "green block" and "red square"), a
maximum.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

PADDING, UNKNOWN = 0, 1


def split_words(text: str) -> list[str]:
    """Lower-case words of a sentence, without punctuation.

    >>> split_words("Put the RED block, please.")
    ['put', 'the', 'red', 'block', 'please']
    """
    return re.findall(r"[a-z0-9]+", text.lower())


class InstructionEncoder(nn.Module):
    """Sentence to vector. `vocabulary`: the known words; width D of the result, `embedding` of a word."""

    def __init__(self, vocabulary: Sequence[str], width: int, *, embedding: int = 32) -> None:
        super().__init__()
        if len(set(vocabulary)) != len(vocabulary):
            raise ValueError("vocabulary holds a word twice; give each word once")
        self.index = {word: i + 2 for i, word in enumerate(vocabulary)}
        self.embed = nn.Embedding(len(vocabulary) + 2, embedding, padding_idx=PADDING)
        self.neighbours = nn.Conv1d(embedding, width, kernel_size=3, padding=1)

    def encode(self, task: Sequence[str]) -> Tensor:
        """Word numbers of B sentences, padded with 0; unknown words are 1. Returns (B, L) int64."""
        texts = isinstance(task, Sequence) and all(isinstance(text, str) for text in task)
        if isinstance(task, str) or not texts:
            raise TypeError(f"task is {task!r}, expected a list of sentences, one for each sample")
        rows = [[self.index.get(word, UNKNOWN) for word in split_words(text)] for text in task]
        longest = max(1, *(len(row) for row in rows))
        return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])

    def forward(self, task: Sequence[str]) -> Tensor:
        """task: B sentences. Returns (B, D)."""
        numbers = self.encode(task).to(self.embed.weight.device)
        words = rearrange(self.embed(numbers), "batch word width -> batch width word")
        features = self.neighbours(words).masked_fill(
            rearrange(numbers == PADDING, "b w -> b 1 w"), float("-inf")
        )
        return reduce(features, "batch width word -> batch width", "max").clamp(min=-10)
