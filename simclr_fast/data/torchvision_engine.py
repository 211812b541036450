"""The engine for where DALI cannot be had: Pillow decodes, torchvision makes the views, in worker processes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from simclr_fast.data.policy import Batch, Params, Policy
from simclr_fast.data.sources import Split


def run(
    split: Split, policy: Policy, steps: range, plan: Callable[[int], Batch], workers: int, device: torch.device
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Make what is planned for each step: (views, indices), as `train_views` gives them."""
    loader = DataLoader(
        _Steps(split, policy, steps, plan),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that the global one stays as it is
    )
    for views, indices in loader:
        yield [view.permute(0, 3, 1, 2).to(device, non_blocking=True) for view in views], indices.numpy()


class _Steps(Dataset):
    """Whole batches: the k-th item is (views, each float32 [B, S, S, 3], indices) of the k-th step."""

    def __init__(self, split: Split, policy: Policy, steps: range, plan: Callable[[int], Batch]) -> None:
        self.split, self.policy, self.steps, self.plan = split, policy, steps, plan

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, k: int) -> tuple[list[Tensor], np.ndarray]:
        indices, params = self.plan(self.steps[k])
        views = [torch.empty(len(indices), self.policy.size, self.policy.size, 3) for _ in params]
        for row, index in enumerate(indices):
            image = decode(self.split.read(index))
            for out, one in zip(views, params, strict=True):
                out[row] = _view(image, one, row, self.policy).permute(1, 2, 0)
        return views, indices


def decode(encoded: np.ndarray) -> Tensor:
    """uint8 [3, H, W], not rotated by EXIF."""
    image: Image.Image = Image.open(io.BytesIO(encoded.tobytes()))
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return F.pil_to_tensor(image.convert("RGB"))


def _view(image: Tensor, params: Params, row: int, policy: Policy) -> Tensor:
    """float32 [3, S, S]."""
    tf = policy.dialect == "tf"
    crop = F.crop(image, *params.window[row].tolist()).contiguous()
    x = F.to_dtype(crop, torch.float32, scale=True)
    x = _resize_tf(x, policy.size) if tf else _resize(x, policy.size)
    if params.jitter[row]:
        operators = (F.adjust_brightness, *((_contrast_tf, _saturation_tf) if tf else _TORCHVISION), F.adjust_hue)
        for op in params.order[row]:
            x = operators[op](x, float(params.factors[row, op])).clamp(0, 1)
    if params.gray[row]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    x = x.clamp(0, 1)
    if params.sigma[row] and policy.blur_radius:
        x = _blur(x, float(params.sigma[row]), policy.blur_radius, tf)
    if params.flip[row]:
        x = F.horizontal_flip(x)
    return F.normalize(x, list(policy.mean), list(policy.std))


_TORCHVISION = (F.adjust_contrast, F.adjust_saturation)


def _resize(crop: Tensor, size: int) -> Tensor:
    return F.resize(crop, [size, size], F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def _resize_tf(x: Tensor, size: int) -> Tensor:
    """tf.image.resize, bicubic: Keys' kernel with a = -1/2, four taps, those beyond the edge left out."""
    for axis in (1, 2):
        length = x.shape[axis]
        centre = (torch.arange(size) + 0.5) * (length / size)
        at = (centre - 0.5).floor()[:, None] + torch.arange(-1, 3)
        d = (at + 0.5 - centre[:, None]).abs()
        weights = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
        weights *= (at >= 0) & (at < length)
        weights /= weights.sum(1, keepdim=True)
        taps = x.movedim(axis, -1)[..., at.long().clamp(0, length - 1)]
        x = (taps * weights).sum(-1).movedim(-1, axis)
    return x


def _blur(x: Tensor, sigma: float, radius: int, tf: bool) -> Tensor:
    """F.gaussian_blur with 2 * radius + 1 taps (which is not separable there), in `tf` with zeros beyond the edge."""
    size, offsets = x.shape[-1], torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    at = torch.arange(size)[:, None] + offsets
    inside = (at >= 0) & (at < size)
    reflected = size - 1 - (size - 1 - at.abs()).abs()
    taps = weights / weights.sum() * (inside if tf else torch.ones_like(inside))
    matrix = torch.zeros(size, size).scatter_add_(1, reflected, taps)
    return matrix @ x @ matrix.T


def _contrast_tf(x: Tensor, factor: float) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return mean + factor * (x - mean)


def _saturation_tf(x: Tensor, factor: float) -> Tensor:
    value = x.amax(0)
    chroma = value - x.amin(0)
    return value - (value - x) * (value / chroma.clamp(min=1e-20)).clamp(max=factor)
