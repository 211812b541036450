"""`augment`: views of a batch of uint8 images on the device where they are, given the parameters of each.

Registered with torch.library as `simclr_fast::augment`. One Triton kernel sums the pixels for contrast and one makes
the views; compiled loops serve CPUs, plain PyTorch is the yardstick.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.policy import PACKED, Params, Policy

BACKENDS = ("auto", "triton", "native", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RADIUS = 24
HAS_TRITON, HAS_NUMBA = (importlib.util.find_spec(name) is not None for name in ("triton", "numba"))


def augment(
    images: Tensor,
    params: Params | Tensor,
    *,
    size: int | None = None,
    index: Tensor | None = None,
    dialect: Literal["torchvision", "tf"] | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    blur_radius: int | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """SimCLR's views of a batch of images: [crop and resize,] colour jitter, gray, blur, flip, normalise.

    Each view has its own crop window, factors, order of the four colour operators, and sigma. All is clamped to [0, 1]
    after each operator, as in torchvision (or TensorFlow, in the dialect `tf`).

    Args:
        images: uint8 [N, H, W, 3], contiguous.
        params: of the B views, `Policy.draw`'s or float32 [B, 16] (`Params.packed`) on any device. Values on a GPU are
            not looked at: windows and indices are cut back to the image.
        size: None where the images are the crops already, H = W = S, and the windows are not used; else S, the side to
            which each window is resized (bicubic, antialiased but in `tf`). H and W may then be larger than an image.
        index: int64 [B], the image of each view; None for one view of each image in order, B = N.
        dialect: whose operators; None for that of `params` (`torchvision` where they are a tensor).
        mean, std: of the channels, in [0, 1]; None for the dialect's (ImageNet's, or 0 and 1 in `tf`).
        blur_radius: the blur has 2 * radius + 1 taps, at most 49 and less than 2S; None for the policy's, 8 at 224 px.
        dtype: of the views: float32, float16 or bfloat16; float64 with `reference`.
        backend: `triton`; `native`, compiled for the CPU; `reference`, plain PyTorch, view by view; or `auto`: Triton
            on a GPU, native on a CPU, reference where that is not installed.
    Returns:
        [B, 3, S, S] in channels_last strides.
    Raises:
        ValueError: an argument breaks its rule; the text names it and says what it got.
    """
    _require(isinstance(images, Tensor), "images must be a tensor", type(images).__name__)
    _require(images.dtype == torch.uint8, "images must be uint8", images.dtype)
    shaped = images.ndim == 4 and images.shape[3] == 3 and 0 not in images.shape[1:]
    _require(shaped, "images must be [N, H, W, 3]", list(images.shape))
    _require(images.is_contiguous(), "images must be contiguous", images.stride())
    crop = size is not None
    side = images.shape[1] if size is None else size
    square = crop or images.shape[1] == images.shape[2]
    _require(square, "images must be square without size: crops, resized", list(images.shape))
    _require(1 <= side <= 16384, "size must be in 1 to 16384, or None", size)
    _require(images.shape[1:].numel() < 2**31, "images must have under 2^31 bytes each", list(images.shape))
    drawn_for = params.dialect if isinstance(params, Params) else dialect
    _require(dialect in (None, drawn_for), "dialect must be left out, or that of params", repr(dialect))
    policy = Policy(side, dialect=drawn_for or "torchvision")
    mean, std = policy.mean if mean is None else mean, policy.std if std is None else std
    for name, values in (("mean", mean), ("std", std)):
        _require(len(values) == 3, f"{name} must be three numbers", values)
    _require(all(value > 0 for value in std), "std must be positive", std)
    radius = policy.blur_radius if blur_radius is None else blur_radius
    limit = min(MAX_RADIUS, side - 1)  # a reflection stays inside
    _require(0 <= radius <= limit, f"blur_radius must be in 0 to {limit} for views of {side} px", radius)
    backend = _backend(backend, images.device)
    allowed = (*DTYPES, torch.float64) if backend == "reference" else DTYPES
    _require(dtype in allowed, f"dtype must be one of {allowed} for backend={backend!r}", dtype)
    rows, index = _rows(images, params, index, side, crop)
    constants = [float(value) for value in (*mean, *std)]
    return _augment(images, rows, index, side, crop, policy.dialect == "tf", constants, radius, dtype, backend)


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {got}")


def _backend(backend: str, device: torch.device) -> str:
    _require(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}", repr(backend))
    if backend == "auto":
        fast, there = ("triton", HAS_TRITON) if device.type == "cuda" else ("native", HAS_NUMBA)
        return fast if there else "reference"
    _require(backend != "native" or device.type == "cpu", "backend must not be 'native' but on the CPU", device)
    _require(backend != "native" or HAS_NUMBA, "backend must not be 'native' where numba is not installed", backend)
    _require(backend != "triton" or HAS_TRITON, "backend must not be 'triton' where Triton is not installed", backend)
    return backend


def _rows(
    images: Tensor, params: Params | Tensor, index: Tensor | None, side: int, crop: bool
) -> tuple[Tensor, Tensor]:
    """The parameters as float32 [B, 16] and the index, checked, on the images' device."""
    packed = torch.from_numpy(params.packed()) if isinstance(params, Params) else params
    right = isinstance(packed, Tensor) and packed.ndim == 2 and packed.shape[1] == PACKED
    _require(right, f"params must be Params or [B, {PACKED}]", getattr(packed, "shape", type(packed).__name__))
    _require(packed.dtype == torch.float32, "params must be float32", packed.dtype)
    everything = index is None
    index = torch.arange(len(images), device=images.device) if index is None else index
    _require(index.dtype == torch.int64 and index.ndim == 1, "index must be int64 [B]", (index.dtype, index.ndim))
    counts = f"{len(packed)} rows and {len(index)} {'images' if everything else 'indices'}"
    _require(len(index) == len(packed), "params must have a row for each view", counts)
    device, non_blocking = images.device, images.is_cuda
    checked = packed.device.type == "cpu" or device.type == "cpu", index.device.type == "cpu" or device.type == "cpu"
    if not non_blocking:
        packed, index = packed.to(device), index.to(device)
    if not torch.compiler.is_compiling():
        if checked[1] and len(index):
            inside = 0 <= int(index.min()) and int(index.max()) < len(images)
            _require(inside, f"index must be in 0 to {len(images) - 1}", (int(index.min()), int(index.max())))
        if checked[0]:
            _check(packed.numpy(), images.shape[1:3], crop)
    rows, which = packed.to(device, non_blocking=non_blocking), index.to(device, non_blocking=non_blocking)
    return rows.contiguous(), which.contiguous()


