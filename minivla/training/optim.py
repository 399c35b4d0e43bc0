"""Adam and its learning rate, averaged weights, and what is trainable at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULES = ("cosine", "constant", "upstream")


def make_optimizer(policy: Any, lr: float | None = None) -> torch.optim.Adam:
    """AdamW (Loshchilov & Hutter 2019) over `policy.optimizer_groups()`.

    A group may have betas and eps of its own, and decoupled_weight_decay=False, which makes it plain Adam.
    `lr` replaces the largest rate among the groups; the others keep their ratio to it (ACT's backbone, for
    one). Raises ValueError when nothing is trainable.
    """
    groups = [dict(group, params=list(group["params"])) for group in policy.optimizer_groups()]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            f"{type(policy).__name__} has nothing to train: every parameter is frozen. "
            "print(minivla.training.trainable_report(policy)) shows which; set requires_grad on some"
        )
    largest = max(group["lr"] for group in groups)
    for group in groups:
        group["lr"] = group["lr"] if lr is None else lr * group["lr"] / largest
    fused = {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}
    # Not torch.optim.AdamW, which is this, but decouples every group again when its state is loaded.
    return torch.optim.Adam(groups, decoupled_weight_decay=True, fused=fused)


def lr_factor(step: int, *, steps: int, warmup_steps: int = 0, schedule: str = "cosine") -> float:
    """The learning rate's factor at `step` (counted from 0): a straight rise, then half a cosine to 0, or 1.

    >>> [round(lr_factor(k, steps=6, warmup_steps=2), 3) for k in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def policy_lr_factor(
    config: Any, step: int, *, start: int, steps: int, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """`lr_factor`, begun at step `start`; before, in a phase of its own, the factor is 1.

    "upstream" is LeRobot's schedule for the policy of this config, whatever `warmup_steps`: 1 if it has no
    scheduler_warmup_steps, else a rise from 0 and half a cosine, as long as the whole run. Source: LeRobot
    0.6 `optim/schedulers.py`. Raises ValueError where the config names another than the cosine.
    """
    if step < start:
        return 1.0
    if schedule != "upstream":
        return lr_factor(step - start, steps=steps - start, warmup_steps=warmup_steps, schedule=schedule)
    if (name := getattr(config, "scheduler_name", "cosine")) != "cosine":
        raise ValueError(f"scheduler_name is {name!r}, minivla knows 'cosine'; or give train its schedule=")
    if (warmup := getattr(config, "scheduler_warmup_steps", None)) is None:
        return 1.0
    if step - start < warmup:
        return (step - start) / warmup
    return lr_factor(step - start - warmup, steps=steps - warmup)


def set_lr(optimizer: torch.optim.Optimizer, rates: Sequence[float], factor: float) -> None:
    """Give each parameter group its own rate times `factor`."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor


class Average:
    """An exponential moving average of the trainable parameters, kept in at least float32.

    After step n the decay is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: _float32(p.detach()).clone() for name, p in _trainable(policy)}

    @torch.no_grad()
    def update(self, policy: nn.Module, step: int) -> None:
        """Move the average towards the parameters; `step` counts finished steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in _trainable(policy):
            self.weights[name].lerp_(_float32(parameter), 1 - decay)

    @torch.no_grad()
    def copy_to(self, policy: nn.Module) -> None:
        """Give the policy the averaged weights."""
        for name, parameter in _trainable(policy):
            parameter.copy_(self.weights[name])

    @contextlib.contextmanager
    def applied(self, policy: nn.Module) -> Iterator[None]:
        """Inside, the policy has the averaged weights; afterwards its own, to the bit."""
        own = {name: parameter.detach().clone() for name, parameter in _trainable(policy)}
        self.copy_to(policy)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in _trainable(policy):
                    parameter.copy_(own[name])

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over the averages of a checkpoint. Raises ValueError when they are of other parameters."""
        if weights.keys() != self.weights.keys():
            odd = ", ".join(sorted(weights.keys() ^ self.weights.keys())[:4])
            raise ValueError(
                f"the checkpoint's averaged weights are of other parameters ({odd}); freeze the same ones"
            )
        for name, weight in weights.items():
            self.weights[name].copy_(weight)


def _float32(tensor: Tensor) -> Tensor:
    # In bfloat16 a step of 1 - 0.999 would be rounded away.
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _trainable(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in policy.named_parameters() if p.requires_grad)


@dataclass(frozen=True)
class TrainableReport:
    """How many parameters each part has, and how many of them train: rows (part, parameters, trainable)."""

    rows: tuple[tuple[str, int, int], ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(row[1] for row in self.rows)

    @property
    def trainable(self) -> int:
        """Those that an optimiser step moves."""
        return sum(row[2] for row in self.rows)

    def __str__(self) -> str:
        width = max([len("module"), *(len(name) for name, _, _ in self.rows)])
        lines = [f"{'module':<{width}}  {'parameters':>13}  {'trainable':>13}  {'frozen':>13}"]
        for name, count, trainable in (*self.rows, ("total", self.total, self.trainable)):
            lines.append(f"{name:<{width}}  {count:>13,}  {trainable:>13,}  {count - trainable:>13,}")
        lines.insert(-1, "-" * len(lines[0]))
        return "\n".join(lines)

    __repr__ = __str__


def trainable_report(policy: nn.Module) -> TrainableReport:
    """What of a policy trains and what is frozen, part by part; a table when printed.

    Parts are the first level at which the module tree branches. A shared parameter counts once.
    """
    named = [(name.split("."), p) for name, p in policy.named_parameters()]
    level = 0
    while all(len(path) > level + 1 for path, _ in named) and len({path[level] for path, _ in named}) == 1:
        level += 1
    rows: dict[str, tuple[int, int]] = {}
    for path, parameter in named:
        count, trainable = rows.get(path[level], (0, 0))
        size = parameter.numel()
        rows[path[level]] = (count + size, trainable + size * parameter.requires_grad)
    return TrainableReport(tuple((name, *counts) for name, counts in rows.items()))
