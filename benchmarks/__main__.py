"""`python -m benchmarks`: run everything, print the table, keep it in RESULTS.md and results.json."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import act, others
from benchmarks.timing import report

HERE = Path(__file__).parent


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="print the table and keep nothing")
    options = parser.parse_args()
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("minivla", "lerobot", "torch")),
        "measured": "calls in turn, medians, bootstrap interval of the ratio; above 1 we are better",
    }
    worlds = [others.tabletop(body) for body in ("cartesian", "arm2", "bimanual")]
    rows = [*others.imports(3), *act.rows(), others.trace_off(), *worlds]
    text, content = report(rows, facts)
    print(text)
    if not options.dry:
        (HERE / "RESULTS.md").write_text(text)
        (HERE / "results.json").write_text(content)


if __name__ == "__main__":
    main()
