"""Each check of chapter 5 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

from pathlib import Path

import torch

from minivla.exercises import chapter05

CHAPTER = Path(__file__).parents[2] / "notebooks" / "05_vqbet.ipynb"


def frequencies(codes, size):
    return codes.bincount(minlength=size) / len(codes)


def perplexity(codes, size):
    share = frequencies(codes, size)
    share = share[share > 0]
    return torch.exp(-(share * share.log()).sum()).item()


def chance(logits, codes, temperature):
    return (logits / temperature).softmax(-1).gather(-1, codes[:, None]).prod().item()


def revive(book, counts, x):
    dead = counts == 0
    distance = torch.cdist(x, book[~dead]).min(dim=1).values
    revived = book.clone()
    revived[dead] = x[distance.argsort(descending=True)[: int(dead.sum())]]
    return revived


CHECKS = [
    (chapter05.check_perplexity, perplexity),
    (chapter05.check_chance, chance),
    (chapter05.check_revive, revive),
]


def unused_become_nan(codes, size):
    share = frequencies(codes, size)
    return torch.exp(-(share * share.log()).sum()).item()


def in_bits(codes, size):
    share = frequencies(codes, size)
    share = share[share > 0]
    return torch.exp(-(share * share.log2()).sum()).item()


def how_many_are_used(codes, size):
    return len(codes.unique())


def mean_of_the_levels(logits, codes, temperature):
    return (logits / temperature).softmax(-1).gather(-1, codes[:, None]).mean().item()


def temperature_the_wrong_way_round(logits, codes, temperature):
    return chance(logits, codes, 1 / temperature)


def softmax_over_levels(logits, codes, temperature):
    return (logits / temperature).softmax(0).gather(-1, codes[:, None]).prod().item()


def colder_after_the_softmax(logits, codes, temperature):
    return (logits.softmax(-1) / temperature).gather(-1, codes[:, None]).prod().item()


def in_place(book, counts, x):
    book[counts == 0] = revive(book, counts, x)[counts == 0]
    return book


def nearest_first(book, counts, x):
    dead = counts == 0
    distance = torch.cdist(x, book[~dead]).min(dim=1).values
    revived = book.clone()
    revived[dead] = x[distance.argsort()[: int(dead.sum())]]
    return revived


def the_dead_counted_as_living(book, counts, x):
    dead = counts == 0
    distance = torch.cdist(x, book).min(dim=1).values
    revived = book.clone()
    revived[dead] = x[distance.argsort(descending=True)[: int(dead.sum())]]
    return revived


def only_the_first_dead_entry(book, counts, x):
    revived = book.clone()
    for entry in (counts == 0).nonzero().flatten()[:1]:
        revived[entry] = revive(book, counts, x)[entry]
    return revived


def only_the_new_ones(book, counts, x):
    return revive(book, counts, x)[counts == 0]


MISTAKES = [
    (chapter05.check_perplexity, unused_become_nan, "the others never: nan, expected 4.00"),
    (chapter05.check_perplexity, in_bits, "four codes used alike: 7.39"),
    (chapter05.check_perplexity, how_many_are_used, "one code half of the time"),
    (chapter05.check_chance, mean_of_the_levels, "expected 0.062"),
    (chapter05.check_chance, temperature_the_wrong_way_round, "at temperature 0.5"),
    (chapter05.check_chance, softmax_over_levels, "two levels of four even codes"),
    (chapter05.check_chance, colder_after_the_softmax, "at temperature 0.5"),
    (chapter05.check_revive, in_place, "changed in place"),
    (chapter05.check_revive, nearest_first, "entry 1 is dead: entry 1 is"),
    (chapter05.check_revive, the_dead_counted_as_living, "entries 1 and 3 are dead"),
    (chapter05.check_revive, only_the_first_dead_entry, "entry 3 is (9, 9.1)"),
    (chapter05.check_revive, only_the_new_ones, "expected a codebook of shape (4, 2) back"),
]


def test_where_all_entries_live_nothing_changes(capsys):
    chapter05.check_revive(lambda book, counts, x: book.clone())
    assert "entry 1 is dead: entry 1 is (70, 70), expected (0, 5)" in capsys.readouterr().out
