"""What blocks call to be seen: nothing happens unless a trace is open and its policy runs.

    recorder.keep("encoder", tokens)                      a hidden state, under a name; the last one counts
    recorder.keep_step("suffix.0.input_norm.gate", gate)  the same where every step of a sampler counts
    recorder.spell("prompt", ids)                         which words a segment's tokens are
    recorder.passed(Pass(…))                              a network with a key/value cache ran once
    with recorder.apart(cameras): …                       a batch is several pictures of each sample
    call.record_attention(site, query, key, mask)         who looks at whom, recomputed from queries and keys
    call.describe(segments, mask); call.lay_out(...)      what the tokens are, told by the policy

The call being recorded is a context variable, so that threads do not see each other's. Who opens traces, and
what one shows, is `minivla.tracing`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum, repeat
from torch import Tensor

from minivla.segments import Segment, arrange


class NotKept(KeyError, ValueError):
    """Something was asked of a trace that it does not hold. Prints its text as it is."""

    __str__ = Exception.__str__


class BySite(dict[str, Tensor]):
    """Tensors by site; a site that is not there is named together with those that are."""

    def __missing__(self, site: str) -> Tensor:
        raise NotKept(
            f"nothing was kept at {site!r}, only at {', '.join(self) or 'no site'}: name it in "
            "minivla.trace(policy, attention=[...]), or take attention=True"
        )


_call: ContextVar[Call | None] = ContextVar("minivla_call", default=None)


def current() -> Call | None:
    """The call to record into, or None: no trace is open, or none of the policy that runs."""
    return None if torch.compiler.is_compiling() else _call.get()


@contextmanager
def recording(call: Call) -> Iterator[None]:
    """Inside, what blocks tell goes into `call`; at the end it is put together. In an error it is left."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
    call.finish()


@contextmanager
def paused() -> Iterator[None]:
    """Inside, nothing is recorded: another policy runs."""
    token = _call.set(None)
    try:
        yield
    finally:
        _call.reset(token)


def keep(name: str, value: Tensor) -> None:
    """Keep a hidden state under a name ("encoder", "latent"); does nothing when no trace is on."""
    if (call := current()) is not None:
        for place, (part,) in call.apart(name, value):
            call.hidden[place] = part if call.proving else part.detach()


def keep_step(name: str, value: Tensor) -> None:
    """Keep a value each time it is told: a call's `steps[name]` is (N, …), one entry for each of N times."""
    if (call := current()) is not None:
        call.told.setdefault(name, []).append(value.detach())


def spell(segment: str, ids: Tensor) -> None:
    """The tokens of a segment are the words `ids` (B, L): a trace with a tokenizer writes them out."""
    if (call := current()) is not None:
        call.ids[segment] = ids.detach()


def passed(run: Pass) -> None:
    """A network with a key/value cache ran once."""
    if (call := current()) is not None:
        call.passes.append(run)


@contextmanager
def apart(pictures: Sequence[Segment]) -> Iterator[None]:
    """Inside, a batch (pictures · B, …) is several pictures of each sample: all first ones, then the next.

    What is told of "vision" and "vision.3" is kept apart as "vision.table" and "vision.table.3": a camera's
    stack of its own, with B samples. `pictures` are the segments that the pictures become, in that order.
    """
    if (call := current()) is None:
        yield
        return
    before, call.pictures = call.pictures, list(pictures)
    for picture in pictures:
        call.lay_out(f"*.{picture.name}.*", arrange([picture]), arrange([picture]))
    try:
        yield
    finally:
        call.pictures = before


def enter(name: str, tokens: Tensor) -> Tensor:
    """Tokens (B, L, D) enter the stack of layers `name`, whose outcome is kept under the same name.

    Returns them unchanged; only while masks are proven (`minivla.proof`) a zero is added that gradients can
    be asked of.
    """
    if (call := current()) is None or not call.proving:
        return tokens
    found = {place: torch.zeros_like(part, requires_grad=True) for place, (part,) in call.apart(name, tokens)}
    call.entered.update(found)
    return tokens + torch.cat(list(found.values()))


@dataclass
class Flow:
    """A sampler's path. times (N + 1,), x (N + 1, B, H, A) from noise x[0] to result x[N], v (N, B, H, A).

    `quantity` says what v is: the velocity, or what a diffusion network predicts ("noise", "action").
    """

    times: Tensor
    x: Tensor
    v: Tensor
    quantity: str = "velocity"


@dataclass(frozen=True)
class Pass:
    """One run of a network that keeps keys and values: of one sample, tokens.

    streams    which streams of the decoder ran
    computed   tokens that went through it
    read       tokens before them, whose keys and values it took from the cache
    written    of the computed, those whose keys and values stay in the cache; 0 where all are forgotten
    token      bytes that one token takes in the cache: keys and values of all layers
    """

    streams: tuple[str, ...]
    computed: int
    read: int
    written: int
    token: int


@dataclass
class Rows:
    """What one attention computed: queries from position `start` on, against the first K keys."""

    start: int
    mask: Tensor  # (B, Q, K) bool
    attention: Tensor | None  # (B, heads, Q, K)


