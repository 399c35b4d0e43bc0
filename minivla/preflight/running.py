"""Running somebody's policy so that two runs can be compared: same random draws, no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minivla.data.features import ACTION

SEED = 0


def observed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what only training has."""
    return {key: value for key, value in batch.items() if not key.startswith(ACTION)}


def moment(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What `select_action` is given: of a history (B, T, …) the newest observation."""
    newest = config.observation_delta_indices is not None
    return {
        key: value[:, -1] if newest and key in config.input_features else value
        for key, value in observed(batch).items()
    }


@torch.no_grad()
def chunk(policy: Any, batch: Mapping[str, Any]) -> Tensor:
    """The chunk (B, H, A) a policy predicts, with the same random draws each time."""
    policy.eval()
    torch.manual_seed(SEED)
    found: Tensor = policy.predict_action_chunk(observed(batch))
    return found.float()


@torch.no_grad()
def action(policy: Any, batch: Mapping[str, Any]) -> Tensor:
    """The next action (B, A), with the same random draws each time."""
    torch.manual_seed(SEED)
    found: Tensor = policy.select_action(observed(batch))
    return found.float()


@torch.no_grad()
def loss(policy: Any, batch: Mapping[str, Any], *, training: bool) -> float:
    """The loss of a batch in one mode or the other, with the same random draws each time."""
    policy.train(training)
    torch.manual_seed(SEED)
    value, _ = policy(dict(batch))
    return float(value)


def spread(chunks: Tensor) -> float:
    """How much chunks (N, H, A) vary over samples and steps, root mean square over dimensions."""
    return float(chunks.flatten(0, 1).std(0).square().mean().sqrt())
