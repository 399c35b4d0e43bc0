"""The directives `ledger` and `layouts`: what the parity tests measured, and which published files map key by
key, read from book/ledger/*.json."""

import html
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

Row = dict[str, Any]
COLUMNS = ("block", "largest difference", "tolerance", "dtype", "")
LAYOUTS = "layouts.json"
COUNTS = ("stored", "matched", "tied", "ignored", "missing", "unexpected")
NAMES = {"act": "ACT"}  # families by the names people call them


def read(folder: Path) -> list[Row]:
    """All rows, in the order of the files and, inside each, of the blocks."""
    paths = sorted(path for path in folder.glob("*.json") if path.name != LAYOUTS)
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]


def line(row: Row) -> str:
    """One row of the table. A red one also says so in words, since colour alone is not for everybody."""
    verdict = "equal" if row["ok"] else "differs"
    values = (row["block"], f"{row['error']:.1e}", f"{row['tolerance']:.0e}", row["dtype"], verdict)
    cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
    return f'<tr class="mv-row mv-{verdict}">{cells}</tr>'


def table(rows: list[Row]) -> str:
    """All rows of a family, under a line that names their case."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = ""
    for case, group in groupby(rows, key=lambda row: row["case"]):
        body += f'<tr class="mv-case"><th colspan="{len(COLUMNS)}">{html.escape(case)}</th></tr>'
        body += "".join(map(line, group))
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="mv-wide"><table class="table mv-ledger">{inside}</table></div>'


def verdict(rows: list[Row]) -> str:
    """A sentence on a family: all equal, or the first block that is not."""
    red = [row for row in rows if not row["ok"]]
    if not red:
        worst = max(row["error"] / row["tolerance"] for row in rows)
        return f"{len(rows)} rows, all equal; the largest difference is {worst:.0%} of what is allowed."
    return f"{len(red)} of {len(rows)} rows differ, first in block {red[0]['block']} ({red[0]['case']})."


def layout_table(rows: list[Row]) -> str:
    """The published layouts of each family, and what became of their keys."""
    head = "".join(f"<th>{name}</th>" for name in ("layout", *COUNTS, "", "known from"))
    body = ""
    for family, group in groupby(
        sorted(rows, key=lambda row: str(row["family"])), key=lambda row: row["family"]
    ):
        body += f'<tr class="mv-case"><th colspan="{len(COUNTS) + 3}">{html.escape(family)}</th></tr>'
        body += "".join(map(_layout_line, group))
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="mv-wide"><table class="table mv-ledger">{inside}</table></div>'


def _layout_line(row: Row) -> str:
    verdict = "equal" if row["ok"] else "differs"
    said = "maps" if row["ok"] else "does not map"
    values = (row["layout"], *(row[name] for name in COUNTS), said, row["source"])
    cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
    return f'<tr class="mv-row mv-{verdict}">{cells}</tr>'


class Layouts(Directive):
    """A table of published layouts."""

    def run(self) -> list[nodes.Node]:
        """The table; a note when there is none."""
        environment = self.state.document.settings.env
        path = Path(environment.srcdir) / "ledger" / LAYOUTS
        for each in (path, Path(__file__)):
            environment.note_dependency(str(each))
        if not path.is_file():
            return [nodes.paragraph("", "Nothing has been mapped yet: run make ledger.")]
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [nodes.raw("", layout_table(rows), format="html")]


class Ledger(Directive):
    """A section a family."""

    def run(self) -> list[nodes.Node]:
        """Sections with a sentence and a table each; a note when nothing has been measured."""
        environment = self.state.document.settings.env
        folder = Path(environment.srcdir) / "ledger"
        for path in [*folder.glob("*.json"), Path(__file__)]:
            environment.note_dependency(str(path))
        sections = []
        for (family, upstream, version), group in groupby(
            read(folder), key=lambda row: (row["family"], row["upstream"], row["version"])
        ):
            rows = list(group)
            section = nodes.section(ids=[nodes.make_id(f"ledger-{family}")], names=[family])
            section += nodes.title("", NAMES.get(family, family))
            section += nodes.paragraph("", f"Against {upstream}, version {version}. {verdict(rows)}")
            section += nodes.raw("", table(rows), format="html")
            sections.append(section)
        return sections or [nodes.paragraph("", "Nothing has been measured yet: run make ledger.")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("ledger", Ledger)
    app.add_directive("layouts", Layouts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
