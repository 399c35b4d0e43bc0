"""Each check of chapter 3 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

from pathlib import Path

import torch

from minivla.exercises import chapter03

CHAPTER = Path(__file__).parents[2] / "notebooks" / "03_looking_inside.ipynb"


def entropy(attention):
    return -torch.special.xlogy(attention, attention).sum(-1).mean(-1) / torch.log(torch.tensor(2.0))


def reaches(mask, layers):
    step = (mask | torch.eye(len(mask), dtype=torch.bool)).float()
    return torch.linalg.matrix_power(step, layers) > 0


def diagnose(shares, chunk):
    if chunk.abs().max() > 1.5:
        return "statistics"
    return "cameras" if shares["wrist"] < 0.25 else "nothing"


CHECKS = [
    (chapter03.check_entropy, entropy),
    (chapter03.check_reaches, reaches),
    (chapter03.check_diagnose, diagnose),
]


def without_the_zeros(attention):
    return -(attention * attention.log2()).sum(-1).mean(-1)


def in_nats(attention):
    return -torch.special.xlogy(attention, attention).sum(-1).mean(-1)


def of_the_mean_query(attention):
    return entropy(attention.mean(1, keepdim=True))


def one_number(attention):
    return entropy(attention).mean()


def without_the_residual(mask, layers):
    return torch.linalg.matrix_power(mask.float(), layers) > 0


def one_layer_only(mask, layers):
    return mask | torch.eye(len(mask), dtype=torch.bool)


def the_wrong_way_round(mask, layers):
    return reaches(mask, layers).T


def in_place(mask, layers):
    mask |= torch.eye(len(mask), dtype=torch.bool)
    return torch.linalg.matrix_power(mask.float(), layers) > 0


def beyond_the_bound(shares, chunk):
    return "statistics" if chunk.abs().max() > 1 else diagnose(shares, chunk)


def upwards_only(shares, chunk):
    return "statistics" if chunk.max() > 1.5 else diagnose(shares, chunk * 0)


def cameras_alone(shares, chunk):
    return diagnose(shares, chunk * 0)


def statistics_alone(shares, chunk):
    return diagnose({"wrist": 0.44}, chunk)


MISTAKES = [
    (chapter03.check_entropy, without_the_zeros, "looks at one token: nan bits"),
    (chapter03.check_entropy, in_nats, "expected 1.000"),
    (chapter03.check_entropy, of_the_mean_query, "looks at one token: 2.000 bits"),
    (chapter03.check_entropy, one_number, "expected (5,)"),
    (chapter03.check_reaches, without_the_residual, "1 layers: token 0 reaches token 0"),
    (chapter03.check_reaches, one_layer_only, "0 layers: token 1 does not reach token 0"),
    (chapter03.check_reaches, the_wrong_way_round, "token 1 reaches token 0"),
    (chapter03.check_reaches, in_place, "in place"),
    (chapter03.check_diagnose, beyond_the_bound, "beyond the bound: you say 'statistics'"),
    (chapter03.check_diagnose, upwards_only, "dy around -2"),
    (chapter03.check_diagnose, cameras_alone, "dy around 2"),
    (chapter03.check_diagnose, statistics_alone, "wrist 12 %"),
]
