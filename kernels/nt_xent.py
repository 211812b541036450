"""The contrastive kernels as functions of tensors, and the table of what is launched.

losses/blocked.py has the same five functions in plain PyTorch. In their arguments, one place each for view 1 and
view 2, or a single one: `own` and `pos`, the columns of y that the first row of a view is itself, and of its positive.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from simclr_fast.kernels import contrast, tiles, unit_rows
from simclr_fast.kernels.contrast import ABSENT, FP16_SCALE

INTERPRETED: bool = tiles.INTERPRETED.value


class Launch(NamedTuple):
    """Block sizes of a kernel: rows a program, columns a step, warps, pipeline stages, programs a multiprocessor."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 1


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
WIDE = 512  # stands for all widths above 256, which are walked BLOCK_D at a time
BLOCK_D = {64: 64, 128: 128, 256: 256, WIDE: 64}
_HALF = {
    64: (Launch(128, 64, 8, 3, 2), Launch(64, 64, 4, 3, 2)),
    128: (Launch(128, 64, 8, 3, 2), Launch(64, 64, 4, 3, 2)),
    256: (Launch(128, 64, 8, 2), Launch(64, 32, 8, 2)),
    WIDE: (Launch(128, 128, 8, 3), Launch(128, 64, 8, 3)),
}
_TF32 = {
    64: (Launch(64, 64, 4, 3), Launch(64, 32, 8, 2)),
    128: (Launch(128, 64, 8, 2), Launch(64, 32, 8, 2)),
    256: (Launch(64, 32, 8, 2), Launch(32, 32, 8, 2)),
    WIDE: (Launch(128, 32, 8, 2), Launch(128, 64, 8, 2)),
}
_FP32 = {
    64: (Launch(32, 32, 4, 2), Launch(64, 32, 8, 2)),
    128: (Launch(32, 16, 8, 2), Launch(16, 32, 8, 2)),
    256: (Launch(32, 32, 8, 2), Launch(32, 16, 8, 2)),
    WIDE: (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2)),
}
# (width, precision) -> (statistics and spread, gradient or, if WIDE, weights). None spills on sm_80, sm_90 or sm_100.
LAUNCH = {
    (width, precision): launches
    for precision, table in {"fp16": _HALF, "bf16": _HALF, "tf32": _TF32, "fp32": _FP32}.items()
    for width, launches in table.items()
}
# Where a block has less shared memory than SHARED, as on sm_86, sm_89 and sm_120.
SHARED = 160 * 1024
LOW_SHARED = {
    (256, "fp16"): (Launch(64, 64, 4, 2), Launch(32, 32, 4, 2)),
    (256, "bf16"): (Launch(64, 64, 4, 2), Launch(32, 32, 4, 2)),
    (256, "tf32"): (Launch(32, 32, 4, 2), Launch(16, 32, 4, 2)),
}


