"""Our docstrings are plain text with backticks; autodoc wants reStructuredText."""

import re
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"``?([^`]+)``?")
MARKUP = re.compile(r"([\\*|_])")
BULLET = re.compile(r"[-*] ")
# "name, other: what it is" or "name   what it is"
ENTRY = re.compile(r"[a-z_`][\w`.,/<>() ]{0,70}(?: {2,}|: )\S")


def inline(text: str) -> str:
    """Backticks become code; every other character means itself."""
    pieces, end = [], 0
    for match in CODE.finditer(text):
        pieces += [MARKUP.sub(r"\\\1", text[end : match.start()]), f"\\ ``{match[1].strip()}``\\ "]
        end = match.end()
    return "".join([*pieces, MARKUP.sub(r"\\\1", text[end:])])


def items(lines: list[str], starts: re.Pattern[str]) -> list[str]:
    """Lines joined to the item they continue; an item is a line that `starts` matches."""
    found: list[str] = []
    for line in lines:
        if starts.match(line) or not found:
            found.append(line)
        else:
            found[-1] += " " + line.strip()
    return found


def convert(block: list[str]) -> list[str]:
    """One paragraph: examples, a list, a table of names, a drawing, or text, each as what it is."""
    if block[0].startswith(">>>"):
        return block
    bullet = next((place for place, line in enumerate(block) if BULLET.match(line)), None)
    if bullet:
        return [*convert(block[:bullet]), "", *convert(block[bullet:])]
    if bullet == 0:
        return ["- " + inline(item[2:]) for item in items(block, BULLET)]
    if sum(bool(ENTRY.match(line)) for line in block) > 1 and ENTRY.match(block[0]):
        return ["| " + inline(re.sub(r" {2,}", ": ", item, count=1)) for item in items(block, ENTRY)]
    drawn = next((place for place, line in enumerate(block) if re.search(r"^ |\S {3,}\S", line)), None)
    if drawn is None:
        return [inline(line) for line in block]
    return [*map(inline, block[:drawn]), "", "::", "", *("    " + line for line in block[drawn:])]


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace a docstring's lines in place, paragraph by paragraph."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line.rstrip())
        elif paragraphs[-1]:
            paragraphs.append([])
    lines[:] = [line for block in paragraphs if block for line in ["", *convert(block), ""]]


def signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, call: str, result: str) -> Any:
    """A dataclass's default that is made on demand is written as an ellipsis, which can be parsed."""
    return (call.replace("<factory>", "..."), result) if call and "<factory>" in call else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
