"""A small image encoder for small worlds: a few convolutions that know where they are and what was asked.

It stands in for a ResNet in the shipped checkpoints, where 64 × 64 pixels of flat colour need precision
rather than recognition. Three old ideas: coordinates as two extra input channels (Liu et al. 2018,
CoordConv), the instruction scaling and shifting the channels (Perez et al. 2018, FiLM), and keypoints read
off by a spatial softmax (Levine et al. 2016), told to every patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


def coordinate_grid(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """x and y of each cell's centre, in [-1, 1], y downwards. Returns (2, rows, columns)."""
    y = (torch.arange(rows, device=device) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns, device=device) + 0.5) / columns * 2 - 1
    return torch.stack((repeat(x, "x -> y x", y=rows), repeat(y, "y -> y x", x=columns)))


def spatial_softmax(heat: Tensor, places: Tensor | None = None) -> Tensor:
    """The mean position under the softmax of each channel: one keypoint a channel.

    heat (B, K, H, W); places (H · W, 2), x and y of each cell, or None for their centres in [-1, 1]. Returns
    (B, K, 2). Source: Levine et al. 2016, section 5.1.
    """
    if places is None:
        grid = coordinate_grid(heat.shape[-2], heat.shape[-1], heat.device).to(heat.dtype)
        places = rearrange(grid, "xy h w -> (h w) xy")
    weight = rearrange(heat, "batch k y x -> batch k (y x)").softmax(-1)
    return weight @ places


class CompactVision(nn.Module):
    """Image to a map of features, 8 × 8 for 64 × 64 pixels: (B, 3, H, W) → (B, channels, H / 8, W / 8).

    `channels` C of the result; `condition` is the width of the instruction's vector, 0 for none; `keypoints`
    K.
    """

    def __init__(self, channels: int, *, condition: int = 0, keypoints: int = 16) -> None:
        super().__init__()
        half = channels // 2
        self.channels = channels
        self.stem = nn.Conv2d(5, half, kernel_size=6, stride=4, padding=1)
        self.film = nn.Linear(condition, 2 * half) if condition else None
        self.mix = nn.Conv2d(half, half, kernel_size=3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(4, half), nn.GroupNorm(4, half)
        self.heat = nn.Conv2d(half, keypoints, kernel_size=1)
        self.tell = nn.Linear(2 * keypoints, channels)
        self.down = nn.Conv2d(half, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, image: Tensor, condition: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W), condition (B, `condition`). Returns (B, channels, H / 8, W / 8)."""
        grid = coordinate_grid(image.shape[-2], image.shape[-1], image.device).to(image.dtype)
        x = torch.cat((image, repeat(grid, "xy h w -> b xy h w", b=len(image))), dim=1)
        x = self.norm1(self.stem(x))  # (B, C / 2, H / 4, W / 4)
        if self.film is not None and condition is not None:
            scale, shift = rearrange(self.film(condition), "b (two c) -> two b c 1 1", two=2)
            x = x * (1 + scale) + shift
        x = F.relu(x)
        x = F.relu(x + self.norm2(self.mix(x)))
        points = spatial_softmax(self.heat(x))
        told = self.tell(rearrange(points, "b k xy -> b (k xy)"))
        return F.relu(self.down(x)) + rearrange(told, "b c -> b c 1 1")  # (B, C, H / 8, W / 8)
