"""Run chapters from top to bottom in fresh kernels and store their outputs in the committed form.

    .venv/bin/python tools/run_notebooks.py [notebooks/02_act.ipynb …] [--check]

Runs in the environment of the tests (no network, one thread). A chapter in which a cell fails is left as it
was.
`--check` runs nothing: it names the files that are not in the committed form.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tools import offline

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_SECONDS = 120


def normalise(notebook: NotebookNode) -> NotebookNode:
    """The committed form: tags and nothing else as metadata, cells numbered in order, streams in one
    piece."""
    notebook.metadata = NotebookNode(METADATA)
    number = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = NotebookNode({"tags": sorted(tags)} if tags else {})
        if cell.cell_type != "code":
            continue
        number += 1
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "metadata" in output:  # a figure's size on the page, and nothing else
                size = output.metadata.get("image/png")
                output.metadata = NotebookNode({"image/png": size} if size else {})
    return notebook


def text_of(notebook: NotebookNode) -> str:
    """What is written to disk."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def execute(path: Path) -> None:
    """Run one chapter and write it back, whole or not at all."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
    )
    client.execute()
    nbformat.validate(notebook)
    beside = path.with_suffix(".ipynb.new")
    beside.write_text(text_of(normalise(notebook)), encoding="utf-8")
    beside.replace(path)


def is_normal(path: Path) -> bool:
    """Whether a file is in the committed form."""
    text = path.read_text(encoding="utf-8")
    return text == text_of(normalise(nbformat.reads(text, as_version=4)))


def main() -> int:
    """The command line; the number of chapters that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", type=Path, default=sorted(CHAPTERS.glob("*.ipynb")))
    parser.add_argument(
        "--check", action="store_true", help="name the files that are not in the committed form"
    )
    options = parser.parse_args()
    if options.check:
        odd = [path for path in options.chapters if not is_normal(path)]
        print("\n".join(f"{path}: not in the committed form; run make notebooks" for path in odd))
        return len(odd)
    os.environ.update(offline.environment())
    failed = 0
    for path in options.chapters:
        started = time.monotonic()
        try:
            execute(path)
        except Exception as error:  # whatever a chapter raises, the next one deserves its turn
            failed += 1
            print(f"{path.name}: failed and left as it was\n{error}", flush=True)
        else:
            print(
                f"{path.name}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 1e3:.0f} kB",
                flush=True,
            )
    offline.forget()
    return failed


if __name__ == "__main__":
    sys.exit(main())
