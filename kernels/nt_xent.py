"""NT-Xent over tiles: row statistics and the gradient, without storing the 2N x 2N similarities.

    S[i, j]  = <z_i, z_j> / tau
    rest[i]  = log sum_{j != i, pos(i)} exp S[i, j]       negatives alone: a tiny loss keeps its digits
    match[i] = S[i, pos(i)],  pos(i) = (i + N) mod 2N
    P[i, j]  = exp(S[i, j] - lse[i]),  lse = log(exp rest + exp match)
    dz_i     = 1/tau sum_{j != i} (g_i P[i, j] + g_j P[j, i]) z_j     for j != pos(i)
                                  - pull[i] z_j                       for j == pos(i)

S is symmetric, so P[j, i] needs only lse[j], and one program makes a whole row: no atomics, bit-equal runs.

Names, here and in the kernels below:
    N, R      images and rows of z over all ranks (R = 2N: every view 1, then every view 2)
    n, first  images of this rank, and the index of its first image; it owns 2n anchors
    i, j      anchor (global row) and candidate (column) of S;  row: an anchor's place among the 2n
    BLOCK_D   columns of z: D rounded up to a width of the launch table, zeros beyond D
Row numbers are int32 (2N < 2^31) until they meet a stride, where they become int64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
# Tile weights lie in [-2, 2]; times 2^14 they fill float16, whose normal range then reaches down to 4e-9.
FP16_SCALE = tl.constexpr(16384.0)


class Launch(NamedTuple):
    """Block sizes of one kernel: anchors a program, candidates a step, warps, pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


DTYPES = {
    "auto": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
# (BLOCK_D, precision) -> (statistics, gradient). Chosen so that no entry spills on sm_80, sm_90 or sm_100.
LAUNCH = {
    (64, "fp16"): (Launch(128, 128, 8, 3), Launch(128, 64, 8, 2)),
    (128, "fp16"): (Launch(128, 64, 8, 3), Launch(128, 64, 8, 3)),
    (256, "fp16"): (Launch(128, 64, 8, 2), Launch(64, 64, 8, 2)),
    (64, "bf16"): (Launch(128, 128, 8, 3), Launch(128, 64, 8, 2)),
    (128, "bf16"): (Launch(128, 64, 8, 3), Launch(128, 64, 8, 3)),
    (256, "bf16"): (Launch(128, 64, 8, 2), Launch(64, 64, 8, 2)),
    (64, "tf32"): (Launch(128, 64, 8, 3), Launch(64, 32, 8, 2)),
    (128, "tf32"): (Launch(128, 64, 8, 2), Launch(64, 32, 8, 2)),
    (256, "tf32"): (Launch(64, 32, 8, 2), Launch(32, 32, 8, 2)),
    (64, "fp32"): (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2)),
    (128, "fp32"): (Launch(32, 16, 8, 2), Launch(32, 32, 8, 2)),
    (256, "fp32"): (Launch(32, 32, 8, 2), Launch(16, 32, 8, 2)),
}
WIDTHS = sorted({width for width, _ in LAUNCH})


@triton.jit
def _anchors(n, N, first, BLOCK_I: tl.constexpr):
    """This program's anchors, [BLOCK_I]: places among the 2n, rows of z, and rows of their positives."""
    row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    i = first + tl.where(row < n, row, row - n + N)
    return row, i, tl.where(i < N, i + N, i - N)


@triton.jit
def _rows(z_ptr, i, exists, BLOCK_D: tl.constexpr):
    """Rows i of z, [len(i), BLOCK_D]; zeros where a row does not exist."""
    offset = i.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.load(z_ptr + offset, mask=exists[:, None], other=0.0)


# Statistics. One program owns BLOCK_I anchors and walks all R candidates with a running maximum and sum
# (online softmax, arXiv:1805.02867, algorithm 3); base-2 exponents inside, nats outside.
#   reads  z once per program, mostly from L2;  writes  rest and match, 2 * 2n fp32;  scratch, atomics: none
@triton.jit(do_not_specialize=["n", "N", "first"])
def statistics_kernel(
    z_ptr,  # [R, BLOCK_D] unit rows
    tau_ptr,  # [] fp32
    rest_ptr,  # [2n] fp32, out, nats
    match_ptr,  # [2n] fp32, out, nats
    n,
    N,
    first,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R = 2 * N
    scale = LOG2_E / tl.load(tau_ptr)
    row, i, positive = _anchors(n, N, first, BLOCK_I)
    column = tl.arange(0, BLOCK_J)
    z_i = _rows(z_ptr, i, row < 2 * n, BLOCK_D)  # [BLOCK_I, BLOCK_D]
    top = tl.full([BLOCK_I], -3.0e38, tl.float32)  # finite: -inf - -inf is NaN
    total = tl.zeros([BLOCK_I], tl.float32)
    match = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, R, BLOCK_J):
        j = start + column
        z_j = _rows(z_ptr, j, j < R, BLOCK_D)  # [BLOCK_J, BLOCK_D]
        s = tl.dot(z_i, tl.trans(z_j), input_precision=PRECISION) * scale  # [BLOCK_I, BLOCK_J]
        paired = j[None, :] == positive[:, None]
        match += tl.sum(tl.where(paired, s, 0.0), 1)
        s = tl.where(paired | (j[None, :] == i[:, None]) | (j[None, :] >= R), -float("inf"), s)
        new_top = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(s - new_top[:, None]), 1)
        top = new_top
    rest = top + tl.log2(tl.where(total == 0.0, 1.0, total))  # no negatives (N = 1): as good as -inf
    tl.store(rest_ptr + row, rest / LOG2_E, mask=row < 2 * n)
    tl.store(match_ptr + row, match / LOG2_E, mask=row < 2 * n)


