"""What a trace records with: blocks call in, and nothing happens unless somebody is looking.

    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch)
    t.segments, t.mask, t.attention["decoder.0.cross"]

The trace in force is a context variable, so threads and nested traces do not see each other. It holds one
`Call` for each time the policy computed a loss or a chunk; the plain attributes of `Trace` mean the last one.
Pictures live in `minivla.viz`, which is imported when one is asked for.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from torch import Tensor

from minivla.segments import Segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WATCHED = ("forward", "predict_action_chunk")
_current: ContextVar[Trace | None] = ContextVar("minivla_trace", default=None)


def current() -> Trace | None:
    """The trace to record into, or None: no trace is on, or the call belongs to a policy nobody traces."""
    if torch.compiler.is_compiling():
        return None
    trace = _current.get()
    return trace if trace is not None and trace.recording else None


def keep(name: str, value: Tensor) -> None:
    """Keep a hidden state under a name ("encoder", "latent"); does nothing when no trace is on."""
    if (trace := current()) is not None:
        trace.calls[-1].hidden[name] = value.detach()


@dataclass
class Flow:
    """A sampler's path. times (N + 1,), x (N + 1, B, H, A) from noise x[0] to result x[N], v (N, B, H, A)."""

    times: Tensor
    x: Tensor
    v: Tensor


@dataclass
class Call:
    """One forward pass.

    method      "forward" or "predict_action_chunk"
    batch       the normalised batch it was given
    segments    the policy's main sequence; `mask` (Q, K) bool, who may look at whom there, sample 0
    masks       by site: (B, Q, K) bool;  attention by site: (B, heads, Q, K)
    sites       by site: (query segments, key segments)
    hidden      named hidden states;  chunk (B, H, A), normalised;  flow, for policies that integrate one
    """

    method: str
    batch: Mapping[str, Any]
    segments: list[Segment] = field(default_factory=list)
    mask: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, tuple[list[Segment], list[Segment]]] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)
    chunk: Tensor | None = None
    flow: Flow | None = None
    layout: dict[str, tuple[list[Segment], list[Segment]]] = field(default_factory=dict, repr=False)

    def describe(self, segments: Sequence[Segment], mask: Tensor) -> None:
        """The policy tells its main sequence and who may look at whom there, (Q, K) bool."""
        self.segments, self.mask = list(segments), mask

    def lay_out(self, sites: str, queries: Sequence[Segment], keys: Sequence[Segment]) -> None:
        """The policy tells what the tokens at some attention sites are; `sites` may hold wildcards
        ("encoder.*").
        """
        self.layout[sites] = (list(queries), list(keys))

    def segments_at(self, site: str, queries: int, keys: int) -> tuple[list[Segment], list[Segment]]:
        """Query and key segments of a site. Raises ValueError when they do not add up to the sequence."""
        unnamed = ([Segment("queries", "query", queries)], [Segment("keys", "query", keys)])
        found = next((v for pattern, v in self.layout.items() if fnmatch.fnmatchcase(site, pattern)), unnamed)
        for what, segments, length in (("query", found[0], queries), ("key", found[1], keys)):
            total = sum(s.length for s in segments)
            if total != length:
                names = ", ".join(f"{s.name} {s.length}" for s in segments)
                raise ValueError(
                    f"site {site!r}: the {what} segments add up to {total} ({names}), "
                    f"the sequence has {length}"
                )
        return found


