"""ResNet encoders without a classifier, in torchvision's layout and, as a variant, in the original SimCLR's.

Module names are torchvision's (conv1, layer1.0.bn2, ...), so its state dicts load both ways, except for `fc`.
Initial weights are the original's: truncated normal convolutions of variance 1 / fan_in, and scale 0 in the
last BN of every residual branch (but for resnet8), so that each block starts as its shortcut.

Sources: He et al. 2015, arXiv:1512.03385, with the stride of a bottleneck on its 3x3 convolution;
Chen et al. 2020, arXiv:2002.05709; github.com/google-research/simclr.
"""

import math
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast.config import choose
from simclr_fast.models.batchnorm import BatchNorm2d
from simclr_fast.models.sk import Select, ShortcutPool, gate_channels

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


def _select(channels: int, ratio: float) -> nn.Module:
    gate = gate_channels(channels, ratio)
    return Select(_conv(channels, gate, 1), _conv(gate, 2 * channels, 1))


class Block(nn.Module):
    """relu(branch(x) + shortcut(x)); the branch is 3x3 and 3x3, or the bottleneck: 1x1, 3x3 and 1x1.

    With `sk_ratio`, the bottleneck's 3x3 makes two streams, of which one is selected.
    """

    def __init__(
        self, c_in: int, channels: int, c_out: int, stride: int, project: bool, zero_scale: bool, sk_ratio: float
    ) -> None:
        super().__init__()
        self.bottleneck = c_out != channels
        kernel, strides = (1, (1, stride)) if self.bottleneck else (3, (stride, 1))
        streams = 2 * channels if sk_ratio else channels
        self.conv1, self.bn1 = _conv(c_in, channels, kernel, strides[0]), BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, streams, 3, strides[1]), BatchNorm2d(streams)
        if self.bottleneck:
            self.select = _select(channels, sk_ratio) if sk_ratio else nn.Identity()
            self.conv3, self.bn3 = _conv(channels, c_out, 1), BatchNorm2d(c_out)
        pool, stride = ([ShortcutPool(stride)], 1) if sk_ratio else ([], stride)
        shortcut = (*pool, _conv(c_in, c_out, 1, stride), BatchNorm2d(c_out)) if project else ()
        self.downsample = nn.Sequential(*shortcut)
        if zero_scale:
            nn.init.zeros_((self.bn3 if self.bottleneck else self.bn2).weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn1(self.conv1(x), relu=True))
        last = self.bn2
        if self.bottleneck:
            y, last = self.conv3(self.select(self.bn2(y, relu=True))), self.bn3
        return last(y, residual=self.downsample(x), relu=True)


def _deep_stem(base: int) -> nn.Sequential:
    """ResNet-D's three 3x3 convolutions in place of the 7x7."""
    half = base // 2
    first, second = (_conv(3, half, 3, 2), BatchNorm2d(half)), (_conv(half, half, 3), BatchNorm2d(half))
    return nn.Sequential(*first, nn.ReLU(inplace=True), *second, nn.ReLU(inplace=True), _conv(half, base, 3))


class SamePool(nn.Module):
    """TensorFlow's 3x3 max-pool of stride 2 with padding SAME: even sizes are padded after the image only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)


class ResNet(nn.Module):
    """Images [B, 3, H, W] to features [B, num_features]; made by `resnet`."""

    def __init__(self, arch: Arch, stem: Stem, base: int, official: bool, sk_ratio: float) -> None:
        super().__init__()
        kernel, stride, pooled = stem
        self.conv1: nn.Module = _deep_stem(base) if sk_ratio and pooled else _conv(3, base, kernel, stride)
        self.bn1 = BatchNorm2d(base)
        pool = SamePool() if official else nn.MaxPool2d(3, 2, padding=1)
        self.maxpool = pool if pooled else nn.Identity()
        self.groups = [f"layer{i + 1}" for i in range(len(arch.depths))]
        c_in = base
        for i, (name, depth) in enumerate(zip(self.groups, arch.depths, strict=True)):
            channels, stride = base * 2**i, min(i + 1, 2)
            c_out = channels * 4 if arch.bottleneck else channels
            project = official or stride > 1 or c_in != c_out
            first = Block(c_in, channels, c_out, stride, project, arch.zero_scale, sk_ratio)
            rest = [Block(c_out, channels, c_out, 1, False, arch.zero_scale, sk_ratio) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
            c_in = c_out
        self.num_features = c_in

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        for name in self.groups:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def resnet(
    arch: str,
    *,
    width: float = 1.0,
    stem: Literal["imagenet", "small"] = "imagenet",
    variant: Literal["torchvision", "official"] = "torchvision",
    sk_ratio: float = 0.0,
) -> ResNet:
    """Build an encoder with new weights, drawn from torch's global generator.

    Args:
        arch: a name in `ARCHS`: torchvision's, or resnet8, a demonstration of three basic blocks (its stem is
            always 3x3, stride 2, no max-pool).
        width: factor on every channel count, the stem's included: 64 becomes 64 * width, rounded.
        stem: "imagenet" is 7x7, stride 2, max-pool; "small" is 3x3, stride 1, for images of up to 32 pixels.
        variant: "official" is TensorFlow's: a projection in every group's first shortcut, a SAME max-pool.
        sk_ratio: with "official" and bottlenecks, selective kernels whose gates have this share of the channels, and
            ResNet-D's stem and shortcuts: 0.0625 in SimCLR v2; 0 is none.
    Returns:
        A module: images [B, 3, H, W] of the weights' dtype to features [B, num_features], means over the last
        map; num_features is 256 * width for resnet8, 512 * width for ResNet-18 and 34, else 2048 * width.
    Raises:
        ValueError: an unknown arch, stem or variant; a width that is not finite or leaves no channel; an sk_ratio
            outside of [0, 1], or for a network that has no selective kernels.
    """
    kind = ARCHS[choose("arch", arch, ARCHS)]
    common = STEMS[choose("stem", stem, STEMS)]
    choose("variant", variant, ("torchvision", "official"))
    if not (math.isfinite(width) and round(64 * width) >= 1):
        raise ValueError(f"width must be finite and leave at least 1 of 64 channels, got {width=}")
    if not 0 <= sk_ratio <= 1 or (sk_ratio and not (kind.bottleneck and variant == "official")):
        raise ValueError(
            f"sk_ratio must be in [0, 1], and 0 but for variant official of an arch with bottlenecks, got {sk_ratio=}, "
            f"{arch=}, {variant=}"
        )
    return ResNet(kind, kind.stem or common, round(64 * width), variant == "official", sk_ratio)
