"""What is done to images, so that a classifier of their features shall tell it: colour, rotation, noise, edges.

The label of an image depends on the seed and the image's index alone, and so does its noise: not on batches and ranks.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from simclr_fast.data import Policy

Operator = Callable[[Tensor, Tensor, "Change"], Tensor]


@dataclass(frozen=True)
class Property:
    """Something that images have, and a label for it; label 0 leaves an image as it is."""

    name: str
    shares: tuple[float, ...]
    """Of the images, that get each label."""
    paper: tuple[float, float]
    """Accuracies of h and of g(h) in table 3 of the paper."""
    operator: Operator

    def labels(self, n: int, seed: int, part: str) -> np.ndarray:
        """Labels int64 [n] of the n images of a part of the data."""
        rng = np.random.default_rng([seed, zlib.crc32(f"{self.name} {part}".encode())])
        return np.searchsorted(np.cumsum(self.shares[:-1]), rng.random(n), side="right").astype(np.int64)


@dataclass(frozen=True)
class Change:
    """A property's operator for `features.Extractor`, on images that a policy has prepared."""

    of: Property
    labels: np.ndarray  # int64, of all images of the part
    policy: Policy
    seed: int
    noise: float
    """Standard deviation, of values in [0, 1]."""

    @property
    def key(self) -> str:
        """All that it does, for the cache."""
        labels = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes()).hexdigest()[:16]
        return f"{self.of.name} {labels} seed {self.seed} noise {self.noise} 1"

    def __call__(self, images: Tensor, indices: np.ndarray) -> Tensor:
        """Prepared images [B, 3, S, S] float32 changed by their labels."""
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(3, 1, 1)
            for values in (self.policy.mean, self.policy.std)
        )
        rows = torch.from_numpy(np.asarray(indices, np.int64))
        changed = self.of.operator((images * std + mean).clamp(0, 1), rows, self).clamp(0, 1)
        return ((changed - mean) / std).contiguous(memory_format=torch.channels_last)

    def among(self, indices: Tensor) -> Tensor:
        """Labels [B] of images."""
        return torch.from_numpy(self.labels)[indices]


def gray(images: Tensor, indices: Tensor, change: Change) -> Tensor:
    return torch.where(_marked(images, indices, change), V.rgb_to_grayscale(images, 3), images)


def rotated(images: Tensor, indices: Tensor, change: Change) -> Tensor:
    """By as many quarter turns as the label says."""
    turned, labels = images.clone(), change.among(indices).to(images.device)
    for turns in (1, 2, 3):
        turned[labels == turns] = torch.rot90(images[labels == turns], turns, (2, 3))
    return turned


def noisy(images: Tensor, indices: Tensor, change: Change) -> Tensor:
    """Gaussian noise, of its own for each image."""
    noise, generator = torch.empty_like(images), torch.Generator(images.device)
    for index, out in zip(indices.tolist(), noise, strict=True):
        words = np.random.SeedSequence([change.seed, index]).generate_state(1, np.uint64)
        generator.manual_seed(int(words[0]) >> 1)
        out.copy_(torch.randn(out.shape, generator=generator, device=out.device))
    return torch.where(_marked(images, indices, change), images + change.noise * noise, images)


def edges(images: Tensor, indices: Tensor, change: Change) -> Tensor:
    """The length of Sobel's gradient of the brightness, where a step from 0 to 1 gives 1."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=images.dtype, device=images.device) / 4
    kernels = torch.stack([across, across.T])[:, None]
    brightness = F.pad(V.rgb_to_grayscale(images, 1), (1, 1, 1, 1), mode="replicate")
    found = F.conv2d(brightness, kernels).square().sum(1, keepdim=True).sqrt()
    return torch.where(_marked(images, indices, change), found.expand_as(images), images)


def _marked(images: Tensor, indices: Tensor, change: Change) -> Tensor:
    return (change.among(indices) > 0).view(-1, 1, 1, 1).to(images.device)


PROPERTIES = (
    Property("colour or grayscale", (0.8, 0.2), (0.993, 0.974), gray),
    Property("rotation by 0, 90, 180, 270 degrees", (0.25,) * 4, (0.676, 0.256), rotated),
    Property("original or noisy", (0.5, 0.5), (0.995, 0.596), noisy),
    Property("original or Sobel filtered", (0.5, 0.5), (0.966, 0.563), edges),
)
"""Those of table 3 of the paper (Chen et al. 2020)."""
