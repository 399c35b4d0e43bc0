"""Every check of every chapter accepts its solution and knows a starter that nobody has touched."""

import pytest

from tests.exercises import test_chapter01, test_chapter02, test_chapter03

CHECKS = [pair for chapter in (test_chapter01, test_chapter02, test_chapter03) for pair in chapter.CHECKS]
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
