"""GPT-2's arrangement of the transformer, for sequences of vectors: positions once, norms first.

Source: Radford et al. 2019; LeRobot 0.6 `policies/vqbet/vqbet_utils.py`, GPT, from karpathy's nanoGPT.
"""

from __future__ import annotations

from torch import Tensor, nn

from minivla.nn.transformer import Stack


class GPT(nn.Module):
    """Vectors of width `inputs` in, of width `outputs` out, token by token; in between, width D.

    name: what a trace calls its stack of layers; positions: the longest sequence; heads must divide D.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        width: int,
        outputs: int,
        *,
        layers: int,
        heads: int,
        positions: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Linear(inputs, width), nn.Embedding(positions, width)
        self.dropout = nn.Dropout(dropout)
        options = {"dropout": dropout, "activation": "gelu", "pre_norm": True, "drop_inside": False}
        self.stack = Stack(name, layers, width, heads, 4 * width, norm=True, **options)
        self.lm_head = nn.Linear(width, outputs, bias=False)
        for key, parameter in self.named_parameters():
            if parameter.dim() > 1:  # what ends an attention's residual branch is smaller the more there are
                share = 2 * layers if key.endswith("out_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / share**0.5)
            elif key.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, L, inputs), mask (1, L, L), True = may look. Returns (B, L, outputs)."""
        placed = self.dropout(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]])
        out: Tensor = self.lm_head(self.stack(placed, mask=mask))
        return out

    @property
    def undecayed(self) -> list[nn.Parameter]:
        """What weight decay is to leave alone: biases, norms and positions."""
        return [p for p in self.parameters() if p.dim() == 1 or p is self.wpe.weight]
