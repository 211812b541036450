"""Batch normalisation of rows [M, C], with a residual and a ReLU, and its gradient.

    d  = x - mean;   scale = weight / sqrt(var + eps)
    y  = d * scale + bias (+ residual), with RELU no less than 0
    g  = dy, with RELU 0 where y is
    dx = scale * (g - sum g / n - d * sum (g d) / (n (var + eps)))

A program owns BLOCK_C channels. Where it reduces it takes every splits-th tile of rows; its threads keep mean and
squared deviations (Welford), or sums, of their own, which are combined at the end in a fixed order: no atomics, no
difference of large squares. Elementwise passes walk backwards: what the pass before has read last is in L2 still. Loads
are 16 bytes wide where C is a multiple of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = {"statistics": 4096, "sums": 2048, "elementwise": 4096}  # of a tile
MAX_BLOCK_C = 128
# A multiprocessor holds 4 such programs: 1,024 threads with at least 32 bytes on their way to each.
PER_PROCESSOR = 4
REDUCING = {"num_warps": 8, "maxnreg": 64}
ELEMENTWISE = {"num_warps": 8}
MAX_SPLITS = 1024
MERGED_C = 8


@triton.jit
def _channels(C, BLOCK_C: tl.constexpr):
    """This program's channels, and its place among those that have the same ones."""
    blocks = tl.cdiv(C, BLOCK_C)
    return tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) // blocks


