"""Masks proven: what a token must not see cannot change it, to the last bit.

    print(minivla.prove_masks(policy, policy.preprocess(item)))

A mask is a promise. Here it is kept or broken by gradients: a zero is added to every token that enters a
stack of layers, and the gradient of each token that leaves is asked for every token that entered. Wherever
the mask is closed it must be exactly 0.0, wherever it is open it must not be, and at each attention every
open place must get some weight from some head. Any policy that tells a trace its tokens can be proven.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivla.recorder import Call
from minivla.segments import Segment
from minivla.tracing import Trace, bare

ROWS = 256  # tokens whose gradients are asked for, at most: one backward pass each


@dataclass(frozen=True)
class Proven:
    """One sequence.

    rows, tokens    how many tokens' gradients were asked for, of how many
    closed, open    places of the mask in those rows, over the samples asked
    second_hand     of the closed, those reached all the same, through tokens in between: i sees j, j sees k
    leaks           the places, at most five named, where something passes that may not, not even so
    silent          those that are open and where nothing passes
    largest_closed  the largest gradient where nothing may pass
    """

    sequence: str
    rows: int
    tokens: int
    closed: int
    open: int
    second_hand: int
    largest_closed: float
    leaks: tuple[str, ...]
    silent: tuple[str, ...]
    exact: bool = True

    @property
    def ok(self) -> bool:
        """Is the mask what it says? A silent place counts only where rounding cannot be the reason."""
        return not self.leaks and not (self.exact and self.silent)

    def __str__(self) -> str:
        lines = [
            f"{'ok' if self.ok else 'BROKEN':6} {self.sequence}: {self.rows} of {self.tokens} tokens asked; "
            f"{self.closed:,} closed places, largest gradient {self.largest_closed:.3g}; {self.open:,} open"
        ]
        if self.second_hand:
            lines.append(f"       {self.second_hand:,} closed places are reached through tokens in between")
        lines += [f"       leak: {leak}" for leak in self.leaks]
        why = "" if self.exact else " (or float32 rounds it to 0)"
        lines += [f"       open, yet nothing passes{why}: {place}" for place in self.silent]
        return "\n".join(lines)


@dataclass(frozen=True)
class Proof:
    """What `prove_masks` found: `ok`, and readable when printed.

    attention   by site, the least weight that an open place gets from the head that looks there most
    """

    sequences: tuple[Proven, ...]
    attention: Mapping[str, float]
    exact: bool = True

    @property
    def ok(self) -> bool:
        """Does every mask hold, and does every open place get attention, as far as numbers can tell?"""
        seen = all(least > 0 for least in self.attention.values())
        return all(p.ok for p in self.sequences) and (seen or not self.exact)

    def __str__(self) -> str:
        lines = [str(p) for p in self.sequences]
        unseen = [site for site, least in self.attention.items() if not least > 0]
        word = "BROKEN" if self.exact else "note  "
        lines += [f"{word} {site}: an open place gets no attention at all" for site in unseen]
        if not unseen:
            lines.append(f"ok     attention: above zero at every open place of {', '.join(self.attention)}")
        return "\n".join(lines)

    __repr__ = __str__


def prove_masks(
    policy: Any, batch: Mapping[str, Any], *, rows: int = ROWS, seed: int = 0, exact: bool = True
) -> Proof:
    """Prove the masks of a policy on a normalised batch; print the result, or `assert` its `.ok`.

    The loss is computed in training mode, so that what only trains (ACT's VAE) is proven too; a batch
    without a padded chunk of actions gets one of zeros whose last action is padding. Of a sequence longer
    than `rows`, the ends of each segment and tokens spread between them are asked. The policy, its modes and
    torch's random numbers are left as they were.

    It is a copy in float64 that is proven, since in float32 a trained head can be so sure of itself that
    softmax rounds an open place to 0. `exact` False proves the policy itself, for networks whose copy would
    not fit; then a silent place may be such a one, and does not count against `.ok`.

    Raises ValueError when the policy has no token stack to ask and when the batch has no input of the
    policy, TypeError for what is no policy and for a batch of arrays.
    """
    policy = bare(policy)
    batch = _with_actions(policy, batch)
    if exact:
        policy = copy.deepcopy(policy).double()
        batch = {k: v.double() if _is_float(v) else v for k, v in batch.items()}
    with _training(policy), torch.random.fork_rng(), torch.enable_grad(), Trace(policy) as t:
        torch.manual_seed(seed)
        t.run("forward", type(policy).forward.__get__(policy), batch, proving=True)
    call = t.calls[-1]
    if not call.entered:
        raise ValueError(
            f"{type(policy).__name__} has no masks to prove: none of its stacks calls recorder.enter"
        )
    stacks: list[tuple[str, ...]] = [call.stacks] if call.stacks else []
    stacks += [(name,) for name in call.entered if name not in call.stacks]
    least = {
        site: float(weights.amax(dim=1).masked_fill(~call.masks[site], 1.0).min())
        for site, weights in call.attention.items()
    }
    with torch.enable_grad():
        return Proof(tuple(_prove(call, names, rows, seed, exact) for names in stacks), least, exact)


def _prove(call: Call, names: Sequence[str], most: int, seed: int, exact: bool) -> Proven:
    """One sequence, which goes through the stacks `names`, asked row by row."""
    segments, mask = _promise(call, names)
    reach = _closure(mask)
    probes = [call.entered[name] for name in names]
    leaving = [_projected(call.hidden[name][: len(mask)], seed) for name in names]
    values = torch.cat(leaving, dim=1)
    asked = _chosen(segments, most)
    passed = torch.stack([_gradient(values[:, i].sum(), probes)[: len(mask)] for i in asked], dim=1)
    may, reached = mask[:, asked], reach[:, asked]
    return Proven(
        " → ".join(names),
        rows=len(asked),
        tokens=values.shape[1],
        closed=int((~may).sum()),
        open=int(may.sum()),
        second_hand=int((reached & ~may).sum()),
        largest_closed=float(passed.masked_fill(reached, 0.0).max()),
        leaks=_places(~reached & (passed != 0), asked, segments),
        silent=_places(may & (passed == 0), asked, segments),
        exact=exact,
    )


def _promise(call: Call, names: Sequence[str]) -> tuple[list[Segment], Tensor]:
    """Segments and mask (B, Q, K) of a sequence: the main one as described (sample 0), another as its layers
    were masked. A token always sees itself: the residual path passes by every mask.
    """
    if tuple(names) == call.stacks:
        assert call.mask is not None
        segments, mask = call.segments, call.mask[None]
    else:
        masks = {site: mask for site, mask in call.masks.items() if site.startswith(f"{names[0]}.")}
        if not masks:
            raise ValueError(
                f"no attention was recorded in the stack {names[0]!r}; give its sites that prefix"
            )
        segments, mask = call.sites[next(iter(masks))][1], torch.stack(list(masks.values())).any(dim=0)
    return segments, mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def _closure(mask: Tensor) -> Tensor:
    """Who is reached in any number of looks. (B, L, L) bool in and out."""
    reach = mask
    while not torch.equal(mask := reach | (reach.float() @ reach.float() > 0), reach):
        reach = mask
    return reach


def _projected(leaving: Tensor, seed: int) -> Tensor:
    """One number for each token that leaves a stack, (B, L, D) to (B, L): along a random direction."""
    direction = torch.randn(leaving.shape[-1], generator=torch.Generator().manual_seed(seed))
    return leaving @ direction.to(leaving)


def _gradient(value: Tensor, probes: Sequence[Tensor]) -> Tensor:
    """How much of each entering token reaches `value`: (B, L), the largest absolute gradient over width."""
    gradients = torch.autograd.grad(value, probes, retain_graph=True, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, gradients, strict=True)]
    least = min(len(g) for g in found)  # of a stack that runs several times a sample, the first are asked
    return torch.cat([g[:least].abs().amax(dim=-1) for g in found], dim=1)


def _chosen(segments: Sequence[Segment], most: int) -> list[int]:
    """At most about `most` positions: the ends of every segment, and others evenly between."""
    total = sum(s.length for s in segments)
    ends = {position for s in segments for position in (s.start, s.stop - 1)}
    stride = max(1, -(-total // max(1, most - len(ends))))
    return sorted(ends | set(range(0, total, stride))) if total > most else list(range(total))


def _places(wrong: Tensor, asked: Sequence[int], segments: Sequence[Segment]) -> tuple[str, ...]:
    """The first few wrong places in words, and how many more there are."""
    found = wrong.any(dim=0).nonzero().tolist()
    told = [f"{_name(asked[q], segments)} sees {_name(k, segments)}" for q, k in found[:5]]
    return (*told, *([f"and {len(found) - 5:,} more"] if len(found) > 5 else []))


def _name(position: int, segments: Sequence[Segment]) -> str:
    s = next(s for s in segments if s.start <= position < s.stop)
    return s.name if s.length == 1 else f"{s.name}[{position - s.start}]"


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _with_actions(policy: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    found = [key for key in policy.config.input_features if key in batch]
    if not found:
        wanted = ", ".join(policy.config.input_features)
        raise ValueError(
            f"the batch has {', '.join(batch) or 'nothing'}; expected {wanted}: give policy.preprocess(raw)"
        )
    example = batch[found[0]]
    if not isinstance(example, Tensor):
        raise TypeError(
            f"{found[0]!r} is a {type(example).__name__}, expected a tensor: give policy.preprocess(raw)"
        )
    if "action_is_pad" in batch:
        return dict(batch)
    horizon, width = len(policy.config.action_delta_indices), policy.config.action_feature.shape[0]
    is_pad = torch.zeros(len(example), horizon, dtype=torch.bool, device=example.device)
    is_pad[:, -1] = True
    return {**batch, "action": example.new_zeros(len(example), horizon, width), "action_is_pad": is_pad}


@contextmanager
def _training(policy: nn.Module) -> Iterator[None]:
    """Training mode for everything but the batch norms, whose running means would move; without gradient
    checkpointing, which would compute each layer anew for every token that is asked.
    """
    modes = {module: module.training for module in policy.modules()}
    saving = [module for module in modes if getattr(module, "checkpointing", False)]
    for module in modes:
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    for module in saving:
        vars(module)["checkpointing"] = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module in saving:
            vars(module)["checkpointing"] = True
