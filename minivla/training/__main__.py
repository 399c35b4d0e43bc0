"""`python -m minivla.training` trains a policy, `python -m minivla.training evaluate` measures one.

    python -m minivla.training --policy act --data "tabletop:pick_place?episodes=600&seed=0" \\
        --steps 20000 --output runs/act
    python -m minivla.training --policy act --data lerobot/pusht --steps 50000 \\
        --set chunk_size=16 --set n_action_steps=8
    accelerate launch --multi_gpu --num_processes 2 -m minivla.training --policy act --data … --steps 20000
    python -m minivla.training evaluate --policy runs/act/checkpoints/last/pretrained_model \\
        --env tabletop:pick_place
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from minivla.training.evaluation import evaluate
from minivla.training.loop import train
from minivla.training.optim import trainable_report
from minivla.training.spec import literal, parse_spec

HELP = {
    "steps": "optimiser steps in all",
    "batch_size": "samples a step, on each process",
    "seed": "decides the order of samples and every random number",
    "output": "folder for the log, the plot and the checkpoints",
    "lr": "learning rate of the largest group (default: the policy's own)",
    "warmup_steps": "steps over which the learning rate rises",
    "schedule": "cosine, constant, or upstream: as LeRobot trains this policy",
    "grad_clip": "largest norm of the gradient, or none",
    "ema": "decay of the averaged weights, such as 0.999",
    "mixed_precision": "bf16 or no (default: bf16 on a GPU that has it)",
    "eval_env": 'where to evaluate: "tabletop:reach?size=64" or a gymnasium id (default: that of --data)',
    "eval_every": "steps between evaluations (0: none)",
    "eval_episodes": "episodes of each evaluation",
    "eval_seed": "seed of the first of them",
    "save_every": "steps between checkpoints (0: only at the end)",
    "keep": "how many checkpoints stay (default: all)",
    "log_every": "steps that one line of the log averages over",
    "resume": "go on from the newest whole checkpoint in --output",
    "num_workers": "processes that prepare batches",
    "progress": "show a progress bar",
}
# What demonstrations and evaluation share.
ENVIRONMENT = ("embodiment", "size", "cameras", "environment_state", "split")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["evaluate"]:
        return _evaluate(_evaluate_parser().parse_args(words[1:]))
    return _train(_train_parser().parse_args(words))


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minivla.training",
        description="Train a policy. Write `evaluate` first, and --help, for measuring one.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--policy",
        required=True,
        help="a type (act), or a shipped checkpoint, folder or hub id to start from",
    )
    parser.add_argument(
        "--data",
        required=True,
        help='"tabletop:TASK?episodes=600&seed=0", or a LeRobot dataset: folder or hub id',
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the policy's config"
    )
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda when there is one)")
    for name, option in _train_options().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(option.default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=option.default, help=HELP[name]
            )
            continue
        required = option.default is inspect.Parameter.empty
        default = None if required else option.default
        shown = "" if default is None else f" (default: {default})"
        text = HELP[name].replace("%", "%%") + shown
        parser.add_argument(flag, type=_word, required=required, default=default, metavar="X", help=text)
    return parser


def _train_options() -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(train).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _word(text: str) -> Any:
    # Paths and ids stay text, even "a,b".
    value = literal(text)
    return text if isinstance(value, tuple) else value


def _train(given: argparse.Namespace) -> int:
    options = {name: getattr(given, name) for name in _train_options()}
    options["output"] = None if given.output is None else str(given.output)
    if options["eval_every"] and options["eval_env"] is None:
        options["eval_env"] = _matching_env(given.data)
    device = given.device or _default_device()
    overrides = _overrides(given.set)
    policy, dataset = make_policy(given.policy, given.data, overrides, device)
    main_process = _process() == 0
    if main_process:
        print(trainable_report(policy), flush=True)
    result = train(policy, dataset, **options)
    if main_process:
        print(result)
    _end_processes()
    return 130 if result.interrupted else 0


def make_policy(name: str, data: str, overrides: dict[str, Any], device: str) -> tuple[Any, Any]:
    """(policy, dataset), fitted to each other.

    A type gives a fresh policy with the dataset's features and statistics, anything else is loaded; a LeRobot
    dataset gets the policy's windows (`train` gives them to a `tabletop:` one).
    """
    from minivla.checkpoints import POLICIES, load
    from minivla.data.features import features_of

    dataset = open_data(data)
    if name not in POLICIES:
        policy = load(name, device=device, **overrides)
        return policy, dataset if _is_tabletop(data) else open_data(data, policy.config)
    module, _, kind = POLICIES[name].partition(":")
    policy_class = getattr(import_module(module), kind)
    inputs, outputs = features_of(dataset)
    fields = {"input_features": inputs, "output_features": outputs, "device": device} | overrides
    config = policy_class.config_class.from_json({}, **fields)
    stats = dataset.stats if hasattr(dataset, "stats") else dataset.meta.stats
    policy = policy_class(config, stats).to(device)
    return policy, dataset if _is_tabletop(data) else open_data(data, config)


def open_data(text: str, config: Any = None) -> Any:
    """The dataset that `--data` names; a LeRobot dataset gets the windows of `config`, if given."""
    if _is_tabletop(text):
        from minivla.world import demonstrations

        name, arguments = parse_spec(text)
        arguments = {"episodes": 100, "seed": 0, "progress": _process() == 0} | arguments
        return demonstrations(name.removeprefix("tabletop:"), **arguments)
    from minivla.data.lerobot import open_dataset

    folder = Path(text).expanduser()
    if folder.is_dir():
        return open_dataset(folder.name, root=folder, config=config)
    return open_dataset(text, config=config)


def _is_tabletop(data: str) -> bool:
    return data.startswith("tabletop:")


def _matching_env(data: str) -> str:
    """The environment that a `tabletop:` dataset was recorded in."""
    if not _is_tabletop(data):
        raise ValueError(f"--eval-every needs --eval-env: {data!r} does not say which environment it is from")
    name, _, query = data.partition("?")
    shared = [word for word in query.split("&") if word.partition("=")[0] in ENVIRONMENT]
    return name + ("?" + "&".join(shared) if shared else "")


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"--set {wrong[0]}; expected KEY=VALUE, such as --set chunk_size=16")
    return {key: literal(value) for key, _, value in (word.partition("=") for word in words)}


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _process() -> int:
    import os

    return int(os.environ.get("RANK", 0))


def _end_processes() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minivla.training evaluate",
        description="Measure a policy's success rate.",
        allow_abbrev=False,
    )
    parser.add_argument("--policy", required=True, help="a shipped checkpoint, a folder or a hub id")
    parser.add_argument("--env", required=True, help='"tabletop:TASK?key=value" or a gymnasium id')
    parser.add_argument("--episodes", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the first episode (default: 1000000)")
    parser.add_argument(
        "--batch-size", type=int, default=25, help="environments that step together (default: 25)"
    )
    parser.add_argument(
        "--max-steps", type=int, help="steps until an episode is over (default: the environment's)"
    )
    parser.add_argument("--video", help="a .gif or .mp4 of the first episodes")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda when there is one)")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar"
    )
    return parser


def _evaluate(given: argparse.Namespace) -> int:
    from minivla.checkpoints import load

    options = {key: getattr(given, key) for key in ("batch_size", "max_steps", "video", "progress")}
    policy = load(given.policy, device=given.device or _default_device())
    print(evaluate(policy, given.env, given.episodes, given.seed, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
