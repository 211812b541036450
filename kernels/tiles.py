"""Walking the columns of a similarity matrix in tiles: what the kernels of contrast.py, which lists the names, share.

Tiles around the columns that a block of rows is itself and is paired with need masks, and so does a tail. They are
numbered first: the loop over all the others then has no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """c + a @ b in fp32. The interpreter has no product of bf16; fp32 holds the same numbers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def load(ptr, row, exists, width, start, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Elements start .. start + BLOCK_D - 1 of rows, [len(row), BLOCK_D]; zeros where a row does not exist."""
    ptrs = ptr + row.to(tl.int64)[:, None] * width + start + tl.arange(0, BLOCK_D)
    if MASKED:
        part = tl.load(ptrs, mask=exists[:, None], other=0.0)
    else:
        part = tl.load(ptrs)
    return part


@triton.jit
def block(R, own_0, own_1, pos_0, pos_1, BLOCK_I: tl.constexpr):
    """This program's rows of x, whether they exist, and the columns that they are and are paired with, [BLOCK_I]."""
    blocks = tl.cdiv(R, BLOCK_I)
    segment = tl.program_id(0) // blocks
    place = (tl.program_id(0) - segment * blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    own, pos = tl.where(segment == 0, own_0, own_1), tl.where(segment == 0, pos_0, pos_1)
    return segment * R + place, place < R, own + place, pos + place


@triton.jit
def plan(own, pos, C, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Tiles with masks, [a, a_end) and [b, b_end), in order; and the numbers that this program takes: those from begin
    to turn have masks, those from turn to end have none."""
    own, pos = tl.min(own, 0), tl.min(pos, 0)
    low, high, whole = tl.minimum(own, pos), tl.maximum(own, pos), C // BLOCK_J
    a = tl.minimum(tl.maximum(low, 0) // BLOCK_J, whole)
    a_end = tl.minimum(tl.maximum(low + BLOCK_I + BLOCK_J - 1, 0) // BLOCK_J, whole)
    b = tl.maximum(tl.minimum(tl.maximum(high, 0) // BLOCK_J, whole), a_end)
    b_end = tl.maximum(tl.minimum(tl.maximum(high + BLOCK_I + BLOCK_J - 1, 0) // BLOCK_J, whole), b)
    tiles = tl.cdiv(C, BLOCK_J)
    masked = a_end - a + b_end - b + tiles - whole
    share = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tiles)
    return a, a_end, b, b_end, begin, tl.minimum(tl.maximum(masked, begin), end), end


@triton.jit
def columns(u, a, a_end, b, b_end, C, BLOCK_J: tl.constexpr, MASKED: tl.constexpr):
    """The columns of the tile that has number u, [BLOCK_J]."""
    whole = C // BLOCK_J
    if MASKED:
        later = u - (a_end - a)
        tile = tl.where(later < 0, a + u, tl.where(later < b_end - b, b + later, whole))
    else:
        tile = u - (a_end - a + b_end - b + tl.cdiv(C, BLOCK_J) - whole)
        tile += tl.where(tile >= a, a_end - a, 0)
        tile += tl.where(tile >= b, b_end - b, 0)
    return tile * BLOCK_J + tl.arange(0, BLOCK_J)


@triton.jit
def scores(
    x_ptr, x, row, exists, y_ptr, y, j, C, width,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j>, [BLOCK_I, BLOCK_J]; WIDE rows are loaded here, others have been."""
    s = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    if WIDE:
        for start in range(0, width, BLOCK_D):
            part = load(x_ptr, row, exists, width, start, BLOCK_D, True)
            s = dot(part, tl.trans(load(y_ptr, j, j < C, width, start, BLOCK_D, MASKED)), s, PRECISION)
    else:
        s = dot(x, tl.trans(y), s, PRECISION)
    return s
