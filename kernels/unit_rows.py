"""Rows divided by their norms, and the gradient back through that division.

    divisor = max(|x|, eps);   u = x / divisor
    dx      = (du - u <u, du>) / divisor    where |x| > eps, else    du / eps        (as F.normalize)

Rows are divided by their largest element first: no square under- or overflows, whatever the row's size. x is one
tensor or two, of any strides and floating types up to float32; u has the rows of the first, then those of the second.
BLOCK_I rows at a time, BLOCK_D of a row at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row(x_ptr, row, d, stride_i, stride_d, exists):
    """Elements d of rows, fp32."""
    offset = row.to(tl.int64)[:, None] * stride_i + d.to(tl.int64)[None, :] * stride_d
    return tl.load(x_ptr + offset, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _norms(x_ptr, row, R, stride_i, stride_d, D, eps, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr):
    """Largest element, the norm of the row divided by it, and eps divided by it, [BLOCK_I]."""
    largest = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = _row(x_ptr, row, d, stride_i, stride_d, (row < R)[:, None] & (d < D)[None, :])
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    largest = tl.where(largest == 0.0, 1.0, largest)
    squares = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = _row(x_ptr, row, d, stride_i, stride_d, (row < R)[:, None] & (d < D)[None, :])
        x = x / largest[:, None]
        squares += tl.sum(x * x, 1)
    return largest, tl.sqrt(squares), eps / largest


@triton.jit
def _normalise(
    x_ptr, u_ptr, R, stride_i, stride_d, D, width, eps, segment, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    largest, norm, floor = _norms(x_ptr, row, R, stride_i, stride_d, D, eps, BLOCK_I, BLOCK_D)
    divisor = tl.where(norm < floor, floor, norm)  # NaN stays NaN
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = _row(x_ptr, row, d, stride_i, stride_d, (row < R)[:, None] & (d < D)[None, :])
        u = x / largest[:, None] / divisor[:, None]
        out = (segment * R + row).to(tl.int64)[:, None] * width + d[None, :]
        tl.store(u_ptr + out, u.to(u_ptr.dtype.element_ty), mask=(row < R)[:, None] & (d < width)[None, :])


#   reads  x, 3 times, from the cache but for the first;  writes  u once, zeros from D to width
@triton.jit(do_not_specialize=["R", "eps"])
def normalise_kernel(
    x0_ptr, x1_ptr,  # [R, D]
    u_ptr,  # [segments * R, width] out
    R, stride_0i, stride_0d, stride_1i, stride_1d, D, width, eps,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _normalise(x0_ptr, u_ptr, R, stride_0i, stride_0d, D, width, eps, 0, BLOCK_I, BLOCK_D)
    else:
        _normalise(x1_ptr, u_ptr, R, stride_1i, stride_1d, D, width, eps, 1, BLOCK_I, BLOCK_D)


@triton.jit
def _sum_of_shares(du_ptr, row, d, rows, shares, width, exists, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr):
    du = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for share in range(shares):
        offset = (share * rows + row).to(tl.int64)[:, None] * width + d[None, :]
        du += tl.load(du_ptr + offset, mask=exists, other=0.0)
    return du


@triton.jit
def _project(
    x_ptr, dx_ptr, du_ptr, radial_ptr, R, stride_i, stride_d, D, width, eps, factor, rows, shares, segment,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    largest, norm, floor = _norms(x_ptr, row, R, stride_i, stride_d, D, eps, BLOCK_I, BLOCK_D)
    divisor = tl.where(norm < floor, floor, norm)  # NaN stays NaN
    radial = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        exists = (row < R)[:, None] & (d < D)[None, :]
        x = _row(x_ptr, row, d, stride_i, stride_d, exists)
        u = x / largest[:, None] / divisor[:, None]
        du = _sum_of_shares(du_ptr, segment * R + row, d, rows, shares, width, exists, BLOCK_I, BLOCK_D)
        radial += tl.sum(u * (du * factor), 1)
    tl.store(radial_ptr + segment * R + row, radial, mask=row < R)
    active = tl.where(norm > floor, radial, 0.0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        exists = (row < R)[:, None] & (d < D)[None, :]
        x = _row(x_ptr, row, d, stride_i, stride_d, exists)
        u = x / largest[:, None] / divisor[:, None]
        du = _sum_of_shares(du_ptr, segment * R + row, d, rows, shares, width, exists, BLOCK_I, BLOCK_D)
        dx = (du * factor - u * active[:, None]) / divisor[:, None] / largest[:, None]
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * D + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=exists)


#   reads  x 4 times and every share of du twice, mostly from the cache;  writes  dx, and <u, du> of each row
@triton.jit(do_not_specialize=["R", "eps", "rows", "shares"])
def project_kernel(
    x0_ptr, x1_ptr,  # [R, D]
    dx0_ptr, dx1_ptr,  # [R, D] out, contiguous
    du_ptr,  # [shares, rows = segments * R, width] fp32
    radial_ptr,  # [rows] fp32, out
    factor_ptr,  # [] fp32, multiplies du
    R, stride_0i, stride_0d, stride_1i, stride_1d, D, width, eps, rows, shares,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr)
    if tl.program_id(1) == 0:
        _project(
            x0_ptr, dx0_ptr, du_ptr, radial_ptr, R, stride_0i, stride_0d, D, width, eps, factor, rows, shares, 0,
            BLOCK_I, BLOCK_D,
        )  # fmt: skip
    else:
        _project(
            x1_ptr, dx1_ptr, du_ptr, radial_ptr, R, stride_1i, stride_1d, D, width, eps, factor, rows, shares, 1,
            BLOCK_I, BLOCK_D,
        )  # fmt: skip


def normalise(xs: list[Tensor], width: int, dtype: torch.dtype, eps: float) -> Tensor:
    """Unit rows of one or two [R, D], [rows, width]."""
    R, D = xs[0].shape
    u = torch.empty(len(xs) * R, width, dtype=dtype, device=xs[0].device)
    block = block_sizes(width)
    strides = [stride for x in (xs[0], xs[-1]) for stride in x.stride()]
    grid = (triton.cdiv(R, block["BLOCK_I"]), len(xs))
    normalise_kernel[grid](xs[0], xs[-1], u, R, *strides, D, width, eps, **block)
    return u


def project(du: Tensor, xs: list[Tensor], factor: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """dx of every x, in its type, and <u, du> of each row, given the shares of du, which `factor` multiplies."""
    R, D = xs[0].shape
    shares, rows, width = du.shape
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    radial = torch.empty(rows, dtype=torch.float32, device=du.device)
    block = block_sizes(D)
    strides = [stride for x in (xs[0], xs[-1]) for stride in x.stride()]
    grid = (triton.cdiv(R, block["BLOCK_I"]), len(xs))
    project_kernel[grid](
        xs[0], xs[-1], dxs[0], dxs[-1], du, radial, factor, R, *strides, D, width, eps, rows, shares, **block
    )  # fmt: skip
    return dxs, radial


def block_sizes(D: int) -> dict[str, int]:
    """Block sizes: 1,024 elements, of rows as long as possible."""
    width = min(triton.next_power_of_2(D), 1024)
    return {"BLOCK_I": 1024 // width, "BLOCK_D": width}
