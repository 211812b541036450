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
    256: (Launch(128, 64, 8, 2), Launch(64, 64, 8, 2)),
    WIDE: (Launch(128, 128, 8, 3), Launch(128, 128, 8, 3)),
}
_TF32 = {
    64: (Launch(128, 64, 8, 3), Launch(64, 32, 8, 2)),
    128: (Launch(128, 64, 8, 2), Launch(64, 32, 8, 2)),
    256: (Launch(64, 32, 8, 2), Launch(32, 32, 8, 2)),
    WIDE: (Launch(64, 64, 8, 2), Launch(128, 64, 8, 2)),
}
_FP32 = {
    64: (Launch(32, 32, 4, 2), Launch(64, 32, 8, 2)),
    128: (Launch(32, 16, 8, 2), Launch(32, 32, 8, 2)),
    256: (Launch(32, 32, 8, 2), Launch(16, 32, 8, 2)),
    WIDE: (Launch(64, 32, 8, 2), Launch(64, 32, 8, 2)),
}
# (width, precision) -> (statistics and spread, gradient or, if WIDE, weights). None spills on sm_80, sm_90 or sm_100.
LAUNCH = {
    (width, precision): launches
    for precision, table in {"fp16": _HALF, "bf16": _HALF, "tf32": _TF32, "fp32": _FP32}.items()
    for width, launches in table.items()
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
    launch = LAUNCH[_key(x), precision][0]
    blocks, shares = _grid(x, y, len(pos), launch)
    rest, match = torch.empty(2, shares, len(x), device=x.device).unbind()
    loss, lse = (torch.empty(len(x), device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        contrast.statistics_kernel[blocks, shares](
            x, y, tau, rest, match, *_places(x, y, own, pos), len(x), x.shape[1],
            WIDE=_key(x) == WIDE, **constants(launch, _key(x), precision), **options(launch, _chip(x.device)[0]),
        )  # fmt: skip
        contrast.merge_kernel[(triton.cdiv(len(x), 256),)](
            rest, match, loss, lse, len(x), shares, PAIRED=pos[0] != ABSENT, BLOCK_I=256
        )
    return loss, lse


def gradient(
    x: Tensor, y: Tensor, tau: Tensor, lse_x: Tensor, g_x: Tensor, lse_y: Tensor, g_y: Tensor, pull: Tensor,
    own: list[int], pos: list[int], precision: str,
) -> Tensor:  # fmt: skip
    """tau dL/dx in shares that are to be added up, [shares, rows, width] fp32."""
    tensors, launch = (tau, lse_x, g_x, lse_y, g_y, pull), LAUNCH[_key(x), precision][1]
    if _key(x) == WIDE:
        return _wide_gradient(x, y, tensors, own, pos, precision)
    blocks, shares = _grid(x, y, len(pos), launch)
    dx = torch.empty(shares, *x.shape, device=x.device)
    with torch.cuda.device_of(x):
        contrast.gradient_kernel[blocks, shares](
            x, y, *tensors, dx, *_places(x, y, own, pos), len(x), x.shape[1],
            WIDE=False, **constants(launch, _key(x), precision), **options(launch, _chip(x.device)[0]),
        )  # fmt: skip
    return dx


def project(dx: Tensor, u: Tensor, xs: list[Tensor], factor: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """Gradients of the rows before they were normalised, and <u, du> of each row, `factor` times; u is not read:
    the kernel divides anew, in float32."""
    with torch.cuda.device_of(dx):
        return unit_rows.project(dx, xs, factor, eps)


def spread(x: Tensor, y: Tensor, tau: Tensor, pos: int, precision: str) -> tuple[Tensor, Tensor]:
    """Entropy of the softmax of each row, nats, and 1 where its positive comes first, [rows] fp32."""
    entropy, hit = torch.empty(2, len(x), device=x.device).unbind()
    launch = LAUNCH[_key(x), precision][0]
    with torch.cuda.device_of(x):
        contrast.spread_kernel[(triton.cdiv(len(x), launch.rows),)](
            x, y, tau, entropy, hit, len(x), len(y), pos, x.shape[1],
            WIDE=_key(x) == WIDE, **constants(launch, _key(x), precision), **options(launch, _chip(x.device)[0]),
        )  # fmt: skip
    return entropy, hit


def _wide_gradient(x: Tensor, y: Tensor, tensors: tuple, own: list[int], pos: list[int], precision: str) -> Tensor:
    """As `gradient`, through the weights of `width` rows at a time: 2 C D bytes, a quarter of the result's inputs."""
    tau, lse_x, g_x, lse_y, g_y, pull = tensors
    launch, dx = LAUNCH[WIDE, precision][1], torch.empty(1, *x.shape, device=x.device)
    R = len(x) // len(pos)
    for view, start in ((view, start) for view in range(len(pos)) for start in range(0, R, x.shape[1])):
        rows = slice(view * R + start, view * R + min(start + x.shape[1], R))
        w = y.new_empty(rows.stop - rows.start, triton.cdiv(len(y), 16) * 16)[:, : len(y)]  # aligned rows
        grid = (triton.cdiv(len(w), launch.rows), triton.cdiv(len(y), launch.columns))
        with torch.cuda.device_of(x):
            contrast.weights_kernel[grid](
                x[rows], y, tau, lse_x[rows], g_x[rows], lse_y, g_y, pull[rows], w,
                len(w), len(y), own[view] + start, pos[view] + start, x.shape[1], w.stride(0),
                **constants(launch, WIDE, precision), **options(launch, _chip(x.device)[0]),
            )  # fmt: skip
        dx[0, rows] = _product(w, y, precision).div_(FP16_SCALE.value)
    return dx


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


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten, and multiprocessors; for the interpreter enough of them to share columns."""
    if device.type != "cuda":
        return 0, 3
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _grid(x: Tensor, y: Tensor, segments: int, launch: Launch) -> tuple[int, int]:
    """Blocks of rows, and shares of the columns: as few as keep nine tenths of all multiprocessors busy."""
    blocks = segments * triton.cdiv(len(x) // segments, launch.rows)
    if blocks == 0:
        return 0, 1
    slots = _chip(x.device)[1] * launch.programs
    most = max(1, triton.cdiv(len(y), launch.columns) // 2)

    def busy(shares: int) -> float:
        return blocks * shares / (slots * triton.cdiv(blocks * shares, slots))

    return blocks, next((k for k in range(1, most) if busy(k) >= 0.9), max(range(1, most + 1), key=busy))


def constants(launch: Launch, key: int, precision: str) -> dict:
    """Compile-time arguments of a kernel; PRECISION has no effect on products of fp16 and bf16."""
    dot = "tf32" if precision == "tf32" else "ieee"
    return {"BLOCK_I": launch.rows, "BLOCK_J": launch.columns, "BLOCK_D": BLOCK_D[key], "PRECISION": dot}


def options(launch: Launch, arch: int) -> dict:
    """Compiler options of a kernel; before sm_90 a limit on registers would spill."""
    registers = 65536 // (launch.programs * launch.warps * 32)
    limit = {"maxnreg": registers} if arch >= 90 and registers < 255 else {}
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True, **limit}
