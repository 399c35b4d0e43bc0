"""Pictures to one vector: crop, convolve, and say where things are.

A convolutional network answers "what is where" with maps; a controller needs the "where". Each of K channels
is therefore reduced to the mean position under its softmax, a keypoint, and the 2 K coordinates go through
one linear layer. Sources: Levine et al. 2016, section 5.1 (spatial softmax); Chi et al. 2023, section 3.2
(group norm for batch norm, random crops); LeRobot 0.6 `policies/diffusion/modeling_diffusion.py`,
DiffusionRgbEncoder and SpatialSoftmax, whose parameter names are kept, but for those inside `backbone`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from minivla import recorder
from minivla.nn.compact_vision import CompactVision, spatial_softmax
from minivla.nn.resnet import ResNet, load_imagenet

# What upstream, whose backbone is a list of torchvision's modules, ReLU (2) and pooling (3) among them, calls
# the parts of ours, for a policy's CHECKPOINT_NAMES.
BACKBONE_NAMES = (
    (r"backbone\.conv1\.", "backbone.0."),
    (r"backbone\.bn1\.", "backbone.1."),
    *((rf"backbone\.layer{i}\.", f"backbone.{i + 3}.") for i in range(1, 5)),
)
COMPACT_CHANNELS = 64
Size = tuple[int, int]


def group_norm16(channels: int) -> nn.GroupNorm:
    """Group norm with 16 channels a group: no batch statistics, which a moving average of the weights would
    not fit.
    """
    return nn.GroupNorm(channels // 16, channels)


def corner_grid(rows: int, columns: int) -> Tensor:
    """x and y of each cell, y downwards, the corner cells at ±1. Returns (rows · columns, 2)."""
    y, x = (torch.linspace(-1, 1, count, dtype=torch.float64).float() for count in (rows, columns))
    return torch.stack((x.repeat(rows), y.repeat_interleave(columns)), dim=-1)


class Keypoints(nn.Module):
    """Maps (N, channels, rows, columns) to K points (N, K, 2) in [-1, 1]: convolution, spatial softmax."""

    pos_grid: Tensor

    def __init__(self, channels: int, keypoints: int, rows: int, columns: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, keypoints, kernel_size=1)
        self.register_buffer("pos_grid", corner_grid(rows, columns))

    def forward(self, maps: Tensor) -> Tensor:
        """maps (N, channels, rows, columns). Returns (N, K, 2)."""
        return spatial_softmax(self.nets(maps), self.pos_grid)


class ImageVector(nn.Module):
    """One encoder for one or several cameras of one size.

    shapes: (3, H, W) by batch key, the cameras it looks through, in this order
    backbone, pretrained, group_norm: the ResNet, torchvision's name for ImageNet weights, GroupNorm for
    BatchNorm
    resize, crop (rows, columns): what is done to a picture first; the crop is random while training if
    `random_crop`, else central
    keypoints K; compact, condition: `CompactVision` for the ResNet, and the width of its instruction

    `width` is the size of the result, 2 K for each camera. Raises ValueError for cameras of several sizes, a
    crop that is larger than the picture, and pretrained batch norms that would be replaced.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        backbone: str = "resnet18",
        pretrained: str | None = None,
        group_norm: bool = False,
        resize: Size | None = None,
        crop: Size | None = None,
        random_crop: bool = True,
        keypoints: int = 32,
        compact: bool = False,
        condition: int = 0,
    ) -> None:
        super().__init__()
        self.cameras, self.resize, self.crop, self.random_crop = tuple(shapes), resize, crop, random_crop
        size = _one_size(shapes)
        _expect_crop_fits(crop, resize or size, "resize_shape is" if resize else "the images are")
        rows, columns = crop or resize or size
        if pretrained and group_norm and not compact:
            raise ValueError(
                f"use_group_norm would replace the batch norms that belong to {pretrained!r}; set "
                "pretrained_backbone_weights=None or use_group_norm=False"
            )
        self.backbone: ResNet | CompactVision
        if compact:
            self.backbone = CompactVision(COMPACT_CHANNELS, condition=condition)
            self.stride, self.first = 8, 1.5
            rows, columns = (-(-(size // 4) // 2) for size in (rows, columns))
        else:
            self.backbone = ResNet(backbone, norm=group_norm16 if group_norm else nn.BatchNorm2d)
            self.stride, self.first = 32, 0.0
            rows, columns = (-(-size // 32) for size in (rows, columns))
            if pretrained:
                load_imagenet(self.backbone, pretrained)
        self.pool = Keypoints(self.backbone.channels, keypoints, rows, columns)
        self.cells = (rows, columns)
        self.width = 2 * keypoints * len(shapes)
        self.out = nn.Linear(2 * keypoints + COMPACT_CHANNELS * compact, 2 * keypoints)

    def forward(
        self,
        batch: Mapping[str, Tensor],
        condition: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """batch: for each camera (B, T, 3, H, W); condition (B, `condition`), the instruction.

        Returns (B, T, width), camera after camera. `generator` draws the crop (None: torch's own, on the CPU,
        as torchvision does); all pictures of a call are cropped at one place.
        """
        images = torch.stack([batch[camera] for camera in self.cameras], dim=2)
        size, steps, cameras = images.shape[:3]
        images = self.prepare(rearrange(images, "b t n c y x -> (b t n) c y x"), generator)
        if isinstance(self.backbone, CompactVision):
            if condition is not None:
                condition = repeat(condition, "b d -> (b t n) d", t=steps, n=cameras)
            maps = self.backbone(images, condition)
        else:
            maps = self.backbone(images)
        points = self.pool(maps)  # (B T n, K, 2)
        named = rearrange(points, "(b t n) k xy -> n b t k xy", b=size, t=steps)
        for camera, seen in zip(self.cameras, named, strict=True):
            recorder.keep(f"keypoints.{camera}", seen)
        flat = rearrange(points, "image k xy -> image (k xy)")
        if isinstance(self.backbone, CompactVision):
            # What it tells every patch is the same everywhere, and softmax cannot see that; the mean can.
            flat = torch.cat((flat, reduce(maps, "image c y x -> image c", "mean")), dim=-1)
        return rearrange(F.relu(self.out(flat)), "(b t n) d -> b t (n d)", b=size, t=steps)

    def prepare(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Resize and crop. (N, 3, H, W) in and out."""
        if self.resize is not None and tuple(images.shape[-2:]) != tuple(self.resize):
            images = F.interpolate(images, size=self.resize, mode="bilinear", antialias=True)
        if self.crop is None:
            return images
        (rows, columns), (height, width) = self.crop, images.shape[-2:]
        if self.training and self.random_crop:
            top, left = _random_corner(height - rows, width - columns, generator)
        else:
            top, left = round((height - rows) / 2), round((width - columns) / 2)
        return images[..., top : top + rows, left : left + columns]

    def pixels(self, points: Tensor, size: Size) -> Tensor:
        """Where keypoints lie in the whole picture, for drawing: (…, 2) in [-1, 1] to (…, 2) pixels, x and y.

        `size` (H, W) is the picture's. As in evaluation, with the crop in the centre. A point of ±1 is the
        middle of the outermost cell's view, not the picture's edge.
        """
        height, width = self.resize or size
        rows, columns = self.crop or (height, width)
        extent = points.new_tensor([self.cells[1] - 1, self.cells[0] - 1]) * self.stride
        corner = points.new_tensor([round((width - columns) / 2), round((height - rows) / 2)])
        scale = points.new_tensor([size[1] / width, size[0] / height])
        return ((points + 1) / 2 * extent + self.first + corner) * scale


def _random_corner(spare_rows: int, spare_columns: int, generator: torch.Generator | None) -> Size:
    """Upper left corner of a crop, drawn as torchvision's RandomCrop draws: nothing when all is kept."""
    if spare_rows == spare_columns == 0:
        return 0, 0
    device = "cpu" if generator is None else generator.device
    corner = [
        torch.randint(spare + 1, (1,), generator=generator, device=device)
        for spare in (spare_rows, spare_columns)
    ]
    return int(corner[0]), int(corner[1])


def _one_size(shapes: Mapping[str, tuple[int, ...]]) -> Size:
    sizes = {shape[-2:] for shape in shapes.values()}
    if len(sizes) != 1:
        told = ", ".join(f"{camera} {shape}" for camera, shape in shapes.items())
        raise ValueError(
            f"one image encoder looks through cameras of several sizes ({told}); expected one. Record or "
            "resize them alike, or give each an encoder of its own"
        )
    rows, columns = sizes.pop()
    return rows, columns


def _expect_crop_fits(crop: Size | None, size: Size, what: str) -> None:
    if crop is not None and (crop[0] > size[0] or crop[1] > size[1] or min(crop) < 1):
        raise ValueError(
            f"crop_shape is {tuple(crop)}, {what} {tuple(size)}; expected a crop of at least 1 that fits in. "
            "Make crop_shape smaller, or None for no crop"
        )
