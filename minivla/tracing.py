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
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minivla import recorder
from minivla.recorder import Call, Flow
from minivla.segments import Segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minivla.viz.explorer import Explorer

WATCHED = ("forward", "predict_action_chunk")
MUCH = 1 << 30  # bytes of attention weights in one call that are worth a warning
_open: ContextVar[tuple[Trace, ...]] = ContextVar("minivla_traces", default=())


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
        if trace is None or recorder.current() is not None:
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
        self.policy = policy
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
        call = Call(method, batch, self.wants, proving)
        with recorder.recording(call):
            result = function(batch, *args, **(options or {}))
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

        return tokens.plot_tokens(self.segments, **{"mask": self.mask, **options})

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
    return Trace(_bare(policy), attention=attention)
