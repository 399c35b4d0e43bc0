"""Chapter 00's self-checks accept the solution, reject plausible mistakes, and know an untouched starter."""

import json
import re
from pathlib import Path

import pytest

from minivla.exercises.chapter00 import SITE, check_robot_units, check_wrist_share, made_up_trace

CHAPTER = Path(__file__).parents[2] / "notebooks" / "00_start_here.ipynb"


def said(capsys, check, function) -> str:
    check(function)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1, "a check prints one line"
    return printed.strip()


def not_written(*_):
    raise NotImplementedError


def units(normalised, mean, std):
    return normalised * std + mean


def share(trace, query):
    wrist = next(s for s in trace.sites[SITE][1] if s.name == "wrist")
    return trace.attention[SITE][0, :, query, wrist.start : wrist.stop].sum(dim=-1).mean()


@pytest.mark.parametrize("check", [check_robot_units, check_wrist_share])
def test_a_starter_is_not_attempted_yet(capsys, check):
    assert said(capsys, check, not_written) == "not attempted yet"


@pytest.mark.parametrize(("check", "solution"), [(check_robot_units, units), (check_wrist_share, share)])
def test_a_solution_is_correct(capsys, check, solution):
    assert said(capsys, check, solution) == "correct"


@pytest.mark.parametrize(
    ("mistake", "about"),
    [
        (lambda n, mean, std: (n - mean) / std, "dx: "),  # normalises a second time
        (lambda n, mean, std: (n + mean) * std, "dx: "),
        (lambda n, mean, std: n * std, "expected"),
        (lambda n, mean, std: n * std[0] + mean, "dy: "),  # one scale for all dimensions
        (lambda n, mean, std: (n * std + mean)[0], "returns (4, 3), expected (2, 4, 3)"),
        (lambda n, mean, std: n.mul_(std).add_(mean), "in place"),
        (lambda n, mean, std: None, "stopped with"),
    ],
)
def test_a_mistake_in_robot_units_is_named(capsys, mistake, about):
    line = said(capsys, check_robot_units, mistake)
    assert line.startswith("not yet: ")
    assert about in line


def other_camera(trace, query):
    table = next(s for s in trace.sites[SITE][1] if s.name == "table")
    return trace.attention[SITE][0, :, query, table.start : table.stop].sum(dim=-1).mean()


@pytest.mark.parametrize(
    "mistake",
    [
        other_camera,
        lambda trace, query: (
            trace.attention[SITE][0, :, query, -6:].sum(dim=-1).mean()
        ),  # place learnt by heart
        lambda trace, query: share(trace, query) * 2,  # the sum over heads
        lambda trace, query: share(trace, 0),
        lambda trace, query: trace.attention[SITE][1, :, query, 6:].sum(dim=-1).mean(),  # the second sample
    ],
)
def test_a_mistake_in_the_share_is_named(capsys, mistake):
    assert re.match(
        r"not yet: query \d over the tokens .*: got .*, expected", said(capsys, check_wrist_share, mistake)
    )


def test_a_made_up_trace_is_attention():
    trace = made_up_trace((("wrist", "image", 4), ("state", "state", 1)))
    assert trace.attention[SITE].shape == (2, 2, 3, 5)
    assert float((trace.attention[SITE].sum(dim=-1) - 1).abs().max()) < 1e-6


def test_the_chapter_leaves_the_starters_and_folds_correct_solutions():
    cells = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
    checking = [cell for cell in cells if re.search(r"^check_", "".join(cell["source"]), flags=re.M)]
    folded = ["hide-cell" in cell["metadata"].get("tags", []) for cell in checking]
    printed = ["".join(cell["outputs"][0]["text"]).strip() for cell in checking]
    assert folded == [False, True] * 2
    assert printed == ["not attempted yet", "correct"] * 2
