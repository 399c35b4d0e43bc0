"""Parity with upstream: redraw weights, compare block by block, keep the ledger.

A comparison is a list of `Row`s, in the order in which the blocks are passed through; the first red row names
the block where we part from upstream. `make ledger` (MINIVLA_LEDGER=1) writes the rows to
`book/ledger/<family>.json`, which the book shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEDGER = Path(__file__).parent.parent / "book" / "ledger"


@dataclass(frozen=True)
class Row:
    """One line of the ledger."""

    family: str
    upstream: str
    version: str
    case: str
    block: str
    error: float
    tolerance: float
    dtype: str

    @property
    def ok(self) -> bool:
        """Green? A NaN is red."""
        return self.error <= self.tolerance


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max|ours − theirs| / max|theirs|. Shapes must agree."""
    assert ours.shape == theirs.shape, (
        f"shapes differ: ours {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    )
    theirs = theirs.double()
    return ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()


def compare(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, tolerance: float = 1e-5, **where: str
) -> list[Row]:
    """Rows for every block that upstream gave, in upstream's order; `where` fills family, upstream, version,
    case.
    """
    return [
        Row(
            **where,
            block=block,
            error=relative_error(ours[block], value),
            tolerance=tolerance,
            dtype="float32",
        )
        for block, value in theirs.items()
    ]


def first_red(rows: list[Row]) -> str | None:
    """The block where we part from upstream, None when all is green."""
    return next((row.block for row in rows if not row.ok), None)


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and floating-point buffer that is saved anew, large enough that no block is close
    to the identity.

    Matrices keep the scale of their fan-in and batch norms shrink, so that activations neither vanish nor
    explode through a deep residual network (else attention saturates, and rounding alone grows past any
    tolerance); variances stay positive.
    """
    generator = torch.Generator().manual_seed(seed)
    saved = module.state_dict().keys()
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
        drawn = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
        if name not in saved:
            continue
        if name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        elif ".bn" in name or "downsample.1" in name:
            drawn = 0.4 * drawn + (0.5 if name.endswith("weight") else 0.0)
        elif "norm" in name:
            drawn = drawn + (1.0 if name.endswith("weight") else 0.0)
        tensor.data.copy_(drawn)


def write_ledger(family: str, rows: list[Row]) -> None:
    """Keep the rows of a family, when asked to."""
    if os.environ.get("MINIVLA_LEDGER"):
        LEDGER.mkdir(parents=True, exist_ok=True)
        table = [asdict(row) | {"error": float(f"{row.error:.1e}"), "ok": row.ok} for row in rows]
        (LEDGER / f"{family}.json").write_text(json.dumps(table, indent=1) + "\n")


def their_features(*tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of our features, as LeRobot's."""
    from lerobot.configs import FeatureType, PolicyFeature

    return [
        {key: PolicyFeature(FeatureType(feature.type.value), feature.shape) for key, feature in table.items()}
        for table in tables
    ]
