"""What a trace records with: blocks call in, and nothing happens unless somebody is looking.

    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch)
    t.segments, t.mask, t.attention["decoder.0.cross"]

The traces that are open and the call being recorded are context variables, so threads and nested traces do
not see each other. A trace holds one `Call` for each time the policy computed a loss or a chunk; its plain
attributes mean the last one. What `torch.compile` has compiled runs eagerly meanwhile: compiled code has no
place to look into. Pictures live in `minivla.viz`, which is imported when one is asked for.
"""

from __future__ import annotations

import fnmatch
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, repeat
from torch import Tensor

from minivla.segments import Segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minivla.viz.explorer import Explorer

WATCHED = ("forward", "predict_action_chunk")
MUCH = 1 << 30  # bytes of attention weights in one call that are worth a warning
_open: ContextVar[tuple[Trace, ...]] = ContextVar("minivla_traces", default=())
_call: ContextVar[Call | None] = ContextVar("minivla_call", default=None)


def current() -> Call | None:
    """The call to record into, or None: no trace is open, or none of the policy that runs."""
    return None if torch.compiler.is_compiling() else _call.get()


def keep(name: str, value: Tensor) -> None:
    """Keep a hidden state under a name ("encoder", "latent"); does nothing when no trace is on."""
    if (call := current()) is not None:
        call.hidden[name] = value if call.proving else value.detach()


def enter(name: str, tokens: Tensor) -> Tensor:
    """Tokens (B, L, D) enter the stack of layers `name`, whose outcome is kept under the same name.

    Returns them unchanged; only while masks are proven (`minivla.proof`) a zero is added that gradients can
    be asked of.
    """
    if (call := current()) is None or not call.proving:
        return tokens
    call.entered[name] = torch.zeros_like(tokens, requires_grad=True)
    return tokens + call.entered[name]


@dataclass
class Flow:
    """A sampler's path. times (N + 1,), x (N + 1, B, H, A) from noise x[0] to result x[N], v (N, B, H, A)."""

    times: Tensor
    x: Tensor
    v: Tensor


@dataclass
class Rows:
    """What one attention computed: queries from position `start` on, against the first K keys."""

    start: int
    mask: Tensor  # (B, Q, K) bool
    attention: Tensor | None  # (B, heads, Q, K)


