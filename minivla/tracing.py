"""Looking inside a policy: `minivla.trace`.

    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch)
    t.segments, t.mask, t.attention["decoder.0.cross"]

The open traces are a context variable, so threads and nested traces do not see each other. A trace holds one
`Call` for each time the policy computed a loss or a chunk; its plain attributes mean the last one. What
`torch.compile` has compiled runs eagerly meanwhile: compiled code has no place to look into. Pictures live in
`minivla.viz`, which is imported when one is asked for.
"""

from __future__ import annotations

import fnmatch
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from minivla import recorder
from minivla.recorder import Call, Flow, NotKept, Pass
from minivla.segments import Segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minivla.viz.explorer import Explorer

WATCHED = ("forward", "predict_action_chunk")
MUCH = 1 << 30  # bytes of attention weights in one call that are worth a warning
_open: ContextVar[tuple[Trace, ...]] = ContextVar("minivla_traces", default=())
_running: ContextVar[Any] = ContextVar("minivla_policy", default=None)


@contextmanager
def _run(policy: Any) -> Iterator[None]:
    """Inside, this policy runs: what it calls of itself is no call of its own."""
    token = _running.set(policy)
    try:
        yield
    finally:
        _running.reset(token)


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
        if _running.get() is self.policy:
            return own(batch, *args, **options)
        trace = next((trace for trace in reversed(_open.get()) if trace.policy is self.policy), None)
        if trace is not None:
            return trace.run(self.method, own, batch, args, options)
        with _run(self.policy), recorder.paused():  # it may run inside a policy that is traced
            return own(batch, *args, **options)

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
        """A trace of this policy opens."""
        from minivla import upstream

        with self.lock:
            if upstream.is_lerobot(policy) and id(policy) not in self.watchers:
                self.closers[id(policy)] = upstream.open_eyes(policy)
            for each in _policies_in(policy):
                if id(each) not in self.watchers:
                    vars(each).update({method: _Watched(each, method) for method in WATCHED})
                self.watchers[id(each)] = self.watchers.get(id(each), 0) + 1
        self.run_eagerly()

    def end(self, policy: Any) -> None:
        """A trace of this policy closes."""
        with self.lock:
            for each in _policies_in(policy):
                self.watchers[id(each)] -= 1
                if self.watchers[id(each)] == 0:
                    del self.watchers[id(each)]
                    for method in WATCHED:
                        vars(each).pop(method).put_back()
            if id(policy) not in self.watchers:
                self.closers.pop(id(policy), lambda: None)()
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


def _policies_in(policy: Any) -> list[Any]:
    """A policy, and those it holds: a teacher's attention is not its student's."""
    return [module for module in policy.modules() if hasattr(type(module), "predict_action_chunk")]


def bare(policy: Any) -> Any:
    """The policy inside what `torch.compile` or distributed training put around it.

    Raises TypeError for what is no policy.
    """
    inner = policy
    while not hasattr(type(inner), "predict_action_chunk"):
        found = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if found is None:
            raise TypeError(
                f"expected a policy; {type(policy).__name__} has no predict_action_chunk. Give one of "
                "minivla's (minivla.load(...)) or LeRobot's policies, not its network"
            )
        inner = found
    return inner


def _sites(policy: Any) -> list[str]:
    from minivla import upstream

    if upstream.is_lerobot(policy):
        return upstream.sites(policy)
    found = ([getattr(m, "site", ""), *getattr(m, "sites", ())] for m in policy.modules())
    return [site for named in found for site in named if site]


def _tokenizer_of(policy: Any) -> Any:
    """The tokenizer in a policy's preprocessor, if it was loaded; to load one may need a network."""
    steps = getattr(getattr(policy, "preprocessor", None), "steps", ())
    return next((t for step in steps if (t := getattr(step, "tokenizer", None)) is not None), None)


def _spelled(ids: Tensor, tokenizer: Any) -> list[list[str]]:
    """Token ids (B, L) as text, each on its own; a word's space stays before it. Ids that the tokenizer does
    not know become "?".
    """
    size = len(tokenizer)
    rows = [
        [tokenizer.convert_ids_to_tokens(i) if 0 <= i < size else None for i in row] for row in ids.tolist()
    ]
    return [["?" if word is None else word.replace("▁", " ") for word in row] for row in rows]


