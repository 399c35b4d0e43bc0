"""Self-checks of chapter 5, VQ-BeT: perplexity of codes, the chance of a drawn name, dead entries revived."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minivla.exercises.verdict import verdict

USES = {
    "four codes used alike": ([0, 1, 2, 3], 4, 4.0),
    "four of eight codes used alike, the others never": ([0, 2, 4, 6], 8, 4.0),
    "one code only": ([5, 5, 5], 8, 1.0),
    "one code half of the time, two a quarter each": ([0, 0, 1, 2], 4, 2 * math.sqrt(2)),
}


def check_perplexity(perplexity: Callable[[Tensor, int], float]) -> None:
    """Print whether `perplexity(codes (N,), size)` is the exponential of the codes' entropy.

    A code that is never used counts as nothing, not as nan.
    """

    def complaint() -> str | None:
        for name, (codes, size, wanted) in USES.items():
            given = float(perplexity(torch.tensor(codes), size))
            if not abs(given - wanted) < 1e-3:
                return f"{name}: {given:.2f}, expected {wanted:.2f}"
        return None

    verdict(complaint)


def check_chance(chance: Callable[[Tensor, Tensor, float], float]) -> None:
    """Print whether `chance(logits (G, C), codes (G,), temperature)` is the probability of drawing that name.

    Each level's code is drawn from the softmax of its logits, those after the codes before, divided by the
    temperature.
    """

    def complaint() -> str | None:
        even, sure = torch.zeros(2, 4), torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0]])
        likely = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
        cases = (
            ("two levels of four even codes", even, (0, 3), 1.0, 1 / 16),
            ("two levels, both sure of these codes", sure, (0, 1), 1.0, 0.9993),
            ("two levels, each at 3 : 1 for these codes", likely, (0, 1), 1.0, 9 / 16),
            ("two levels, at 3 : 1 for the first code and 1 : 3 for the second", likely, (0, 0), 1.0, 3 / 16),
            ("two levels, each at 3 : 1, at temperature 0.5", likely, (0, 1), 0.5, 0.81),
            ("one level, at 3 : 1, at temperature 0.5", likely[:1], (0,), 0.5, 0.9),
        )
        for name, logits, codes, temperature, wanted in cases:
            given = float(chance(logits.clone(), torch.tensor(codes), temperature))
            if not abs(given - wanted) < 1e-3:
                return f"{name}: {given:.3f}, expected {wanted:.3f}"
        return None

    verdict(complaint)


def check_revive(revive: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Print whether `revive(book (C, D), counts (C,), x (N, D))` puts dead entries where they are needed.

    An entry is dead when its count is 0. The dead ones, in their order, become the vectors of x that are
    farthest from their nearest living entry, the farthest first; the living stay, and `book` is left alone.
    """

    def complaint() -> str | None:
        x = torch.tensor([[0.0, 0.1], [1.0, 0.0], [0.0, 5.0], [4.0, 0.0], [9.0, 9.0]])
        book = torch.tensor([[0.0, 0.0], [70.0, 70.0], [1.0, 0.0], [9.0, 9.1]])
        cases = (
            ("all entries live", [1, 2, 3, 4], book),
            ("entry 1 is dead", [2, 0, 1, 1], book.index_put((torch.tensor([1]),), x[2])),
            # Entry 3 is near the last vector, but dead: that vector is the worst served of all.
            (
                "entries 1 and 3 are dead",
                [2, 0, 1, 0],
                book.index_put((torch.tensor([1, 3]),), x[torch.tensor([4, 2])]),
            ),
        )
        for name, counts, wanted in cases:
            given = revive(copy := book.clone(), torch.tensor(counts), x.clone())
            if not torch.equal(copy, book):
                return "the codebook was changed in place; work on a copy"
            if not torch.is_tensor(given) or given.shape != book.shape:
                return f"expected a codebook of shape {tuple(book.shape)} back"
            for entry, (found, expected) in enumerate(zip(given.tolist(), wanted.tolist(), strict=True)):
                if not torch.allclose(torch.tensor(found), torch.tensor(expected)):
                    return f"{name}: entry {entry} is {_shown(found)}, expected {_shown(expected)}"
        return None

    verdict(complaint)


def _shown(vector: list[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in (round(value, 2) for value in vector)) + ")"
