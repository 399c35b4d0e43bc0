"""Checks that run the policy, on a twin of it: what its loss, its chunk and its optimiser do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minivla.data.features import ACTION, OBS_LANGUAGE, FeatureType
from minivla.policies.base import Policy
from minivla.preflight import running
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.subject import Subject

NOTHING = 1e-6  # of the chunk's spread: rounding
LITTLE = 1e-3
KINDS = {"image": "images", "state": "state", "text": "instruction"}
# ACT's tensors that no gradient reaches, though upstream trains them, and when; LeRobot's names end alike.
# The decoder's input is zero, so its values are alike, and a norm before it has nothing to scale; without a
# VAE the latent is always zero.
INERT: dict[str, Callable[[Any], bool]] = {
    "decoder.layers.0.self_attn.in_proj_weight": lambda config: not config.pre_norm,
    "decoder.layers.0.norm1.weight": lambda config: config.pre_norm,
    "encoder_latent_input_proj.weight": lambda config: not config.use_vae,
}
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
        change = abs(moved - plain) / max(abs(plain), 1e-8)
        if not change < 1e-4:
            what = f"while {mode}, changing padded actions changes the loss by {change:.2g} of it"
            mend = "multiply errors with ~batch['action_is_pad'], and mask padding in any encoder of actions"
            yield Finding("padding-leaks", ERROR, "loss", what, mend)
            return


def sensitivity(kind: str, subject: Subject) -> Iterator[Finding]:
    """The chunk changes when the images, the state or the instruction are those of another moment.

    Threads: lerobot#515 #951 #1239 #1270 #2213 #2761; act#6; physical-ai-studio#998; GR00T#82 #130.
    """
    keys = _keys_of(kind, subject)
    if not keys:
        raise NotRun(f"a policy that reads {'an instruction' if kind == 'text' else KINDS[kind]}")
    plain, others, spread = subject.baseline
    if spread < NOTHING:
        if kind == "image" or not _keys_of("image", subject):
            what = "the same action at every step, whatever is observed"
            mend = "look for a head that was never loaded or trained, or a normalisation that flattens it"
            yield Finding("constant-chunk", ERROR, "policy", what, mend)
        return
    reached = max(_change(subject, other, keys, plain) for other in others) / spread
    subject.measurements[f"chunk's change with other {KINDS[kind]}"] = reached
    yield from _judged(kind, KINDS[kind], reached)
    if kind == "image" and len(keys) > 1 and reached >= NOTHING:
        for key in keys:
            alone = max(_change(subject, other, [key], plain) for other in others) / spread
            subject.measurements[f"  {key.rsplit('.', 1)[-1]} alone"] = alone
            yield from _judged(kind, key, alone)


def _judged(kind: str, where: str, reached: float) -> Iterator[Finding]:
    code, plural = f"ignores-{'instruction' if kind == 'text' else kind}", kind == "image"
    if reached < NOTHING:
        what = f"the chunk is the same with other {where}"
        mend = "do these tokens reach the action head (minivla.trace)? Are they masked, or weights zero?"
        yield Finding(code, ERROR, where, what, mend)
    elif reached < LITTLE:
        verb = "barely moves" if plural else "hardly changes"
        what = f"the chunk {verb} with other {where}: by {reached:.1g} of its spread"
        mend = (
            "a sign of causal confusion or of collapsed features; vary this input more in the training data"
        )
        yield Finding(code, WARNING, where, what, mend)


def _keys_of(kind: str, subject: Subject) -> list[str]:
    if kind == "text":
        tokens = [key for key in subject.batch if key.startswith(OBS_LANGUAGE)]
        return ["task", *tokens] if subject.reads_text else []
    types = (FeatureType.VISUAL,) if kind == "image" else (FeatureType.STATE, FeatureType.ENV)
    return [key for key, feature in subject.inputs.items() if feature.type in types]


def _change(subject: Subject, other: Mapping[str, Any], keys: list[str], plain: Tensor) -> float:
    """Root mean square of the chunk's change when `keys` come from another observation."""
    mixed = {**subject.batch, **{key: other[key] for key in keys if key in other}}
    return float((running.chunk(subject.patient, mixed) - plain).square().mean().sqrt())


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
        what = f"the loss is {loss.item()} on a normalised batch"
        yield Finding("loss-not-finite", ERROR, "loss", what, "look for log, sqrt or a division in the loss")
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
    own = tuple(policy.inert) if isinstance(policy, Policy) else ()
    is_act = getattr(policy, "name", "") == "act"
    return own + tuple(name for name, holds in INERT.items() if is_act and holds(policy.config))


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