@dataclass(repr=False)
class Call:
    """One forward pass.

    method      "forward" or "predict_action_chunk"
    batch       the normalised batch it was given
    segments    the policy's main sequence; `mask` (Q, K) bool, who may look at whom there, sample 0;
                `stacks`, through which stacks of layers it goes, in its order
    masks       by site: (B, Q, K) bool;  attention by site: (B, heads, Q, K)
    sites       by site: (query segments, key segments)
    hidden      named hidden states;  chunk (B, H, A), normalised;  flow, for policies that integrate one
    steps       by name, what is kept at each step of a sampler: (N, …)
    passes      each run of a network with a key/value cache
    ids, words  by segment, its tokens' numbers (B, L), and with a tokenizer B lists of strings
    """

    method: str
    batch: Mapping[str, Any]
    wants: Callable[[str, int], bool] = field(default=lambda site, size: True, repr=False)
    proving: bool = False
    segments: list[Segment] = field(default_factory=list)
    mask: Tensor | None = None
    stacks: tuple[str, ...] = ()
    masks: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, tuple[list[Segment], list[Segment]]] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)
    entered: dict[str, Tensor] = field(default_factory=dict, repr=False)
    steps: dict[str, Tensor] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)
    ids: dict[str, Tensor] = field(default_factory=dict, repr=False)
    words: dict[str, list[list[str]]] = field(default_factory=dict)
    chunk: Tensor | None = None
    flow: Flow | None = None
    told: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)
    pictures: list[Segment] = field(default_factory=list, repr=False)
    layout: dict[str, tuple[list[Segment], list[Segment]]] = field(default_factory=dict, repr=False)
    rows: dict[str, dict[int, Rows]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.masks, self.attention = BySite(self.masks), BySite(self.attention)

    def __repr__(self) -> str:
        tokens = f"{sum(s.length for s in self.segments)} tokens in {len(self.segments)} segments"
        chunk = "" if self.chunk is None else f", chunk {tuple(self.chunk.shape)}"
        return f"Call({self.method}: {tokens}, attention at {', '.join(self.attention) or 'no site'}{chunk})"

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

    def apart(self, name: str, *values: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """A name and values as they are; inside `recorder.apart`, name and shares (B, …) of each picture."""
        if not self.pictures:
            yield name, values
            return
        stack, *rest = name.split(".")
        shares = zip(*(value.chunk(len(self.pictures)) for value in values), strict=True)
        for picture, share in zip(self.pictures, shares, strict=True):
            yield ".".join([stack, picture.name, *rest]), share

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
        open_ = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device) if mask is None else mask
        seen = open_.expand(len(query), query.shape[-2], key.shape[-2])
        for place, parts in self.apart(site, query, key, seen):
            self._record(place, *parts, start=start, scale=scale)

    def _record(
        self, site: str, query: Tensor, key: Tensor, seen: Tensor, *, start: int | None, scale: float | None
    ) -> None:
        """One site's queries, keys and mask (B, Q, K)."""
        (batch, heads, queries, width), keys = query.shape, key.shape[-2]
        weights = None
        if self.wants(site, 4 * batch * heads * queries * keys):
            wide = torch.promote_types(query.dtype, torch.float32)
            shared = repeat(key.detach().to(wide), "b h k d -> b (h group) k d", group=heads // key.shape[1])
            score = einsum(query.detach().to(wide), shared, "b h q d, b h k d -> b h q k")
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
        for site in self.rows:
            self.masks[site], attention = self.whole(site)
            self.sites[site] = self.segments_at(site, *self.masks[site].shape[1:])
            if attention is not None:
                self.attention[site] = attention
        self.rows.clear()
        self.steps = {name: torch.stack(values) for name, values in self.told.items() if _alike(values)}
        self.told.clear()

    def whole(self, site: str) -> tuple[Tensor, Tensor | None]:
        """A site's mask (B, Q, K) and, if kept, attention (B, heads, Q, K), out of its blocks of rows."""
        parts = list(self.rows[site].values())
        queries = max(part.start + part.mask.shape[1] for part in parts)
        keys = max(part.mask.shape[2] for part in parts)
        kept = [(part.start, part.attention) for part in parts if part.attention is not None]
        mask = _joined([(part.start, part.mask) for part in parts], queries, keys)
        return mask, _joined(kept, queries, keys) if kept else None

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


def _alike(values: Sequence[Tensor]) -> bool:
    """Do they stack? A value told once for a whole batch and once for each sample does not."""
    return len({value.shape for value in values}) == 1


def _told(segments: Sequence[Segment]) -> str:
    return ", ".join(f"{s.name} {s.length}" for s in segments)


def _joined(parts: Sequence[tuple[int, Tensor]], queries: int, keys: int) -> Tensor:
    """Blocks of rows (B, ..., q, k), each with its first row, in one (B, ..., queries, keys), else nothing.

    Of a block with fewer samples each stands for several of the others: one look, several draws of noise.
    """
    first, size = parts[0][1], max(len(part) for _, part in parts)
    if len(parts) == 1 and tuple(first.shape[-2:]) == (queries, keys):
        return first
    whole = first.new_zeros(size, *first.shape[1:-2], queries, keys)
    for start, part in parts:
        rows = part.repeat_interleave(size // len(part), dim=0)
        whole[..., start : start + part.shape[-2], : part.shape[-1]] = rows
    return whole
