"""Real-time chunking: the next chunk begins as the one in progress goes on.

While a policy thinks, the robot carries out the old chunk, and the new one then has to fit what was done
meanwhile. Actions that will be over by then are frozen, those after them are a wish that fades, the rest is
free: `prefix_weights`. A flow that is on its way from noise to actions foresees, at every step, where it will
arrive, x + (time left) · velocity; `guide` bends the velocity so that the foreseen chunk agrees with the old
one where the weights say so. Nothing is trained. `smooth` is the plain alternative: mix the finished chunks.
Sources: Black et al. 2025 (real-time chunking), section 3; Song et al. 2023 (ΠGDM, the guidance); LeRobot
`policies/rtc/modeling_rtc.py`, to which this is equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from minivla.actions.flow import Convention, Field, expect_one_of

SCHEDULES = ("ZEROS", "ONES", "LINEAR", "EXP")


@dataclass
class RTCConfig:
    """LeRobot's `rtc_config`, field by field (`policies/rtc/configuration_rtc.py`).

    enabled                    False: chunks are predicted as if there were no previous one
    prefix_attention_schedule  how the wish fades, one of `SCHEDULES`
    max_guidance_weight        the strongest pull; where all is still noise the formula gives infinity
    execution_horizon          where the wish ends, in steps from the chunk's beginning. The paper's H − s,
                               and not its s, the execution horizon, whose name LeRobot gave it
    debug, debug_maxlen        LeRobot's own records, kept for its sake; here `minivla.trace` shows the flow

    Raises ValueError naming the field and its value where that makes no sense.
    """

    enabled: bool = True
    prefix_attention_schedule: str = "LINEAR"
    max_guidance_weight: float = 10.0
    execution_horizon: int = 10
    debug: bool = False
    debug_maxlen: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            given, kind = getattr(self, field.name), type(field.default)
            kinds = (int, float) if kind is float else (kind,)
            if not isinstance(given, kinds) or (isinstance(given, bool) and kind is not bool):
                raise ValueError(f"{field.name} is {given!r}, expected {kind.__name__}")
        expect_one_of("prefix_attention_schedule", self.prefix_attention_schedule, SCHEDULES)
        for name in ("max_guidance_weight", "debug_maxlen"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a number above 0")
        if self.execution_horizon < 0:
            raise ValueError(f"execution_horizon is {self.execution_horizon!r}, expected at least 0 steps")

    def to_json(self) -> dict[str, Any]:
        """What `config.json` holds under "rtc_config"."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | Self) -> Self:
        """The reverse; fields left out are at their defaults. A config is given back as it is. Raises
        ValueError naming unknown fields, and for what is neither.
        """
        if isinstance(content, cls):
            return content
        if not isinstance(content, Mapping):
            raise ValueError(f"rtc_config is {content!r}, expected an RTCConfig or a mapping of its fields")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in content if name not in known]:
            raise ValueError(f"rtc_config has unknown fields {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**content)


def prefix_weights(delay: int, execution_horizon: int, horizon: int, schedule: str) -> Tensor:
    """How far each action of the new chunk is held to the previous one: float32 (horizon,), from 1 to 0.

    The first `delay` actions will be over when the chunk arrives: 1. From `execution_horizon` on: 0. Between
    them "ONES" holds on, "ZEROS" lets go, "LINEAR" fades, "EXP" fades faster: c · (eᶜ − 1) / (e − 1) of the
    linear c. Of a delay beyond the execution horizon no more than that counts, and no more of that than the
    horizon. Raises ValueError for negative numbers and unknown schedules.

    >>> prefix_weights(1, 4, 6, "LINEAR").tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    expect_one_of("prefix_attention_schedule", schedule, SCHEDULES)
    if delay < 0 or execution_horizon < 0:
        raise ValueError(
            f"delay is {delay} and execution_horizon {execution_horizon}, expected at least 0 steps of each"
        )
    end = min(execution_horizon, horizon)
    start = min(delay, end)
    fading = torch.arange(end - start, 0, -1) / (end - start + 1)
    between = {
        "ZEROS": torch.zeros_like(fading),
        "ONES": torch.ones_like(fading),
        "LINEAR": fading,
        "EXP": fading * torch.expm1(fading) / (math.e - 1),
    }
    return torch.cat((torch.ones(start), between[schedule], torch.zeros(horizon - end)))


def guidance_weight(done: Tensor, largest: float) -> Tensor:
    """How strongly to pull when the share `done` of the way from noise to action is behind.

    done (1,) in [0, 1]; the formula, (1 − τ) / τ · ((1 − τ)² + τ²) / (1 − τ)², is infinite at both ends:
    `largest` bounds it. At τ = 1 itself, which no sampler asks for, it is 0, as in LeRobot. Returns (1,).
    """
    left = 1 - done
    weight = left / done * (left**2 + done**2) / left**2
    return weight.nan_to_num(nan=0.0, posinf=largest).clamp(max=largest)


def guide(
    field: Field,
    previous: Tensor | None,
    delay: int,
    config: RTCConfig,
    convention: Convention,
    *,
    execution_horizon: int | None = None,
    through_network: bool = False,
) -> Field:
    """The field, bent towards what is left over of the previous chunk: for `minivla.actions.flow.euler`.

    previous           (B, K, A') with K ≤ H and A' ≤ A, normalised, its first action the one due when this
                       prediction begins; or (K, A'), one for all. Zeros fill it up to (B, H, A), so within
                       the weights A − A' padded dimensions are drawn to zero; beyond K nothing is. None, as
                       in an episode's first chunk: the field comes back as it is, also where not `enabled`
    delay              steps that will have passed when the chunk is there
    execution_horizon  in place of the config's; never more than K counts
    through_network    False, LeRobot: the pull on an action is that action's own error. True, the paper: the
                       error is taken back through the network, Jacobianᵀ · error, so that actions and
                       dimensions that belong together move together; about three times the work

    LeRobot means to do the second: it asks autograd for the product, but calls the network before x begins to
    require gradients. The velocity is then a constant, the Jacobian the identity, and the error itself comes
    back; a test beside this file shows it. Its published behaviour is the default here.
    Raises ValueError for a negative delay and a `previous` of other than two or three axes, and, when called,
    for one that does not fit the chunk.
    """
    if previous is None or not config.enabled:
        return field
    if previous.ndim not in (2, 3):
        raise ValueError(
            f"the previous chunk's left-over has shape {tuple(previous.shape)}, expected (B, K, A) or "
            "(K, A); pass the K actions not yet carried out, normalised"
        )
    wished = config.execution_horizon if execution_horizon is None else execution_horizon
    end = min(wished, previous.shape[-2])
    prefix_weights(delay, end, 0, config.prefix_attention_schedule)  # refuses now what makes no sense
    towards = -1 if convention.noise_at else 1  # the velocity's sign from noise to action

    def guided(x: Tensor, time: Tensor) -> Tensor:
        target = _fill_up(previous, x)
        held = prefix_weights(delay, end, x.shape[1], config.prefix_attention_schedule).to(x)[:, None]
        done = 1 - time if convention.noise_at else time
        with torch.set_grad_enabled(through_network or torch.is_grad_enabled()):
            point = x.detach().requires_grad_(True) if through_network else x
            velocity = field(point, time)
            foreseen = point + towards * (1 - done) * velocity
        pull = (target - foreseen) * held
        if through_network:
            (pull,) = torch.autograd.grad(foreseen, point, pull.detach())
            velocity = velocity.detach()
        return velocity + towards * guidance_weight(done, config.max_guidance_weight) * pull

    return guided


def _fill_up(previous: Tensor, x: Tensor) -> Tensor:
    """`previous`, (B, K, A') or (K, A'), with zeros up to the shape of x (B, H, A)."""
    missing = [have - given for have, given in zip(x.shape[1:], previous.shape[-2:], strict=True)]
    if min(missing) < 0 or (previous.ndim == 3 and len(previous) != len(x)):
        raise ValueError(
            f"the previous chunk's left-over has shape {tuple(previous.shape)}, expected {tuple(x.shape)} "
            "(B, H, A) or fewer steps or dimensions; pass the actions not yet carried out, normalised"
        )
    return F.pad(previous.to(x), (0, missing[1], 0, missing[0])).expand_as(x)


def smooth(previous: Tensor, chunk: Tensor, overlap: int) -> Tensor:
    """The new chunk, faded in: its first `overlap` actions are mixed with the old chunk's, linearly.

    previous (B, K, A), chunk (B, H, A), both from the same moment on. Of n mixed actions, action i (i = 0 the
    first) is (n − i) / (n + 1) old; n is `overlap`, or K or H where those are smaller. Returns (B, H, A).
    Raises ValueError for a negative overlap.
    """
    mixed = min(overlap, previous.shape[1], chunk.shape[1])
    old = prefix_weights(0, mixed, mixed, "LINEAR").to(chunk)[:, None]
    return torch.cat((torch.lerp(chunk[:, :mixed], previous[:, :mixed], old), chunk[:, mixed:]), dim=1)
