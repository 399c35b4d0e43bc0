"""Fixed position codes: sines and cosines of a token's place."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor


def _interleave(angle: Tensor) -> Tensor:
    """Sine of the even channels, cosine of the odd ones, kept in place. angle (..., D), D even."""
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_positions(length: int, width: int) -> Tensor:
    """1-D position codes. Returns (length, width), float32.

    Angle of position p in channels 2i and 2i + 1: p / 10000^(2i / width). Computed in float64, as upstream
    does with numpy. Source: Vaswani et al. 2017, section 3.5; LeRobot `policies/act/modeling_act.py`,
    create_sinusoidal_pos_embedding.
    """
    position = torch.arange(length, dtype=torch.float64)
    channel = torch.arange(width, dtype=torch.float64) // 2
    return _interleave(rearrange(position, "p -> p 1") / 10000 ** (2 * channel / width)).float()


def sine_timesteps(timestep: Tensor, width: int) -> Tensor:
    """Codes of diffusion timesteps (B,), whole or not. Returns (B, width), float32: sines, then cosines.

    Frequencies fall from 1 to 1 / 10000. Source: Ho et al. 2020; LeRobot
    `policies/diffusion/modeling_diffusion.py`, DiffusionSinusoidalPosEmb.
    """
    half = width // 2
    channel = torch.arange(half, device=timestep.device)
    frequency = torch.exp(channel * (-math.log(10000) / (half - 1)))
    angle = rearrange(timestep, "b -> b 1") * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def sine_time(
    time: Tensor, width: int, *, shortest: float, longest: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Codes of a flow time (B,) in [0, 1]. Returns (B, width), float32: sines, then cosines.

    Periods grow geometrically from `shortest` to `longest`, both included. Angles reach 2π / shortest, so
    that float32 and float64 differ: π0's JAX code reckons in the first, both PyTorch ports in the second
    (and in the first on Apple's GPUs, which have no float64).
    Source: openpi `models/pi0.py`, posemb_sincos; LeRobot `policies/common/vla_utils.py`.
    """
    dtype = torch.float32 if time.device.type == "mps" else dtype
    fraction = torch.linspace(0, 1, width // 2, dtype=dtype, device=time.device)
    period = shortest * (longest / shortest) ** fraction
    angle = rearrange(time.to(dtype), "batch -> batch 1") * (1.0 / period * 2 * math.pi)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


def sine_positions_2d(rows: int, columns: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """2-D position codes of an image's patches. Returns (rows * columns, width): first half for y, second for
    x.

    Positions count from 1 and are scaled so that the last row (column) lies at 2π, as in DETR.
    Source: Carion et al. 2020; LeRobot `policies/act/modeling_act.py`, ACTSinusoidalPositionEmbedding2d.
    """
    half = width // 2
    frequency = 10000 ** (2 * (torch.arange(half, dtype=torch.float32, device=device) // 2) / half)

    def codes(count: int) -> Tensor:
        place = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        return _interleave(rearrange(place / (count + 1e-6) * (2 * math.pi), "p -> p 1") / frequency)

    y = codes(rows)[:, None].expand(rows, columns, half)
    x = codes(columns)[None, :].expand(rows, columns, half)
    return rearrange(torch.cat((y, x), dim=-1), "row column width -> (row column) width")
