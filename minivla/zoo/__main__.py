"""`python -m minivla.zoo NAME`: train a shipped checkpoint again."""

from __future__ import annotations

import argparse
from pathlib import Path

from minivla.checkpoints.hub import CHECKPOINTS
from minivla.zoo import RECIPES, cook, experiment, measure


def main() -> None:
    """Read the command line, cook, print what came out."""
    parser = argparse.ArgumentParser(prog="python -m minivla.zoo", description=__doc__)
    parser.add_argument("name", choices=list(RECIPES), help="which checkpoint")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where logs and checkpoints of the run go"
    )
    parser.add_argument("--steps", type=int, help="in place of the recipe's steps")
    parser.add_argument("--episodes", type=int, default=200, help="unseen seeds to evaluate on")
    parser.add_argument("--target", type=Path, default=CHECKPOINTS, help="where the checkpoint is put")
    parser.add_argument("--measure", action="store_true", help="train nothing, measure what is there")
    parser.add_argument(
        "--experiments", action="store_true", help="run what is there in other ways too, into measured.json"
    )
    options = parser.parse_args()
    where = {"episodes": options.episodes, "target": options.target}
    if options.experiments:
        for run in experiment(options.name, **where):
            print(run)
        return
    if options.measure:
        measured = measure(options.name, **where)
    else:
        try:
            measured = cook(options.name, runs=options.runs, steps=options.steps, **where)
        except KeyboardInterrupt as stopped:
            parser.exit(130, f"interrupted: {stopped}\n")
    for row, result in measured.items():
        print(f"{options.name}, {row}: {result}")


if __name__ == "__main__":
    main()