@dataclass
class Call:
    """One forward pass.

    method      "forward" or "predict_action_chunk"
    batch       the normalised batch it was given
    segments    the policy's main sequence; `mask` (Q, K) bool, who may look at whom there, sample 0;
                `stacks`, through which stacks of layers it goes, in its order
    masks       by site: (B, Q, K) bool;  attention by site: (B, heads, Q, K)
    sites       by site: (query segments, key segments)
    hidden      named hidden states;  chunk (B, H, A), normalised;  flow, for policies that integrate one
    """

    method: str
    batch: Mapping[str, Any]
    trace: Trace | None = field(default=None, repr=False)
    proving: bool = False
    segments: list[Segment] = field(default_factory=list)
    mask: Tensor | None = None
    stacks: tuple[str, ...] = ()
    masks: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, tuple[list[Segment], list[Segment]]] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)
    entered: dict[str, Tensor] = field(default_factory=dict, repr=False)
    chunk: Tensor | None = None
    flow: Flow | None = None
    layout: dict[str, tuple[list[Segment], list[Segment]]] = field(default_factory=dict, repr=False)
    rows: dict[str, dict[int, Rows]] = field(default_factory=dict, repr=False)

    def describe(self, segments: Sequence[Segment], mask: Tensor, stacks: Sequence[str] = ()) -> None:
        """The policy tells its main sequence, who may look at whom there, (Q, K) bool, and the stacks of
        layers it goes through (`enter`), in the order of the sequence.

        Raises ValueError when the segments do not add up to the mask.
        """
        total = sum(s.length for s in segments)
        if tuple(mask.shape) != (total, total):
            raise ValueError(
                f"the segments add up to {total} tokens ({_told(segments)}), the mask of the main sequence "
                f"has shape {tuple(mask.shape)}; expected ({total}, {total})"
            )
        self.segments, self.mask, self.stacks = list(segments), mask, tuple(stacks)

    def lay_out(self, sites: str, queries: Sequence[Segment], keys: Sequence[Segment]) -> None:
        """The policy tells what the tokens at some attention sites are; `sites` may hold wildcards
        ("encoder.*"). Told again, as a sequence grows, the last word counts.
        """
        self.layout[sites] = (list(queries), list(keys))

    def record_attention(
        self,
        site: str,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        *,
        start: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Blocks call this. query (B, heads, Q, d); key (B, heads or fewer, K, d), shared by groups of query
        heads where they are fewer; mask (B, Q, K) bool, or broadcastable, or None; scores are multiplied by
        `scale`, 1 / sqrt(d) unless given.

        `start`, with a key/value cache, is the position of the first query among the keys: the rows of
        prefill and decoding steps then add up to one picture, a row computed again replacing the older one.
        Without it, the last time a site is used in a call is what the call shows.
        """
        (batch, heads, queries, width), keys = query.shape, key.shape[-2]
        seen = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device) if mask is None else mask
        seen = seen.expand(batch, queries, keys)
        weights = None
        if self.trace is None or self.trace.wants(site, 4 * batch * heads * queries * keys):
            shared = repeat(key.detach().float(), "b h k d -> b (h group) k d", group=heads // key.shape[1])
            score = einsum(query.detach().float(), shared, "b h q d, b h k d -> b h q k")
            score = score * (width**-0.5 if scale is None else scale)
            # A row of padding with nothing to see is shown empty, not as nan.
            weights = score.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        rows = self.rows.setdefault(site, {})
        if start is None:
            rows.clear()
        rows[start or 0] = Rows(start or 0, seen, weights)

    def finish(self) -> None:
        """The call is over: put each site's rows together and name its tokens.

        Raises ValueError when a site's segments do not add up to its sequence.
        """
        for site, rows in self.rows.items():
            parts = list(rows.values())
            queries = max(part.start + part.mask.shape[1] for part in parts)
            keys = max(part.mask.shape[2] for part in parts)
            self.sites[site] = self.segments_at(site, queries, keys)
            self.masks[site] = _joined([(part.start, part.mask) for part in parts], queries, keys)
            kept = [(part.start, part.attention) for part in parts if part.attention is not None]
            if kept:
                self.attention[site] = _joined(kept, queries, keys)
        self.rows.clear()

    def segments_at(self, site: str, queries: int, keys: int) -> tuple[list[Segment], list[Segment]]:
        """Query and key segments of a site. Raises ValueError when they do not add up to the sequence."""
        unnamed = ([Segment("queries", "query", queries)], [Segment("keys", "query", keys)])
        found = next((v for pattern, v in self.layout.items() if fnmatch.fnmatchcase(site, pattern)), unnamed)
        for what, segments, length in (("query", found[0], queries), ("key", found[1], keys)):
            total = sum(s.length for s in segments)
            if total != length:
                raise ValueError(
                    f"site {site!r}: the {what} segments add up to {total} ({_told(segments)}), "
                    f"the sequence has {length}"
                )
        return found


def _told(segments: Sequence[Segment]) -> str:
    return ", ".join(f"{s.name} {s.length}" for s in segments)


def _joined(parts: Sequence[tuple[int, Tensor]], queries: int, keys: int) -> Tensor:
    """Blocks of rows (..., q, k), each with its first row, in one (..., queries, keys); nothing elsewhere."""
    first = parts[0][1]
    if len(parts) == 1 and tuple(first.shape[-2:]) == (queries, keys):
        return first
    whole = first.new_zeros(*first.shape[:-2], queries, keys)
    for start, part in parts:
        whole[..., start : start + part.shape[-2], : part.shape[-1]] = part
    return whole


class _Watched:
    """What stands in the place of a policy's `forward` or `predict_action_chunk` while traces are open."""

    def __init__(self, policy: Any, method: str) -> None:
        self.policy, self.method = policy, method
        self.before = vars(policy).get(method)

    def put_back(self) -> None:
        """Leave the policy as it was found."""
        if self.before is not None:
            vars(self.policy)[self.method] = self.before

    def __call__(self, batch: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        own = self.before or getattr(type(self.policy), self.method).__get__(self.policy)
        trace = next((trace for trace in reversed(_open.get()) if trace.policy is self.policy), None)
        if trace is None or _call.get() is not None:
            return own(batch, *args, **options)
        return trace.run(self.method, own, batch, args, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the policy runs its own method, untraced, and not the original's."""
        return getattr(type(self.policy), self.method).__get__(memo.get(id(self.policy), self.policy))


class _Watch:
    """Who is watched, over all threads: stand-ins are put in with a policy's first trace and taken out with
    its last; compiled code runs eagerly as long as any trace is open.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.watchers: dict[int, int] = {}
        self.closers: dict[int, Callable[[], None]] = {}
        self.stance: Any = None

    def begin(self, policy: Any) -> None:
        from minivla import upstream

        with self.lock:
            if id(policy) not in self.watchers:
                if upstream.is_lerobot(policy):
                    self.closers[id(policy)] = upstream.open_eyes(policy)
                for method in WATCHED:
                    vars(policy)[method] = _Watched(policy, method)
            self.watchers[id(policy)] = self.watchers.get(id(policy), 0) + 1
        self.run_eagerly()

    def end(self, policy: Any) -> None:
        with self.lock:
            self.watchers[id(policy)] -= 1
            if self.watchers[id(policy)] == 0:
                del self.watchers[id(policy)]
                self.closers.pop(id(policy), lambda: None)()
                for method in WATCHED:
                    vars(policy).pop(method).put_back()
            if not self.watchers and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None

    def run_eagerly(self) -> None:
        """Nothing to do, and nothing imported, where nothing was ever compiled."""
        with self.lock:
            if self.stance is None and "torch._dynamo" in sys.modules:
                self.stance = torch.compiler.set_stance("force_eager")
                self.stance.__enter__()


_watch = _Watch()


def _bare(policy: Any) -> Any:
    """The policy inside what `torch.compile` or distributed training put around it.

    Raises TypeError for what is no policy.
    """
    bare = policy
    while not hasattr(type(bare), "predict_action_chunk"):
        inner = getattr(bare, "_orig_mod", None) or getattr(bare, "module", None)
        if inner is None:
            raise TypeError(
                f"minivla.trace looks into a policy; {type(policy).__name__} has no predict_action_chunk. "
                "Give one of minivla's (minivla.load(...)) or LeRobot's policies, not its network"
            )
        bare = inner
    return bare


class Trace:
    """A look inside a policy; make one with `minivla.trace`."""

    def __init__(self, policy: Any, *, attention: bool | Sequence[str] = True) -> None:
        self.policy = _bare(policy)
        self.calls: list[Call] = []
        self._wanted = ["*"] if attention is True else list(attention or [])
        self._warned = False

    def __enter__(self) -> Trace:
        _watch.begin(self.policy)
        _open.set((*_open.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        traces = list(_open.get())
        del traces[len(traces) - 1 - traces[::-1].index(self)]
        _open.set(tuple(traces))
        _watch.end(self.policy)

    def wants(self, site: str, size: int) -> bool:
        """Are this site's attention weights, `size` bytes, kept? Warns when all that are would be much."""
        if not self._asked_for(site):
            return False
        count = max(1, sum(self._asked_for(getattr(m, "site", "")) for m in self.policy.modules()))
        if size * count > MUCH and not self._warned:
            self._warned = True
            warnings.warn(
                f"keeping the attention of {count} sites takes about {size * count / 2**30:.1f} GiB for each "
                f"call ({size / 2**20:.0f} MiB at {site!r}); choose some: "
                f"minivla.trace(policy, attention=[{site!r}])",
                stacklevel=2,
            )
        return True

    def _asked_for(self, site: str) -> bool:
        return bool(site) and any(fnmatch.fnmatchcase(site, pattern) for pattern in self._wanted)

    def run(
        self,
        method: str,
        function: Callable[..., Any],
        batch: Mapping[str, Any],
        args: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
        *,
        proving: bool = False,
    ) -> Any:
        """Run the policy's own method as a call of this trace. A call that fails is not kept."""
        _watch.run_eagerly()
        call = Call(method, batch, self, proving)
        token = _call.set(call)
        try:
            result = function(batch, *args, **(options or {}))
        finally:
            _call.reset(token)
        call.finish()
        if method == "predict_action_chunk":
            call.chunk = result.detach()
        self.calls.append(call)
        return result

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

    def plot_flow(self, **options: Any) -> Figure:
        """The sampler's path from noise to the chunk (`minivla.viz.flow`)."""
        from minivla.viz import flow

        if self.flow is None:
            raise ValueError(
                "the last call integrated no flow: trace policy.predict_action_chunk(batch) of a diffusion "
                f"or flow-matching policy, which {type(self.policy).__name__} may not be"
            )
        return flow.plot_flow(self.flow, **options)

    def explore(self, *, call: int = -1, sample: int = 0, **options: Any) -> Explorer:
        """One call as a piece of HTML to point at: what is each token, what may it see, what does it look at
        (`minivla.viz.explorer`).
        """
        from minivla.viz import explorer

        self._last()
        if not -len(self.calls) <= call < len(self.calls):
            raise ValueError(f"call is {call}; this trace holds {len(self.calls)} calls")
        robot = None if getattr(self.policy, "postprocessor", None) is None else self.policy.postprocess
        return explorer.explore(self.calls[call], sample=sample, robot=robot, **options)

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
        if site not in call.masks:
            raise ValueError(f"no site {site!r}; this call has {', '.join(call.masks) or 'none'}")
        queries, keys = call.sites[site]
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
        robot = None if getattr(self.policy, "postprocessor", None) is None else self.policy.postprocess
        return chunks.plot_chunk(self.chunk, robot and robot(self.chunk), **options)

    def _site(self, site: str | None) -> str:
        kept = list(self._last().attention)
        if site is None and kept:
            return kept[-1]
        if site not in kept:
            raise ValueError(
                f"attention site {site!r} was not kept; this trace holds {', '.join(kept) or 'none'} of "
                f"{', '.join(self._last().masks) or 'none'}: trace with attention=True, or name it there"
            )
        return site


def trace(policy: Any, *, attention: bool | Sequence[str] = True) -> Trace:
    """Look inside `policy` while a block runs.

        with minivla.trace(policy) as t:
            policy.select_action(batch)

    `policy` is one of minivla's, or LeRobot's own ACT (`minivla.upstream`); one that was wrapped by
    `torch.compile` or for distributed training is looked for inside its wrapper, and compiled code runs
    eagerly meanwhile. `attention` chooses the sites whose weights are recomputed and kept: True for all, or
    names with wildcards (["decoder.*.cross"]). Masks, segments and hidden states are always kept. Costs
    nothing when it is off.

    Raises TypeError for what is no policy, and for a family of LeRobot's that cannot be looked into yet.
    """
    return Trace(policy, attention=attention)
