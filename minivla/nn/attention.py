"""Multi-head attention, with the projections of torch's own module and a place where a trace can look in.

Source: Vaswani et al. 2017, section 3.2. Parameter names and layout are those of
`torch.nn.MultiheadAttention` (query, key and value projections stacked in one matrix), so checkpoints of
DETR-like models load unchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivla import recorder


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    site: str,
    dropout: float = 0.0,
    start: int | None = None,
) -> Tensor:
    """Scaled dot-product attention of all heads.

    query (B, heads, Q, d), key and value (B, heads, K, d) or with fewer heads, each shared by a group of
    query heads; `mask` (B, Q, K) bool or broadcastable to it, True = may look, None = everything is open.
    Returns (B, heads, Q, d). `site` is the name under which a trace keeps who looked where; `start`, with a
    key/value cache, the position of the first query among the keys.
    """
    if (call := recorder.current()) is not None:
        call.record_attention(site, query, key, mask, start=start)
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (_shared(x, group) for x in (key, value))
    head_mask = None if mask is None else mask.unsqueeze(-3)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=head_mask, dropout_p=dropout)


def _shared(x: Tensor, group: int) -> Tensor:
    """Each head (B, heads, K, d) `group` times in a row: (B, heads · group, K, d); one head is not copied."""
    return x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads · d) as (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, d) as (B, L, heads · d)."""
    return x.transpose(1, 2).flatten(2)


class MultiheadAttention(nn.Module):
    """Attention with separate inputs for query, key and value, batch first.

    width D, heads (must divide D), dropout on the attention weights while training.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0, site: str = "attention") -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width {width} is not a multiple of heads {heads}: each head takes an equal share"
            )
        self.heads, self.dropout, self.site = heads, dropout, site
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, Q, D), key and value (B, K, D), mask as in `attend`. Returns (B, Q, D)."""
        q, k, v = (split_heads(x, self.heads) for x in self.project(query, key, value))
        out = attend(q, k, v, mask, site=self.site, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(merge_heads(out))

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Each through its share of the stacked projections, shapes unchanged; in one go if all are one."""
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
