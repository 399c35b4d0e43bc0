"""What a shipped checkpoint can do, on seeds it never saw; and what it does when it is run differently."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minivla.actions.realtime import RTCConfig
from minivla.checkpoints import load
from minivla.checkpoints.hub import CHECKPOINTS
from minivla.files import atomic_write
from minivla.policies.base import Policy
from minivla.training import Evaluation, evaluate
from minivla.training.evaluation import wilson
from minivla.training.latency import under_delay
from minivla.zoo.recipes import Recipe, recipe_of

UNSEEN = 2_000_000  # first seed of the evaluation: far from every seed that training or its checks use
# Of an experiment's settings: what `load` does not take.
NO_FIELDS = ("change", "delay", "strategy", "execution_horizon")
SMOOTH = ("jerk", "seam", "elsewhere")
SPLITS = {"success": "train", "held-out words": "test"}


def measure(name: str, *, episodes: int = 200, target: Path = CHECKPOINTS) -> dict[str, Evaluation]:
    """Success of a shipped checkpoint: with instructions of the kind it was trained on ("success"), and with
    combinations of colour, shape and wording held out of training ("held-out words"); task by task, where it
    learnt several ("success, detour").

    Raises ValueError for an unknown name.
    """
    policy, tasks = load(target / name), recipe_of(name).tasks
    return {
        row + (f", {task}" if len(tasks) > 1 else ""): _run(policy, task, split, episodes)
        for row, split in SPLITS.items()
        for task in tasks
    }


def experiment(name: str, *, episodes: int = 200, target: Path = CHECKPOINTS) -> list[dict[str, Any]]:
    """Run a shipped checkpoint in every way its recipe's `experiments` name, and store what came out.

    Each is a mapping of overrides as `load` takes them, {"change": one of CHANGES} or {"delay": steps,
    "strategy": one of `minivla.training.latency`, "execution_horizon": steps, if not the policy's}; "tasks"
    in it says which of the recipe's. Returns the rows of `measured`. Raises ValueError for an unknown name.
    """
    rows = []
    for task, settings in asked(recipe_of(name)):
        overrides = {key: value for key, value in settings.items() if key not in NO_FIELDS}
        policy = load(target / name, **overrides)
        if "change" in settings:
            CHANGES[settings["change"]](policy)
        if "delay" in settings:
            rows.append(_late(policy, task, settings, episodes))
        else:
            rows.append(_row(task, settings, _run(policy, task, "train", episodes)))
    text = ",\n".join(json.dumps(row) for row in rows)
    atomic_write(target / name / "measured.json", f"[\n{text}\n]\n")
    return rows


def asked(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """A recipe's experiments as (task, settings), in the order of `measured`."""
    every = [(dict(s), s.get("tasks", recipe.tasks)) for s in recipe.experiments]
    return [(t, {k: v for k, v in s.items() if k != "tasks"}) for s, tasks in every for t in tasks]


def measured(name: str, *, target: Path = CHECKPOINTS) -> list[dict[str, Any]]:
    """The stored outcome of `experiment`: rows of task, split, settings, success with low and high (95 %),
    episodes and, for detour, how many of them passed the obstacle left and right; with a delay also what
    `Latency` measures: jerk, seam and elsewhere.

    Raises ValueError for an unknown name, FileNotFoundError where nothing was stored.
    """
    recipe_of(name)
    path = target / name / "measured.json"
    if not path.exists():
        raise FileNotFoundError(f"{name} has no {path.name}: run `make zoo NAME={name} ARGS=--experiments`")
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def sides(rows: Mapping[str, Evaluation]) -> dict[str, str]:
    """For each row whose episodes went round an obstacle: how often on its left, with a 95 % interval."""
    told = {}
    for row, result in rows.items():
        left, right = (_passed(result, side) for side in ("left", "right"))
        if left + right:
            low, high = wilson(left, left + right)
            told[f"left side, {row}"] = f"{left / (left + right):.3f} [{low:.3f}, {high:.3f}]"
    return told


def _run(policy: Policy, task: str, split: str, episodes: int) -> Evaluation:
    return evaluate(policy, f"tabletop:{task}?split={split}", episodes, UNSEEN, progress=False)


def _row(task: str, settings: Mapping[str, Any], result: Evaluation) -> dict[str, Any]:
    numbers = {key: round(getattr(result, key), 4) for key in ("success", "low", "high", "clipped")}
    passed = {side: _passed(result, side) for side in ("left", "right")} if task == "detour" else {}
    row = {"task": task, "split": "train", "settings": dict(settings)}
    return row | numbers | {"episodes": result.episodes} | passed


def _late(policy: Policy, task: str, settings: Mapping[str, Any], episodes: int) -> dict[str, Any]:
    """A row of one strategy at one delay; real-time chunking at LeRobot's settings, but for an
    `execution_horizon` that is given."""
    if settings["strategy"] == "rtc":
        policy.config.rtc_config = RTCConfig().to_json()
    where = f"tabletop:{task}?split=train"
    horizon = settings.get("execution_horizon")
    found = under_delay(
        policy, where, settings["delay"], settings["strategy"], episodes, UNSEEN, execution_horizon=horizon
    )
    return _row(task, settings, found.evaluation) | {
        key: float(f"{getattr(found, key):.3g}") for key in SMOOTH
    }


def _passed(result: Evaluation, side: str) -> int:
    return sum(info.get("side") == side for info in result.infos)


@torch.no_grad()
def _no_offsets(policy: Any) -> None:
    for parameter in policy.code_head.offset.parameters():
        parameter.zero_()


@torch.no_grad()
def _first_level_only(policy: Any) -> None:
    _no_offsets(policy)
    for quantizer in policy.vqvae.vq_layer.levels[1:]:
        quantizer.embed.zero_()


CHANGES: dict[str, Callable[[Any], None]] = {
    "no offsets": _no_offsets,
    "first level only": _first_level_only,
}
"""Changes to VQ-BeT's weights: codes alone, without what is added to them; only the first code of each chunk,
also without."""