class Trace:
    """A look inside a policy; make one with `minivla.trace`."""

    def __init__(
        self, policy: Any, *, attention: bool | str | Sequence[str] = True, tokenizer: Any = None
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.calls: list[Call] = []
        named = [attention] if isinstance(attention, str) else attention
        self._wanted = ["*"] if named is True else list(named or [])
        self._unmet = {pattern for pattern in self._wanted if pattern != "*"}
        self._warned = False

    def __enter__(self) -> Trace:
        _watch.begin(self.policy)
        _open.set((*_open.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        traces = list(_open.get())
        if self in traces:  # else it is closed in another thread than it was opened in
            del traces[len(traces) - 1 - traces[::-1].index(self)]
            _open.set(tuple(traces))
        _watch.end(self.policy)
        if self._unmet and self.calls:
            sites = ", ".join(dict.fromkeys(site for call in self.calls for site in call.masks))
            warnings.warn(
                f"attention={sorted(self._unmet)} matches no site that was used: {sites or 'there was none'}",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"Trace of {type(self.policy).__name__}, {len(self.calls)} calls: {self.calls}"

    def wants(self, site: str, size: int) -> bool:
        """Are this site's attention weights, `size` bytes, kept? Warns when all that are would be much."""
        if not self._asked_for(site):
            return False
        self._unmet -= {pattern for pattern in self._unmet if fnmatch.fnmatchcase(site, pattern)}
        count = max(1, sum(map(self._asked_for, _sites(self.policy))))
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
        call = Call(method, dict(batch), self.wants, proving)
        with _run(self.policy), recorder.recording(call):
            result = function(batch, *args, **(options or {}))
        if method == "predict_action_chunk":
            call.chunk = result.detach().clone()
        if (tokenizer := self.tokenizer or _tokenizer_of(self.policy)) is not None:
            call.words |= {name: _spelled(ids, tokenizer) for name, ids in call.ids.items()}
        self.calls.append(call)
        return result

    def _last(self) -> Call:
        if not self.calls:
            raise ValueError(
                "this trace is empty: inside `with minivla.trace(policy) as t:` and in the same thread call "
                "policy(batch), policy.predict_action_chunk(batch) or policy.select_action(batch) on the "
                "same policy; select_action may serve its queue of actions: policy.reset() first"
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
    def steps(self) -> dict[str, Tensor]:
        """What is kept at each step of a sampler, by name: (N, …)."""
        return self._last().steps

    @property
    def words(self) -> dict[str, list[list[str]]]:
        """By segment, its tokens as B lists of strings; empty where no tokenizer is at hand."""
        return self._last().words

    @property
    def passes(self) -> list[Pass]:
        """Each run of a network with a key/value cache."""
        return self._last().passes

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

    def call(self, index: int = -1) -> Call:
        """One of the calls. Raises ValueError when there is none of that number."""
        self._last()
        if not -len(self.calls) <= index < len(self.calls):
            raise ValueError(f"call is {index}; this trace holds {len(self.calls)} calls")
        return self.calls[index]

    def plot_tokens(self, *, call: int = -1, **options: Any) -> Figure:
        """The main sequence as a ribbon of named segments, and its words where they are known, of sample 0
        (`minivla.viz.tokens`).
        """
        from minivla.viz import attention, tokens

        seen = self.call(call)
        known = {"mask": seen.mask, "words": attention.spoken(seen, 0)}
        return tokens.plot_tokens(seen.segments, **{**known, **options})

    def plot_mask(
        self, site: str | None = None, *, call: int = -1, sample: int = 0, **options: Any
    ) -> Figure:
        """The mask of the main sequence (of sample 0), or a sample's at one site (`minivla.viz.masks`)."""
        from minivla.viz import masks

        seen = self.call(call)
        if site is None:
            if sample:
                raise ValueError("the main sequence's mask is that of sample 0; for another name a site")
            return masks.plot_mask(seen.mask, seen.segments, seen.segments, **options)
        mask = seen.masks[site]
        if not 0 <= sample < len(mask):
            raise ValueError(f"sample is {sample}; the batch has {len(mask)}")
        queries, keys = seen.sites[site]
        return masks.plot_mask(mask[sample], queries, keys, **options)

    def plot_attention(
        self,
        site: str | None = None,
        *,
        query: SupportsIndex | str = 0,
        head: int | None = None,
        call: int = -1,
        **options: Any,
    ) -> Figure:
        """What one query looks at, laid over the cameras (`minivla.viz.attention`).

        `site` defaults to the last one kept; `query` is a position or a segment's name (its mean); `head`
        None is the mean over heads.
        """
        from minivla.viz import attention

        seen = self.call(call)
        if site is None and not seen.attention:
            raise NotKept("no attention was kept in this call: trace with attention=True")
        site = list(seen.attention)[-1] if site is None else site
        seen.attention[site]  # says what was kept, if not this
        return attention.plot_attention(seen, site, query=query, head=head, **options)

    def plot_chunk(self, *, call: int = -1, **options: Any) -> Figure:
        """The predicted chunk, one line a dimension, in normalised and robot units (`minivla.viz.chunks`)."""
        from minivla.viz import chunks

        if (chunk := self.call(call).chunk) is None:
            raise ValueError("that call was a loss; call policy.predict_action_chunk(batch) to see a chunk")
        return chunks.plot_chunk(chunk, self._robot and self._robot(chunk), **options)

    def plot_flow(self, *, call: int = -1, **options: Any) -> Figure:
        """The sampler's path from noise to the chunk (`minivla.viz.flow`)."""
        from minivla.viz import flow

        if (path := self.call(call).flow) is None:
            raise ValueError(
                "that call integrated no flow: trace policy.predict_action_chunk(batch) of a diffusion "
                f"or flow-matching policy, which {type(self.policy).__name__} may not be"
            )
        return flow.plot_flow(path, **options)

    def plot_denoising(self, *, call: int = -1, sample: int = 0, **options: Any) -> Figure:
        """The chunk at several moments of the sampler, in robot units, or, with `meaning=env.action_spec`,
        where it leads on the table (`minivla.viz.denoising`).
        """
        from minivla.viz import denoising

        given = {"robot": self._robot, **options}
        return denoising.plot_traced(self.policy, self.call(call), sample=sample, **given)

    def plot_score(self, *, call: int = -1, sample: int = 0, **options: Any) -> Figure:
        """Where the denoiser would send noisy chunks for this call's observations (`minivla.viz.basins`)."""
        from minivla.viz import basins

        return basins.plot_score_field(self.policy, self.call(call).batch, sample=sample, **options)

    def plot_keypoints(self, *, call: int = -1, sample: int = 0, ago: int = 0, **options: Any) -> Figure:
        """The image encoder's keypoints on the pictures, `ago` moments back (`minivla.viz.keypoints`)."""
        from minivla.viz import keypoints

        found = keypoints.keypoints_of(self.policy, self.call(call), sample=sample, ago=ago)
        return keypoints.plot_keypoints(*found, **options)

    def plot_codes(self, *, call: int = -1, sample: int = 0, **options: Any) -> Figure:
        """How the call chose its codes, what they stand for, and what the offset adds; with
        `meaning=env.action_spec` in units of the table (`minivla.viz.choice`).
        """
        from minivla.viz import choice

        return choice.plot_choice(self.policy, self.call(call), sample=sample, **options)

    def plot_cache(self, *, call: int = -1, **options: Any) -> Figure:
        """What each run of the decoder computes, reads from its cache and keeps (`minivla.viz.cache`)."""
        from minivla.viz import cache

        return cache.plot_cache(self.call(call).passes, **options)

    def plot_modulation(self, *, call: int = -1, sample: int = 0, **options: Any) -> Figure:
        """Scale, shift and gate of the adaptive norms along the flow (`minivla.viz.modulation`)."""
        from minivla.viz import modulation

        return modulation.plot_modulation(self.call(call).steps, sample=sample, **options)

    def plot_spelling(self, *, call: int = -1, sample: int = 0, **options: Any) -> Figure:
        """What π0-FAST said, beside the chunk and the frequencies it spells (`minivla.viz.spelling`)."""
        from minivla.viz import spelling

        return spelling.plot_said(self.policy, self.call(call), sample=sample, **options)

    def explore(self, *, call: int = -1, sample: int = 0, **options: Any) -> Explorer:
        """One call as a piece of HTML to point at: what is each token, what may it see, what does it look at
        (`minivla.viz.explorer`).
        """
        from minivla.viz import explorer

        given = {"robot": self._robot, "encoders": self._encoders, **options}
        return explorer.explore(self.call(call), sample=sample, **given)

    @property
    def _encoders(self) -> dict[str, Any]:
        """By camera, what makes its pictures into keypoints (`minivla.nn.image_vector`)."""
        from minivla import upstream

        if upstream.is_lerobot(self.policy):
            return dict(upstream.encoders(self.policy))
        encoders = [module for module in self.policy.modules() if hasattr(type(module), "pixels")]
        return {camera: encoder for encoder in encoders for camera in encoder.cameras}

    @property
    def _robot(self) -> Callable[[Tensor], Tensor] | None:
        """Normalised actions to robot units, if the policy can."""
        return None if getattr(self.policy, "postprocessor", None) is None else self.policy.postprocess


def trace(policy: Any, *, attention: bool | str | Sequence[str] = True, tokenizer: Any = None) -> Trace:
    """Look inside `policy` while a block runs.

        with minivla.trace(policy) as t:
            policy.select_action(batch)

    `policy` is one of minivla's, or LeRobot's own ACT, Diffusion Policy, VQ-BeT, π0 or π0.5
    (`minivla.upstream`); one wrapped by `torch.compile` or for distributed training is looked for inside its
    wrapper, and compiled code runs eagerly meanwhile. `attention` chooses the sites whose weights are
    recomputed and kept: True for all, or names with wildcards ("decoder.*.cross", or a list). Masks, segments
    and hidden states are always kept. `tokenizer` writes the words of a prompt out; without it the
    preprocessor's does, once it was loaded.
    Costs nothing when it is off. Of several open traces of one policy the innermost records a call; a policy
    that runs inside another has calls of its own.

    Raises TypeError for what is no policy, and for a family of LeRobot's that cannot be looked into yet.
    """
    return Trace(bare(policy), attention=attention, tokenizer=tokenizer)
