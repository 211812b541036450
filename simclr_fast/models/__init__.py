"""Encoders and projection heads."""

from simclr_fast.models.heads import projection_head
from simclr_fast.models.resnet import ARCHS, ResNet, resnet

__all__ = ["ARCHS", "ResNet", "projection_head", "resnet"]