def layout(D: int, dtype: torch.dtype, precision: str) -> tuple[int, torch.dtype]:
    """Width and dtype of an operand of rows of D."""
    step = BLOCK_D[WIDE]
    width = next((width for width in BLOCK_D if D <= width < WIDE), (D + step - 1) // step * step)
    return width, DTYPES["fp16" if precision == "auto" else precision]


def operand(xs: list[Tensor], dtype: torch.dtype, precision: str, eps: float) -> Tensor:
    """Unit rows as the kernels read them, [rows, width]."""
    with torch.cuda.device_of(xs[0]):
        return unit_rows.normalise(xs, *layout(xs[0].shape[1], dtype, precision), eps)


def statistics(
    x: Tensor, y: Tensor, tau: Tensor, own: list[int], pos: list[int], precision: str
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row of x, [rows] fp32; without positives the loss means nothing."""
    launch = _launches(x, precision)[0]
    blocks, shares = _grid(x, y, len(pos), launch)
    rest, match = torch.empty(2, shares, len(x), dtype=torch.float32, device=x.device).unbind()
    loss, lse = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        contrast.statistics_kernel[blocks, shares](
            x, y, tau, rest, match, *_places(x, y, own, pos), len(x), x.shape[1],
            WIDE=_key(x) == WIDE, **constants(launch, _key(x), precision), **options(launch, _chip(x.device).arch),
        )  # fmt: skip
        contrast.merge_kernel[(triton.cdiv(len(x), 256),)](
            rest, match, loss, lse, len(x), shares, PAIRED=pos[0] != ABSENT, BLOCK_I=256
        )
    return loss, lse


def gradient(
    x: Tensor, y: Tensor, tau: Tensor, lse_x: Tensor, g_x: Tensor, lse_y: Tensor, g_y: Tensor, pull: Tensor,
    own: list[int], pos: list[int], precision: str, slope: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """tau dL/dx in shares that are to be added up, [shares, rows, width] fp32, and the slope of each row, if wanted.

    The slopes of all rows of all ranks add up to <x, tau dL/dx>.
    """
    tensors, launch = (tau, lse_x, g_x, lse_y, g_y, pull), _launches(x, precision)[1]
    if _key(x) == WIDE:
        return _wide_gradient(x, y, tensors, own, pos, precision, slope)
    blocks, shares = _grid(x, y, len(pos), launch)
    dx = torch.empty(shares, *x.shape, dtype=torch.float32, device=x.device)
    slopes = dx.new_empty(shares, len(x) if slope else 0)
    with torch.cuda.device_of(x):
        contrast.gradient_kernel[blocks, shares](
            x, y, *tensors, dx, slopes, *_places(x, y, own, pos), len(x), x.shape[1],
            SLOPE=slope, **constants(launch, _key(x), precision), **options(launch, _chip(x.device).arch),
        )  # fmt: skip
    return dx, slopes.sum(0) if slope else None


def project(dx: Tensor, u: Tensor, xs: list[Tensor], factor: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """Gradients of the rows before they were normalised, and <u, du> of each row, `factor` times; u is not read:
    the kernel divides anew, in float32."""
    with torch.cuda.device_of(dx):
        return unit_rows.project(dx, xs, factor, eps)


def spread(x: Tensor, y: Tensor, tau: Tensor, pos: int, precision: str) -> tuple[Tensor, Tensor]:
    """Entropy of the softmax of each row, nats, and 1 where its positive comes first, [rows] fp32."""
    entropy, hit = torch.empty(2, len(x), dtype=torch.float32, device=x.device).unbind()
    launch = _launches(x, precision)[0]
    with torch.cuda.device_of(x):
        contrast.spread_kernel[(triton.cdiv(len(x), launch.rows),)](
            x, y, tau, entropy, hit, len(x), len(y), pos, x.shape[1],
            WIDE=_key(x) == WIDE, **constants(launch, _key(x), precision), **options(launch, _chip(x.device).arch),
        )  # fmt: skip
    return entropy, hit


def _wide_gradient(
    x: Tensor, y: Tensor, tensors: tuple, own: list[int], pos: list[int], precision: str, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """As `gradient`, through the stored weights of some rows at a time: as many as make a large product."""
    tau, lse_x, g_x, lse_y, g_y, pull = tensors
    launch = _launches(x, precision)[1]
    dx = torch.empty(1, *x.shape, dtype=torch.float32, device=x.device)
    slopes, R, step = dx.new_empty(len(x)), len(x) // len(pos), max(x.shape[1], 2048)
    for view, start in ((view, start) for view in range(len(pos)) for start in range(0, R, step)):
        rows = slice(view * R + start, view * R + min(start + step, R))
        w = y.new_empty(rows.stop - rows.start, triton.cdiv(len(y), 16) * 16)[:, : len(y)]  # aligned rows
        grid = (triton.cdiv(len(w), launch.rows), triton.cdiv(len(y), launch.columns))
        parts = dx.new_empty(len(w), grid[1] if slope else 0)
        with torch.cuda.device_of(x):
            contrast.weights_kernel[grid](
                x[rows], y, tau, lse_x[rows], g_x[rows], lse_y, g_y, pull[rows], w, parts,
                len(w), len(y), own[view] + start, pos[view] + start, x.shape[1], w.stride(0),
                SLOPE=slope, **constants(launch, WIDE, precision), **options(launch, _chip(x.device).arch),
            )  # fmt: skip
        dx[0, rows] = _product(w, y, precision).div_(FP16_SCALE.value)
        slopes[rows] = parts.sum(1)
    return dx, slopes if slope else None


def _product(w: Tensor, y: Tensor, precision: str) -> Tensor:
    """w @ y in fp32, whatever PyTorch is set to."""
    if not w.is_cuda:
        return w.float() @ y.float()
    if w.dtype != torch.float32:
        return torch.mm(w, y, out_dtype=torch.float32)
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        return w @ y
    finally:
        settings.fp32_precision = before


def _key(x: Tensor) -> int:
    return x.shape[1] if x.shape[1] < WIDE and x.shape[1] in BLOCK_D else WIDE


def _places(x: Tensor, y: Tensor, own: list[int], pos: list[int]) -> tuple[int, ...]:
    """R, C, own_0, own_1, pos_0, pos_1 of a kernel."""
    return len(x) // len(pos), len(y), own[0], own[-1], pos[0], pos[-1]


class Chip(NamedTuple):
    """Compute capability times ten, multiprocessors, and bytes of shared memory that a block may have."""

    arch: int
    multiprocessors: int
    shared: int


@cache
def _chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(0, 8, 1 << 18)  # the interpreter: enough multiprocessors for columns to be shared
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in every torch's stubs
    return Chip(10 * found.major + found.minor, found.multi_processor_count, shared)


def _launches(x: Tensor, precision: str) -> tuple[Launch, Launch]:
    return launches(_key(x), precision, _chip(x.device).shared)


def launches(key: int, precision: str, shared: int) -> tuple[Launch, Launch]:
    """The entry of the table for a chip whose blocks have so much shared memory."""
    return (LAUNCH if shared >= SHARED else LAUNCH | LOW_SHARED)[key, precision]


def _grid(x: Tensor, y: Tensor, segments: int, launch: Launch) -> tuple[int, int]:
    """Blocks of rows, and shares of the columns."""
    blocks = segments * triton.cdiv(len(x) // segments, launch.rows)
    return blocks, _shares(
        blocks, triton.cdiv(len(y), launch.columns), _chip(x.device).multiprocessors * launch.programs
    )


@cache
def _shares(blocks: int, tiles: int, slots: int) -> int:
    """As few as keep nine tenths of the slots busy, and one where blocks alone do: each share takes a dx of its own."""
    if blocks == 0 or blocks >= slots:
        return 1
    most = max(1, min(tiles // 2, -(-2 * slots // blocks)))
    busy = {shares: blocks * shares / (slots * -(-blocks * shares // slots)) for shares in range(1, most + 1)}
    return next((shares for shares in busy if busy[shares] >= 0.9), max(busy, key=lambda shares: busy[shares]))


def constants(launch: Launch, key: int, precision: str) -> dict:
    """Compile-time arguments of a kernel; PRECISION has no effect on products of fp16 and bf16."""
    dot = "tf32" if precision == "tf32" else "ieee"
    return {"BLOCK_I": launch.rows, "BLOCK_J": launch.columns, "BLOCK_D": BLOCK_D[key], "PRECISION": dot}


def options(launch: Launch, arch: int) -> dict:
    """Compiler options of a kernel; before sm_90 a limit on registers would spill."""
    registers = 65536 // (launch.programs * launch.warps * 32)
    limit = {"maxnreg": registers} if arch >= 90 and registers < 255 else {}
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True, **limit}
