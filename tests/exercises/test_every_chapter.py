"""Every check of every chapter accepts its solution, names a plausible mistake and knows a starter."""

import pytest

from tests.exercises import (
    test_chapter01,
    test_chapter02,
    test_chapter03,
    test_chapter04,
    test_chapter05,
    test_chapter06,
    test_chapter07,
    test_chapter08,
    test_chapter09,
    test_chapter10,
)

CHAPTERS = (
    test_chapter01,
    test_chapter02,
    test_chapter03,
    test_chapter04,
    test_chapter05,
    test_chapter06,
    test_chapter07,
    test_chapter08,
    test_chapter09,
    test_chapter10,
)
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
