"""Checks of training, on a twin: what the loss leaves out, what a step of the optimiser moves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minivla.data.features import ACTION
from minivla.policies.act import inert_act
from minivla.policies.base import Policy
from minivla.preflight import running
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.subject import Subject

SHIFTS = (
    100.0,
    -100.0,
    0.0,
)  # of the actions: an absolute error's gradients can cancel out, but not in all three


def padding_mask(subject: Subject) -> Iterator[Finding]:
    """Actions that are marked as padding do not change the loss, neither evaluating nor training.

    Threads: lerobot#965 #1707 #3133 #3353 #3433 PR#3442; openpi#681.
    """
    batch = subject.training_batch
    if bool(batch["action_is_pad"].all()) or not bool(batch["action_is_pad"].any()):
        raise NotRun("a policy that predicts more than one action")
    noise = torch.randn(batch[ACTION].shape, generator=torch.Generator().manual_seed(1))
    shift = 10 * noise.to(batch[ACTION]) * batch["action_is_pad"][..., None]
    policy = subject.twin()
    for mode in ("evaluating", "training"):
        plain, moved = (
            running.loss(policy, {**batch, ACTION: action}, training=mode == "training")
            for action in (batch[ACTION], batch[ACTION] + shift)
        )
        if not math.isfinite(plain):
            yield _not_finite(plain)
            return
        change = abs(moved - plain) / max(abs(plain), 1e-8)
        if not change < 1e-4:
            what = f"while {mode}, changing padded actions changes the loss by {change:.2g} of it"
            mend = "multiply errors with ~batch['action_is_pad'], and mask padding in any encoder of actions"
            yield Finding("padding-leaks", WARNING if _counts_padding(policy) else ERROR, "loss", what, mend)
            return


def _counts_padding(policy: Any) -> bool:
    """Does this policy learn from padded actions on purpose, as upstream does? Worth a look, but no fault."""
    is_told = getattr(policy.config, "do_mask_loss_for_padding", None) is False
    return is_told or getattr(policy, "name", "") == "vqbet"


def _not_finite(loss: float) -> Finding:
    what = f"the loss is {loss} on a normalised batch"
    return Finding("loss-not-finite", ERROR, "loss", what, "look for log, sqrt or a division in the loss")


def frozen_and_trainable(subject: Subject) -> Iterator[Finding]:
    """A step of the optimiser leaves frozen parameters alone, and a gradient reaches all others.

    Threads: lerobot PR#4019; openpi#744. Takes one step on a copy; not run where memory is short.
    """
    batch = subject.training_batch
    _expect_memory(subject.policy)
    frozen = {name for name, p in subject.policy.named_parameters() if not p.requires_grad}
    policy = subject.twin(weights=True)
    _stir(policy)
    before = {name: tensor.detach().clone() for name, tensor in policy.state_dict(keep_vars=True).items()}
    loss, reached = _step(policy, batch)
    if not torch.isfinite(loss):
        yield _not_finite(loss.item())
        return
    after = policy.state_dict(keep_vars=True)
    moved = [name for name in sorted(frozen) if name in after and not torch.equal(after[name], before[name])]
    moved += _moved_buffers(policy, before, frozen)
    if moved:
        what = f"{len(moved)} frozen tensors moved in one training step"
        mend = "freeze after train(), keep frozen batch norms in eval(), give the optimiser the rest only"
        yield Finding("frozen-moves", ERROR, _some(moved), what, mend)
    trainable = [name for name, p in subject.policy.named_parameters() if p.requires_grad]
    excused = _inert(subject.policy)
    stuck = [name for name in trainable if name not in reached and not name.endswith(excused)]
    if stuck:
        what = f"{len(stuck)} trainable tensors get no gradient or are in no group of the optimiser"
        mend = "take them into the loss and the optimiser, or requires_grad_(False), or delete them"
        yield Finding("trainable-stuck", ERROR, _some(stuck), what, mend)


def _inert(policy: Any) -> tuple[str, ...]:
    """How the names of tensors end that are known to change nothing."""
    if isinstance(policy, Policy):
        return tuple(policy.inert)
    return tuple(inert_act(policy.config)) if getattr(policy, "name", "") == "act" else ()


def _stir(policy: nn.Module) -> None:
    """A little noise on every trainable parameter: biases that start at zero keep gradients from their
    neighbours in the first step, and only there.
    """
    torch.manual_seed(running.SEED)
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))


def _step(policy: Any, batch: Mapping[str, Any]) -> tuple[Tensor, set[str]]:
    """One training step; returns the loss, and which of the optimiser's parameters a gradient reached."""
    groups = policy.optimizer_groups() if hasattr(policy, "optimizer_groups") else policy.get_optim_params()
    groups = [dict(g, params=list(g["params"])) if isinstance(g, dict) else {"params": [g]} for g in groups]
    listed = {id(p) for group in groups for p in group["params"]}
    if not listed:
        raise NotRun("a policy with something to train: every parameter is frozen")
    policy.train()
    torch.manual_seed(running.SEED)
    reached: set[str] = set()
    for shift in SHIFTS:
        policy.zero_grad()
        with torch.enable_grad():
            loss, _ = policy({**batch, ACTION: batch[ACTION] + shift})
            loss.backward()
        named = ((name, p) for name, p in policy.named_parameters() if id(p) in listed)
        reached |= {name for name, p in named if p.grad is not None and bool(p.grad.any())}
    for group in groups:
        _first_adamw_step(**group)
    return loss.detach(), reached


@torch.no_grad()
def _first_adamw_step(
    params: list[nn.Parameter], lr: float = 1e-3, weight_decay: float = 1e-2, **_: Any
) -> None:
    """AdamW's first step, written out: both moments are those of one gradient, so their ratio is its sign.

    (`torch.optim` would take seconds to import the compiler, and two more copies of the weights.)
    """
    for parameter in params:
        if parameter.grad is not None:
            parameter.sub_(lr * (parameter.grad.sign() + weight_decay * parameter))


def _moved_buffers(policy: nn.Module, before: Mapping[str, Tensor], frozen: set[str]) -> list[str]:
    """Floating buffers that changed in modules whose own parameters are all frozen: running statistics."""
    return [
        name
        for prefix, module in policy.named_modules()
        for name, buffer in module.named_buffers(prefix, recurse=False)
        if _is_frozen(prefix, module, frozen) and _has_moved(buffer, before.get(name))
    ]


def _is_frozen(prefix: str, module: nn.Module, frozen: set[str]) -> bool:
    own = [name for name, _ in module.named_parameters(prefix, recurse=False)]
    return bool(own) and frozen.issuperset(own)


def _has_moved(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and buffer.is_floating_point() and not torch.equal(buffer, before)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _expect_memory(policy: nn.Module) -> None:
    """A copy and its gradients: twice the parameters, in at most half of what is free."""
    first = next(policy.parameters())
    need = 2 * sum(p.numel() * p.element_size() for p in policy.parameters())
    free = _free_memory(first.device)
    if free is not None and need > free / 2:
        raise NotRun(f"memory for a copy that trains: {need / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB free")


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None