@triton.jit
def _place(tile, c, M, C, BLOCK_M: tl.constexpr):
    """Rows of a tile, offsets of its elements, and whether these exist."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, row.to(tl.int64)[:, None] * C + c[None, :], (row < M)[:, None] & (c < C)[None, :]


@triton.jit
def _load(ptr, at, exists):
    return tl.load(ptr + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _combined(count, mean, squares):
    """Mean and squared deviations of all from those of parts, [parts, BLOCK_C]."""
    total = tl.sum(count, 0)
    every = tl.sum(count * mean, 0) / total
    every += tl.sum(count * (mean - every[None, :]), 0) / total  # what the first sum has lost by rounding
    apart = mean - every[None, :]
    return every, tl.sum(squares + count * apart * apart, 0)


#   reads  x;  writes  2 numbers a channel and split
@triton.jit(do_not_specialize=["M", "splits"])
def statistics_kernel(
    x_ptr,  # [M, C]
    parts_ptr,  # [splits, 2, C] out: mean and squared deviations
    M, C, splits,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, split = _channels(C, BLOCK_C)
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    seen = 0.0
    for tile in range(split, tl.cdiv(M, BLOCK_M), splits):
        row, at, exists = _place(tile, c, M, C, BLOCK_M)
        delta = _load(x_ptr, at, exists) - mean
        share = tl.where(row < M, 1.0 / (seen + 1.0), 0.0)[:, None]
        mean += delta * share
        squares += delta * delta * (share * seen)
        seen += 1.0
    step = splits * BLOCK_M
    count = (M - split * BLOCK_M - tl.arange(0, BLOCK_M) + step - 1) // step  # of the tiles that have this row
    mean, squares = _combined(count.to(tl.float32)[:, None], mean, squares)
    out = parts_ptr + split * 2 * C + c
    tl.store(out, mean, mask=c < C)
    tl.store(out + C, squares, mask=c < C)


@triton.jit(do_not_specialize=["M", "splits"])
def merge_kernel(
    parts_ptr,  # [splits, 2, C]
    mean_ptr, var_ptr,  # [C] out
    M, C, splits,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, split = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    tiles = tl.cdiv(M, BLOCK_M)
    missing = tl.where(split == (tiles - 1) % splits, tiles * BLOCK_M - M, 0)
    count = tl.where(split < splits, (tiles - split + splits - 1) // splits * BLOCK_M - missing, 0)
    exists = (split < splits)[:, None] & (c < C)[None, :]
    at = (split * 2 * C)[:, None] + c[None, :]
    mean, squares = _load(parts_ptr, at, exists), _load(parts_ptr + C, at, exists)
    mean, squares = _combined(count.to(tl.float32)[:, None], mean, squares)
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(var_ptr + c, squares / M, mask=c < C)


@triton.jit
def _channel_values(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C, HAS_BIAS: tl.constexpr):
    """Mean, var + eps, scale and bias, [1, BLOCK_C]."""
    mean, var = tl.load(mean_ptr + c, mask=c < C, other=0.0), tl.load(var_ptr + c, mask=c < C, other=0.0) + eps
    scale = tl.load(weight_ptr + c, mask=c < C, other=0.0) / tl.sqrt_rn(var)
    bias = tl.zeros_like(mean)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    return mean[None, :], var[None, :], scale[None, :], bias[None, :]


#   reads  x, residual;  writes  y
@triton.jit(do_not_specialize=["M", "eps"])
def normalise_kernel(
    x_ptr, residual_ptr,  # [M, C]
    weight_ptr, bias_ptr, mean_ptr, var_ptr,  # [C]
    y_ptr,  # [M, C] out
    M, C, eps,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, place = _channels(C, BLOCK_C)
    row, at, exists = _place(tl.cdiv(M, BLOCK_M) - 1 - place, c, M, C, BLOCK_M)
    mean, var, scale, bias = _channel_values(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C, HAS_BIAS)
    y = (_load(x_ptr, at, exists) - mean) * scale + bias
    if RESIDUAL:
        y += _load(residual_ptr, at, exists)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=exists)


#   reads  dy, x, with RESIDUAL y;  writes  with RESIDUAL g;  2 numbers a channel and split
@triton.jit(do_not_specialize=["M", "splits", "eps"])
def sums_kernel(
    dy_ptr, x_ptr, y_ptr,  # [M, C]
    weight_ptr, bias_ptr, mean_ptr, var_ptr,  # [C]
    g_ptr,  # [M, C] out
    parts_ptr,  # [splits, 2, C] out: sums of g and g d
    M, C, splits, eps,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, split = _channels(C, BLOCK_C)
    mean, var, scale, bias = _channel_values(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C, HAS_BIAS)
    level = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    slope = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(split, tl.cdiv(M, BLOCK_M), splits):
        row, at, exists = _place(tile, c, M, C, BLOCK_M)
        g, d = _load(dy_ptr, at, exists), _load(x_ptr, at, exists) - mean
        if RELU and RESIDUAL:
            g = tl.where(_load(y_ptr, at, exists) <= 0.0, 0.0, g)
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=exists)
        elif RELU:
            g = tl.where(d * scale + bias <= 0.0, 0.0, g)
        level += g
        slope += g * d
    out = parts_ptr + split * 2 * C + c
    tl.store(out, tl.sum(level, 0), mask=c < C)
    tl.store(out + C, tl.sum(slope, 0), mask=c < C)


#   reads  g, x;  writes  dx
@triton.jit(do_not_specialize=["M", "inverse", "eps"])
def gradient_kernel(
    g_ptr,  # [M, C], dy with RELU
    x_ptr,  # [M, C]
    weight_ptr, bias_ptr, mean_ptr, var_ptr,  # [C]
    sums_ptr,  # [2, C]
    dx_ptr,  # [M, C] out
    M, C, inverse, eps,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, place = _channels(C, BLOCK_C)
    row, at, exists = _place(tl.cdiv(M, BLOCK_M) - 1 - place, c, M, C, BLOCK_M)
    mean, var, scale, bias = _channel_values(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C, HAS_BIAS)
    level = tl.load(sums_ptr + c, mask=c < C, other=0.0)[None, :] * inverse
    slope = tl.load(sums_ptr + C + c, mask=c < C, other=0.0)[None, :] * inverse / var
    g, d = _load(g_ptr, at, exists), _load(x_ptr, at, exists) - mean
    if RELU:
        g = tl.where(d * scale + bias <= 0.0, 0.0, g)
    dx = scale * (g - level - d * slope)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=exists)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of every channel, fp32 [C]; x [N, C] or channels_last, without gaps."""
    M, C = rows(x)
    mean, var = (torch.empty(C, dtype=torch.float32, device=x.device) for _ in range(2))
    block, blocks, tiles = grid("statistics", M, C)
    splits = splits_of(blocks, tiles, x.device)
    parts = torch.empty(splits, 2, C, dtype=torch.float32, device=x.device)
    merged = merge_constants(splits, block["BLOCK_M"])
    with torch.cuda.device_of(x):
        statistics_kernel[(blocks * splits,)](x, parts, M, C, splits, **block, **REDUCING)
        merge_kernel[(triton.cdiv(C, MERGED_C),)](parts, mean, var, M, C, splits, **merged, **ELEMENTWISE)
    return mean, var


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    relu: bool,
) -> Tensor:  # fmt: skip
    """y, laid out as x, as the residual must be."""
    M, C = rows(x)
    y = torch.empty_like(x)
    block, blocks, tiles = grid("elementwise", M, C)
    with torch.cuda.device_of(x):
        normalise_kernel[(blocks * tiles,)](
            x, x if residual is None else residual, weight, weight if bias is None else bias, mean, var, y, M, C, eps,
            HAS_BIAS=bias is not None, RESIDUAL=residual is not None, RELU=relu, **block, **ELEMENTWISE,
        )  # fmt: skip
    return y


