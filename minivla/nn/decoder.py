"""One decoder for Gemma, Llama, SmolLM2 and Qwen3, with one stream of tokens or several.

A language model is a stack of layers: attention with rotary positions (fewer key heads than query heads),
then a gated MLP, an RMSNorm before each. What tells the families apart are a few fields of `DecoderConfig`.

Several *streams* ("experts") may share one attention: each kind of token has norms, projections and MLP of
its own, and only queries, keys and values meet. A single language model is the one-stream case, π0 the
two-stream case: what it sees and reads in the first, what it does in the second.

    stream 0   norm  q k v ─┐                 ┌─ o  + norm  mlp  +
                            ├─ one attention ─┤
    stream 1   norm  q k v ─┘                 └─ o  + norm  mlp  +

Keys and values of tokens that no later token changes can be kept (`Cache`), and later tokens look at them.
Sources: Vaswani et al. 2017; Shazeer 2019 (multi-query attention) and 2020 (GLU); Zhang and Sennrich 2019
(RMSNorm); Su et al. 2021 (RoPE); Gemma team 2024. transformers `models/gemma/modeling_gemma.py`, openpi
`models/gemma.py`, LeRobot `policies/pi_gemma.py`. The adaptive norm is DiT's (Peebles and Xie 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minivla import recorder
from minivla.nn.attention import attend, merge_heads, split_heads

ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
SHARED = ("layers", "heads", "kv_heads", "head_dim", "rope_base", "rope_rounds")  # by all streams
Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, (B, 1, L, head_dim) each


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of one stream; the last fields are what tells families apart, at Gemma's settings.

    width D, layers, mlp       the residual stream, the depth, the MLP's inner width
    heads, kv_heads, head_dim  query heads, the key/value heads they share, the width of each
    condition                  width of the vector that steers adaptive norms; 0 for plain norms
    norm_offset                what is added to a norm's stored scale: 1 in Gemma, 0 elsewhere
    activation                 "gelu_tanh" or "silu"
    rope_base, eps             longest wavelength of the rotary positions; the norms' epsilon
    rope_rounds                reckon the rotary frequencies in the type of the matrices, as LeRobot's π0 does
    qk_norm, qkv_bias          a norm on each head's query and key (Qwen3); biases on q, k, v (Qwen2)
    """

    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    condition: int = 0
    norm_offset: float = 1.0
    activation: str = "gelu_tanh"
    rope_base: float = 10_000.0
    rope_rounds: bool = False
    eps: float = 1e-6
    qk_norm: bool = False
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that do not go together."""
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads} and kv_heads {self.kv_heads}; expected kv_heads to divide heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number: channels turn in pairs")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), scaled; computed in float32, given back in the type of x.

    With a `condition` the scale is no parameter but follows from a vector, one for each sample, together with
    a shift and a gate for the branch behind the norm (adaRMS): x̂ · (1 + scale) + shift.
    """

    def __init__(self, width: int, *, eps: float = 1e-6, offset: float = 1.0, condition: int = 0) -> None:
        super().__init__()
        self.eps, self.offset, self.condition, self.name = eps, offset, condition, "norm"
        if condition:
            self.dense = nn.Linear(condition, 3 * width)
            nn.init.zeros_(self.dense.weight)  # upstream in JAX zeroes the bias too; its ports do not
        else:
            self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, L, D), condition (B, C). Returns (x normed, gate (B, 1, D) or None)."""
        if not self.condition:
            scale = self.weight.float() + self.offset
            return F.rms_norm(x.float(), x.shape[-1:], scale, self.eps).to(x.dtype), None
        if condition is None:
            raise ValueError("an adaptive norm needs its condition (B, C), and none was given")
        told = self.dense(condition.to(self.dense.weight.dtype)).unsqueeze(1)  # the same for all tokens
        scale, shift, gate = told.chunk(3, dim=-1)
        if recorder.current() is not None:
            for part, value in (("scale", scale), ("shift", shift), ("gate", gate)):
                recorder.keep_step(f"{self.name}.{part}", value.squeeze(1))
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return torch.addcmul(shift.float(), normed, 1 + scale.float()).to(x.dtype), gate.to(x.dtype)


def rotation(
    positions: Tensor, head_dim: int, base: float, dtype: torch.dtype, *, rounds: bool = False
) -> Rotation:
    """How far to turn the queries and keys at each position, as `rotate` takes it.

    positions (B, L) int. Angle of channel pair i: position / base^(2i / head_dim), in float32, then cast.
    With `rounds` the frequencies are cast first: in bfloat16, of eight bits, a far token's angle is then off
    by a radian. LeRobot's π0 does so by a slip (`self.to(bfloat16)` casts the table of frequencies too), and
    policies that it trained in bfloat16 have learnt with it.
    """
    wavelength = base ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    frequency = 1.0 / wavelength
    frequency = frequency.to(dtype).float() if rounds else frequency
    angle = positions.float()[:, None, :, None] * frequency
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Rotary positions: channel i and channel i + head_dim / 2 are a pair that turns. x (B, heads, L, d)."""
    cosine, sine = turn
    return x * cosine + x.roll(x.shape[-1] // 2, dims=-1) * sine


def valid_positions(valid: Tensor, start: Tensor | int = 0) -> Tensor:
    """Positions (B, L) that count only real tokens. valid (B, L) bool; start (B, 1): tokens before."""
    return start + valid.long().cumsum(dim=1) - 1


@dataclass
class Cache:
    """Keys and values of every layer, (B, kv_heads, K, head_dim) each; keys are rotated already."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.keys[0].shape[-2] if self.keys else 0

    def extend(self, layer: int, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values behind its first `start`, and return all."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer], self.values[layer] = self.before(layer, key, value, start)
        return self.keys[layer], self.values[layer]

    def before(self, layer: int, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The layer's first `start` keys and values with these behind them; nothing is kept.

        Activation checkpointing runs a layer twice: what the first run put behind `start` is left out.
        """
        keys, values = self.keys[layer][..., :start, :], self.values[layer][..., :start, :]
        return torch.cat((keys, key), dim=-2), torch.cat((values, value), dim=-2)


@dataclass(frozen=True)
class Joint:
    """What all layers of one forward pass share: the mask (B, Q, K), the angles of the positions and the
    conditions by stream, the cache and whether new keys stay in it, and how many were there at the start.
    """

    mask: Tensor
    turns: dict[str, Rotation]
    conditions: dict[str, Tensor]
    cache: Cache | None
    keep: bool
    start: int

    def with_past(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values, behind those of the cache."""
        if self.cache is None:
            return key, value
        return (self.cache.extend if self.keep else self.cache.before)(layer, key, value, self.start)


class DecoderLayer(nn.Module):
    """The weights of one stream in one layer; `Decoder` lets the streams meet."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c, queries, keys = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.config, self.activation = config, ACTIVATIONS[config.activation]
        norm: dict[str, Any] = {"eps": c.eps, "offset": c.norm_offset}
        self.input_norm = RMSNorm(c.width, condition=c.condition, **norm)
        self.post_norm = RMSNorm(c.width, condition=c.condition, **norm)
        self.q_proj = nn.Linear(c.width, queries, bias=c.qkv_bias)
        self.k_proj, self.v_proj = (nn.Linear(c.width, keys, bias=c.qkv_bias) for _ in range(2))
        self.o_proj = nn.Linear(queries, c.width, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(c.width, c.mlp, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.mlp, c.width, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, **norm) for _ in range(2))

    def query(self, x: Tensor, turn: Rotation) -> Tensor:
        """Queries of normed tokens (B, L, D), turned by position: (B, heads, L, head_dim)."""
        query = split_heads(self.q_proj(x), self.config.heads)
        return rotate(self.q_norm(query)[0] if self.config.qk_norm else query, turn)

    def key_value(self, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """Keys, turned by position, and values of normed tokens: (B, kv_heads, L, head_dim) each."""
        key, value = (split_heads(project(x), self.config.kv_heads) for project in (self.k_proj, self.v_proj))
        return rotate(self.k_norm(key)[0] if self.config.qk_norm else key, turn), value

    def finish(self, tokens: Tensor, seen: Tensor, gate: Tensor | None, condition: Tensor | None) -> Tensor:
        """What attention brought, seen (B, heads, L, head_dim), onto the residual stream; then the MLP."""
        tokens = _gated(tokens, self.o_proj(merge_heads(seen)), gate)
        x, gate = self.post_norm(tokens, condition)
        return _gated(tokens, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)), gate)


def _gated(tokens: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return tokens + branch if gate is None else torch.addcmul(tokens, branch, gate)


class Stream(nn.Module):
    """One stream's layers and its last norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(
            config.width, eps=config.eps, offset=config.norm_offset, condition=config.condition
        )

    def layer(self, i: int) -> DecoderLayer:
        """Layer i."""
        found = self.layers[i]
        assert isinstance(found, DecoderLayer)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """What its matrices compute in (norms may be kept in float32)."""
        return self.layer(0).q_proj.weight.dtype


class Decoder(nn.Module):
    """Streams by name, e.g. {"prefix": DecoderConfig(…), "suffix": DecoderConfig(…)}, in sequence order.

    `checkpointing` recomputes each layer in the backward pass to save memory. A trace finds the attention of
    layer i at "joint.i", every stream's hidden state after it at "name.i", and after the last norm at "name";
    what steers adaptive norms at "name.i.input_norm.scale" (shift, gate), and each run as a `recorder.Pass`.
    Raises ValueError when the streams' attentions do not fit together.
    """

    def __init__(self, streams: dict[str, DecoderConfig]) -> None:
        super().__init__()
        _expect_to_fit(streams)
        self.config = next(iter(streams.values()))
        self.streams = nn.ModuleDict({name: Stream(config) for name, config in streams.items()})
        self.checkpointing = False
        for place, norm in self.streams.named_modules():
            if isinstance(norm, RMSNorm):
                norm.name = place.replace(".layers.", ".")

    @property
    def sites(self) -> list[str]:
        """Where a trace finds its attention."""
        return [f"joint.{i}" for i in range(self.config.layers)]

    def forward(
        self,
        tokens: dict[str, Tensor],
        mask: Tensor,
        positions: Tensor,
        *,
        conditions: dict[str, Tensor] | None = None,
        cache: Cache | None = None,
        keep: bool = True,
        outcome: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Streams that are there, tokens (B, L, D) by name in sequence order, through all layers.

        mask (B, Q, K) bool, True = may look: Q all tokens given, K those in the cache before them.
        positions (B, Q) int; conditions (B, C) for streams with adaptive norms; `keep` adds the new keys and
        values to the cache, without it they are forgotten. `outcome`: the streams whose outcome is wanted, in
        any order; in the last layer the others only lend their keys and values. Returns them after the last
        norm, in the order of `tokens`. Raises ValueError for an outcome that is not among these.
        """
        wanted = _wanted(tokens, outcome)
        tokens = {n: recorder.enter(n, x.to(self.stream(n).dtype)) for n, x in tokens.items()}
        dtype = next(iter(tokens.values())).dtype
        c = self.config
        turn = rotation(positions, c.head_dim, c.rope_base, dtype, rounds=c.rope_rounds)
        turns = dict(zip(tokens, _split(turn, tokens), strict=True))
        joint = Joint(mask, turns, conditions or {}, cache, keep, 0 if cache is None else len(cache))
        recorder.passed(self.told(tokens, joint))
        for i in range(self.config.layers):
            asking = wanted if i + 1 == self.config.layers else tuple(tokens)
            if self.checkpointing and self.training:
                tokens = checkpoint(self.layer, i, tokens, joint, asking, use_reentrant=False)
            else:
                tokens = self.layer(i, tokens, joint, asking)
        done = {n: self.stream(n).norm(x, joint.conditions.get(n))[0] for n, x in tokens.items()}
        for name, x in done.items():
            recorder.keep(name, x)
        return done

    def told(self, tokens: dict[str, Tensor], joint: Joint) -> recorder.Pass:
        """What one run computes, reads from the cache and writes there, for a trace."""
        c, computed = self.config, sum(x.shape[1] for x in tokens.values())
        written = computed if joint.cache is not None and joint.keep else 0
        size = next(iter(tokens.values())).element_size()
        token = 2 * c.layers * c.kv_heads * c.head_dim * size
        return recorder.Pass(tuple(tokens), computed, joint.start, written, token)

    def stream(self, name: str) -> Stream:
        """One stream by name."""
        found = self.streams[name]
        assert isinstance(found, Stream)
        return found

    def layer(
        self, i: int, tokens: dict[str, Tensor], joint: Joint, asking: Sequence[str]
    ) -> dict[str, Tensor]:
        """Layer i: every stream projects, all look at all they may, every stream goes on by itself.

        Only the streams `asking`, in sequence order, have queries, and come out. tokens (B, L, D) by name, in
        and out.
        """
        layers = {name: self.stream(name).layer(i) for name in tokens}
        normed = {n: layer.input_norm(tokens[n], joint.conditions.get(n)) for n, layer in layers.items()}
        shared = [layer.key_value(normed[n][0], joint.turns[n]) for n, layer in layers.items()]
        key, value = (_in_a_row(parts) for parts in zip(*shared, strict=True))
        key, value = joint.with_past(i, key, value)
        if not asking:
            return {}
        query = _in_a_row([layers[n].query(normed[n][0], joint.turns[n]) for n in asking])
        seen = attend(
            query, key, value, _rows(joint.mask, tokens, asking), site=f"joint.{i}", start=joint.start
        )
        shares = [seen] if len(asking) == 1 else seen.split([tokens[n].shape[1] for n in asking], dim=-2)
        out = {
            n: layers[n].finish(tokens[n], share, normed[n][1], joint.conditions.get(n))
            for n, share in zip(asking, shares, strict=True)
        }
        for name, x in out.items():
            recorder.keep(f"{name}.{i}", x)
        return out


def _expect_to_fit(streams: dict[str, DecoderConfig]) -> None:
    """Raises ValueError unless there are streams, and all have the same attention."""
    if len({tuple(getattr(c, part) for part in SHARED) for c in streams.values()}) == 1:
        return
    told = [
        f"{name}: " + ", ".join(f"{part}={getattr(c, part)}" for part in SHARED)
        for name, c in streams.items()
    ]
    raise ValueError(
        f"streams share one attention: {', '.join(SHARED)} must agree; got {'; '.join(told) or 'no stream'}"
    )


def _wanted(tokens: dict[str, Tensor], outcome: Sequence[str] | None) -> tuple[str, ...]:
    """The streams that `outcome` asks for, in the mask's order; all for None, and while a trace is on."""
    if unknown := [name for name in outcome or () if name not in tokens]:
        raise ValueError(
            f"outcome names {', '.join(map(repr, unknown))}, expected some of {', '.join(map(repr, tokens))}"
        )
    if outcome is None or recorder.current() is not None:
        return tuple(tokens)
    return tuple(name for name in tokens if name in outcome)


def _in_a_row(parts: Sequence[Tensor]) -> Tensor:
    """The streams' heads (B, heads, L, head_dim) as one sequence; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=-2)


def _split(turn: Rotation, tokens: dict[str, Tensor]) -> list[Rotation]:
    """Each stream's share of the angles."""
    lengths = [x.shape[1] for x in tokens.values()]
    return list(zip(*(table.split(lengths, dim=-2) for table in turn), strict=True))


def _rows(mask: Tensor, tokens: dict[str, Tensor], asking: Sequence[str]) -> Tensor:
    """The rows of the mask (B, Q, K) that belong to the streams that ask."""
    if len(asking) == len(tokens):
        return mask
    rows = mask.split([x.shape[1] for x in tokens.values()], dim=1)
    return torch.cat([part for part, name in zip(rows, tokens, strict=True) if name in asking], dim=1)
