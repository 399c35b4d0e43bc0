"""One transformer layer for two: DETR's, which adds positions to queries and keys, never to values, and
GPT-2's.

Source: Carion et al. 2020 (DETR); LeRobot `policies/act/modeling_act.py`, ACTEncoderLayer and
ACTDecoderLayer, whose parameter names are kept. GPT-2 is the layer with `pre_norm`, without positions (they
were added to the tokens once, before the first layer) and without `drop_inside`, under a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minivla import recorder
from minivla.nn.attention import MultiheadAttention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to a memory if `cross`, then a two-layer MLP; each on a residual path.

    width D; `feedforward` the MLP's inner width; norms stand after each sum, or before each branch with
    `pre_norm`; `drop_inside`: dropout between the MLP's two layers too. `site` names the attentions in
    a trace: the site itself, or `site.self` and `site.cross`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feedforward: int,
        *,
        cross: bool = False,
        dropout: float = 0.0,
        activation: str = "relu",
        pre_norm: bool = False,
        drop_inside: bool = True,
        site: str = "layer",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is not known; choose one of {', '.join(ACTIVATIONS)}"
            )
        self.self_attn = MultiheadAttention(
            width, heads, dropout=dropout, site=f"{site}.self" if cross else site
        )
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if cross:
            self.multihead_attn = MultiheadAttention(width, heads, dropout=dropout, site=f"{site}.cross")
            self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.inner_dropout = self.dropout if drop_inside else nn.Identity()
        self.activation, self.pre_norm, self.cross = ACTIVATIONS[activation], pre_norm, cross

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        memory: Tensor | None = None,
        memory_positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, L, D), memory (B, K, D), positions broadcastable to each, or None; `mask` (B, L, L) for
        the self-attention, True = may look. Returns (B, L, D)."""

        def look_at_each_other(x: Tensor) -> Tensor:
            placed = _placed(x, positions)
            return self.self_attn(placed, placed, x, mask)

        def look_at_memory(x: Tensor) -> Tensor:
            assert memory is not None
            return self.multihead_attn(_placed(x, positions), _placed(memory, memory_positions), memory)

        tokens = self.residual(tokens, look_at_each_other, self.norm1)
        if not self.cross:
            return self.residual(tokens, self.mlp, self.norm2)
        tokens = self.residual(tokens, look_at_memory, self.norm2)
        return self.residual(tokens, self.mlp, self.norm3)

    def mlp(self, tokens: Tensor) -> Tensor:
        """Linear, activation, linear, token by token. (B, L, D) in and out."""
        return self.linear2(self.inner_dropout(self.activation(self.linear1(tokens))))

    def residual(self, tokens: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """tokens + branch(tokens), with the norm on the side that `pre_norm` says. (B, L, D) in and out."""
        if self.pre_norm:
            return tokens + self.dropout(branch(norm(tokens)))
        return norm(tokens + self.dropout(branch(tokens)))


class Stack(nn.Module):
    """Transformer layers one after another, and a last norm (or none).

    `name` is what a trace calls it: its attentions are the sites "name.0", "name.1", …, and what leaves it is
    kept as the hidden state "name". The other arguments are those of `TransformerLayer`.
    """

    def __init__(
        self, name: str, layers: int, width: int, heads: int, feedforward: int, *, norm: bool, **options: Any
    ) -> None:
        super().__init__()
        self.stack = name
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, feedforward, site=f"{name}.{i}", **options) for i in range(layers)
        )
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *context: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, L, D), positions (L, D) or None; `context` is the memory and its positions, if the
        layers look at one; `mask` as in `TransformerLayer`. Returns (B, L, D).
        """
        tokens = recorder.enter(self.stack, tokens)
        for layer in self.layers:
            tokens = layer(tokens, positions, *context, mask=mask)
        tokens = self.norm(tokens)
        recorder.keep(self.stack, tokens)
        return tokens


def _placed(tokens: Tensor, positions: Tensor | None) -> Tensor:
    return tokens if positions is None else tokens + positions
