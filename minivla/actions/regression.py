"""Regression: predict the chunk itself. The loss, the variational term, and the overlap of chunks in time."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor


def masked_l1(predicted: Tensor, action: Tensor, is_pad: Tensor) -> Tensor:
    """Mean absolute error over the real actions.

    predicted, action (B, H, A); is_pad (B, H) bool, True beyond the end of the episode. Returns a scalar.
    Source: LeRobot `policies/act/modeling_act.py`, forward: the mean is over the whole batch's real entries,
    so that an episode's last frames weigh as much as others, entry by entry.
    """
    valid = rearrange(~is_pad, "batch step -> batch step 1")
    error = (predicted - action).abs() * valid
    return error.sum() / (valid.sum() * action.shape[-1]).clamp(min=1)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)), summed over the latent, averaged over the batch.

    mean, log_variance (B, Z). Returns a scalar. Source: Kingma & Welling 2014, appendix B.
    """
    per_dimension = -0.5 * (1 + log_variance - mean**2 - log_variance.exp())
    return reduce(per_dimension, "batch latent -> batch", "sum").mean()


class TemporalEnsembler:
    """Every step predicts a chunk; what is executed is the weighted mean of all predictions made for this
    moment.

    Prediction i of n for one moment (i = 0 the oldest) has weight exp(-coefficient · i): positive trusts old
    predictions, negative new ones, 0 all alike. Source: Zhao et al. 2023 (ACT), algorithm 2; LeRobot
    `policies/act/modeling_act.py`, ACTTemporalEnsembler. As there, the mean is kept online: one running mean
    and one count a future moment.
    """

    def __init__(self, coefficient: float, horizon: int) -> None:
        self.weight = torch.exp(-coefficient * torch.arange(horizon))
        self.total = self.weight.cumsum(0)
        self.reset()

    def reset(self) -> None:
        """Forget the episode."""
        self.mean: Tensor | None = None
        self.count = torch.zeros(0, dtype=torch.long)

    def update(self, chunk: Tensor) -> Tensor:
        """Take in this step's chunk (B, H, A); return the action to execute now (B, A)."""
        weight, total = self.weight.to(chunk), self.total.to(chunk)
        if self.mean is None:
            self.mean, self.count = (
                chunk.clone(),
                torch.ones(chunk.shape[1], 1, dtype=torch.long, device=chunk.device),
            )
        else:
            n = self.count
            old = (self.mean * total[n - 1] + chunk[:, :-1] * weight[n]) / total[n]
            self.mean = torch.cat((old, chunk[:, -1:]), dim=1)
            self.count = torch.cat((n + 1, torch.ones_like(n[-1:])))
        action, self.mean, self.count = self.mean[:, 0], self.mean[:, 1:], self.count[1:]
        return action
