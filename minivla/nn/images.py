"""Bringing pictures to the size a vision encoder wants, without bending them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_with_pad(image: Tensor, rows: int, columns: int, value: float = 0.0) -> Tensor:
    """The whole image inside (rows, columns), its aspect ratio kept, centred between bands of `value`.

    image (B, 3, H, W) in [0, 1]. Bilinear without antialiasing, as both PyTorch ports of π0 (its JAX pipeline
    resizes with PIL, which smooths when it shrinks). An odd band is wider at the right and the bottom.
    Source: LeRobot `policies/common/vla_utils.py`, resize_with_pad_torch.
    """
    height, width = image.shape[-2:]
    if (height, width) == (rows, columns):
        return image
    ratio = max(width / columns, height / rows)
    inner = int(height / ratio), int(width / ratio)
    image = F.interpolate(image, size=inner, mode="bilinear", align_corners=False).clamp(0.0, 1.0)
    top, left = (rows - inner[0]) // 2, (columns - inner[1]) // 2
    return F.pad(image, (left, columns - inner[1] - left, top, rows - inner[0] - top), value=value)
