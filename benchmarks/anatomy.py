"""Where the time of a chunk and of a training step goes: by part of the policy, and by kind of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# Kinds of torch's operators, by what their names contain; an operator is of the first kind that fits.
KINDS = {
    "products and convolutions": ("conv", "mm", "linear", "scaled_dot", "dot", "mv"),
    "norms and activations": ("norm", "mish", "relu", "gelu", "softmax", "max_pool", "addcmul"),
    "copies and layout": ("copy_", "cat", "im2col", "col2im", "unfold", "clone", "index", "gather", "fill"),
}


@dataclass
class Share:
    """What one part of a policy costs in one call of the whole."""

    calls: int = 0
    flops: float = 0.0
    seconds: float = 0.0


@contextmanager
def metered(
    parts: Mapping[str, nn.Module], shares: dict[str, Share], flops: Callable[[], int]
) -> Iterator[None]:
    """While this lasts, `shares` counts each part's calls, seconds, and the operations that `flops` tells."""
    with ExitStack() as stack:
        for name, module in parts.items():
            started: list[tuple[float, int]] = []

            def enter(_: Any, inputs: Any, started: Any = started) -> None:
                started.append((perf_counter(), flops()))

            def leave(_: Any, inputs: Any, out: Any, name: str = name, started: Any = started) -> None:
                (second, count), share = started.pop(), shares[name]
                share.calls, share.flops = share.calls + 1, share.flops + flops() - count
                share.seconds += perf_counter() - second

            for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
                stack.callback(handle.remove)
        yield


def by_part(call: Callable[[], object], parts: Mapping[str, nn.Module], *, rounds: int) -> dict[str, Share]:
    """The share of each part in `call`, and of "the rest". Multiplications and additions are counted, of
    products and convolutions; seconds are medians.
    """
    counted = {name: Share() for name in parts}
    with FlopCounterMode(display=False) as counter, metered(parts, counted, counter.get_total_flops):
        call()
    times: dict[str, list[float]] = {name: [] for name in (*parts, "the rest")}
    for _ in range(rounds):
        timed, start = {name: Share() for name in parts}, perf_counter()
        with metered(parts, timed, lambda: 0):
            call()
        spent = {name: share.seconds for name, share in timed.items()}
        for name, seconds in (spent | {"the rest": perf_counter() - start - sum(spent.values())}).items():
            times[name].append(seconds)
    left = counter.get_total_flops() - sum(share.flops for share in counted.values())
    counted["the rest"] = Share(0, left)
    for name, share in counted.items():
        share.seconds = float(np.median(times[name]))
    return counted


def parts_table(shares: Mapping[str, Share], parts: Mapping[str, nn.Module]) -> str:
    """`by_part` as markdown, with the numbers of weights."""
    total = sum(share.seconds for share in shares.values())
    lines = [
        "| part | weights | calls | GFLOP | ms | share of the time |",
        "|---|---|---|---|---|---|",
    ]
    for name, share in shares.items():
        weights = sum(p.numel() for p in parts[name].parameters()) / 1e6 if name in parts else None
        told = "–" if weights is None else f"{weights:,.2f} M"
        calls = share.calls or "–"
        cost = f"{share.flops / 1e9:,.3g} | {1000 * share.seconds:,.1f} | {share.seconds / total:.0%}"
        lines.append(f"| {name} | {told} | {calls} | {cost} |")
    flops = sum(share.flops for share in shares.values()) / 1e9
    return "\n".join([*lines, f"| one chunk | – | – | {flops:,.3g} | {1000 * total:,.1f} | 100% |"])


def by_kind(call: Callable[[], object], *, rounds: int) -> dict[str, float]:
    """The share of each of KINDS in the time of `call`; "Python and the rest" is what no operator took."""
    call()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        start = perf_counter()
        for _ in range(rounds):
            call()
        total = perf_counter() - start
    shares = dict.fromkeys(KINDS, 0.0)
    for event in recorded.key_averages():
        kind = next((k for k, words in KINDS.items() if any(word in event.key for word in words)), None)
        if kind is not None:
            shares[kind] += event.self_cpu_time_total / 1e6 / total
    return shares | {"Python and the rest": max(0.0, 1 - sum(shares.values()))}


def kinds_line(who: str, shares: Mapping[str, float]) -> str:
    """`by_kind` as a sentence."""
    return f"{who}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def training_line(policy: Any, batch: dict[str, Tensor], *, rounds: int) -> str:
    """How a training step's time divides into forward pass, backward pass and AdamW."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5)
    policy.train()
    times = []
    for _ in range(rounds + 1):
        marks = [perf_counter()]
        loss = policy(batch)[0]
        marks.append(perf_counter())
        loss.backward()
        marks.append(perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(np.diff([*marks, perf_counter()]))
    spent = np.median(times[1:], axis=0)
    names = ("forward", "backward", "AdamW")
    return ", ".join(f"{name} {part / spent.sum():.0%}" for name, part in zip(names, spent, strict=True))


def describe(
    title: str,
    policy: Any,
    parts: Mapping[str, nn.Module],
    calls: Mapping[str, Callable[[], object]],
    batch: dict[str, Tensor],
    *,
    rounds: int,
) -> str:
    """All of the above for one policy: `calls` makes a chunk, ours first, `batch` is a training step's."""
    ours = next(iter(calls.values()))
    table = parts_table(by_part(ours, parts, rounds=rounds), parts)
    kinds = [
        f"- Under torch's profiler, {kinds_line(who, by_kind(call, rounds=rounds))}."
        for who, call in calls.items()
    ]
    step = f"- Training step, batch {len(batch['action'])}: {training_line(policy, batch, rounds=rounds)}."
    return "\n".join([f"**{title}**, one chunk of ours by part:", "", table, "", *kinds, step])
