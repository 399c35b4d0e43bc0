"""Chapters keep the form that makes them readable and testable (nbval runs them; this reads them)."""

import ast
import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from tools.run_notebooks import is_normal

HERE = Path(__file__).parent
CHAPTERS = sorted((HERE.parent.parent / "notebooks").glob("*.ipynb"))
TAGS_THAT_WEAKEN = ("nbval-skip", "nbval-ignore-output", "nbval-raises-exception", "raises-exception")
TAGS_THAT_SHOW = (
    "hide-cell",
    "hide-input",
    "hide-output",
    "remove-input",
    "remove-cell",
    "exercise",
    "solution",
)

pytestmark = pytest.mark.parametrize("chapter", CHAPTERS, ids=[path.stem for path in CHAPTERS])


def cells(chapter: Path, kind: str | None = None) -> list[dict]:
    everything = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in everything if kind in (None, cell["cell_type"])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def lines(cell: dict) -> int:
    return sum(bool(line.strip()) for line in source(cell).splitlines())


def tree(cell: dict) -> ast.Module:
    """The cell's syntax, its IPython magics blanked."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source(cell), flags=re.M), mode="exec")


def has_assertion(cell: dict) -> bool:
    """An assert, or a call of something named assert_…"""
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and re.search(r"(^|\.)assert_\w+$", ast.unparse(node.func)))
        for node in ast.walk(tree(cell))
    )


def kinds(cell: dict) -> set[str]:
    return {kind for output in cell["outputs"] for kind in output.get("data", {})}


def test_is_stored_as_make_notebooks_stores_it(chapter):
    assert is_normal(chapter), (
        "run `make notebooks`: metadata, numbering or outputs are not in the committed form"
    )


def test_has_been_run(chapter):
    for cell in cells(chapter, "code"):
        allowed = "raises-exception" in cell["metadata"].get("tags", [])
        failures = [output["ename"] for output in cell["outputs"] if output["output_type"] == "error"]
        assert allowed or not failures, f"a committed error, {failures}, in\n{source(cell)}"
    shown = sum(bool(cell["outputs"]) for cell in cells(chapter, "code"))
    assert shown >= len(cells(chapter, "code")) / 4, (
        "outputs are committed, so that a reader on the web sees them"
    )


def test_nothing_is_printed_to_stderr(chapter):
    said = [
        output["text"]
        for cell in cells(chapter, "code")
        for output in cell["outputs"]
        if output.get("name") == "stderr"
    ]
    assert not said, "a warning is mended, not committed"


def test_is_small_enough(chapter):
    assert chapter.stat().st_size < 3_000_000


def test_figures_are_png(chapter):
    for cell in cells(chapter, "code"):
        assert not kinds(cell) & {"image/svg+xml", "image/jpeg"}, f"figures are PNG:\n{source(cell)}"


def test_each_figure_has_an_assertion_beside_it(chapter):
    code = cells(chapter, "code")
    for place, cell in enumerate(code):
        seen = kinds(cell) & {"image/png", "image/gif", "text/html", "video/mp4"}
        near = code[max(0, place - 2) : place + 3]
        assert not seen or any(map(has_assertion, near)), (
            f"nbval does not compare {sorted(seen)}; no cell within two of this one asserts:\n{source(cell)}"
        )


def test_cells_are_short(chapter):
    lengths = [lines(cell) for cell in cells(chapter, "code")]
    assert max(lengths) <= 25
    assert median(lengths) <= 8


def test_prose_leads(chapter):
    assert len(cells(chapter, "markdown")) >= len(cells(chapter, "code"))


def test_one_import_cell(chapter):
    importing = [
        cell
        for cell in cells(chapter, "code")
        if any(isinstance(n, ast.Import | ast.ImportFrom) for n in tree(cell).body)
    ]
    assert len(importing) == 1, "one cell holds the imports"
    count = sum(isinstance(node, ast.Import | ast.ImportFrom) for node in tree(importing[0]).body)
    assert count <= 6, f"the import cell has {count} imports; six at most"


def test_no_path_or_clock_is_printed(chapter):
    for cell in cells(chapter, "code"):
        printed = json.dumps(
            cell["outputs"] if "nbval-ignore-output" not in cell["metadata"].get("tags", []) else []
        )
        assert not re.search(r"/(home|root|tmp|Users)/|\bat 0x[0-9a-f]{6,}", printed), (
            f"not stable:\n{source(cell)}"
        )


def test_the_weakening_tags_are_explained(chapter):
    """tags.json holds, for each chapter, how many cells carry a tag that weakens nbval, and why they must."""
    explained = json.loads((HERE / "tags.json").read_text(encoding="utf-8")).get(chapter.name, {})
    tags = Counter(tag for cell in cells(chapter) for tag in cell["metadata"].get("tags", []))
    unknown = set(tags) - set(TAGS_THAT_WEAKEN) - set(TAGS_THAT_SHOW)
    assert not unknown, f"tags nobody reads: {sorted(unknown)}"
    weak = {tag: count for tag, count in tags.items() if tag in TAGS_THAT_WEAKEN}
    assert weak == {tag: entry["cells"] for tag, entry in explained.items()}, (
        "tell tags.json how many, and why"
    )
    assert all(len(entry["why"]) > 10 for entry in explained.values())
