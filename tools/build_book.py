"""Build the book: stage its sources, run Sphinx with warnings as errors, check the pages.

    .venv/bin/python tools/build_book.py [--into book/_build]

Nothing but local files is read, and the pages may load nothing but local files: every reference by which a
browser fetches something is looked at, and every internal link is followed to its anchor.
"""

import argparse
import ast
import filecmp
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
ROOMS = {  # the order in which the reference presents the package
    "minivla": "The front door",
    "minivla.policies": "Policies, one file a family",
    "minivla.nn": "Blocks",
    "minivla.actions": "How actions become predictions",
    "minivla.data": "The data path",
    "minivla.world": "Tabletop",
    "minivla.training": "Training and evaluation",
    "minivla.checkpoints": "Loading and saving",
    "minivla.viz": "Pictures",
    "minivla.zoo": "Shipped checkpoints",
    "minivla.exercises": "Checks of the exercises",
    "": "The ground floor",
}


def put(text: str | Path, target: Path, kept: set[Path]) -> None:
    """Bring one file to the stage, untouched when it is already there, so that Sphinx rebuilds only what
    changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    kept.add(target)
    if isinstance(text, Path):
        if not (target.exists() and filecmp.cmp(text, target, shallow=False)):
            shutil.copyfile(text, target)
    elif not (target.exists() and target.read_text(encoding="utf-8") == text):
        target.write_text(text, encoding="utf-8")


def modules() -> list[str]:
    """Public modules of the package, found without importing them."""
    names = ["minivla"]
    for info in pkgutil.walk_packages([str(ROOT / "minivla")], "minivla.", onerror=lambda name: None):
        if not any(part.startswith("_") for part in info.name.split(".")):
            names.append(info.name)
    return names


def room(name: str) -> str:
    """The heading of ROOMS under which a module belongs."""
    fits = [key for key in ROOMS if key and (name == key or name.startswith(f"{key}.")) and key != "minivla"]
    return fits[0] if fits else ("minivla" if name == "minivla" else "")


def syntax(name: str) -> ast.Module:
    """A module's source, parsed."""
    path = ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def first_line(name: str) -> str:
    """A module's docstring, its first line."""
    return (ast.get_docstring(syntax(name)) or "–").partition("\n")[0]


def offers(name: str) -> dict[str, str]:
    """What a module passes on from other modules of ours, and the full name under which each is described."""
    if not (ROOT.joinpath(*name.split(".")) / "__init__.py").exists():
        return {}
    imports = [node for node in ast.walk(syntax(name)) if isinstance(node, ast.ImportFrom) and node.module]
    found = {}
    for node in imports:
        for alias in node.names if node.module.startswith("minivla") else []:
            found[alias.name] = offers(node.module).get(alias.name, f"{node.module}.{alias.name}")
    return dict(sorted(found.items()))


def api_page(name: str) -> str:
    """One module: its docstring, what it defines, and what it passes on."""
    directive = f".. automodule:: {name}\n   :members:\n   :ignore-module-all:\n   :show-inheritance:\n"
    page = f"# {name}\n\n```{{eval-rst}}\n{directive}```\n"
    links = ", ".join(f"{{py:obj}}`{entry} <{home}>`" for entry, home in offers(name).items())
    return page + (f"\nOffers {links}.\n" if links else "")


def api_pages() -> dict[str, str]:
    """The reference: an index by room and a page a module."""
    names = modules()
    pages = {f"api/{name}.md": api_page(name) for name in names}
    parts = ["# Reference\n\nWritten by the docstrings. Shapes are named as in the {doc}`../glossary`.\n"]
    for key, title in ROOMS.items():
        inside = [name for name in names if room(name) == key]
        rows = "\n".join(f"[{name}]({name}.md)\n: {first_line(name)}\n" for name in inside)
        parts += [f"## {title}\n\n{rows}"] if inside else []
    toctree = "\n".join(names)
    pages["api/index.md"] = "\n".join(parts) + f"\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{toctree}\n```\n"
    return pages


def stage(source: Path) -> None:
    """Copy pages, chapters and the ledger to where Sphinx reads them, and remove what is no longer there."""
    kept: set[Path] = set()
    for path in BOOK.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc") and "_build" not in path.parts:
            put(path, source / path.relative_to(BOOK), kept)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        put(path, source / "chapters" / path.name, kept)
    for name, text in api_pages().items():
        put(text, source / name, kept)
    for path in source.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()


class Page(HTMLParser):
    """What a page loads, where it links, and the anchors it offers."""

    FETCHED: ClassVar = {
        "script": "src",
        "img": "src",
        "iframe": "src",
        "source": "src",
        "video": "src",
        "audio": "src",
        "embed": "src",
    }

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort one tag's references."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in self.FETCHED and self.FETCHED[tag] in given:
            self.loads.append(given[self.FETCHED[tag]])
        if tag == "link" and not {"canonical", "next", "prev", "index", "search", "author"} & set(
            given.get("rel", "").split()
        ):
            self.loads.append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))


def is_elsewhere(reference: str) -> bool:
    """Whether following a reference leaves the book."""
    return bool(re.match(r"(?:[a-z][a-z0-9+.-]*:)?//", reference, re.I))


def problems_of_page(path: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Loads from another host; links that lead nowhere."""
    page = pages[path]
    yield from (f"loads {load}" for load in page.loads if is_elsewhere(load))
    for reference in [*page.loads, *page.links]:
        address, anchor = urldefrag(reference)
        address = address.partition("?")[0]
        if is_elsewhere(reference) or re.match(r"[a-z]+:", reference, re.I) or (not address and not anchor):
            continue
        target = (path.parent / unquote(address)).resolve() if address else path
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"links to {reference}, which is not there"
        elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
            yield f"links to {reference}, which has no such anchor"


def problems(output: Path) -> list[str]:
    """Everything wrong with the built pages and style sheets, one line each."""
    written = [path.resolve() for path in output.rglob("*.html") if not path.stem.endswith("macros")]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in written}
    found = [
        f"{path.relative_to(output.resolve())} {problem}"
        for path in pages
        for problem in problems_of_page(path, pages)
    ]
    for path in output.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        for reference in re.findall(r"(?:url\(|@import\s+)['\"]?([^'\")\s;]+)", text):
            if is_elsewhere(reference):
                found.append(f"{path.relative_to(output)} loads {reference}")
    return found


def main() -> int:
    """The command line; 0 when the book is whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--into", type=Path, default=BOOK / "_build", help="the folder for sources, cache and pages"
    )
    into = parser.parse_args().into.resolve()
    source, cache, output = into / "source", into / "doctrees", into / "html"
    stage(source)
    options = ["-b", "html", "-c", str(BOOK), "-d", str(cache), "--fail-on-warning", "--quiet"]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(output)]
    if done := subprocess.run(command, check=False, cwd=ROOT).returncode:
        return done
    found = problems(output)
    print("\n".join(found) if found else f"The book is at {output / 'index.html'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
