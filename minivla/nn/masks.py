"""One mask builder for every policy: segments in, boolean mask out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from minivla.segments import Segment


def segment_mask(segments: Sequence[Segment], valid: Tensor | None = None) -> Tensor:
    """Who may look at whom in a sequence of segments.

    A token sees its own block and lower ones; inside a "causal" segment it sees itself and earlier tokens.
    `valid` (B, L) bool, True where a token is real: nobody looks at padding. Returns (B, Q, K) bool, True =
    may look, with B = 1 when `valid` is None. A row of padding keeps its open places, so that softmax never
    meets an empty row unless every key is padding.

    >>> state, chunk = Segment("state", "state", 1), Segment("chunk", "action", 2, start=1, block=1)
    >>> segment_mask([state, chunk])[0].int().tolist()
    [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    """
    block = torch.cat([torch.full((s.length,), s.block) for s in segments])
    mask = rearrange(block, "key -> 1 key") <= rearrange(block, "query -> query 1")
    for s in segments:
        if s.rule == "causal":
            mask[s.start : s.stop, s.start : s.stop] &= torch.ones(
                s.length, s.length, dtype=torch.bool
            ).tril()
    if valid is None:
        return rearrange(mask, "query key -> 1 query key")
    return mask.to(valid.device) & key_mask(valid)


def key_mask(valid: Tensor) -> Tensor:
    """Every query sees the real keys. valid (B, K) bool. Returns (B, 1, K), which broadcasts over queries."""
    return rearrange(valid, "batch key -> batch 1 key")
