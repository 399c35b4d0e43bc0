"""One recipe a shipped checkpoint: the world it learns in, the policy's sizes, how long it trains, how it is
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minivla.checkpoints import load
from minivla.checkpoints.hub import CHECKPOINTS
from minivla.data.features import features_of
from minivla.files import atomic_write
from minivla.policies.act import ACT, ACTConfig
from minivla.policies.base import Policy
from minivla.training import Evaluation, evaluate, train
from minivla.world import VOCABULARY, demonstrations

CLIPPED = (
    "share of steps; the expert's grip always lies at a bound, and predictions beyond it by any amount count"
)
UNSEEN = 2_000_000  # first seed of the evaluation: far from every seed that training or its checks use


@dataclass(frozen=True)
class Recipe:
    """What it takes to train a shipped checkpoint.

    task, episodes, data_seed   the demonstrations; `noise` as in `minivla.world.demonstrations`
    make                        builds the policy from the demonstrations
    training                    options of `minivla.train`
    aim                         the success rate the recipe is meant to reach
    """

    name: str
    make: Callable[[Any], Policy]
    task: str = "pick_place"
    episodes: int = 800
    data_seed: int = 0
    noise: float = 0.15
    training: Mapping[str, Any] = field(default_factory=dict)
    aim: float = 0.95


def _act(dataset: Any) -> Policy:
    """A small ACT that reads the instruction: 0.4 M parameters, 64 × 64 pixels from two cameras."""
    inputs, outputs = features_of(dataset)
    config = ACTConfig(
        input_features=inputs,
        output_features=outputs,
        chunk_size=16,
        n_action_steps=8,
        compact_vision=True,
        vocabulary=VOCABULARY,
        pretrained_backbone_weights=None,
        dim_model=96,
        n_heads=4,
        dim_feedforward=192,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        latent_dim=8,
        dropout=0.0,
        optimizer_lr=1e-3,
        optimizer_lr_backbone=1e-3,
    )
    return ACT(config, stats=dataset.stats)


RECIPES: dict[str, Recipe] = {
    "act-tabletop": Recipe(
        name="act-tabletop",
        make=_act,
        training={"steps": 5_000, "batch_size": 32, "warmup_steps": 200, "ema": 0.999},
    )
}


def cook(
    name: str, *, runs: Path, steps: int | None = None, episodes: int = 200, target: Path = CHECKPOINTS
) -> dict[str, Evaluation]:
    """Train a recipe (going on where an earlier run stopped), ship it into `target`, measure the shipped.

    `runs` holds the run's log and checkpoints; `steps` overrides the recipe's, `episodes` is how many unseen
    seeds the evaluation takes. The checkpoint is stored in float16, and it is the stored one that is
    measured. Returns `measure`'s. Raises ValueError for an unknown name.
    """
    recipe = _recipe(name)
    dataset = demonstrations(recipe.task, recipe.episodes, recipe.data_seed, noise=recipe.noise)
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
    atomic_write(folder / "README.md", _card(recipe, options, result.policy, measured, minutes))
    return measured


def measure(name: str, *, episodes: int = 200, target: Path = CHECKPOINTS) -> dict[str, Evaluation]:
    """Success of a shipped checkpoint on seeds it never saw: with instructions of the kind it was trained on
    ("success"), and with combinations of colour, shape and wording held out of training ("held-out words").

    Raises ValueError for an unknown name.
    """
    recipe = _recipe(name)
    splits = {"success": "train", "held-out words": "test"}
    return {
        row: evaluate(
            load(target / name), f"tabletop:{recipe.task}?split={split}", episodes, UNSEEN, progress=False
        )
        for row, split in splits.items()
    }


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _card(
    recipe: Recipe,
    options: Mapping[str, Any],
    policy: Policy,
    measured: Mapping[str, Evaluation],
    minutes: float,
) -> str:
    parameters = sum(p.numel() for p in policy.parameters())
    rows = {
        "policy": f"{policy.name}, {parameters / 1e6:.2f} M parameters, stored in float16",
        "task": f"Tabletop `{recipe.task}`, cartesian gripper, cameras table and wrist, 64 × 64",
        "demonstrations": f"{recipe.episodes} episodes, data seed {recipe.data_seed}, noise {recipe.noise}",
        "training": ", ".join(f"{k} {v}" for k, v in options.items()),
        "time to train": f"{minutes:.0f} minutes, {torch.get_num_threads()} CPU threads",
        **{row: str(result) for row, result in measured.items()},
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