# Gradient. The same walk; the weights of a tile are formed in fp32, the positive's included, and only then
# rounded to the type of z, so that the difference 1 - P is never taken between rounded numbers.
#   reads  z once per program, lse and g;  writes  dz, 2n * BLOCK_D fp32;  scratch, atomics: none
@triton.jit(do_not_specialize=["n", "N", "first"])
def gradient_kernel(
    z_ptr,  # [R, BLOCK_D] unit rows
    tau_ptr,  # [] fp32
    lse_ptr,  # [R] fp32, nats
    g_ptr,  # [R] fp32, dL/d(loss of a row), |g| <= 1
    pull_ptr,  # [2n] fp32, weight of the positive, |pull| <= 2
    dz_ptr,  # [2n, BLOCK_D] fp32, out, times tau
    n,
    N,
    first,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R = 2 * N
    scale = LOG2_E / tl.load(tau_ptr)
    row, i, positive = _anchors(n, N, first, BLOCK_I)
    owned = row < 2 * n
    column = tl.arange(0, BLOCK_J)
    z_i = _rows(z_ptr, i, owned, BLOCK_D)  # [BLOCK_I, BLOCK_D]
    lse_i = tl.load(lse_ptr + i, mask=owned, other=0.0) * LOG2_E
    g_i = tl.load(g_ptr + i, mask=owned, other=0.0) * FP16_SCALE
    pull = tl.load(pull_ptr + row, mask=owned, other=0.0) * FP16_SCALE
    dz = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(0, R, BLOCK_J):
        j = start + column
        z_j = _rows(z_ptr, j, j < R, BLOCK_D)  # [BLOCK_J, BLOCK_D]
        lse_j = tl.load(lse_ptr + j, mask=j < R, other=0.0) * LOG2_E
        g_j = tl.load(g_ptr + j, mask=j < R, other=0.0) * FP16_SCALE
        s = tl.dot(z_i, tl.trans(z_j), input_precision=PRECISION) * scale  # [BLOCK_I, BLOCK_J]
        s = tl.where((j[None, :] == i[:, None]) | (j[None, :] >= R), -float("inf"), s)
        w = g_i[:, None] * tl.exp2(s - lse_i[:, None]) + g_j[None, :] * tl.exp2(s - lse_j[None, :])
        w = tl.where(j[None, :] == positive[:, None], -pull[:, None], w)
        dz = tl.dot(w.to(z_j.dtype), z_j, dz, input_precision=PRECISION)
    offset = row.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(dz_ptr + offset, dz / FP16_SCALE, mask=owned[:, None])


INTERPRETED = not isinstance(statistics_kernel, triton.JITFunction)


def operand(z: Tensor, precision: str) -> Tensor:
    """z as the kernels read it: in the dtype of `precision`, "auto" being fp16, and BLOCK_D wide."""
    width = next(width for width in WIDTHS if z.shape[1] <= width)
    return F.pad(z.to(DTYPES[precision]), (0, width - z.shape[1]))


def statistics(z: Tensor, tau: Tensor, n: int, first: int, precision: str) -> tuple[Tensor, Tensor]:
    """`rest` and `match`, [2n] fp32, of images first .. first + n - 1 of z, [R, BLOCK_D]."""
    rest, match = torch.empty(2, 2 * n, device=z.device).unbind()
    _launch(statistics_kernel, 0, precision, n, z, tau, rest, match, n, len(z) // 2, first)
    return rest, match


def gradient(z: Tensor, tau: Tensor, lse: Tensor, g: Tensor, pull: Tensor, first: int, precision: str) -> Tensor:
    """tau dL/dz of the same anchors, [2n, BLOCK_D] fp32."""
    dz, n = torch.empty(len(pull), z.shape[1], device=z.device), len(pull) // 2
    _launch(gradient_kernel, 1, precision, n, z, tau, lse, g, pull, dz, n, len(z) // 2, first)
    return dz


def _launch(kernel, which: int, precision: str, n: int, z: Tensor, *args) -> None:
    if not (z.is_cuda or INTERPRETED):
        raise ValueError(f"z1 must be on a GPU (or TRITON_INTERPRET=1) for backend='triton', got {z.device}")
    if INTERPRETED and precision == "bf16":
        raise ValueError("precision must not be 'bf16' in Triton's interpreter, which has no such product")
    precision = "fp16" if precision == "auto" else precision
    launch = LAUNCH[z.shape[1], precision][which]
    grid = (triton.cdiv(2 * n, launch.rows),)
    kernel[grid](z, *args, **constants(launch, z.shape[1], precision), **options(launch))


def constants(launch: Launch, width: int, precision: str) -> dict:
    """Compile-time arguments of a kernel; PRECISION has no effect on products of fp16 and bf16."""
    dot = "tf32" if precision == "tf32" else "ieee"
    return {"BLOCK_I": launch.rows, "BLOCK_J": launch.columns, "BLOCK_D": width, "PRECISION": dot}


def options(launch: Launch) -> dict:
    """Compiler options of a kernel."""
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
