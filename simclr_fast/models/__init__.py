"""Encoders and projection heads."""

import math

from torch import nn

from simclr_fast.config import ConfigError, choose
from simclr_fast.models.heads import projection_head
from simclr_fast.models.resnet import ARCHS, ResNet, resnet
from simclr_fast.models.timm_encoder import PREFIX, check_timm, timm_encoder

__all__ = ["ARCHS", "SMALL_IMAGE", "ResNet", "check_arch", "encoder", "projection_head", "resnet"]

SMALL_IMAGE = 32  # up to this side the original uses the stem for small images (google-research/simclr, resnet.py)


def check_arch(arch: str, width: float = 1.0) -> None:
    """Whether `encoder` knows the arch and has it at this width; no model is built.

    Raises:
        ConfigError: an unknown arch; a width that leaves no channel, or that timm's models do not have; timm missing.
    """
    if arch.startswith(PREFIX):
        check_timm(arch)
        if width != 1:
            raise ConfigError(f"width must be 1 for timm's models, whose names say how wide they are, got {width=}")
        return
    choose("arch", arch, [*ARCHS, f"{PREFIX}NAME"])
    if not 1 / 128 < width < math.inf:
        raise ConfigError(f"width must be finite and large enough to leave one of 64 channels, got {width=}")


def encoder(arch: str, *, width: float = 1.0, image_size: int = 224) -> nn.Module:
    """Build an encoder with new weights, drawn from torch's global generator.

    Args:
        arch: a name in `ARCHS`, or `timm:NAME` with one of timm's names.
        width: factor on every channel count; 1 for timm's models.
        image_size: side of the images in pixels. Up to `SMALL_IMAGE`, ResNets get the stem for small images; timm's
            vision transformers are built for this size.
    Returns:
        A module: images [B, 3, image_size, image_size] to features [B, num_features], an attribute of it.
    Raises:
        ConfigError: what `check_arch` refuses; a model of timm's that does not take such images or gives no vectors.
    """
    check_arch(arch, width)
    if arch.startswith(PREFIX):
        return timm_encoder(arch, image_size)
    return resnet(arch, width=width, stem="small" if image_size <= SMALL_IMAGE else "imagenet")
