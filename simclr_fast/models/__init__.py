"""Encoders and projection heads."""

from .heads import projection_head
from .resnet import ARCHS, ResNet, resnet

__all__ = ["ARCHS", "ResNet", "projection_head", "resnet"]
