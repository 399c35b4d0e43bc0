"""One camera's raw pictures: what is wrong with their layout, range, padding and size, and the mended ones.

`examine` never raises on a bad picture; it says what it saw and hands on what can be saved, so that one fault
does not hide the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivla.data.features import PolicyFeature
from minivla.data.stats import IMAGENET
from minivla.preflight.report import ERROR, Finding
from minivla.preflight.scaling import Scaling

TOLERANCE = 1e-3  # how far beyond [0, 1] a pixel may be
OVERSHOOT = 0.1  # as far as sharp resampling takes pixels beyond [0, 1]
FLAT = 1e-3  # standard deviation over all pixels below which a picture shows nothing


@dataclass
class Look:
    """One input: the mended value (pictures: (..., 3, H, W) in [0, 1]), None where it could not be saved, and
    what was wrong.
    """

    key: str
    value: Tensor | None = None
    findings: list[Finding] = field(default_factory=list)

    def note(self, code: str, what: str, mend: str) -> None:
        """Add an error about this input."""
        self.findings.append(Finding(code, ERROR, self.key, what, mend))


def examine(key: str, value: Any, feature: PolicyFeature, scaling: Scaling | None) -> Look:
    """Look at one camera of a raw batch. `scaling` tells what "already normalised" would look like."""
    look = Look(key)
    tensor = torch.as_tensor(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
    if not isinstance(tensor, Tensor) or tensor.ndim < 3:
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(value).__name__
        look.note("image-layout", f"got {shape}; a picture has three axes", "give uint8 (H, W, 3)")
        return look
    picture = _channels_first(look, tensor.detach().cpu(), feature)
    if picture is None:
        return look
    picture = _unit_range(look, picture, tensor.dtype, scaling)
    if picture is None:
        return look
    look.value = _sized(look, picture, feature)
    _see_something(look, look.value)
    return look


def _channels_first(look: Look, tensor: Tensor, feature: PolicyFeature) -> Tensor | None:
    """(..., C, H, W) float, values as they came."""
    channels, whole = feature.shape[0], tensor.dtype == torch.uint8
    last, first = tensor.shape[-1] == channels, tensor.shape[-3] == channels
    kind, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    if not last and not first:
        return _other_channels(look, tensor, channels)
    is_last = last if whole else not first
    if whole and not last:
        look.note("image-layout", f"got uint8 {shape}, channels first", "image.movedim(-3, -1)")
    if not whole and not first:
        look.note("image-layout", f"got {kind} {shape}, channels last", "image.movedim(-1, -3)")
    return (tensor.movedim(-1, -3) if is_last else tensor).float()


def _other_channels(look: Look, tensor: Tensor, channels: int) -> Tensor | None:
    shape = tuple(tensor.shape)
    what = f"got shape {shape}; none of its outer axes has {channels} channels"
    alpha = next((axis for axis in (-1, -3) if tensor.shape[axis] == channels + 1), None)
    grey = next((axis for axis in (-1, -3) if tensor.shape[axis] == 1), None)
    if alpha is not None:
        look.note(
            "image-channels", f"{what}, one has {channels + 1}", "drop the alpha channel: image[..., :3]"
        )
        return tensor.movedim(alpha, -3)[..., :channels, :, :].float()
    if grey is not None:
        look.note("image-channels", f"{what}, it is grey", "repeat the grey channel, or record in colour")
        return tensor.movedim(grey, -3).expand(*tensor.shape[:-3], channels, -1, -1).float()
    look.note("image-channels", what, f"give uint8 (H, W, {channels}) or float ({channels}, H, W)")
    return None


def _unit_range(look: Look, picture: Tensor, dtype: torch.dtype, scaling: Scaling | None) -> Tensor | None:
    """(..., C, H, W) in [0, 1], whatever scale it came in."""
    if not picture.isfinite().all():
        share = 1 - picture.isfinite().float().mean().item()
        look.note("image-not-finite", f"{share:.1%} of the pixels are NaN or inf", "look at the decoder")
        picture = picture.nan_to_num(0.0, 0.0, 0.0)
    if dtype == torch.uint8:
        if picture.max() > 1 or picture.max() == 0:
            return picture / 255
        look.note(
            "image-range",
            "uint8, and no pixel is above 1: a picture in [0, 1] was cut down to whole numbers",
            "(image * 255).astype('uint8'), or keep it float",
        )
        return picture
    border = _border(picture)
    inside = picture[..., ~border] if border.any() else picture
    low, high = (float(bound) for bound in inside.aminmax())
    scale = _scale(low, high, picture, border, look.key, scaling)
    if scale is None:
        look.note(
            "image-range",
            f"values from {low:.3g} to {high:.3g}; expected [0, 1], and no usual scale gives these",
            "give the pictures as they left the camera, uint8 (H, W, 3)",
        )
        return None
    name, mend, black, restored = scale
    edge = float(picture[..., border].min()) if border.any() else black
    if abs(edge - black) > 0.02 * max(1.0, high - low):
        look.note(
            "image-pad-value",
            f"a border of {edge:.3g} around pixels from {low:.3g} to {high:.3g}, where black is {black:.3g}: "
            "it was padded before it was rescaled",
            "rescale first, then pad with black; or pad with 0 before rescaling [0, 1] by the statistics",
        )
    if name:
        look.note("image-range", f"values from {low:.3g} to {high:.3g}, {name}; expected [0, 1]", mend)
    return torch.where(border, 0.0, restored).clamp(0, 1)


Scale = tuple[str, str, float, Tensor]  # what it is called, the mend, its black, the picture in [0, 1]


def _scale(
    low: float, high: float, picture: Tensor, border: Tensor, key: str, scaling: Scaling | None
) -> Scale | None:
    """Which usual scale the pixels are in; the name is empty for [0, 1]."""
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return "", "", 0.0, picture
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return "beyond [0, 1] by a little, as sharp resampling does", "image.clamp(0, 1)", 0.0, picture
    if low >= -0.5 and 1 < high <= 255.5:
        return "as 0…255", "image / 255", 0.0, picture / 255
    if low >= -1.1 and high <= 1.1:
        return "as [-1, 1]", "(image + 1) / 2", -1.0, (picture + 1) / 2
    for mean, std, whose in _normalisers(key, scaling):
        restored = picture * std + mean
        seen = restored[..., ~border]
        if seen.min() >= -0.02 and seen.max() <= 1.02:
            black = float((-mean / std).min())
            return f"already normalised by {whose}", "leave normalising to the policy", black, restored
    return None


def _normalisers(key: str, scaling: Scaling | None) -> Iterator[tuple[Tensor, Tensor, str]]:
    table = scaling.stats.get(key, {}) if scaling is not None else {}
    if "mean" in table and "std" in table:
        yield table["mean"].reshape(-1, 1, 1), table["std"].reshape(-1, 1, 1), "the policy's statistics"
    mean, std = (torch.tensor(IMAGENET[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    yield mean, std, "ImageNet's"


def _border(picture: Tensor) -> Tensor:
    """(H, W) bool: whole rows and columns, counted from the edges, that hold the lowest value and nothing
    else, where that value is below zero.
    """
    height, width = picture.shape[-2:]
    low = picture.min()
    none = torch.zeros(height, width, dtype=torch.bool)
    if low >= -TOLERANCE:
        return none
    flat = ((picture - low).abs() < 1e-4).reshape(-1, height, width).all(0)
    rows, columns = _from_edges(flat.all(1)), _from_edges(flat.all(0))
    border = rows[:, None] | columns[None, :]
    return none if border.all() else border


def _from_edges(lines: Tensor) -> Tensor:
    """The run of True at either end, and nothing between."""
    start = lines.long().cumprod(0).bool()
    return start | lines.flip(0).long().cumprod(0).bool().flip(0)


def _sized(look: Look, picture: Tensor, feature: PolicyFeature) -> Tensor:
    given, wanted = tuple(picture.shape[-2:]), tuple(feature.shape[-2:])
    if given == wanted:
        return picture
    look.note(
        "image-size",
        f"{given[0]} x {given[1]} pixels (H x W); the policy was built for {wanted[0]} x {wanted[1]}",
        "resize as the training data was, or ask the camera for that size",
    )
    flat = picture.reshape(-1, *picture.shape[-3:])
    resized = F.interpolate(flat, wanted, mode="bilinear", antialias=True)
    return resized.reshape(*picture.shape[:-2], *wanted)


def _see_something(look: Look, picture: Tensor) -> None:
    flat = picture.reshape(-1, *picture.shape[-3:])
    blank = flat.flatten(1).std(dim=1) < FLAT
    if blank.any():
        colour = float(flat[blank].mean())
        look.note(
            "image-blank",
            f"{int(blank.sum())} of {len(flat)} pictures have one colour throughout ({colour:.2g} of 1)",
            "look at the camera: lens cap, unplugged, or a placeholder that was never filled",
        )
