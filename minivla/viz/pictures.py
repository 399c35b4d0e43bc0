"""Tensors and camera images as matplotlib and Pillow want them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(value: Any) -> np.ndarray:
    """A tensor (on any device, with or without gradients), array or list as an array.

    NumPy has no bfloat16: such a tensor becomes float32, which holds all its values.
    """
    if not isinstance(value, Tensor):
        return np.asarray(value)
    return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).detach().cpu())


def finite(values: np.ndarray) -> np.ndarray:
    """The values (N,) that are numbers: neither NaN nor infinite."""
    return values[np.isfinite(values)]


def gaps(values: np.ndarray) -> np.ndarray:
    """The values with NaN in place of what is infinite, since a line can only be left open there."""
    return np.where(np.isfinite(values), values, np.nan)


def as_picture(image: Any, *, rescale: bool = False) -> np.ndarray:
    """An image as float (H, W, 3) in [0, 1], from a tensor or array (3, H, W) or (H, W, 3), uint8 or float.

    With `rescale`, for normalised images, the darkest value becomes 0 and the brightest 1; a flat image
    becomes grey, and what is not finite the darkest. Raises ValueError for other shapes, and for floats
    outside [0, 1] unless `rescale`.
    """
    array = as_array(image)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise ValueError(
            f"an image has shape {array.shape}; expected (3, H, W) or (H, W, 3). "
            "Of a batch give one: images[0]"
        )
    if array.shape[-1] != 3:
        array = np.moveaxis(array, 0, -1)
    if array.dtype == np.uint8:
        return array / 255.0
    array = array.astype(float)
    if rescale:
        real = finite(array)
        array = np.where(np.isfinite(array), array, real.min() if real.size else 0.0)
    low, high = array.min(), array.max()
    if rescale:
        return (array - low) / (high - low) if high > low else np.full_like(array, 0.5)
    if low < 0 or high > 1:
        raise ValueError(
            f"an image holds floats from {low:.3g} to {high:.3g}; expected [0, 1] or uint8. "
            "Give the raw image, not the normalised one"
        )
    return array
