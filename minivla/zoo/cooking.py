"""From a recipe to a shipped checkpoint: train, store in float16, measure what was stored, write its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minivla.checkpoints.hub import CHECKPOINTS
from minivla.files import atomic_write
from minivla.policies.base import Policy
from minivla.training import Evaluation, train
from minivla.world import demonstrations
from minivla.zoo.measuring import UNSEEN, measure, sides
from minivla.zoo.recipes import Recipe, recipe_of

CLIPPED = (
    "share of steps; the expert's grip always lies at a bound, and predictions beyond it by any amount count"
)


def cook(
    name: str, *, runs: Path, steps: int | None = None, episodes: int = 200, target: Path = CHECKPOINTS
) -> dict[str, Evaluation]:
    """Train a recipe (going on where an earlier run stopped), ship it into `target`, measure the shipped.

    `runs` holds the run's log and checkpoints; `steps` overrides the recipe's, `episodes` is how many unseen
    seeds the evaluation takes. The checkpoint is stored in float16, and it is the stored one that is
    measured. Returns `measure`'s. Raises ValueError for an unknown name.
    """
    recipe = recipe_of(name)
    dataset = demonstrations(recipe.tasks, recipe.episodes, recipe.data_seed, noise=recipe.noise)
    torch.manual_seed(0)
    options = dict(recipe.training) | ({"steps": steps} if steps else {})
    output = runs / name
    result = train(
        recipe.make(dataset),
        dataset,
        output=output,
        resume=output.exists(),
        save_every=1000,
        keep=2,
        **options,
    )
    # The clock of the log goes on where an interrupted run stopped.
    minutes = max((record["time"]["seconds"] for record in result.log if "time" in record), default=0) / 60
    folder = target / name
    result.policy.save(folder, dtype=torch.float16)
    measured = measure(name, episodes=episodes, target=target)
    told = {row: str(outcome) for row, outcome in measured.items()} | sides(measured)
    atomic_write(folder / "README.md", card(recipe, options, result.policy, told, minutes))
    return measured


def card(
    recipe: Recipe, options: Mapping[str, Any], policy: Policy, measured: Mapping[str, str], minutes: float
) -> str:
    """The README.md beside the weights: what it is, how it was trained, what it can do.

    `options` are train's, `measured` rows of text.
    """
    parameters = sum(p.numel() for p in policy.parameters())
    tasks = ", ".join(f"`{task}`" for task in recipe.tasks)
    rows = {
        "policy": f"{policy.name}, {parameters / 1e6:.2f} M parameters, stored in float16",
        "task": f"Tabletop {tasks}, cartesian gripper, cameras table and wrist, 64 × 64",
        "demonstrations": f"{recipe.episodes} episodes, data seed {recipe.data_seed}, noise {recipe.noise}",
        "training": ", ".join(f"{k} {v}" for k, v in options.items()),
        "time to train": f"{minutes:.0f} minutes, {torch.get_num_threads()} CPU threads",
        **measured,
        "measured": f"95 % Wilson interval, unseen seeds from {UNSEEN:,} on",
        "clipped": CLIPPED,
        "aim": f"{recipe.aim:.0%}",
        "again": f"`make zoo NAME={recipe.name}`; only measured: add `ARGS=--measure`",
        "licence": "Apache-2.0",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# {recipe.name}\n\nTrained from scratch by `minivla/zoo/recipes.py`.\n\n| | |\n|---|---|\n{table}\n"
    )
