"""Running somebody's policy so that two runs can be compared: same random draws, no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minivla.data.features import ACTION, OBS_IMAGES
from minivla.policies.base import Policy

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
def chunk(policy: Any, batch: Mapping[str, Any], seed: int = SEED) -> Tensor:
    """The chunk (B, H, A) a policy predicts, with the random draws of this seed."""
    policy.eval()
    seen = observed(batch)
    if not isinstance(policy, Policy) and policy.config.observation_delta_indices is not None:
        seen = _queued(policy, seen)
    torch.manual_seed(seed)
    found: Tensor = policy.predict_action_chunk(seen)
    return found.float()


def _queued(policy: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's policies take a history from their queues and not from the batch: put it there. Returns the
    batch, with the cameras as one, (B, T, camera, 3, H, W), as `select_action` makes it.
    """
    policy.reset()
    cameras = [batch[key] for key in policy.config.image_features]
    seen = {**batch, OBS_IMAGES: torch.stack(cameras, dim=2)} if cameras else dict(batch)
    for key in policy._queues.keys() & seen.keys():
        policy._queues[key].extend(seen[key].unbind(1))
    return {key: seen[key] for key in policy._queues if key in seen}


@torch.no_grad()
def action(policy: Any, batch: Mapping[str, Any]) -> Tensor:
    """The next action (B, A), with the same random draws each time."""
    torch.manual_seed(SEED)
    found: Tensor = policy.select_action(observed(batch))
    return found.float()


@torch.no_grad()
def loss(policy: Any, batch: Mapping[str, Any], *, training: bool, **drawn: Tensor) -> float:
    """The loss of a batch in one mode or the other, with the same random draws each time, unless given."""
    policy.train(training)
    torch.manual_seed(SEED)
    value, _ = policy(dict(batch), **drawn)
    return float(value)


def spread(chunks: Tensor) -> float:
    """How much chunks (N, H, A) vary over samples and steps, root mean square over dimensions."""
    return float(chunks.flatten(0, 1).std(0).square().mean().sqrt())
