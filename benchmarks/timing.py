"""How two things are timed against each other: in turn, many times, with an interval for the ratio."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

INTRODUCTION = (
    "Written by `make bench`; `python -m benchmarks diffusion` measures one section again and keeps the "
    "others. Calls in turn, medians, and a bootstrap 95 % interval of the ratio LeRobot / minivla: above 1 "
    "we are faster, or smaller. A row is called slower when its whole interval lies below 1."
)


@dataclass(frozen=True)
class Row:
    """One line of the report. `ratio` is theirs / ours, above 1 when we are faster (or smaller); low and high
    are its 95 % interval. Rows without a rival have `theirs` None."""

    what: str
    unit: str
    ours: float
    theirs: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None

    def as_markdown(self) -> str:
        """A row of the table."""
        if self.theirs is None:
            return f"| {self.what} | {self.ours:,.4g} {self.unit} | – | – |"
        ratio = f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"
        return f"| {self.what} | {self.ours:,.4g} {self.unit} | {self.theirs:,.4g} {self.unit} | {ratio} |"


def race(
    what: str, ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, warmup: int = 2
) -> Row:
    """Call both in turn, who goes first alternating, and compare medians; milliseconds.

    The interval is a bootstrap over rounds: what else the machine does falls on both alike.
    """
    for _ in range(warmup):
        ours(), theirs()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    pair = [("ours", ours), ("theirs", theirs)]
    for i in range(rounds):
        for name, call in pair if i % 2 else pair[::-1]:
            start = perf_counter()
            call()
            times[name].append(1000 * (perf_counter() - start))
    return compare(what, "ms", times["ours"], times["theirs"])


def compare(what: str, unit: str, ours: list[float], theirs: list[float]) -> Row:
    """Medians, their ratio, and a bootstrap 95 % interval of it (pairs resampled together)."""
    a, b = np.array(ours), np.array(theirs)
    picks = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    ratios = np.median(b[picks], axis=1) / np.median(a[picks], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Row(
        what, unit, float(np.median(a)), float(np.median(b)), float(np.median(b) / np.median(a)), low, high
    )


def in_fresh_process(code: str) -> float:
    """Run Python code that prints one number last; return the number."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def fresh_race(what: str, unit: str, ours: str, theirs: str, *, rounds: int) -> Row:
    """As `race`, for code that must run in a process of its own and prints its number."""
    pairs = [(in_fresh_process(ours), in_fresh_process(theirs)) for _ in range(rounds)]
    return compare(what, unit, [a for a, _ in pairs], [b for _, b in pairs])


@dataclass(frozen=True)
class Section:
    """What was measured together: on what machine, with what versions; its rows; what is said below them."""

    facts: dict[str, str]
    rows: list[Row]
    notes: list[str]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Section:
        """As `results.json` holds it."""
        return cls(content["facts"], [Row(**row) for row in content["rows"]], content["notes"])

    def as_markdown(self, title: str) -> str:
        """Heading, facts, table, notes."""
        head = "| what | minivla | LeRobot | LeRobot / minivla [95 %] |\n|---|---|---|---|\n"
        table = head + "\n".join(row.as_markdown() for row in self.rows)
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        return "\n\n".join([f"## {title}", facts, table, *self.notes])


def report(sections: dict[str, Section]) -> tuple[str, str]:
    """The results as markdown and as JSON, section by section."""
    rows = [row for section in sections.values() for row in section.rows]
    slower = [row.what for row in rows if row.high is not None and row.high < 1]
    verdict = f"Slower than LeRobot: {', '.join(slower)}." if slower else "No row is slower than LeRobot."
    parts = [section.as_markdown(title) for title, section in sections.items()]
    text = "\n\n".join(["# Benchmarks", INTRODUCTION, verdict, *parts]) + "\n"
    return text, json.dumps({title: asdict(s) for title, s in sections.items()}, indent=1) + "\n"
