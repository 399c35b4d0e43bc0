"""Self-checks of chapter 7, a language model that sees: patches as rows, a prefix's mask, the chance of each
word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from minivla.exercises.verdict import verdict


def check_patches(patches: Callable[[Tensor, int], Tensor]) -> None:
    """Check `patches(pictures, side)`: pictures (B, 3, H, W) cut into squares, a row each in reading order,
    (B, L, 3 · side · side), whose product with a convolution's flattened weights is that convolution.
    """

    def complaint() -> str | None:
        generator = torch.Generator().manual_seed(0)
        for batch, height, width, side in ((1, 4, 4, 2), (2, 6, 4, 2), (3, 9, 12, 3), (2, 8, 8, 8)):
            pictures = torch.randn(batch, 3, height, width, generator=generator)
            length, inner = (height // side) * (width // side), 3 * side * side
            given = patches(pictures, side)
            if tuple(given.shape) != (batch, length, inner):
                return (
                    f"for pictures {tuple(pictures.shape)} and side {side} it returns shape "
                    f"{tuple(given.shape)}, expected {(batch, length, inner)}"
                )
            weight = torch.randn(5, 3, side, side, generator=generator)
            wanted = F.conv2d(pictures, weight, stride=side).flatten(2).mT
            got = given @ weight.flatten(1).T
            wrong = (got - wanted).abs().amax(dim=(0, 2)) > 1e-4
            if wrong.any():
                number = int(wrong.nonzero()[0])
                return (
                    f"patch {number} of a {height} × {width} picture, side {side}, is not what the "
                    f"convolution sees there{_why(given, pictures, side, number)}"
                )
        return None

    verdict(complaint)


def check_prefix_mask(prefix_mask: Callable[[Tensor, int], Tensor]) -> None:
    """Check `prefix_mask(valid, suffix)`: valid (P,) bool, which places of the prefix are real, and the
    number of words that follow it; to (L, L) bool with L = P + suffix, True where a row may look at a
    column's. What the rows of padding hold does not matter.
    """

    def complaint() -> str | None:
        for real, suffix in (((1, 1, 1), 2), ((1, 1, 0), 2), ((1, 0, 1, 1), 3), ((1,), 0)):
            valid = torch.tensor(real, dtype=torch.bool)
            size = len(real) + suffix
            given = prefix_mask(valid, suffix)
            if tuple(given.shape) != (size, size) or given.dtype != torch.bool:
                told = f"{given.dtype} of shape {tuple(given.shape)}"
                return f"it returns {told}, expected torch.bool of shape ({size}, {size})"
            every = torch.cat((valid, torch.ones(suffix, dtype=torch.bool)))
            wrong = (given != _prefix_mask(valid, suffix)) & every[:, None]
            if wrong.any():
                query, key = wrong.nonzero()[0].tolist()
                may = "may look" if given[query, key] else "may not look"
                return (
                    f"with {_shown(real)} and {suffix} words after it, token {query} {may} at token {key}: "
                    f"{_reason(every, len(real), query, key)}"
                )
        return None

    verdict(complaint)


def check_chances(chances: Callable[[Tensor, float, int], Tensor]) -> None:
    """Check `chances(logits, temperature, most)`: of logits (V,) the probability (V,) of each word to come,
    when only the `most` likeliest may be; at temperature 0 the likeliest is certain.
    """

    def complaint() -> str | None:
        logits = torch.tensor([2.0, -1.0, 3.0, 0.0, 1.0])
        for temperature, most in ((1.0, 5), (0.5, 5), (2.0, 3), (1.0, 1), (0.0, 5), (0.01, 2)):
            given, wanted = chances(logits, temperature, most), _chances(logits, temperature, most)
            where = f"logits {_told(logits.tolist())}, temperature {temperature:g}, most {most}"
            if tuple(given.shape) != (5,):
                return f"{where}: it returns shape {tuple(given.shape)}, expected (5,)"
            if not torch.isfinite(given).all():
                return f"{where}: not finite; temperature 0 divides by zero, so treat it apart"
            if not torch.isclose(given.sum(), torch.tensor(1.0), atol=1e-4):
                return (
                    f"{where}: the chances add up to {given.sum():.2f}, expected 1; strike words out before "
                    "the softmax"
                )
            if not torch.allclose(given, wanted, atol=1e-4):
                return f"{where}: it returns {_told(given.tolist())}, expected {_told(wanted.tolist())}"
        return None

    verdict(complaint)


def _why(given: Tensor, pictures: Tensor, side: int, number: int) -> str:
    """What may have gone wrong with a patch."""
    columns = pictures.shape[-1] // side
    top, left = number // columns * side, number % columns * side
    patch = pictures[0, :, top : top + side, left : left + side]
    if torch.allclose(given[0, number], patch.permute(1, 2, 0).flatten()):
        return ": the colour must come first, as in the weights (out, colour, row, column)"
    rows = pictures.shape[-2] // side
    flipped = given[0, number % columns * rows + number // columns]
    if torch.allclose(flipped, patch.flatten()):
        return ": patches are to be in reading order, row by row"
    return f": expected the pixels from row {top}, column {left} on"


def _prefix_mask(valid: Tensor, suffix: int) -> Tensor:
    every = torch.cat((valid, torch.ones(suffix, dtype=torch.bool)))
    size, prefix = len(every), len(valid)
    places = torch.arange(size)
    return ((places[None] < prefix) | (places[None] <= places[:, None])) & every[None]


def _reason(every: Tensor, prefix: int, query: int, key: int) -> str:
    """Why a place of the mask must be open, or closed."""
    if not every[key]:
        return "nobody looks at padding"
    if query < prefix:
        seen = "the prefix sees all of itself"
        return seen if key < prefix else "the prefix must not see what is said after it"
    if key < prefix:
        return "words see the whole prefix"
    return "a word sees itself and those before it, no later ones"


def _chances(logits: Tensor, temperature: float, most: int) -> Tensor:
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).to(logits)
    least = logits.topk(most).values[-1]
    return (logits.masked_fill(logits < least, float("-inf")) / temperature).softmax(-1)


def _shown(real: Sequence[int]) -> str:
    return "a prefix of " + " ".join("word" if each else "padding" for each in real)


def _told(numbers: Sequence[float]) -> str:
    return "(" + ", ".join(f"{number:.2f}" for number in numbers) + ")"