def time_convention(subject: Subject) -> Iterator[Finding]:
    """The sampler starts at the noise, ends at the chunk, and walks along its own velocity.

    Threads: openpi#825; open-pi-zero#27 (the sign of the Euler step) #35; lerobot PR#1605; GR00T#51.
    """
    if not isinstance(subject.policy, Policy):
        raise NotRun("one of minivla's policies: a sampler's path is recorded by minivla.trace")
    from minivla.tracing import trace

    policy = subject.patient
    with trace(policy) as recorded:
        found = running.chunk(policy, subject.batch)
    flow = recorded.flow
    if flow is None:
        raise NotRun("a policy with flow time: this one integrates nothing")
    draws = [_path_start(policy, subject.batch, sign) for sign in (1.0, -1.0)]
    if draws[0] is not None and draws[1] is not None and not torch.equal(draws[0], -draws[1]):
        what = "the sampler's path does not start at the noise it is given"
        mend = (
            "x at the noise end of time is the noise itself; look which end of time the sampler starts from"
        )
        yield Finding("time-start", ERROR, "sampler", what, mend)
    walked = (flow.x[-1] - flow.x[0]).flatten()
    times = flow.times.to(flow.v)
    steps = (times[1:] - times[:-1]).reshape(-1, *[1] * (flow.v.ndim - 1))
    meant = (steps * flow.v).sum(0).flatten()
    if torch.nn.functional.cosine_similarity(walked, meant, dim=0) < 0.9:
        what = "the path does not follow its own velocity: the step's sign or size disagrees with the times"
        mend = "x += (next time - this time) * v, with both times as the loss has them"
        yield Finding("time-direction", ERROR, "sampler", what, mend)
    end = flow.x[-1].float()[..., : found.shape[-1]]
    if found.shape == end.shape and not torch.allclose(end, found, atol=1e-4):
        what = "the path's end is not the chunk the policy returns"
        yield Finding("time-end", ERROR, "sampler", what, "return x at the data end of time")


def _path_start(policy: Any, batch: Mapping[str, Any], sign: float) -> Tensor | None:
    """Where the path starts when the noise is drawn with this sign."""
    from minivla.tracing import trace

    torch.manual_seed(running.SEED)
    with trace(policy) as recorded, torch.no_grad():
        policy.predict_action_chunk(running.observed(batch))
    start = recorded.flow.x[0] if recorded.flow is not None else None
    if start is None:
        return None
    with trace(policy) as again, torch.no_grad():
        policy.predict_action_chunk(running.observed(batch), noise=sign * start)
    return again.flow.x[0] if again.flow is not None else None


def queue_reset(subject: Subject) -> Iterator[Finding]:
    """After `reset` the next action follows from what is observed then, and from nothing before.

    Threads: lerobot PR#343 #1116 #2277; SpatialVLA#52; strands#731; data4robotics#8.
    """
    old, new = running.observed(subject.batch), running.observed(subject.baseline[1][0])
    used, fresh = subject.twin(), subject.twin()
    for policy in (used, fresh):
        policy.reset()
    first = running.action(used, old)
    used.reset()
    after, wanted = running.action(used, new), running.action(fresh, new)
    if subject.config.observation_delta_indices is None:  # a history would need more than one observation
        wanted = running.chunk(subject.patient, new)[:, 0].to(after)
    scale = float((wanted - first).abs().max())
    if scale < NOTHING:
        raise NotRun("a chunk that depends on the observation")
    if float((after - wanted).abs().max()) > 1e-3 * scale:
        what = "after reset() the first action still is that of the episode before"
        mend = "clear every queue, ensemble and history in reset(); call it whenever an episode starts"
        yield Finding("queue-not-reset", ERROR, "reset()", what, mend)
