"""Attention followed through several layers, back to the tokens that entered the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from einops import reduce
from matplotlib.figure import Figure
from torch import Tensor

from minivla.recorder import Call
from minivla.segments import Segment
from minivla.tracing import Trace
from minivla.viz.attention import (
    asker,
    attention_title,
    attention_weights,
    plot_look,
    positions,
    shown,
    spoken,
)


def plot_rollout(
    call: Call | Trace,
    *,
    query: SupportsIndex | str = 0,
    sample: int = 0,
    images: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Figure:
    """What one query looks at when its attention is followed through the layers below, to the first tokens.

    After some layers a token holds something of every other, so that attention to "the patch at (3, 4)" is
    attention to what has been mixed there. Rollout multiplies the layers (`attention_rollout`): all kept
    self-attention sites of one stack, and on top, where there is one, the last cross-attention site, whose
    queries are then the ones to ask for. Arguments and errors as `plot_attention`; ValueError when no stack
    was kept.

    An estimate, not a proof: it counts values, feed-forward layers and norms as passing everything on
    unchanged, gives the residual a fixed half, and cannot tell a push from a pull. What a token really does
    shows when it is changed. Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers".
    """
    call = call.calls[-1] if isinstance(call, Trace) and call.calls else call
    if isinstance(call, Trace):
        raise ValueError("this trace is empty: call the policy inside `with minivla.trace(policy) as t:`")
    weights, keys = rollout_weights(call, query=query, sample=sample)
    cross, stack = _stack(call)
    if title is None:
        layers = stack[0] if len(stack) == 1 else f"{stack[0]} … {stack[-1]}"
        who = asker(query, call.sites[cross or stack[-1]][0])
        title = f"{who} {attention_title(weights, keys)}\nrollout through {layers}"
        title += f" → {cross}" if cross else ""
    images = shown(call.batch, keys, sample) if images is None else images
    return plot_look(weights, keys, images, title=title, words=spoken(call, sample))


def rollout_weights(
    call: Call, *, query: SupportsIndex | str = 0, sample: int = 0
) -> tuple[Tensor, list[Segment]]:
    """What `plot_rollout` draws: a row of weights (K,), adding up to 1, and the segments of its K tokens.

    Same arguments, same errors.
    """
    cross, stack = _stack(call)
    row = attention_weights(call, cross or stack[-1], query=query, sample=sample)
    rolled = attention_rollout([call.attention[site] for site in stack])[sample]
    queries, keys = call.sites[cross or stack[-1]]
    if cross is not None:
        return row @ rolled, list(keys)
    start, stop = positions(query, queries)
    return rolled[start:stop].mean(0), list(keys)


def _stack(call: Call) -> tuple[str | None, list[str]]:
    """The last cross-attention site, if any, and the self-attention sites of the tokens that it looks at."""
    alike = {site: list(queries) == list(keys) for site, (queries, keys) in call.sites.items()}
    kept = [site for site in call.attention if site in call.sites]
    cross = next((site for site in reversed(kept) if not alike[site]), None)
    last = cross or next(iter(reversed(kept)), None)
    tokens = list(call.sites[last][1]) if last else []
    stack = [site for site in kept if alike[site] and list(call.sites[site][1]) == tokens]
    if not stack:
        raise ValueError(
            "rollout needs the self-attention of one stack of layers; this call holds "
            f"{', '.join(kept) or 'none'}. Trace with attention=True"
        )
    return cross, stack


def attention_rollout(layers: Sequence[Tensor], *, residual: float = 0.5) -> Tensor:
    """Attention followed back through several self-attention layers to the first layer's tokens.

    layers: (B, heads, L, L) each, first layer first. A layer passes on `residual` of a token unchanged,
    since the residual connection carries it past the attention, and mixes the rest by the mean of its
    heads. Returns (B, L, L), rows adding up to 1. Raises ValueError for no layers or sites that are not
    square. Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", equation 1.
    """
    if not layers or any(a.ndim != 4 or a.shape[-1] != a.shape[-2] for a in layers):
        shapes = [tuple(a.shape) for a in layers]
        raise ValueError(
            f"rollout needs self-attention layers (B, heads, L, L), got {shapes}; take "
            "[call.attention[s] for s in call.attention if s.startswith('encoder.')]"
        )
    same = torch.eye(layers[0].shape[-1], device=layers[0].device)
    total = same.expand(len(layers[0]), -1, -1)
    for attention in layers:
        mixed = reduce(attention.float(), "batch head query key -> batch query key", "mean")
        total = (residual * same + (1 - residual) * mixed) @ total
    return total
