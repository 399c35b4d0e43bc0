"""Self-checks of chapter 00: from normalised actions to robot units, and reading a share out of a trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivla.exercises.verdict import verdict
from minivla.recorder import Call
from minivla.segments import Kind, Segment, arrange
from minivla.tracing import Trace

Layout = tuple[tuple[str, Kind, int], ...]

SITE = "decoder.0.cross"
NAMES = ("dx", "dy", "grip")
WRIST_FIRST: Layout = (("wrist", "image", 4), ("state", "state", 1), ("table", "image", 9))
WRIST_LAST: Layout = (
    ("state", "state", 1),
    ("table", "image", 4),
    ("instruction", "language", 1),
    ("wrist", "image", 6),
)


def check_robot_units(to_robot_units: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Prints whether `to_robot_units(normalised (…, A), mean (A,), std (A,))` undoes the normalisation.

    Tried on a chunk (B, H, A), which must come back with its shape and be left as it was, and on one action.
    """
    verdict(lambda: _wrong_units(to_robot_units))


def _wrong_units(to_robot_units: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str | None:
    mean, std = torch.tensor([0.1, -0.2, 0.5]), torch.tensor([0.5, 2.0, 0.25])
    for wanted in (torch.linspace(-1, 1, 24).reshape(2, 4, 3), torch.tensor([0.3, -0.6, 1.0])):
        normalised = (wanted - mean) / std
        given, shape = normalised.clone(), tuple(wanted.shape)
        found = torch.as_tensor(to_robot_units(given, mean.clone(), std.clone()))
        if found.shape != shape:
            return f"for normalised actions {shape} it returns {tuple(found.shape)}, expected {shape}"
        if not torch.equal(given, normalised):
            return "the normalised actions were changed in place; return a new tensor instead"
        off = (~torch.isclose(found, wanted, atol=1e-5)).nonzero()
        if len(off):
            at, i = tuple(off[0].tolist()), int(off[0, -1])
            scale = f"mean {mean[i]:.2f} and std {std[i]:.2f}"
            wrong = f"became {found[at]:.2f}, expected {wanted[at]:.2f}"
            return f"{NAMES[i]}: {normalised[at]:.2f} with {scale} {wrong}"
    return None


def check_wrist_share(wrist_share: Callable[[Trace, int], float]) -> None:
    """Prints whether `wrist_share(trace, query)` is the share of one query's attention that the wrist gets.

    Tried on two made-up traces with the wrist camera's tokens in different places, for each query: the mean
    over heads of the first sample at the site "decoder.0.cross".
    """
    verdict(lambda: _wrong_share(wrist_share))


def _wrong_share(wrist_share: Callable[[Trace, int], float]) -> str | None:
    for layout in (WRIST_LAST, WRIST_FIRST):
        trace = made_up_trace(layout)
        keys = {segment.name: segment for segment in trace.sites[SITE][1]}
        start, stop = keys["wrist"].start, keys["wrist"].stop
        for query in range(trace.attention[SITE].shape[2]):
            wanted = float(trace.attention[SITE][0, :, query, start:stop].sum(dim=-1).mean())
            found = float(wrist_share(trace, query))
            if abs(found - wanted) > 1e-4:
                tokens = ", ".join(f"{s.name} {s.start}–{s.stop - 1}" for s in keys.values())
                return f"query {query} over the tokens {tokens}: got {found:.3f}, expected {wanted:.3f}"
    return None


def made_up_trace(layout: Layout, *, queries: int = 3, heads: int = 2) -> Trace:
    """A trace of one call, with random attention (2, heads, Q, K) over keys (name, kind, length)."""
    keys = arrange(Segment(name, kind, length) for name, kind, length in layout)
    asking = [Segment("queries", "query", queries)]
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, heads, queries, keys[-1].stop, generator=generator)
    call = Call("predict_action_chunk", {}, sites={SITE: (asking, keys)}, attention={SITE: 2 * scores})
    call.attention[SITE] = call.attention[SITE].softmax(dim=-1)
    trace = Trace(None)
    trace.calls.append(call)
    return trace