def _check(rows: np.ndarray, shape: torch.Size, crop: bool) -> None:
    """Raises a ValueError for the first row that is no view of an image of that shape."""
    window, flags, order, sigma = rows[:, :4], rows[:, 4:7], rows[:, 11:15], rows[:, 15]
    rules = {
        "finite": np.isfinite(rows).all(1),
        "flags (columns 4-6) of 0 or 1": ((flags == 0) | (flags == 1)).all(1),
        "an order of the operators 0 to 3 (columns 11-14)": (np.sort(order, axis=1) == np.arange(4)).all(1),
        "a sigma (column 15) of 0 or more": sigma >= 0,
    }
    if crop:
        inside = (window[:, :2] >= 0) & (window[:, 2:] >= 1) & (window[:, :2] + window[:, 2:] <= np.array(shape))
        rules[f"a window (columns 0-3: y, x, height, width) inside the image {list(shape)}"] = inside.all(1)
    for rule, holds in rules.items():
        if not holds.all():
            row = int(np.argmin(holds))
            raise ValueError(f"params must have {rule}, got in row {row} {rows[row].tolist()}")


@torch.library.custom_op("simclr_fast::augment", mutates_args=())
def _augment(
    images: Tensor,
    params: Tensor,
    index: Tensor,
    size: int,
    crop: bool,
    tf: bool,
    constants: list[float],
    blur_radius: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    mean, std = constants[:3], constants[3:]
    if backend == "triton":
        from simclr_fast.kernels import augment as kernels

        numbers = _on_device(tuple(constants), images.device)
        out = kernels.augment(images, params, index, size, crop, tf, numbers, blur_radius, dtype)
    elif backend == "native":
        out = _native(images, params, index, size, crop, tf, mean, std, blur_radius).to(dtype)
    else:
        out = _reference(images, params, index, size, crop, tf, mean, std, blur_radius, dtype)
    return out.permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _on_device(constants: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean and 1 / std, copied once and not in every step."""
    return torch.tensor([*constants[:3], *(1 / value for value in constants[3:])], dtype=torch.float32).to(device)


@_augment.register_fake
def _(images, params, index, size, crop, tf, constants, blur_radius, dtype, backend):
    return images.new_empty(len(params), size, size, 3, dtype=dtype).permute(0, 3, 1, 2)


def _native(images, params, index, size, crop, tf, mean, std, radius) -> Tensor:
    from simclr_fast.data.render import render

    out = torch.empty(len(params), size, size, 3)
    pixels, rows, views, which = images.numpy(), params.numpy().copy(), out.numpy(), index.numpy()
    if not crop:
        rows[:, :4] = 0, 0, size, size
    constants = tf, np.array(mean, np.float32), np.array(std, np.float32), radius

    def share(first: int) -> None:
        for k in range(first, len(rows), threads):
            render(views[k], pixels[which[k]], rows[k], *constants)

    threads = max(1, min(torch.get_num_threads(), len(rows)))
    if threads == 1:
        share(0)
        return out
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
    return out


def _reference(images, params, index, size, crop, tf, mean, std, radius, dtype) -> Tensor:
    from simclr_fast.data.reference import view

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(len(params), size, size, 3, dtype=dtype, device=images.device)
    for k, (row, which) in enumerate(zip(params.tolist(), index.tolist(), strict=True)):
        image = images[which].permute(2, 0, 1).to(exact) / 255
        out[k] = view(image, row, size, crop, tf, mean, std, radius).permute(1, 2, 0)
    return out
