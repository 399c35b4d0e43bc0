"""Every check of every chapter accepts its solution, names a plausible mistake and knows a starter."""

import json
import re
from importlib import import_module

import pytest

CHAPTERS = [import_module(f"tests.exercises.test_chapter{number:02}") for number in range(1, 11)]
CHECKS = [pair for chapter in CHAPTERS for pair in chapter.CHECKS]
MISTAKES = [mistake for chapter in CHAPTERS for mistake in chapter.MISTAKES]
names = [check.__name__ for check, _ in CHECKS]


def starter(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize(("check", "solution"), CHECKS, ids=names)
def test_accepts_the_solution(check, solution, capsys):
    check(solution)
    assert capsys.readouterr().out == "correct\n"


@pytest.mark.parametrize("check", [check for check, _ in CHECKS], ids=names)
def test_knows_a_starter(check, capsys):
    check(starter)
    assert capsys.readouterr().out == "not attempted yet\n"


@pytest.mark.parametrize(
    ("check", "mistake", "says"), MISTAKES, ids=[mistake.__name__ for _, mistake, _ in MISTAKES]
)
def test_rejects_a_plausible_mistake(check, mistake, says, capsys):
    check(mistake)
    said = capsys.readouterr().out
    assert said.startswith("not yet: ")
    assert said.count("\n") == 1
    assert says in said


@pytest.mark.parametrize("chapter", CHAPTERS, ids=[chapter.CHAPTER.stem for chapter in CHAPTERS])
def test_the_notebook_shows_a_starter_and_a_solution_for_each_check(chapter):
    """And its solutions were right when it was run."""
    cells = json.loads(chapter.CHAPTER.read_text(encoding="utf-8"))["cells"]
    number = re.search(r"\d+", chapter.CHAPTER.stem)[0]
    tagged = {
        tag: [cell for cell in cells if tag in cell["metadata"].get("tags", [])]
        for tag in ("exercise", "hide-cell")
    }
    for check, _ in chapter.CHECKS:
        for found in tagged.values():
            calls = [f"chapter{number}.{check.__name__}(" in "".join(cell["source"]) for cell in found]
            assert sum(calls) == 1
    outputs = [output for cell in tagged["hide-cell"] for output in cell["outputs"] if "text" in output]
    assert all("".join(output["text"]).startswith("correct\n") for output in outputs)
