"""ResNet without its classifier: a picture in, a map of features out.

Source: He et al. 2016; parameter names, strides and initialisation are torchvision's (`models/resnet.py`), so
its ImageNet weights and every checkpoint built on them load unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# name: (blocks per stage, whether a block is the three-convolution bottleneck)
RESNETS: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
STAGE_WIDTHS = (64, 128, 256, 512)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine terms never change: a fixed scale and shift per
    channel.

    Small batches would make live statistics noisy, so DETR, ACT and others freeze those of ImageNet.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W). Returns the same shape."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # Not addcmul, which would keep x for a gradient that the constant scale never gets.
        return (x * scale[:, None, None]).add_(shift[:, None, None])


Norm = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3, 1×1 for a bottleneck, around a shortcut."""

    def __init__(
        self, inputs: int, width: int, *, stride: int, dilation: int, bottleneck: bool, norm: Norm
    ) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        shapes = (
            [(inputs, width, 1, 1, 1), (width, width, 3, stride, dilation), (width, outputs, 1, 1, 1)]
            if bottleneck
            else [(inputs, width, 3, stride, dilation), (width, outputs, 3, 1, 1)]
        )
        for i, (c_in, c_out, kernel, step, spread) in enumerate(shapes, start=1):
            self.add_module(f"conv{i}", _conv(c_in, c_out, kernel, step, spread))
            self.add_module(f"bn{i}", norm(c_out))
        self.depth = len(shapes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride, 1), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W). Returns (B, C', H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.depth + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            if i < self.depth:
                x = self.relu(x)
        return self.relu(x + shortcut)


class ResNet(nn.Module):
    """The network up to its last feature map.

    `name` is one of RESNETS; `norm` makes a normalisation layer from a channel count; `dilate_last` keeps the
    last stage's resolution and dilates its convolutions instead. Raises ValueError on an unknown name.
    """

    def __init__(
        self, name: str = "resnet18", *, norm: Norm = FrozenBatchNorm2d, dilate_last: bool = False
    ) -> None:
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"vision_backbone {name!r} is not known; choose one of {', '.join(RESNETS)}")
        if dilate_last and not RESNETS[name][1]:
            raise ValueError(
                f"replace_final_stride_with_dilation needs a bottleneck network, {name} is not one; "
                "use resnet50 or deeper"
            )
        self.name = name
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.channels = 64
        for i in range(4):
            self.add_module(f"layer{i + 1}", self._stage(i, norm, dilate=dilate_last and i == 3))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, i: int, norm: Norm, *, dilate: bool) -> nn.Sequential:
        blocks, bottleneck = RESNETS[self.name]
        stage = nn.Sequential()
        for b in range(blocks[i]):
            stride = 2 if b == 0 and i > 0 and not dilate else 1
            # torchvision keeps the stage's first block undilated
            dilation = 2 if dilate and b > 0 else 1
            stage.append(
                ResidualBlock(
                    self.channels,
                    STAGE_WIDTHS[i],
                    stride=stride,
                    dilation=dilation,
                    bottleneck=bottleneck,
                    norm=norm,
                )
            )
            self.channels = STAGE_WIDTHS[i] * (4 if bottleneck else 1)
        return stage

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W). Returns (B, channels, H / 32, W / 32), sizes rounded up."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return x


def _conv(inputs: int, outputs: int, kernel: int, stride: int, dilation: int) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)


def load_imagenet(network: ResNet, weights: str) -> None:
    """Fill a ResNet with torchvision's ImageNet weights, read from their safetensors copy on the hub.

    `weights` is torchvision's name for them, "ResNet18_Weights.IMAGENET1K_V1". Raises ValueError for a name
    that is not the network's, OSError when the weights are neither cached nor within reach.
    """
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    family, _, version = weights.partition("_Weights.")
    suffix = {"IMAGENET1K_V1": "tv_in1k", "IMAGENET1K_V2": "tv2_in1k"}.get(version)
    if family.lower() != network.name or suffix is None:
        wanted = f"ResNet{network.name.removeprefix('resnet')}_Weights.IMAGENET1K_V1"
        raise ValueError(
            f"pretrained_backbone_weights {weights!r} do not fit {network.name}; use {wanted!r} or None"
        )
    try:
        path = hf_hub_download(f"timm/{network.name}.{suffix}", "model.safetensors")
    except Exception as error:
        raise OSError(
            f"ImageNet weights {weights} (timm/{network.name}.{suffix} on the hub) are not cached "
            "and cannot be fetched now. Go online once, or build the policy with "
            "pretrained_backbone_weights=None to start from random weights."
        ) from error
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("fc.") and "num_batches" not in k}
    counts = {k: v for k, v in network.state_dict().items() if "num_batches" in k}  # of live batch norms
    network.load_state_dict(tensors | counts, strict=True)
