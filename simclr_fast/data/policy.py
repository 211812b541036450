"""Which image stands where in the stream, and how each view of it is made.

Everything here is a pure function of (seed, epoch, image, view), so the global batches and their views are the
same for any number of ranks, workers and engines, and to go on with a run takes only the number of its step.
The uniform numbers come from a counter-based generator, splitmix64's finaliser over those words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

ASPECTS = (3 / 4, 4 / 3)  # width / height of a random crop
TF_MIN_COVERED = 0.1  # min_object_covered of the original, which overrules its smallest area of .08
TEST_CROP = 0.875
MAX_UNCROPPED = 32  # sides up to which the central crop is the whole square, as in the original
SIGMAS = (0.1, 2.0)
PACKED = 16  # numbers that describe a view

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER_STREAM = 2**32  # stands where the epoch stands, so that an order shares no numbers with the views
Uniform = Callable[[int], np.ndarray]  # slot -> [B] in [0, 1)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*words: int | np.ndarray) -> np.ndarray:
    """uint64 [B] out of words that are integers or integer arrays [B]."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix((state + _GOLDEN) ^ np.asarray(word).astype(np.uint64))
    return state


def _uniform(keys: np.ndarray, slot: int) -> np.ndarray:
    """float64 in [0, 1), the slot-th number of each key."""
    counter = np.array([slot + 1], np.uint64) * _GOLDEN
    return (_mix(keys + counter) >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the n images in an epoch, int64 [n]."""
    return np.argsort(_hash(seed, epoch + _ORDER_STREAM, np.arange(n)), kind="stable")


def stream(n: int, batch: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, epochs), int64 [batch]: the images of a global batch. Batches straddle epoch borders."""
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    indices = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(n, seed, int(epoch))[places[here]]
    return indices, epochs


@dataclass(frozen=True, eq=False)
class Params:
    """The augmentation of B samples, one row each."""

    window: np.ndarray  # int64 [B, 4]: y, x, height, width of the crop in pixels of the image
    flip: np.ndarray  # bool [B], and so are jitter and gray
    jitter: np.ndarray
    gray: np.ndarray
    factors: np.ndarray  # float32 [B, 4]: brightness, contrast, saturation; hue in turns
    order: np.ndarray  # uint8 [B, 4]: the order of those four
    sigma: np.ndarray  # float32 [B]: of the blur in pixels of the view, 0 for none
    dialect: Literal["torchvision", "tf"] = "torchvision"  # whose operators they are for

    def packed(self) -> np.ndarray:
        """float32 [B, 16]: window (4), flip, jitter, gray, factors (4), order (4), sigma."""
        flags = self.flip, self.jitter, self.gray
        return np.column_stack([self.window, *flags, self.factors, self.order, self.sigma]).astype(np.float32)

    def __len__(self) -> int:
        return len(self.sigma)


@dataclass(frozen=True)
class Policy:
    """SimCLR's augmentation (Chen et al. 2020, appendix A) for views of `size` x `size` pixels.

    Both dialects crop, resize (bicubic), flip, jitter colours in random order, drop colour, and blur:

    - `torchvision`: RandomResizedCrop, antialiased; ColorJitter; blur with reflected borders; ImageNet's mean and std.
    - `tf`: the original code's crop law, without antialias; contrast about each channel's mean; saturation in HSV;
      blur with zero borders; values in [0, 1]. The original draws one sigma for each batch and replica, here each
      image has its own, since a batch is cut differently on other numbers of ranks.
    """

    size: int
    dialect: Literal["torchvision", "tf"] = "torchvision"
    min_area: float = 0.08
    flip: float = 0.5
    jitter_strength: float = 1.0
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.5
    test_crop: float = TEST_CROP  # part of the shorter side that the central crop keeps

    def __post_init__(self) -> None:
        self._require("size", self.size >= 1, "at least 1")
        self._require("dialect", self.dialect in _CROPS, f"one of {', '.join(_CROPS)}")
        self._require("min_area", 0 < self.min_area <= 1, "in (0, 1]")
        self._require("test_crop", 0 < self.test_crop <= 1, "in (0, 1]")
        self._require("jitter_strength", 0 <= self.jitter_strength <= 1.25, "in [0, 1.25]")
        for name in ("flip", "jitter_p", "gray_p", "blur_p"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a probability")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {name}={getattr(self, name)!r}")

    @property
    def mean(self) -> tuple[float, float, float]:
        """Subtracted from the channels, whose values are in [0, 1]."""
        return (0.485, 0.456, 0.406) if self.dialect == "torchvision" else (0.0, 0.0, 0.0)

    @property
    def std(self) -> tuple[float, float, float]:
        """Then divided by."""
        return (0.229, 0.224, 0.225) if self.dialect == "torchvision" else (1.0, 1.0, 1.0)

    @property
    def blur_radius(self) -> int:
        """The blur has 2 * radius + 1 taps: 3 at 32 pixels, 9 at 96, 17 at 224.

        The original has a tenth of the side, 23 at 224; those over 4 sigma hold less than 1e-4 of the sum.
        """
        return min(self.size // 10 // 2, int(4 * SIGMAS[1]))

    @property
    def constants(self) -> tuple[bool, tuple[float, float, float], tuple[float, float, float], int]:
        """What all views have in common beside their size: (whether the dialect is tf, mean, std, blur radius)."""
        return self.dialect == "tf", self.mean, self.std, self.blur_radius

    def draw(self, seed: int, epochs: np.ndarray, indices: np.ndarray, view: int, sizes: np.ndarray) -> Params:
        """Parameters of a view (0 or 1) of images `indices` [B] in `epochs` [B]; `sizes` [B, 2] is height, width."""
        keys = _hash(seed, epochs, indices, view)
        n, strength = len(keys), self.jitter_strength

        def u(slot: int) -> np.ndarray:
            return _uniform(keys, slot)

        centred = np.stack([2 * u(slot) - 1 for slot in range(4, 8)], axis=1)
        factors = np.array([0, 0, 0, 1]) * 0.2 * strength * centred
        factors[:, :3] = 1 + 0.8 * strength * centred[:, :3]
        sigma = np.where(u(3) < self.blur_p, SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * u(12), 0)
        return Params(
            window=self._crop(u, sizes),
            flip=u(0) < self.flip,
            jitter=u(1) < (self.jitter_p if strength else 0),
            gray=u(2) < self.gray_p,
            factors=factors.astype(np.float32),
            order=np.argsort([u(slot) for slot in range(8, 12)], axis=0).T.astype(np.uint8).reshape(n, 4),
            sigma=sigma.astype(np.float32),
            dialect=self.dialect,
        )

    def _crop(self, u: Uniform, sizes: np.ndarray) -> np.ndarray:
        propose, attempts, fallback = _CROPS[self.dialect]
        window, missing = fallback(sizes), np.ones(len(sizes), bool)
        for attempt in range(attempts):
            first = 16 + 4 * attempt
            proposed, fits = propose([u(slot) for slot in range(first, first + 4)], sizes, self.min_area)
            window[missing & fits] = proposed[missing & fits]
            missing &= ~fits
            if not missing.any():
                break
        return window

    def center(self, sizes: np.ndarray) -> Params:
        """For evaluation: the central square, `test_crop` of the shorter side; all of it for views up to 32 pixels."""
        n = len(sizes)
        side = np.min(sizes, axis=1)
        if self.size > MAX_UNCROPPED:
            side = np.maximum(np.rint(self.test_crop * side), 1).astype(np.int64)
        corner = (sizes - side[:, None] + 1) // 2
        off = np.zeros(n, bool)
        return Params(
            window=np.column_stack([corner, side, side]),
            flip=off,
            jitter=off,
            gray=off,
            factors=np.tile(np.array([1, 1, 1, 0], np.float32), (n, 1)),
            order=np.tile(np.arange(4, dtype=np.uint8), (n, 1)),
            sigma=np.zeros(n, np.float32),
            dialect=self.dialect,
        )


def _place(u: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Integers uniform in [0, room), 0 where there is no room."""
    return np.floor(u * np.maximum(room, 1)).astype(np.int64)


def _torchvision_crop(u: list[np.ndarray], sizes: np.ndarray, min_area: float) -> tuple[np.ndarray, np.ndarray]:
    """RandomResizedCrop.get_params: area uniform, logarithm of the aspect uniform."""
    area = sizes[:, 0] * sizes[:, 1] * (min_area + (1 - min_area) * u[0])
    low, high = np.log(ASPECTS)
    aspect = np.exp(low + (high - low) * u[1])
    shape = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=1))).astype(np.int64)
    room = sizes - shape
    corner = np.column_stack([_place(u[2], room[:, 0] + 1), _place(u[3], room[:, 1] + 1)])
    return np.column_stack([corner, shape]), ((shape > 0) & (room >= 0)).all(axis=1)


def _torchvision_fallback(sizes: np.ndarray) -> np.ndarray:
    """The largest central crop whose aspect is allowed."""
    height, width = sizes.T
    shape = np.column_stack(
        [np.minimum(height, np.rint(width / ASPECTS[0])), np.minimum(width, np.rint(height * ASPECTS[1]))]
    )
    shape = np.maximum(shape, 1).astype(np.int64)
    return np.column_stack([(sizes - shape) // 2, shape])


def _tf_crop(u: list[np.ndarray], sizes: np.ndarray, min_area: float) -> tuple[np.ndarray, np.ndarray]:
    """sample_distorted_bounding_box: aspect uniform, height uniform among the integers that the area allows.

    The corner never reaches the last row or column that it could, unless the crop is as large as the image.
    """
    height, width = sizes.T
    whole = height * width
    aspect = ASPECTS[0] + (ASPECTS[1] - ASPECTS[0]) * u[0]
    tallest = np.minimum(np.rint(np.sqrt(whole / aspect)), np.minimum(np.floor((width + 0.5) / aspect), height))
    shortest = np.minimum(np.rint(np.sqrt(min_area * whole / aspect)), tallest)
    h = shortest + np.floor(u[1] * (tallest - shortest + 1))
    w = np.rint(h * aspect)
    short = w * h < min_area * whole  # from rounding
    h, w = np.where(short, h + 1, h), np.where(short, np.rint((h + 1) * aspect), w)
    fits = (h > 0) & (w > 0) & (h <= height) & (w <= width) & (w * h >= max(min_area, TF_MIN_COVERED) * whole)
    shape = np.column_stack([h, w]).astype(np.int64)
    room = sizes - shape
    return np.column_stack([_place(u[2], room[:, 0]), _place(u[3], room[:, 1]), shape]), fits


def _tf_fallback(sizes: np.ndarray) -> np.ndarray:
    return np.column_stack([np.zeros_like(sizes), sizes])


_CROPS = {
    "torchvision": (_torchvision_crop, 10, _torchvision_fallback),
    "tf": (_tf_crop, 100, _tf_fallback),
}