class _Watched:
    """What stands in the place of a policy's `forward` or `predict_action_chunk` while it is traced."""

    def __init__(self, trace: Trace, method: str) -> None:
        self.trace, self.method = trace, method

    def __call__(self, batch: Mapping[str, Any], **options: Any) -> Any:
        return self.trace.run(self.method, batch, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the policy runs its own method, untraced, and not the original's."""
        policy = self.trace.policy
        return getattr(type(policy), self.method).__get__(memo.get(id(policy), policy))


class Trace:
    """A look inside a policy; make one with `minivla.trace`."""

    def __init__(self, policy: Any, *, attention: bool | Sequence[str] = True) -> None:
        self.policy = policy
        self.calls: list[Call] = []
        self.recording = False
        self._wanted = ["*"] if attention is True else list(attention or [])
        self._tokens: list[Token[Trace | None]] = []
        self._before: list[dict[str, Any]] = []

    def __enter__(self) -> Trace:
        self._tokens.append(_current.set(self))
        self._before.append({method: vars(self.policy).get(method) for method in WATCHED})
        for method in WATCHED:
            vars(self.policy)[method] = _Watched(self, method)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _current.reset(self._tokens.pop())
        for method, before in self._before.pop().items():
            if before is None:
                del vars(self.policy)[method]
            else:
                vars(self.policy)[method] = before

    def run(self, method: str, batch: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call the policy's own method, as a call of this trace while it is the one in force."""
        function = getattr(type(self.policy), method)
        if _current.get() is not self or self.recording:
            return function(self.policy, batch, **options)
        self.calls.append(Call(method, batch))
        self.recording = True
        try:
            result = function(self.policy, batch, **options)
        finally:
            self.recording = False
        if method == "predict_action_chunk":
            self.calls[-1].chunk = result.detach()
        return result

    def record_attention(self, site: str, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        """Blocks call this. query (B, heads, Q, d), key (B, heads, K, d), mask (B, Q, K) bool or None."""
        call = self.calls[-1]
        batch, _, queries, width = query.shape
        keys = key.shape[-2]
        call.sites[site] = call.segments_at(site, queries, keys)
        open_ = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device) if mask is None else mask
        call.masks[site] = open_.expand(batch, queries, keys)
        if any(fnmatch.fnmatchcase(site, pattern) for pattern in self._wanted):
            score = (
                einsum(query.detach().float(), key.detach().float(), "b h q d, b h k d -> b h q k")
                / width**0.5
            )
            call.attention[site] = score.masked_fill(~call.masks[site][:, None], float("-inf")).softmax(-1)

    def _last(self) -> Call:
        if not self.calls:
            raise ValueError(
                "this trace is empty: inside `with minivla.trace(policy) as t:` call policy(batch), "
                "policy.predict_action_chunk(batch) or policy.select_action(batch) on the same policy"
            )
        return self.calls[-1]

    @property
    def segments(self) -> list[Segment]:
        """What each token of the policy's main sequence is."""
        return self._last().segments

    @property
    def mask(self) -> Tensor | None:
        """(Q, K) bool: who may look at whom in the main sequence, sample 0."""
        return self._last().mask

    @property
    def masks(self) -> dict[str, Tensor]:
        """By site: (B, Q, K) bool."""
        return self._last().masks

    @property
    def attention(self) -> dict[str, Tensor]:
        """By site: (B, heads, Q, K), rows sum to one."""
        return self._last().attention

    @property
    def sites(self) -> dict[str, tuple[list[Segment], list[Segment]]]:
        """By site: the query segments and the key segments."""
        return self._last().sites

    @property
    def hidden(self) -> dict[str, Tensor]:
        """Hidden states the policy keeps, by name."""
        return self._last().hidden

    @property
    def batch(self) -> Mapping[str, Any]:
        """The normalised batch of the last call."""
        return self._last().batch

    @property
    def chunk(self) -> Tensor | None:
        """(B, H, A) normalised actions of the last call, if it predicted a chunk."""
        return self._last().chunk

    @property
    def flow(self) -> Flow | None:
        """The sampler's path, for policies that integrate one."""
        return self._last().flow

    def plot_tokens(self, **options: Any) -> Figure:
        """The main sequence as a ribbon of named segments (`minivla.viz.tokens`)."""
        from minivla.viz import tokens

        return tokens.plot_tokens(self.segments, **options)

    def plot_mask(self, site: str | None = None, **options: Any) -> Figure:
        """The mask of the main sequence, or of one attention site (`minivla.viz.masks`)."""
        from minivla.viz import masks

        call = self._last()
        if site is None:
            return masks.plot_mask(call.mask, call.segments, call.segments, **options)
        queries, keys = call.sites[self._site(site)]
        return masks.plot_mask(call.masks[site][0], queries, keys, **options)

    def plot_attention(
        self, site: str | None = None, *, query: int | str = 0, head: int | None = None, **options: Any
    ) -> Figure:
        """What one query looks at, laid over the cameras (`minivla.viz.attention`).

        `site` defaults to the last one kept; `query` is a position or a segment's name (its mean); `head`
        None is the mean over heads.
        """
        from minivla.viz import attention

        return attention.plot_attention(self._last(), self._site(site), query=query, head=head, **options)

    def plot_chunk(self, **options: Any) -> Figure:
        """The predicted chunk, one line a dimension, in normalised and robot units (`minivla.viz.chunks`)."""
        from minivla.viz import chunks

        if self.chunk is None:
            raise ValueError(
                "the last call was a loss; call policy.predict_action_chunk(batch) to see a chunk"
            )
        return chunks.plot_chunk(self.chunk, self.policy.postprocess(self.chunk), **options)

    def _site(self, site: str | None) -> str:
        kept = list(self._last().attention)
        if site is None and kept:
            return kept[-1]
        if site not in kept:
            raise ValueError(
                f"attention site {site!r} was not kept; this trace holds {', '.join(kept) or 'none'}"
            )
        return site


def trace(policy: Any, *, attention: bool | Sequence[str] = True) -> Trace:
    """Look inside `policy` while a block runs.

        with minivla.trace(policy) as t:
            policy.select_action(batch)

    `attention` chooses the sites whose weights are recomputed and kept: True for all, or names with wildcards
    (["decoder.*.cross"]). Masks, segments and hidden states are always kept. Costs nothing when it is off.
    """
    return Trace(policy, attention=attention)
