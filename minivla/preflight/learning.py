"""Checks of training, on a twin: what the loss leaves out, what a step of the optimiser moves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minivla.data.features import ACTION
from minivla.policies.act import inert_act
from minivla.policies.base import Policy
from minivla.preflight import running, sampler
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.subject import Subject
from minivla.upstream_pi import pi_inert

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
    if any(key.startswith(f"{ACTION}.") for key in batch):
        raise NotRun("a loss that reads actions as numbers: this one reads words, of the whole chunk")
    noise = torch.randn(batch[ACTION].shape, generator=torch.Generator().manual_seed(1))
    shift = 10 * noise.to(batch[ACTION]) * batch["action_is_pad"][..., None]
    policy, draws = subject.twin(), _draws(subject, shift)
    for mode in ("evaluating", "training"):
        plain, moved = (
            running.loss(policy, {**batch, ACTION: action}, training=mode == "training", **drawn)
            for action, drawn in zip((batch[ACTION], batch[ACTION] + shift), draws, strict=True)
        )
        if not math.isfinite(plain):
            yield _not_finite(plain)
            return
        change = abs(moved - plain) / max(abs(plain), 1e-8)
        if not change < 1e-4:
            what = f"while {mode}, changing padded actions changes the loss by {change:.2g} of it"
            severity, mend = _judged_padding(policy)
            yield Finding("padding-leaks", severity, "loss", what, mend)
            return


def _draws(subject: Subject, shift: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the loss is to draw for the actions, and for the shifted ones. A network with a sampler reads
    noisy actions, padded ones too, which is no leak: so other noise makes up for the shift.
    """
    call = subject.path[0] if isinstance(subject.policy, Policy) else None
    if call is None or (flow := call.flow) is None:
        return {}, {}
    noise = sampler.draw(call)
    try:
        taught = sampler.lesson(subject, flow.times[(len(flow.v) - 1) // 2], noise)
    except NotRun:  # it does not tell
        return {}, {}
    other = noise.clone()
    other[..., : shift.shape[-1]] -= shift * taught.signal / taught.noise
    time = taught.time.expand(len(noise)).to(noise.device)
    return {"noise": noise, "time": time}, {"noise": other, "time": time}


def _judged_padding(policy: Any) -> tuple[str, str]:
    """Severity and mend: some policies learn from padded actions on purpose, as upstream, which is no fault
    but worth a look.
    """
    if getattr(policy, "name", "") == "diffusion" and not isinstance(policy, Policy):
        return WARNING, "meant by LeRobot: its network reads padded actions, whatever the loss leaves out"
    if getattr(policy.config, "do_mask_loss_for_padding", None) is False:
        return WARNING, "meant, as upstream; do_mask_loss_for_padding=True leaves padded actions out"
    if getattr(policy, "name", "") in ("pi0", "pi05"):
        return WARNING, "meant, as upstream: the loss counts every step of a chunk, padded ones too"
    if getattr(policy, "name", "") == "vqbet":
        return (
            WARNING,
            "meant, as upstream: it learns to repeat an episode's last action",
        )
    return ERROR, "multiply errors with ~batch['action_is_pad'], and mask padding in any encoder of actions"


def _not_finite(loss: float) -> Finding:
    what = f"the loss is {loss} on a normalised batch"
    return Finding("loss-not-finite", ERROR, "loss", what, "look for log, sqrt or a division in the loss")


def frozen_and_trainable(subject: Subject) -> Iterator[Finding]:
    """A step of the optimiser leaves frozen and resting tensors alone, and a gradient reaches all others.

    Threads: lerobot PR#4019; openpi#744. Takes one step on a copy; not run where memory is short.
    """
    batch = subject.training_batch
    _expect_memory(subject.policy)
    policy = subject.twin(weights=True)
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    frozen = {name for name in flags if not flags[name]}
    before, phase = _snapshot(policy), _resting(policy)
    loss, reached = _step(policy, batch)
    if not torch.isfinite(loss):
        yield _not_finite(loss.item())
        return
    after, later = policy.state_dict(keep_vars=True), _resting(policy)
    moved = {name for name in after if _has_moved(after[name], before.get(name))}
    resting = {part: why for part, why in phase.items() if part in later}  # the step may have ended a phase
    yield from _moved(moved & (frozen | _buffers_of(policy, frozen)), moved - frozen, resting)
    subject.notes.extend(_said(resting))
    done, inert = (*reached, *frozen), _inert(policy)
    waiting = [name for name in flags if name not in done and not name.endswith(inert)]
    if stuck := [name for name in waiting if not _lies_in(name, {**phase, **later})]:
        what = f"{len(stuck)} trainable tensors get no gradient or are in no group of the optimiser"
        mend = "take them into the loss and the optimiser, or requires_grad_(False), or delete them"
        yield Finding("trainable-stuck", ERROR, _some(stuck), what, mend)


def _moved(frozen: set[str], others: set[str], resting: Mapping[str, str]) -> Iterator[Finding]:
    """Of the tensors that moved, those that are frozen, or of a part that is to rest."""
    if frozen:
        what = f"{len(frozen)} frozen tensors moved in one training step"
        mend = "freeze after train(), keep frozen batch norms in eval(), give the optimiser the rest only"
        yield Finding("frozen-moves", ERROR, _some(sorted(frozen)), what, mend)
    if restless := sorted(name for name in others if _lies_in(name, resting)):
        what = f"{len(restless)} tensors moved in one training step, and are to rest ({_some(list(resting))})"
        mend = "let no gradient into them (no_grad, detach), and stop their moving averages"
        yield Finding("resting-moves", ERROR, _some(restless), what, mend)


def _said(resting: Mapping[str, str]) -> list[str]:
    """One sentence for each reason."""
    by_reason = {why: [part for part in resting if resting[part] == why] for why in resting.values()}
    return [f"training leaves {_some(parts)} alone for now: {why}" for why, parts in by_reason.items()]


def _inert(policy: Any) -> tuple[str, ...]:
    """How the names of tensors end that are known to change nothing."""
    if isinstance(policy, Policy):
        return tuple(policy.inert)
    if getattr(policy, "name", "") == "act":
        return tuple(inert_act(policy.config))
    if getattr(policy, "name", "") in ("pi0", "pi05"):
        return pi_inert(policy)
    return ("pool.nets.bias",)  # of LeRobot's keypoints: softmax does not see a constant


def _resting(policy: Any) -> dict[str, str]:
    """Modules and tensors that training leaves as they are for now, each with the reason."""
    if isinstance(policy, Policy):
        return policy.resting
    vqvae = "vqbet.action_head.vqvae_model"
    if getattr(policy, "name", "") != "vqbet":
        return {}
    if policy.get_submodule(vqvae).discretized:
        return {vqvae: "phase 1 is over, the codes stay what they are"}
    others = (name for name, _ in policy.named_parameters() if not name.startswith(vqvae))
    return dict.fromkeys(others, "phase 1 makes the codes first")


def _lies_in(name: str, parts: Iterable[str]) -> bool:
    """Whether the tensor `name` is one of these modules' and tensors', by name."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def _snapshot(policy: nn.Module) -> dict[str, Tensor]:
    """The policy's tensors, after a little noise on every trainable parameter: biases that start at zero keep
    gradients from their neighbours in the first step, and only there.
    """
    torch.manual_seed(running.SEED)
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return {name: tensor.detach().clone() for name, tensor in policy.state_dict(keep_vars=True).items()}


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


def _buffers_of(policy: nn.Module, frozen: set[str]) -> set[str]:
    """Buffers in modules whose own parameters are all frozen: running statistics."""
    return {
        name
        for prefix, module in policy.named_modules()
        for name, _ in module.named_buffers(prefix, recurse=False)
        if _is_frozen(prefix, module, frozen)
    }


def _is_frozen(prefix: str, module: nn.Module, frozen: set[str]) -> bool:
    own = [name for name, _ in module.named_parameters(prefix, recurse=False)]
    return bool(own) and frozen.issuperset(own)


def _has_moved(tensor: Tensor, before: Tensor | None) -> bool:
    return before is not None and tensor.is_floating_point() and not torch.equal(tensor, before)


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
