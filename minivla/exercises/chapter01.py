"""Self-checks of chapter 1: padding counted, a loss that leaves it out, statistics of two datasets merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minivla.actions.regression import masked_l1
from minivla.data.windows import window_indices
from minivla.exercises.verdict import verdict

Table = Mapping[str, Any]


def check_padding(count_padding: Callable[[Sequence[int], int], int]) -> None:
    """Print whether `count_padding(lengths, horizon)` counts the padded actions of all windows.

    lengths: frames in each episode, which may be fewer than the horizon. One window starts at each frame.
    The truth is counted from `minivla.data.window_indices`, for one episode first, then for several.
    """

    def complaint() -> str | None:
        for lengths, horizon in (([20], 1), ([20], 8), ([20, 31], 8), ([8, 3], 8), ([1], 5)):
            given, wanted = count_padding(lengths, horizon), _padding(lengths, horizon)
            if given != wanted:
                return (
                    f"episodes of {lengths} frames at horizon {horizon} have {wanted} padded actions, "
                    f"and you count {given}"
                )
        return None

    verdict(complaint)


def check_loss(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Print whether `loss(predicted, action, is_pad)` is the mean absolute error over the real actions.

    predicted, action (B, H, A); is_pad (B, H) bool, True where an action is padding. The truth is
    `minivla.actions.regression.masked_l1`.
    """

    def complaint() -> str | None:
        draw = torch.Generator().manual_seed(0)
        predicted, action = torch.randn(2, 3, 6, 2, generator=draw)
        cut = torch.arange(6) >= torch.tensor([[6], [4], [1]])
        cases = {"without padding": torch.zeros_like(cut), "with 7 of 18 actions padded": cut}
        for where, is_pad in cases.items():
            given, wanted = loss(predicted, action, is_pad), masked_l1(predicted, action, is_pad)
            if not torch.is_tensor(given) or given.shape != ():
                return f"{where} you return {_shown(given)}; expected one number, a tensor of shape ()"
            if not torch.allclose(given, wanted):
                return f"{where} the loss is {wanted:.3f}, and yours is {given:.3f}"
        poisoned = torch.where(cut[..., None], 1e6, action)
        if not torch.allclose(loss(predicted, poisoned, cut), masked_l1(predicted, action, cut)):
            return "your loss changes when only the padded targets change"
        return None

    verdict(complaint)


def check_merge(merge: Callable[[Table, Table], Table]) -> None:
    """Print whether `merge(one, other)` gives the statistics of two stretches of data together.

    one, other: {"count": frames, "mean": (S,), "std": (S,)}, std that of the population; the same is expected
    back. The truth is computed from the data laid end to end.
    """

    def complaint() -> str | None:
        draw = torch.Generator().manual_seed(0)
        short, long = torch.randn(40, 2, generator=draw), torch.randn(120, 2, generator=draw)
        pairs = {
            "two equal means": (short - short.mean(0), long - long.mean(0)),
            "two different means": (short + 3, long),
        }
        for where, (a, b) in pairs.items():
            given, wanted = merge(_stats(a), _stats(b)), _stats(torch.cat((a, b)))
            for name, value in wanted.items():
                if name not in given:
                    return f"the result has {', '.join(given) or 'nothing'}; '{name}' is missing"
                if not torch.allclose(torch.as_tensor(given[name], dtype=value.dtype), value, atol=1e-4):
                    return (
                        f"of data with {where}, 40 frames and 120, {name} is {_shown(value)}, "
                        f"and yours {_shown(given[name])}"
                    )
        return None

    verdict(complaint)


def _padding(lengths: Sequence[int], horizon: int) -> int:
    windows = [window_indices(torch.arange(n), 0, n, range(horizon))[1] for n in lengths]
    return sum(int(is_pad.sum()) for is_pad in windows)


def _stats(rows: Tensor) -> dict[str, Tensor]:
    return {"count": torch.tensor(float(len(rows))), "mean": rows.mean(0), "std": rows.std(0, correction=0)}


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.numel() > 4:
        return f"a tensor of shape {tuple(value.shape)}"
    return str([round(float(number), 2) for number in value.flatten()])
