"""The directive `chapters`: a card a chapter, made from the notebooks, so never out of date."""

import html
import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx


def summary(path: Path) -> tuple[str, str]:
    """Title and first sentence of a notebook's prose, Markdown signs removed."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    title = re.search(r"^# (.+)$", prose, re.M)
    rest = prose[title.end() :] if title else prose
    paragraph = next((part for part in re.split(r"\n\s*\n", rest) if re.match(r"\s*[A-Za-z\"*_“]", part)), "")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`_#]", lambda match: match[1] or "", " ".join(paragraph.split()))
    sentence = re.match(r".{20,}?[.?!](?=\s|$)", plain)
    return (title[1].strip() if title else path.stem), (sentence[0] if sentence else plain)


class Chapters(Directive):
    """A grid of links to the chapters, in their order."""

    def run(self) -> list[nodes.Node]:
        """The grid as HTML."""
        environment = self.state.document.settings.env
        environment.note_reread()  # chapters come and go, and a page knows only files that were there
        source = Path(environment.srcdir)
        cards = []
        for path in sorted((source / "chapters").glob("*.ipynb")):
            title, sentence = summary(path)
            number = path.stem.partition("_")[0]
            name = re.sub(r"^\d+\s*[.:·—–-]?\s*", "", title)
            cards.append(
                f'<a class="mv-card" href="chapters/{path.stem}.html"><span class="mv-number">{number}</span>'
                f"<strong>{html.escape(name)}</strong><span>{html.escape(sentence)}</span></a>"
            )
        return [nodes.raw("", f'<div class="mv-cards">{"".join(cards)}</div>', format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("chapters", Chapters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
