"""Each check of chapter 10 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

import json
from pathlib import Path

import torch

from minivla.actions.fast import FastTokenizer, dct
from minivla.exercises import chapter10

CHAPTER = Path(__file__).parents[2] / "notebooks" / "10_fast.ipynb"


def largest_code(horizon, scale):
    return round(scale * horizon**0.5)


def spell(token, merges, first):
    if token < first:
        return [token]
    left, right = merges[token - first]
    return [*spell(left, merges, first), *spell(right, merges, first)]


def enough(partial, tolerance):
    off = (partial - partial[-1]).abs().amax(dim=(1, 2)) > tolerance
    return int(off.nonzero().max()) + 1 if off.any() else 0


CHECKS = [
    (chapter10.check_largest_code, largest_code),
    (chapter10.check_spell, spell),
    (chapter10.check_enough, enough),
]


def the_sum(horizon, scale):
    return horizon * scale


def the_scale(horizon, scale):
    return scale


def a_faster_wave(horizon, scale):
    return round(scale * (2 * horizon) ** 0.5)


def one_level(token, merges, first):
    return [token] if token < first else list(merges[token - first])


def numbered_from_zero(token, merges, first):
    return [token] if token >= len(merges) else list(merges[token])


def backwards(token, merges, first):
    return spell(token, merges, first)[::-1]


def on_average(partial, tolerance):
    off = (partial - partial[-1]).abs().mean(dim=(1, 2)) > tolerance
    return int(off.nonzero().max()) + 1 if off.any() else 0


def signed(partial, tolerance):
    off = (partial - partial[-1]).amax(dim=(1, 2)) > tolerance
    return int(off.nonzero().max()) + 1 if off.any() else 0


def the_first_time(partial, tolerance):
    return int(((partial - partial[-1]).abs().amax(dim=(1, 2)) <= tolerance).nonzero()[0])


def the_last_that_is_off(partial, tolerance):
    return enough(partial, tolerance) - 1


MISTAKES = [
    (chapter10.check_largest_code, the_sum, "largest_code(16, 10) is 160"),
    (chapter10.check_largest_code, the_scale, "has the code 40 at frequency 0"),
    (chapter10.check_largest_code, a_faster_wave, "no chunk in [-1, 1] has a larger one"),
    (chapter10.check_spell, one_level, "10 is a pair itself"),
    (chapter10.check_spell, numbered_from_zero, "expected [1, 2]"),
    (chapter10.check_spell, backwards, "it is the pair merges[0]"),
    (chapter10.check_enough, on_average, "a single number is off by 0.3"),
    (chapter10.check_enough, signed, "off as well"),
    (chapter10.check_enough, the_first_time, "the second spoils it again"),
    (chapter10.check_enough, the_last_that_is_off, "it says 0 of 2 tokens, expected 1"),
]


def test_no_wave_collects_more_than_the_slowest():
    """What the first check calls the largest is: of each frequency, the chunk that agrees with its signs."""
    for horizon in (1, 2, 3, 4, 16, 50):
        waves = dct(torch.eye(horizon, dtype=torch.float64)[None])[0]
        assert waves.abs().sum(dim=1).max() <= horizon**0.5 + 1e-9


def test_spelling_is_the_tokenizers():
    """Taken from a fitted vocabulary, the solution spells what the library does."""
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(300, 2, 1, generator=generator).repeat_interleave(6, dim=1).cumsum(1) / 4
    fast = FastTokenizer.fit(chunks, scale=5, vocab_size=256)
    content = json.loads(fast.bpe.to_str())["model"]
    numbers, merges = content["vocab"], [tuple(pair) for pair in content["merges"]]
    first = len(numbers) - len(merges)
    pairs = [(numbers[left], numbers[right]) for left, right in merges]
    names = {number: name for name, number in numbers.items()}
    for token in range(first, len(numbers)):
        assert "".join(names[symbol] for symbol in spell(token, pairs, first)) == names[token]
