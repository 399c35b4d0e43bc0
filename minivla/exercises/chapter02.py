"""Self-checks of chapter 2, ACT: the queue, the newest prediction's say, a latent's active dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minivla.exercises.verdict import verdict


def check_queued(queued: Callable[[Tensor, int], Tensor]) -> None:
    """Check `queued(chunks, n)`: chunks (T, H, A), one a step, to the actions (T, A) carried out."""

    def complaint() -> str | None:
        step, place = torch.meshgrid(torch.arange(20.0), torch.arange(6.0), indexing="ij")
        chunks = torch.stack(
            (step, place), dim=-1
        )  # (T, H, A): each action says which chunk and which place it is
        for n in (1, 4, 6):
            actions = queued(chunks, n)
            if tuple(actions.shape) != (20, 2):
                return f"for chunks (20, 6, 2) it returns shape {tuple(actions.shape)}; expected (20, 2)"
            for t in range(20):
                wanted = (t - t % n, t % n)
                if actions[t].tolist() != [float(value) for value in wanted]:
                    made, which = (int(value) for value in actions[t].tolist())
                    return (
                        f"with n = {n}, step {t} carries out action {which} of the chunk of step {made}; "
                        f"expected action {wanted[1]} of the chunk of step {wanted[0]}"
                    )
        return None

    verdict(complaint)


def check_newest_share(newest_share: Callable[[float, int], float]) -> None:
    """Check `newest_share(m, count)`: the newest of `count` predictions' share, weights being exp(-m i)."""

    def complaint() -> str | None:
        for m, count in ((0.0, 4), (0.01, 16), (-0.1, 16), (-3.0, 16), (0.5, 3), (2.0, 1)):
            given = float(newest_share(m, count))
            wanted = math.exp(-m * (count - 1)) / sum(math.exp(-m * i) for i in range(count))
            if not math.isclose(given, wanted, rel_tol=1e-4, abs_tol=1e-7):
                return (
                    f"for m = {m:g} and {count} predictions it returns {given:.4g}, expected {wanted:.4g}: "
                    "i = 0 is the oldest, and the shares of all predictions add up to 1"
                )
        return None

    verdict(complaint)


def check_active(active: Callable[..., int]) -> None:
    """Check `active(mean, log_variance, nats)`: how many dimensions cost more than `nats` on average."""

    def complaint() -> str | None:
        # Dimension 0 talks in every sample, 1 in one of four and loudly, 2 by its variance alone, 3 never.
        mean = torch.tensor(
            [[1.0, 4.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]
        )
        log_variance = torch.tensor([0.0, 0.0, -1.0, 0.0]).expand(4, 4)
        for nats, wanted, why in (
            (
                0.05,
                3,
                "dimension 0 by its mean, 1 in one sample of four, 2 by its variance; dimension 3 never",
            ),
            (0.4, 2, "dimension 2 costs 0.18 nats and falls below the threshold"),
            (
                1.0,
                1,
                "dimension 1 costs 8 nats in one sample of four, so 2 on average; dimension 0 costs 0.5",
            ),
        ):
            given = int(active(mean, log_variance, nats))
            if given != wanted:
                return f"with nats = {nats:g} it counts {given}, expected {wanted}: {why}"
        silent = torch.zeros(4, 4)
        if (given := int(active(silent, silent))) != 0:
            return f"of a latent that equals the prior it counts {given}, expected 0"
        return None

    verdict(complaint)
