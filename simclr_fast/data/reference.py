"""One view in plain PyTorch with torchvision's own operators: what every other way of making it is compared with.

The `tf` dialect's operators, which torchvision lacks, stand here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F


def view(
    image: Tensor,
    row: Sequence[float],
    size: int,
    crop: bool,
    tf: bool,
    mean: Sequence[float],
    std: Sequence[float],
    blur_radius: int,
) -> Tensor:
    """One view of an image.

    Args:
        image: [3, H, W], floating, in [0, 1]; the result has its dtype and device.
        row: the 16 numbers of `Params.packed`.
        crop: False where the image is the crop already, at its size.
    Returns:
        [3, S, S], normalised.
    """
    window, order = [int(x) for x in row[:4]], [int(x) for x in row[11:15]]
    flip, jitter, gray, *factors = (float(x) for x in row[4:11])
    sigma, x = float(row[15]), image
    if crop:
        x = F.crop(x, *window).contiguous()
        x = resize_tf(x, size) if tf else _resize(x, size)
    if jitter:
        operators = _TF if tf else _TORCHVISION
        for op in order:
            x = operators[op](x, factors[op]).clamp(0, 1)
    if gray:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    x = x.clamp(0, 1)
    if sigma and blur_radius:
        x = blur(x, sigma, blur_radius, tf)
    if flip:
        x = F.horizontal_flip(x)
    return F.normalize(x, list(mean), list(std))


def _resize(crop: Tensor, size: int) -> Tensor:
    return F.resize(crop, [size, size], F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def resize_tf(x: Tensor, size: int) -> Tensor:
    """tf.image.resize, bicubic: Keys' kernel with a = -1/2, four taps, those beyond the edge left out."""
    for axis in (1, 2):
        length = x.shape[axis]
        centre = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) * (length / size)
        at = (centre - 0.5).floor()[:, None] + torch.arange(-1, 3, device=x.device)
        d = (at + 0.5 - centre[:, None]).abs()
        weights = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
        weights *= (at >= 0) & (at < length)
        weights /= weights.sum(1, keepdim=True)
        taps = x.movedim(axis, -1)[..., at.long().clamp(0, length - 1)]
        x = (taps * weights).sum(-1).movedim(-1, axis)
    return x


def blur(x: Tensor, sigma: float, radius: int, tf: bool) -> Tensor:
    """F.gaussian_blur with 2 * radius + 1 taps (which is not separable there), in `tf` with zeros beyond the edge."""
    size, offsets = x.shape[-1], torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
    at = torch.arange(size, device=x.device)[:, None] + offsets
    inside = (at >= 0) & (at < size)
    reflected = size - 1 - (size - 1 - at.abs()).abs()
    taps = weights / weights.sum() * (inside if tf else torch.ones_like(inside))
    matrix = x.new_zeros(size, size).scatter_add_(1, reflected, taps)
    return matrix @ x @ matrix.T


def contrast_tf(x: Tensor, factor: float) -> Tensor:
    """tf.image.adjust_contrast: about each channel's mean."""
    mean = x.mean((1, 2), keepdim=True)
    return mean + factor * (x - mean)


def saturation_tf(x: Tensor, factor: float) -> Tensor:
    """tf.image.adjust_saturation: in HSV, whose saturation ends at 1."""
    value = x.amax(0)
    chroma = value - x.amin(0)
    return value - (value - x) * (value / chroma.clamp(min=1e-20)).clamp(max=factor)


def hue_tf(x: Tensor, turn: float) -> Tensor:
    """tf.image.adjust_hue, also of what is below 0, which bicubic resizing leaves and torchvision's makes NaN of."""
    value, chroma = x.amax(0), x.amax(0) - x.amin(0)
    (r, g, b), inverse = x, 1 / chroma.clamp(min=1e-20)
    hue = torch.where(value == g, (b - r) * inverse + 2, (r - g) * inverse + 4)
    hue = torch.where(value == r, (g - b) * inverse, hue) + 6 * turn
    k = torch.stack([hue + 5, hue + 3, hue + 1]) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


_TORCHVISION = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
_TF = (F.adjust_brightness, contrast_tf, saturation_tf, hue_tf)
