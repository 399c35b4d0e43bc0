"""From a recipe to a shipped checkpoint: train, store in float16, measure what was stored, write its card."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minivla.checkpoints import load
from minivla.checkpoints.hub import CHECKPOINTS
from minivla.files import atomic_write
from minivla.policies.base import Policy
from minivla.segments import camera_names
from minivla.training import Evaluation, train
from minivla.training.checkpoint import newest_state
from minivla.training.loop import TrainResult
from minivla.world import corrections, demonstrations
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
    recipe = _shortened(recipe_of(name), steps)
    dataset = demonstrations(recipe.tasks, recipe.episodes, recipe.data_seed, noise=recipe.noise)
    torch.manual_seed(0)
    output = runs / name
    start = [load(target / recipe.start)] if recipe.start else []
    policy = recipe.make(dataset, *start)
    if recipe.before is not None and newest_state(output) is None:
        recipe.before(policy, dataset)
    result, minutes = _train(policy, dataset, output, recipe.training)
    if recipe.whole:
        result, more = _train(_all_of_it(result.policy), dataset, runs / f"{name}-whole", recipe.whole)
        minutes += more
    seed = itertools.count(recipe.data_seed + 1)
    for turn, episodes_of in enumerate(recipe.corrected, start=1):
        for task, count in episodes_of.items():
            fresh = corrections(result.policy, task, count, next(seed), noise=recipe.noise)
            dataset = dataset.joined(fresh)
        again = runs / f"{name}-again-{turn}"
        result, more = _train(_all_of_it(result.policy), dataset, again, recipe.again)
        minutes += more
    folder = target / name
    result.policy.save(folder, dtype=torch.float16)
    measured = measure(name, episodes=episodes, target=target)
    told = {row: str(outcome) for row, outcome in measured.items()} | sides(measured)
    atomic_write(folder / "README.md", card(recipe, result.policy, told, minutes))
    return measured


def _shortened(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe, with another number of steps in each of its trainings."""
    if not steps:
        return recipe
    stages = {stage: getattr(recipe, stage) for stage in ("training", "whole", "again")}
    shorter: dict[str, Any] = {stage: {**own, "steps": steps} for stage, own in stages.items() if own}
    return replace(recipe, **shorter)


def _all_of_it(policy: Policy) -> Policy:
    """The policy, of which everything learns now."""
    if hasattr(policy.config, "train_expert_only"):
        policy.config.train_expert_only = False
    return policy.requires_grad_(True)


def _train(
    policy: Policy, dataset: Any, output: Path, options: Mapping[str, Any]
) -> tuple[TrainResult, float]:
    """Train, going on where an earlier run stopped; the result, and how many minutes it took in all.

    Raises KeyboardInterrupt where Ctrl-C ended it before its last step: what comes next needs all of it.
    """
    result = train(
        policy,
        dataset,
        output=output,
        resume=output.exists(),
        save_every=1000,
        keep=2,
        **options,
    )
    if result.interrupted:
        raise KeyboardInterrupt(f"{output} stopped at step {result.step:,}; the same command goes on there")
    # The clock of the log goes on where an interrupted run stopped.
    return result, max((r["time"]["seconds"] for r in result.log if "time" in r), default=0) / 60


def card(recipe: Recipe, policy: Policy, measured: Mapping[str, str], minutes: float) -> str:
    """The README.md beside the weights: what it is, how it was trained, what it can do.

    `measured` are rows of text.
    """
    parameters = sum(p.numel() for p in policy.parameters())
    tasks = ", ".join(f"`{task}`" for task in recipe.tasks)
    views = "camera" if len(policy.config.image_features) == 1 else "cameras"
    cameras = " and ".join(camera_names(policy.config.image_features).values())
    rows = {
        "policy": f"{policy.name}, {parameters / 1e6:.2f} M parameters, stored in float16",
        "task": f"Tabletop {tasks}, cartesian gripper, {views} {cameras}, 64 × 64",
        "demonstrations": f"{recipe.episodes} episodes, data seed {recipe.data_seed}, noise {recipe.noise}",
        "training": _told(recipe.training),
        **({"training, all of it": _told(recipe.whole)} if recipe.whole else {}),
        **({"corrected": _corrected(recipe)} if recipe.corrected else {}),
        **({f"training, with those{_rounds(recipe)}": _told(recipe.again)} if recipe.corrected else {}),
        **({"the shipped run": recipe.differs} if recipe.differs else {}),
        **({"begun with": f"the eyes and words of {recipe.start}, trained before"} if recipe.start else {}),
        "time to train": f"{minutes:.0f} minutes{_apart(recipe)}, CPU threads: {torch.get_num_threads()}",
        **measured,
        "measured": f"95 % Wilson interval, unseen seeds from {UNSEEN:,} on",
        "clipped": CLIPPED,
        "aim": f"{recipe.aim:.0%}" + "".join(f", missed on {task}" for task in recipe.missed),
        "again": f"`make zoo NAME={recipe.name}`; only measured: add `ARGS=--measure`",
        "licence": "Apache-2.0",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# {recipe.name}\n\nTrained by `minivla/zoo/recipes.py`.\n\n| | |\n|---|---|\n{table}\n"


def _told(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _corrected(recipe: Recipe) -> str:
    rounds = [", ".join(f"{n} of `{task}`" for task, n in each.items()) for each in recipe.corrected]
    return f"episodes that it began and the expert ended: {'; then '.join(rounds)}"


def _apart(recipe: Recipe) -> str:
    """What the minutes of training do not count."""
    parts = {"eyes and words": recipe.before, "corrections": recipe.corrected}
    apart = " and ".join(name for name, there in parts.items() if there)
    return f" ({apart} apart)" if apart else ""


def _rounds(recipe: Recipe) -> str:
    return f", {len(recipe.corrected)} times" if len(recipe.corrected) > 1 else ""
