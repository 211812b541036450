"""ResNet encoders without a classifier, in torchvision's layout and, as a variant, in the original SimCLR's.

Module names are torchvision's (conv1, layer1.0.bn2, ...), so its state dicts load both ways, except for `fc`.
Initial weights are the original's: truncated normal convolutions of variance 1 / fan_in, and scale 0 in the
last BN of every residual branch (but for resnet8), so that each block starts as its shortcut.

Sources: He et al. 2015, arXiv:1512.03385, with the stride of a bottleneck on its 3x3 convolution;
Chen et al. 2020, arXiv:2002.05709; github.com/google-research/simclr.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast.config import choose

# Kernel and stride of the first convolution, and whether a 3x3 max-pool of stride 2 follows.
Stem = tuple[int, int, bool]
STEMS: dict[str, Stem] = {"imagenet": (7, 2, True), "small": (3, 1, False)}


class Arch(NamedTuple):
    bottleneck: bool
    depths: tuple[int, ...]
    stem: Stem | None = None  # overrules the caller's
    zero_scale: bool = True  # in the last BN of every residual branch


ARCHS = {
    "resnet8": Arch(False, (1, 1, 1), (3, 2, False), zero_scale=False),  # so shallow a net learns faster without
    "resnet18": Arch(False, (2, 2, 2, 2)),
    "resnet34": Arch(False, (3, 4, 6, 3)),
    "resnet50": Arch(True, (3, 4, 6, 3)),
    "resnet101": Arch(True, (3, 4, 23, 3)),
    "resnet152": Arch(True, (3, 8, 36, 3)),
}


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    std = (c_in * kernel**2) ** -0.5 / 0.8796256610342398  # the std of a unit normal cut off at -2 and 2
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    return conv


class Block(nn.Module):
    """relu(branch(x) + shortcut(x)); the branch is 3x3 and 3x3, or the bottleneck: 1x1, 3x3 and 1x1."""

    def __init__(self, c_in: int, channels: int, c_out: int, stride: int, project: bool, zero_scale: bool) -> None:
        super().__init__()
        self.bottleneck = c_out != channels
        kernel, strides = (1, (1, stride)) if self.bottleneck else (3, (stride, 1))
        self.conv1, self.bn1 = _conv(c_in, channels, kernel, strides[0]), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, strides[1]), nn.BatchNorm2d(channels)
        if self.bottleneck:
            self.conv3, self.bn3 = _conv(channels, c_out, 1), nn.BatchNorm2d(c_out)
        shortcut = (_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out)) if project else ()
        self.downsample = nn.Sequential(*shortcut)
        if zero_scale:
            nn.init.zeros_((self.bn3 if self.bottleneck else self.bn2).weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(torch.relu_(y)))
        return torch.relu_(y.add_(self.downsample(x)))


class SamePool(nn.Module):
    """TensorFlow's 3x3 max-pool of stride 2 with padding SAME: even sizes are padded after the image only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)


class ResNet(nn.Module):
    """Images [B, 3, H, W] to features [B, num_features]; made by `resnet`."""

    def __init__(self, arch: Arch, stem: Stem, base: int, official: bool) -> None:
        super().__init__()
        kernel, stride, pooled = stem
        self.conv1, self.bn1 = _conv(3, base, kernel, stride), nn.BatchNorm2d(base)
        pool = SamePool() if official else nn.MaxPool2d(3, 2, padding=1)
        self.maxpool = pool if pooled else nn.Identity()
        self.groups = [f"layer{i + 1}" for i in range(len(arch.depths))]
        c_in = base
        for i, (name, depth) in enumerate(zip(self.groups, arch.depths, strict=True)):
            channels, stride = base * 2**i, min(i + 1, 2)
            c_out = channels * 4 if arch.bottleneck else channels
            project = official or stride > 1 or c_in != c_out
            first = Block(c_in, channels, c_out, stride, project, arch.zero_scale)
            rest = [Block(c_out, channels, c_out, 1, False, arch.zero_scale) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
            c_in = c_out
        self.num_features = c_in

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(x))))
        for name in self.groups:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def resnet(
    arch: str,
    *,
    width: float = 1.0,
    stem: Literal["imagenet", "small"] = "imagenet",
    variant: Literal["torchvision", "official"] = "torchvision",
) -> ResNet:
    """Build an encoder with new weights, drawn from torch's global generator.

    Args:
        arch: a name in `ARCHS`: torchvision's, or resnet8, a demonstration of three basic blocks (its stem is
            always 3x3, stride 2, no max-pool).
        width: factor on every channel count, the stem's included: 64 becomes 64 * width, rounded.
        stem: "imagenet" is 7x7, stride 2, max-pool; "small" is 3x3, stride 1, for images of up to 32 pixels.
        variant: "official" is TensorFlow's: a projection in every group's first shortcut, a SAME max-pool.
    Returns:
        A module: images [B, 3, H, W] of the weights' dtype to features [B, num_features], means over the last
        map; num_features is 256 * width for resnet8, 512 * width for ResNet-18 and 34, else 2048 * width.
    Raises:
        ValueError: an unknown arch, stem or variant; a width that is not finite or leaves no channel.
    """
    kind = ARCHS[choose("arch", arch, ARCHS)]
    common = STEMS[choose("stem", stem, STEMS)]
    choose("variant", variant, ("torchvision", "official"))
    if not (math.isfinite(width) and round(64 * width) >= 1):
        raise ValueError(f"width must be finite and leave at least 1 of 64 channels, got {width=}")
    return ResNet(kind, kind.stem or common, round(64 * width), official=variant == "official")
