"""Each check of chapter 1 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

import ast
import json
from pathlib import Path

import pytest
import torch

from minivla.exercises import chapter01

CHAPTER = Path(__file__).parents[2] / "notebooks" / "01_data_and_training.ipynb"


def count_padding(lengths, horizon):
    return sum(max(0, horizon - left) for length in lengths for left in range(1, length + 1))


def real_l1(predicted, action, is_pad):
    return (predicted - action)[~is_pad].abs().mean()


def merge(one, other):
    count = one["count"] + other["count"]
    mean = (one["count"] * one["mean"] + other["count"] * other["mean"]) / count
    square = (
        sum(part["count"] * (part["std"] ** 2 + (part["mean"] - mean) ** 2) for part in (one, other)) / count
    )
    return {"count": count, "mean": mean, "std": square**0.5}


CHECKS = [
    (chapter01.check_padding, count_padding),
    (chapter01.check_loss, real_l1),
    (chapter01.check_merge, merge),
]


@pytest.mark.parametrize("check", [check for check, _ in CHECKS])
def test_an_error_of_the_readers_is_one_line(check, capsys):
    check(lambda *arguments: {}["nothing"])
    assert capsys.readouterr().out.startswith("not yet: your function stopped with ")


def forgets_short_episodes(lengths, horizon):
    return len(lengths) * horizon * (horizon - 1) // 2


def off_by_one(lengths, horizon):
    return sum(max(0, horizon - left) for length in lengths for left in range(length))


def divides_by_everything(predicted, action, is_pad):
    return ((predicted - action).abs() * ~is_pad[..., None]).mean()


def keeps_the_padding(predicted, action, is_pad):
    return (predicted - action).abs().mean()


def means_of_rows(predicted, action, is_pad):
    rows = [(p - a)[~pad].abs().mean() for p, a, pad in zip(predicted, action, is_pad, strict=True)]
    return torch.stack(rows).mean()


def one_loss_each(predicted, action, is_pad):
    return (predicted - action).abs().mean(dim=(1, 2))


def averages_the_stds(one, other):
    merged = merge(one, other)
    weights = torch.stack([one["count"], other["count"]]) / merged["count"]
    return merged | {"std": weights[0] * one["std"] + weights[1] * other["std"]}


def forgets_the_means(one, other):
    merged = merge(one, other)
    square = (one["count"] * one["std"] ** 2 + other["count"] * other["std"] ** 2) / merged["count"]
    return merged | {"std": square**0.5}


def weighs_alike(one, other):
    return merge(one, other) | {"mean": (one["mean"] + other["mean"]) / 2}


def leaves_out_the_std(one, other):
    merged = merge(one, other)
    return {"count": merged["count"], "mean": merged["mean"]}


MISTAKES = [
    (chapter01.check_padding, forgets_short_episodes, "[8, 3]"),
    (chapter01.check_padding, off_by_one, "[20]"),
    (chapter01.check_loss, divides_by_everything, "with 7 of 18"),
    (chapter01.check_loss, keeps_the_padding, "with 7 of 18"),
    (chapter01.check_loss, means_of_rows, "with 7 of 18"),
    (chapter01.check_loss, one_loss_each, "shape ()"),
    (chapter01.check_merge, averages_the_stds, "std is"),
    (chapter01.check_merge, forgets_the_means, "two different means"),
    (chapter01.check_merge, weighs_alike, "mean is"),
    (chapter01.check_merge, leaves_out_the_std, "'std' is missing"),
]


def test_loss_that_multiplies_by_the_mask_passes_too(capsys):
    def other_way(predicted, action, is_pad):
        error = (predicted - action).abs() * ~is_pad[..., None]
        return error.sum() / ((~is_pad).sum() * action.shape[-1])

    chapter01.check_loss(other_way)
    assert capsys.readouterr().out == "correct\n"


def test_the_chapters_own_solutions_are_accepted(capsys):
    """The folded cells of the notebook, run here as they stand."""
    cells = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
    folded = [cell for cell in cells if "solution" in cell["metadata"].get("tags", [])]
    assert len(folded) == len(CHECKS)
    for cell in folded:
        code = ast.parse("".join(cell["source"]))
        exec(compile(code, "solution", "exec"), {"chapter01": chapter01, "torch": torch})
    assert capsys.readouterr().out == "correct\n" * len(CHECKS)
