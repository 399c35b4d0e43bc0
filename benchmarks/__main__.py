"""`python -m benchmarks [section …]`: measure, print the tables, keep them in RESULTS.md and results.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import act, diffusion, others, pi, vqbet
from benchmarks.timing import Row, Section, report

HERE = Path(__file__).parent


def _others() -> list[Row]:
    return [others.trace_off(), *(others.tabletop(body) for body in ("cartesian", "arm2", "bimanual"))]


def _nothing() -> list[str]:
    return []


# word on the command line: title, what measures the rows, what says where the time goes
SECTIONS: dict[str, tuple[str, Callable[[], list[Row]], Callable[[], list[str]]]] = {
    "imports": ("Imports", lambda: others.imports(3), _nothing),
    "act": ("ACT", act.rows, _nothing),
    "diffusion": ("Diffusion Policy", diffusion.rows, diffusion.notes),
    "vqbet": ("VQ-BeT", vqbet.rows, vqbet.notes),
    "pi": ("π0 and π0.5", pi.rows, pi.notes),
    "others": ("Recorder and Tabletop", _others, _nothing),
}


def measure(word: str) -> Section:
    """One section, measured now."""
    _, rows, notes = SECTIONS[word]
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads; "
        f"load average at the start {busy}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("minivla", "lerobot", "torch")),
    }
    return Section(facts, rows(), notes())


def main() -> None:
    """Read the command line, measure, write after every section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--dry", action="store_true", help="print the tables and keep nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        parser.error(f"no section is called {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    stored = HERE / "results.json"
    kept = json.loads(stored.read_text()) if stored.exists() else {}
    for word in options.sections or SECTIONS:
        title = SECTIONS[word][0]
        section = measure(word)
        print(section.as_markdown(title), flush=True)
        if options.dry:
            continue
        everything = {name: Section.from_json(content) for name, content in kept.items()} | {title: section}
        titles = [title for title, *_ in SECTIONS.values() if title in everything]
        text, content = report({title: everything[title] for title in titles})
        (HERE / "RESULTS.md").write_text(text)
        stored.write_text(content)
        kept = json.loads(content)


if __name__ == "__main__":
    main()
