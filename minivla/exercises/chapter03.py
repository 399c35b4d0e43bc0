"""Self-checks of chapter 3: how sharp a head looks, who reaches whom through several layers, which patient is
ill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minivla.exercises.verdict import verdict

Shares = Mapping[str, float]

HEALTHY = {"state": 0.05, "table": 0.51, "wrist": 0.44}
SWAPPED = {"state": 0.06, "table": 0.82, "wrist": 0.12}


def check_entropy(entropy: Callable[[Tensor], Tensor]) -> None:
    """Prints whether `entropy(attention (heads, Q, K))` is the mean entropy of each head in bits, (heads,).

    Tried on heads that look at one token (0 bits), at two or at all alike, and at random; a weight of exactly
    0 must count as nothing, not as nan.
    """

    def complaint() -> str | None:
        eye = torch.eye(8)[:4]
        pairs = (eye + torch.eye(8)[4:]) / 2
        random = (3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).softmax(-1)
        mixed = torch.stack((eye[0], torch.full((8,), 1 / 8), eye[1], torch.full((8,), 1 / 8)))
        heads = {
            "one token": (eye, 0.0),
            "two tokens alike": (pairs, 1.0),
            "eight tokens alike": (torch.full((4, 8), 1 / 8), 3.0),
            "one token or all eight, half of the queries each": (mixed, 1.5),
            "random weights": (random, float(-(random * random.log2()).sum(-1).mean())),
        }
        given = torch.as_tensor(entropy(torch.stack([weights for weights, _ in heads.values()])))
        if given.shape != (len(heads),):
            return f"for attention (5, 4, 8) it returns shape {tuple(given.shape)}, expected (5,), one a head"
        for found, (looks_at, (_, wanted)) in zip(given.tolist(), heads.items(), strict=True):
            if not abs(found - wanted) < 1e-3:
                return f"a head that looks at {looks_at}: {found:.3f} bits, expected {wanted:.3f}"
        return None

    verdict(complaint)


def check_reaches(reaches: Callable[[Tensor, int], Tensor]) -> None:
    """Prints whether `reaches(mask (L, L), layers)` is who can influence whom, (L, L) bool, after so many.

    Row i, column j: can token j, as it entered, change token i as it leaves? Each layer is attention under
    the same mask with a residual path around it, so a token always reaches itself.
    """

    chain = torch.eye(5).roll(1, dims=1).bool() & (torch.arange(5)[:, None] < 4)  # i looks at i + 1 only
    window = torch.ones(6, 6).tril().triu(-1).bool()
    masks = {
        "a token sees only the next one": chain,
        "a token sees itself and the one before": window,
        "nobody sees anybody": torch.zeros(3, 3, dtype=torch.bool),
    }
    cases = [(name, mask, layers) for name, mask in masks.items() for layers in (0, 1, 2, 4)]
    verdict(lambda: next((said for case in cases if (said := _unreached(reaches, *case))), None))


def _unreached(reaches: Callable[[Tensor, int], Tensor], name: str, mask: Tensor, layers: int) -> str | None:
    given = torch.as_tensor(reaches(copy := mask.clone(), layers))
    if not torch.equal(copy, mask):
        return "the mask was changed in place; work on a new tensor"
    if given.shape != mask.shape:
        return f"it returns shape {tuple(given.shape)}, expected {tuple(mask.shape)}"
    wrong = (given.bool() != _reached(mask, layers)).nonzero().tolist()
    if not wrong:
        return None
    i, j = wrong[0]
    word = "does not reach" if given[i, j] else "reaches"
    return f"{name}, {layers} layers: token {j} {word} token {i}"


def _reached(mask: Tensor, layers: int) -> Tensor:
    """Layer by layer: what a token holds, and what those it looks at hold."""
    held = torch.eye(len(mask), dtype=torch.bool)
    for _ in range(layers):
        held = held | torch.stack([held[row].any(dim=0) for row in mask])
    return held


def check_diagnose(diagnose: Callable[[Shares, Tensor], str]) -> None:
    """Prints whether `diagnose(shares, chunk)` names what ails a policy: "cameras", "statistics", "nothing".

    shares: {segment: share of the attention}; chunk (H, 3) in robot units, where 1 is the longest step. Tried
    on made-up X-rays like those of the chapter.
    """

    def complaint() -> str | None:
        generator = torch.Generator().manual_seed(0)
        drive = 0.9 * (2 * torch.rand(16, 3, generator=generator) - 1)
        overshoots = drive.clone()
        overshoots[3, 0], overshoots[4:, 2] = -1.04, 1.03
        other_robot = drive * torch.tensor([0.6, 0.5, 1.0]) + torch.tensor([0.5, 2.05, 0.0])
        downwards = drive - torch.tensor([0.0, 2.05, 0.0])
        for name, shares, chunk, wanted in (
            ("wrist 44 %, commands within ±0.9", HEALTHY, drive, "nothing"),
            ("wrist 12 %, commands within ±0.9", SWAPPED, drive, "cameras"),
            ("wrist 44 %, dy around 2", HEALTHY, other_robot, "statistics"),
            ("wrist 44 %, dy around -2", HEALTHY, downwards, "statistics"),
            ("wrist 44 %, commands up to 4 % beyond the bound", HEALTHY, overshoots, "nothing"),
            ("wrist 12 %, commands up to 4 % beyond the bound", SWAPPED, overshoots, "cameras"),
        ):
            given = diagnose(dict(shares), chunk.clone())
            if given != wanted:
                return f"X-ray with {name}: you say {given!r}, it is {wanted!r}"
        return None

    verdict(complaint)
