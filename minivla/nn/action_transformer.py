"""A transformer over the chunk: each action of it a token, told by cross-attention what was seen and how
noisy the chunk still is.

Source: Chi et al. 2023, section 3.1 ("time-series diffusion transformer");
github.com/real-stanford/diffusion_policy, `model/diffusion/transformer_for_diffusion.py`. As there, actions
look back only, and what they look at passes through a small MLP of its own; unlike there, every action sees
the whole history. LeRobot has none.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from minivla import recorder
from minivla.nn.masks import segment_mask
from minivla.nn.positions import sine_timesteps
from minivla.nn.transformer import Stack
from minivla.segments import Segment, arrange


class ActionTransformer(nn.Module):
    """Predicts, for a noisy chunk and its timestep, what `minivla.actions.diffusion` wants predicted.

    actions A; condition C, the width of one observation's vector; horizon H, history T; width D, heads,
    layers, dropout: the transformer's. In a trace: "time" and "observations", which look at nothing, and
    "denoiser", the chunk's tokens.
    """

    def __init__(
        self,
        actions: int,
        condition: int,
        *,
        horizon: int,
        history: int,
        width: int = 256,
        heads: int = 4,
        layers: int = 8,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.width = width
        self.embed_action, self.embed_seen = nn.Linear(actions, width), nn.Linear(condition, width)
        self.action_positions = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.memory_positions = nn.Parameter(0.02 * torch.randn(1 + history, width))
        self.memory = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.stack = Stack(
            "denoiser", layers, width, heads, 4 * width, norm=True, cross=True, pre_norm=True,
            activation="gelu", dropout=dropout,
        )  # fmt: skip
        self.head = nn.Linear(width, actions)

    def remember(self, name: str, tokens: Tensor) -> Tensor:
        """Tokens of the memory, each by itself. (B, L, D) in and out."""
        tokens = self.memory(recorder.enter(name, tokens))
        recorder.keep(name, tokens)
        return tokens

    def observe(self, seen: Tensor) -> Tensor:
        """The observations as tokens, computed once a chunk. seen (B, T, C). Returns (B, T, D)."""
        if (call := recorder.current()) is not None:
            self.describe(call)
        return self.remember("observations", self.embed_seen(seen) + self.memory_positions[1:])

    def forward(self, x: Tensor, timestep: Tensor, observed: Tensor) -> Tensor:
        """x (B, H, A); timestep (B,) or (1,); observed (B, T, D) from `observe`. Returns (B, H, A)."""
        code = sine_timesteps(timestep, self.width).to(x.dtype) + self.memory_positions[0]
        time = self.remember("time", rearrange(code, "b d -> b 1 d"))
        memory = torch.cat((time.expand(len(x), -1, -1), observed), dim=1)
        horizon = x.shape[1]
        back = torch.ones(1, horizon, horizon, dtype=torch.bool, device=x.device).tril()
        tokens = self.embed_action(x) + self.action_positions
        out: Tensor = self.head(self.stack(tokens, None, memory, None, mask=back))
        return out

    def describe(self, call: recorder.Call) -> None:
        """Tell a trace what the tokens are: the memory's, each seeing itself alone, and the chunk's."""
        (horizon, _), (known, _) = self.action_positions.shape, self.memory_positions.shape
        memory = arrange([Segment("time", "time", 1), Segment("observations", "state", known - 1)])
        chunk = Segment("chunk", "action", horizon, block=1, rule="causal")
        call.lay_out("denoiser.*.self", arrange([chunk]), arrange([chunk]))
        call.lay_out("denoiser.*.cross", arrange([chunk]), memory)
        mask = segment_mask(main := arrange([*memory, chunk]))[0]
        mask[:known, :known] = torch.eye(known, dtype=torch.bool)
        call.describe(main, mask, stacks=("time", "observations", "denoiser"))
