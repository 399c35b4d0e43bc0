"""Self-checks of chapter 9, π0.5: reading a prompt backwards, a norm that begins as a plain one, better steps
along the flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minivla.actions import flow
from minivla.exercises.verdict import verdict
from minivla.nn.decoder import RMSNorm
from minivla.policies.vla import STATE_BINS, StatePrompt, state_bins

Field = Callable[[Tensor, Tensor], Tensor]


def check_read_state(read_state: Callable[[str, Tensor, Tensor], Tensor]) -> None:
    """Check `read_state(prompt, q01, q99)`: the state (S,) in robot units that a prompt of π0.5 speaks of,
    each number at the middle of its bin.
    """

    def complaint() -> str | None:
        q01, q99 = torch.tensor([0.0, -2.0, 10.0]), torch.tensor([1.0, 2.0, 20.0])
        for task in ("push the block", "stack 2 cups, State: 3 of 4"):
            state = torch.tensor([0.3, 1.5, 12.0])
            scaled = 2 * (state - q01) / (q99 - q01) - 1
            prompt = StatePrompt()({"task": [task], "observation.state": scaled[None]})["task"][0]
            given = torch.as_tensor(read_state(prompt, q01, q99)).float()
            if given.shape != state.shape:
                return f"for {prompt!r} it returns shape {tuple(given.shape)}, expected (3,)"
            if wrong := _off_a_bin(given, scaled, q01, q99, prompt):
                return wrong
        return None

    verdict(complaint)


def _off_a_bin(given: Tensor, scaled: Tensor, q01: Tensor, q99: Tensor, prompt: str) -> str | None:
    """What is wrong with a state read from a prompt: it belongs in the middle of each bin."""
    number = state_bins(scaled[None])[0]
    wide = (q99 - q01) / STATE_BINS
    middle = q01 + (number + 0.5) * wide
    for i, (got, right, bin_wide) in enumerate(zip(given, middle, wide, strict=True)):
        if abs(got - right) > 0.05 * bin_wide:
            lower = abs(got - (right - bin_wide / 2)) < 0.05 * bin_wide
            why = "that is the bin's lower edge" if lower else f"its bin is {bin_wide:.4f} wide"
            return (
                f"in {prompt!r} number {i} is {int(number[i])}: it returns {got:.4f}, expected {right:.4f}, "
                f"the middle of the bin between {q01[i]:g} and {q99[i]:g}; {why}"
            )
    return None


def check_start_plain(start_plain: Callable[[Any, Tensor], Any]) -> None:
    """Check `start_plain(norm, weight)`: it sets an adaptive `RMSNorm` so that, whatever the condition, it
    does what Gemma's plain norm with this stored weight (D,) does, and every branch is open.
    """

    def complaint() -> str | None:
        generator = torch.Generator().manual_seed(0)
        weight, x, condition = (
            torch.randn(*shape, generator=generator) for shape in ((6,), (2, 3, 6), (2, 4))
        )
        plain, norm = RMSNorm(6), RMSNorm(6, condition=4)
        with torch.no_grad():
            plain.weight.copy_(weight)
            norm.dense.weight.normal_(generator=generator)
        start_plain(norm, weight)
        with torch.no_grad():
            wanted, (told, gate) = plain(x)[0], norm(x, condition)
            again, _ = norm(x, 2 * condition)
        if not torch.allclose(told, again, atol=1e-5):
            return "the outcome still depends on the condition: `dense.weight` must be zero"
        if gate is None or not torch.allclose(gate, torch.ones_like(gate), atol=1e-5):
            return (
                f"the gate is {_few(gate)}, expected 1 everywhere: at 0 the branch behind it is closed, and "
                "a plain norm has no gate, which is 1"
            )
        if torch.allclose(told, plain(x)[0] + x / x.square().mean(-1, keepdim=True).sqrt(), atol=1e-3):
            return "the scale is 1 too large: both norms add 1 to what they store"
        if not torch.allclose(told, wanted, atol=1e-5):
            return f"the outcome is {_few(told)}, expected the plain norm's, {_few(wanted)}"
        return None

    verdict(complaint)


def check_midpoint(midpoint: Callable[[Field, Tensor, int], Tensor]) -> None:
    """Check `midpoint(field, x, steps)`: from time 1 to 0 in equal steps of the midpoint rule, along
    field(x, time (1,)).
    """

    def complaint() -> str | None:
        x = torch.tensor([[[1.0], [2.0]]])
        for steps in (1, 2, 5):
            asked: list[float] = []

            def field(x: Tensor, time: Tensor, asked: list[float] = asked) -> Tensor:
                asked.append(float(time))
                return x * time + torch.cos(3 * time)

            given = midpoint(field, x, steps)
            if len(asked) != 2 * steps:
                return f"{steps} steps call the field {len(asked)} times, expected {2 * steps}: twice a step"
            times = [1 - half / (2 * steps) for half in range(2 * steps)]
            if wrong := [(a, b) for a, b in zip(asked, times, strict=True) if abs(a - b) > 1e-5]:
                got, right = wrong[0]
                return (
                    f"with {steps} steps the field is asked at time {got:.3f}, expected {right:.3f}: from 1 "
                    "down to 0, at the start and in the middle of each step"
                )
            right_end = flow.integrate(field, x, steps, flow.PI, solver="midpoint")
            if not torch.allclose(given, right_end, atol=1e-5):
                return (
                    f"{steps} steps end at {_few(given)}, expected {_few(right_end)}: the whole step goes "
                    "from where it began, along the velocity in its middle; time falls, so a step is negative"
                )
        return None

    verdict(complaint)


def _few(numbers: Tensor | None) -> str:
    if numbers is None:
        return "None"
    values: Sequence[float] = numbers.detach().flatten()[:3].tolist()
    return "(" + ", ".join(f"{value:.2f}" for value in values) + (", …)" if numbers.numel() > 3 else ")")
