"""Each check of chapter 7 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

from pathlib import Path

import torch
from einops import rearrange

from minivla.exercises import chapter07
from minivla.nn.masks import segment_mask
from minivla.segments import Segment, arrange

CHAPTER = Path(__file__).parents[2] / "notebooks" / "07_vlm_from_scratch.ipynb"
CUT = "batch colour (row y) (column x) -> batch (row column) (colour y x)"


def patches(pictures, side):
    return rearrange(pictures, CUT, y=side, x=side)


def prefix_mask(valid, suffix):
    every = torch.cat((valid, torch.ones(suffix, dtype=torch.bool)))
    mask = torch.ones(len(every), len(every), dtype=torch.bool).tril()
    mask[:, : len(valid)] = True
    return mask & every


def chances(logits, temperature, most):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    kept = torch.full_like(logits, float("-inf"))
    best = logits.topk(most)
    kept[best.indices] = best.values
    return (kept / temperature).softmax(-1)


CHECKS = [
    (chapter07.check_patches, patches),
    (chapter07.check_prefix_mask, prefix_mask),
    (chapter07.check_chances, chances),
]


def colour_last(pictures, side):
    return rearrange(pictures, CUT.replace("(colour y x)", "(y x colour)"), y=side, x=side)


def column_by_column(pictures, side):
    return rearrange(pictures, CUT.replace("(row column)", "(column row)"), y=side, x=side)


def just_reshaped(pictures, side):
    return pictures.reshape(len(pictures), -1, 3 * side * side)


def one_row_too_many(pictures, side):
    return rearrange(pictures, CUT.replace("batch (row column)", "(batch row column)"), y=side, x=side)


def causal_everywhere(valid, suffix):
    every = torch.cat((valid, torch.ones(suffix, dtype=torch.bool)))
    return torch.ones(len(every), len(every), dtype=torch.bool).tril() & every


def all_see_all(valid, suffix):
    every = torch.cat((valid, torch.ones(suffix, dtype=torch.bool)))
    return every.expand(len(every), -1)


def padding_is_seen(valid, suffix):
    return prefix_mask(torch.ones_like(valid), suffix)


def words_see_later_ones(valid, suffix):
    mask = prefix_mask(valid, suffix)
    mask[len(valid) :, len(valid) :] = True
    return mask


def words_alone(valid, suffix):
    mask = prefix_mask(valid, suffix)
    mask[len(valid) :, : len(valid)] = False
    return mask


def the_other_way_round(valid, suffix):
    return prefix_mask(valid, suffix).T


def multiplied(logits, temperature, most):
    return chances(logits * temperature**2, temperature, most) if temperature else chances(logits, 0, most)


def struck_out_too_late(logits, temperature, most):
    if temperature == 0:
        return chances(logits, 0, most)
    probability = (logits / temperature).softmax(-1)
    return torch.where(probability >= probability.topk(most).values[-1], probability, 0.0)


def divided_by_zero(logits, temperature, most):
    kept = logits.masked_fill(logits < logits.topk(most).values[-1], float("-inf"))
    return (kept / temperature).softmax(-1)


def none_struck_out(logits, temperature, most):
    return chances(logits, temperature, len(logits))


MISTAKES = [
    (chapter07.check_patches, colour_last, "the colour must come first"),
    (chapter07.check_patches, column_by_column, "in reading order"),
    (chapter07.check_patches, just_reshaped, "expected the pixels from row 0, column 0 on"),
    (chapter07.check_patches, one_row_too_many, "expected (1, 4, 12)"),
    (chapter07.check_prefix_mask, causal_everywhere, "the prefix sees all of itself"),
    (chapter07.check_prefix_mask, all_see_all, "the prefix must not see what is said after it"),
    (chapter07.check_prefix_mask, padding_is_seen, "nobody looks at padding"),
    (chapter07.check_prefix_mask, words_see_later_ones, "no later ones"),
    (chapter07.check_prefix_mask, words_alone, "words see the whole prefix"),
    (chapter07.check_prefix_mask, the_other_way_round, "must not see"),
    (chapter07.check_chances, multiplied, "expected (0.12"),
    (chapter07.check_chances, struck_out_too_late, "before the softmax"),
    (chapter07.check_chances, divided_by_zero, "temperature 0 divides by zero"),
    (chapter07.check_chances, none_struck_out, "temperature 2, most 3"),
]


def test_the_mask_is_the_librarys():
    """What the check calls right is what `segment_mask` makes of the segments."""
    valid = torch.tensor([True, True, False, True])
    laid = arrange([Segment("prefix", "language", 4), Segment("said", "language", 3, block=1, rule="causal")])
    real = torch.cat((valid, torch.ones(3, dtype=torch.bool)))
    assert torch.equal(segment_mask(laid, real[None])[0], prefix_mask(valid, 3))
