"""Selective kernels and ResNet-D's shortcut, as SimCLR v2's larger networks have them.

Sources: Li et al. 2019, arXiv:1903.06586; He et al. 2018, arXiv:1812.01187; Chen et al. 2020, arXiv:2006.10029;
github.com/google-research/simclr.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast.models.batchnorm import BatchNorm2d

MIN_GATE = 32  # channels


def gate_channels(channels: int, ratio: float) -> int:
    """Of the hidden layer of a gate over streams of `channels`."""
    return max(int(channels * ratio), MIN_GATE)


class Select(nn.Module):
    """Two streams [B, 2C, H, W] to one [B, C, H, W]: a mean whose weights a gate draws from both, by channel."""

    def __init__(self, reduce: nn.Conv2d, expand: nn.Conv2d) -> None:
        """
        Args:
            reduce: 1x1, C channels to those of the gate.
            expand: 1x1, from there to 2C.
        """
        super().__init__()
        self.reduce, self.bn, self.expand = reduce, BatchNorm2d(reduce.out_channels), expand

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        gate = self.expand(self.bn(self.reduce((one + two).mean((2, 3), keepdim=True)), relu=True))
        first, second = gate.chunk(2, 1)
        share = (first - second).sigmoid()  # a softmax over two
        return one * share + two * (1 - share)


class ShortcutPool(nn.Module):
    """2x2 average pool of TensorFlow: at stride 1 what lies outside does not count, at stride 2 it counts as zeros."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1), mode="replicate" if self.stride == 1 else "constant")
        return F.avg_pool2d(x, 2, self.stride)
