"""Self-checks of chapter 10, FAST: the largest code, what a token spells, how many tokens are enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minivla.actions.fast import dct
from minivla.exercises.verdict import verdict


def check_largest_code(largest_code: Callable[[int, float], int]) -> None:
    """Check `largest_code(horizon, scale)`: the largest code of any chunk of that length in [-1, 1]."""

    def complaint() -> str | None:
        for horizon, scale in ((16, 10), (4, 10), (50, 10), (16, 3), (1, 10), (25, 20)):
            given = int(largest_code(horizon, scale))
            wanted = int((dct(torch.ones(1, horizon, 1, dtype=torch.float64)) * scale).round().max())
            if given != wanted:
                return (
                    f"largest_code({horizon}, {scale}) is {given}; a chunk of {horizon} ones has the code "
                    f"{wanted} at frequency 0, and no chunk in [-1, 1] has a larger one"
                )
        return None

    verdict(complaint)


def check_spell(spell: Callable[[int, Sequence[tuple[int, int]], int], Sequence[int]]) -> None:
    """Check `spell(token, merges, first)`: the symbols, all below `first`, that a token stands for; token
    first + i is the pair merges[i].
    """

    def complaint() -> str | None:
        merges = [(1, 2), (10, 3), (10, 11), (12, 12)]
        cases = (
            (4, [4], "a token below `first` is a symbol, and stands for itself"),
            (10, [1, 2], "it is the pair merges[0]"),
            (11, [1, 2, 3], "it is 10 and 3, and 10 is a pair itself"),
            (12, [1, 2, 1, 2, 3], "it is 10 and 11, and both are pairs themselves"),
            (13, [1, 2, 1, 2, 3] * 2, "it is 12 twice"),
        )
        for token, wanted, why in cases:
            if (given := [int(symbol) for symbol in spell(token, merges, 10)]) != wanted:
                return f"spell({token}, {merges}, 10) is {given}, expected {wanted}: {why}"
        return None

    verdict(complaint)


def check_enough(enough: Callable[[Tensor, float], int]) -> None:
    """Check `enough(partial, tolerance)`: partial (tokens + 1, H, A) is the chunk after 0, 1, … all tokens;
    the fewest tokens from which on no number is off the last chunk by more than the tolerance.
    """

    def complaint() -> str | None:
        whole = torch.zeros(3, 2)
        small, large, one = whole + 0.05, whole + 0.5, whole.clone()
        one[2, 1] = 0.3
        cases = (
            ([large, small, whole], 1, "after one token all is within 0.1"),
            ([large, large, whole], 2, "after one token all is off by 0.5"),
            ([whole, whole, whole], 0, "no token is needed"),
            ([large, one, whole], 2, "after one token a single number is off by 0.3"),
            ([large, -large, whole], 2, "−0.5 is off as well"),
            ([large, small, large, whole], 3, "after one token all is well, but the second spoils it again"),
        )
        for chunks, wanted, why in cases:
            if (given := int(enough(torch.stack(chunks), 0.1))) != wanted:
                return f"it says {given} of {len(chunks) - 1} tokens, expected {wanted}: {why}"
        return None

    verdict(complaint)