def gradient_sums(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """g and the sums of g and g d, fp32 [2, C]; g is a tensor of its own where `y` is given, for a ReLU after a
    residual, else dy."""
    M, C = rows(x)
    g = dy if y is None else torch.empty_like(dy)
    block, blocks, tiles = grid("sums", M, C)
    splits = splits_of(blocks, tiles, x.device)
    parts = torch.empty(splits, 2, C, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        sums_kernel[(blocks * splits,)](
            dy, x, x if y is None else y, weight, weight if bias is None else bias, mean, var, g, parts, M, C, splits,
            eps, HAS_BIAS=bias is not None, RESIDUAL=y is not None, RELU=relu, **block, **REDUCING,
        )  # fmt: skip
    return g, parts.sum(0)


def gradient(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, sums: Tensor, count: int,
    eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """dx, given the sums over all `count` rows; `relu` where g is dy and y has a ReLU."""
    M, C = rows(x)
    dx = torch.empty_like(x)
    block, blocks, tiles = grid("elementwise", M, C)
    with torch.cuda.device_of(x):
        gradient_kernel[(blocks * tiles,)](
            g, x, weight, weight if bias is None else bias, mean, var, sums, dx, M, C, 1.0 / count, eps,
            HAS_BIAS=bias is not None, RELU=relu, **block, **ELEMENTWISE,
        )  # fmt: skip
    return dx


def rows(x: Tensor) -> tuple[int, int]:
    """M and C of [N, C] or [N, C, H, W]."""
    return x.numel() // x.shape[1], x.shape[1]


def grid(kind: str, M: int, C: int) -> tuple[dict[str, int], int, int]:
    """Block sizes, blocks of channels and tiles of rows."""
    block = block_sizes(kind, C)
    return block, triton.cdiv(C, block["BLOCK_C"]), triton.cdiv(M, block["BLOCK_M"])


def splits_of(blocks: int, tiles: int, device: torch.device) -> int:
    """Programs that share the rows of a block of channels."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(PER_PROCESSOR * processors // blocks, MAX_SPLITS, tiles))


def block_sizes(kind: str, C: int) -> dict[str, int]:
    """Rows as long as useful."""
    width = min(triton.next_power_of_2(C), MAX_BLOCK_C)
    return {"BLOCK_M": ELEMENTS[kind] // width, "BLOCK_C": width}


def merge_constants(splits: int, block_m: int) -> dict[str, int]:
    """What merge_kernel is compiled for."""
    return {"BLOCK_M": block_m, "BLOCK_S": triton.next_power_of_2(splits), "BLOCK_C": MERGED_C}
