"""The book builds without a warning, needs no other host, has no broken link; its checks can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.build_book import problems

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    into = tmp_path_factory.mktemp("book")
    command = [sys.executable, "tools/build_book.py", "--into", str(into)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return into / "html"


def test_every_chapter_and_module_has_its_page(book):
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert chapters == {path.stem for path in (book / "chapters").glob("*.html")}
    assert (book / "api" / "minivla.policies.act.html").exists()
    cards = (book / "index.html").read_text(encoding="utf-8").count('class="mv-card"')
    assert cards == len(chapters)


def test_search_knows_the_words_of_the_book(book):
    assert "ledger" in (book / "searchindex.js").read_text(encoding="utf-8")


def test_the_ledger_shows_every_row(book):
    rows = [row for path in (ROOT / "book" / "ledger").glob("*.json") for row in json.loads(path.read_text())]
    page = (book / "ledger.html").read_text(encoding="utf-8")
    assert page.count('<tr class="mv-row ') == len(rows) > 0
    assert page.count("mv-row mv-differs") == sum(not row["ok"] for row in rows) == 0


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js"),
        ('<img src="//example.org/x.png">', "loads //example.org/x.png"),
        ('<link rel="stylesheet" href="http://example.org/x.css">', "loads http://example.org/x.css"),
        ('<p style="background: url(https://example.org/x.png)">', "loads https://example.org/x.png"),
        ('<a href="missing.html">x</a>', "which is not there"),
        ('<a href="#nowhere">x</a>', "no such anchor"),
    ],
)
def test_the_checks_see_what_they_must(tmp_path, page, complaint):
    (tmp_path / "index.html").write_text(f"<html>{page}</html>")
    assert any(complaint in problem for problem in problems(tmp_path))


def test_a_link_to_another_site_is_no_load(tmp_path):
    (tmp_path / "index.html").write_text(
        '<a href="https://example.org">x</a><h1 id="a">A</h1><a href="#a">y</a>'
    )
    assert problems(tmp_path) == []


def test_a_style_sheet_may_not_load_from_elsewhere(tmp_path):
    (tmp_path / "a.css").write_text(
        '@import "https://example.org/x.css"; b { background: url(data:image/png;base64,) }'
    )
    assert problems(tmp_path) == ["a.css loads https://example.org/x.css"]


def test_a_row_that_differs_is_red_and_named():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from parity_ledger import table, verdict

    row = {"case": "a", "block": "encoder", "error": 0.2, "tolerance": 1e-5, "dtype": "float32", "ok": False}
    good = row | {"block": "backbone", "error": 1e-7, "ok": True}
    assert verdict([good, row]) == "1 of 2 rows differ, first in block encoder (a)."
    assert table([good, row]).count("mv-differs") == 1
    assert "all equal" in verdict([good])
