"""Contrastive losses over tiles: row statistics and gradients, without storing the similarities.

    S[i, j]  = <x_i, y_j> / tau
    rest[i]  = log sum_{j != own(i), pos(i)} exp S[i, j]    negatives alone: a tiny loss keeps its digits
    match[i] = S[i, pos(i)];   lse_x = log(exp rest + exp match);   lse_y likewise for the columns
    dx_i     = 1/tau sum_j (g_x[i] exp(S[i, j] - lse_x[i]) + g_y[j] exp(S[i, j] - lse_y[j])) y_j    j != own(i), pos(i)
                          - pull[i] y_j                                                             j == pos(i)

    slope[i] = sum_j (what y_j is multiplied by in tau dx_i) (<x_i, y_j> - 1)

The slopes add up to sum_i <x_i, tau dx_i>, of which dL/dtau is -1/tau^2, or half that if x = y; they are summed in
fp32, while dx carries the rounding of weights that cancel each other.

NT-Xent takes x = y = z, both views, and own(i) = i. InfoNCE takes queries and keys, or keys and queries for the
gradient of the keys, and excludes nothing. One program owns BLOCK_I rows of x and walks the columns: no atomics,
bit-equal runs.

Names, here and in the kernels:
    i, j       row of x; row of y, which is a column of S
    R, C       rows of one segment of x; columns. x is one segment, or two: R rows of view 1, then R of view 2
    own, pos   the column that a segment's first row is itself, and that of its positive; its other rows follow in order
    width      of x and y: D rounded up, zeros beyond D; BLOCK_D of it at a time where WIDE, else all of it
    share      of the columns: so that few rows still keep every multiprocessor busy
Row numbers are int32 until they meet a stride, where they become int64. Inside, S and its logarithms are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simclr_fast.kernels.tiles import block, columns, dot, load, plan, scores

LOG2_E = tl.constexpr(1.4426950408889634)
# Weights of a tile lie in [-2, 2]; times 2^14 they fill float16, whose normal range then reaches down to 4e-9.
FP16_SCALE = tl.constexpr(16384.0)
# |S| <= 1 / tau. From here on neither exp S nor exp(-lse) of 2^30 columns leaves float32: one exponential a pair.
UNSHIFTED_TAU = tl.constexpr(0.02)
NOTHING = tl.constexpr(-3.0e38)  # log of an empty sum; finite, because -inf - -inf is NaN
ABSENT = -(1 << 30)  # as own or pos: no row has such a column


@triton.jit
def _sums(
    x_ptr, y_ptr, R, C, own_0, own_1, pos_0, pos_1, width, scale,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """rest and match over this program's share of the columns, [BLOCK_I]."""
    row, exists, own, pos = block(R, own_0, own_1, pos_0, pos_1, BLOCK_I)
    a, a_end, b, b_end, begin, turn, end = plan(own, pos, C, BLOCK_I, BLOCK_J)
    x = load(x_ptr, row, exists, width, 0, BLOCK_D, True)
    match = tl.zeros([BLOCK_I], tl.float32)
    top = tl.full([BLOCK_I], NOTHING, tl.float32)
    if SHIFTED:
        total = tl.zeros([BLOCK_I], tl.float32)
    else:
        total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)  # summed over columns once, at the end
    for plain in tl.static_range(2):
        for u in tl.range(turn if plain else begin, end if plain else turn, num_stages=None if plain else 1):
            j = columns(u, a, a_end, b, b_end, C, BLOCK_J, not plain)
            y = x if WIDE else load(y_ptr, j, j < C, width, 0, BLOCK_D, not plain)
            s = scale * scores(
                x_ptr, x, row, exists, y_ptr, y, j, C, width,
                BLOCK_I, BLOCK_J, BLOCK_D, WIDE, not plain, PRECISION,
            )  # fmt: skip
            if not plain:
                paired = j[None, :] == pos[:, None]
                match += tl.sum(tl.where(paired, s, 0.0), 1)
                s = tl.where(paired | (j[None, :] == own[:, None]) | (j[None, :] >= C), -float("inf"), s)
            if SHIFTED:
                new_top = tl.maximum(top, tl.max(s, 1))
                total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(s - new_top[:, None]), 1)
                top = new_top
            else:
                total += tl.exp2(s)
    if SHIFTED:
        rest = top + tl.log2(tl.where(total == 0.0, 1.0, total))
    else:
        total = tl.sum(total, 1)
        rest = tl.where(total == 0.0, NOTHING, tl.log2(tl.where(total == 0.0, 1.0, total)))
    return rest, match


# Statistics. Below UNSHIFTED_TAU with a running maximum and sum (online softmax, arXiv:1805.02867, algorithm 3).
#   reads  y once per program, mostly from L2;  writes  rest and match, 2 fp32 a row and share
@triton.jit(do_not_specialize=["R", "C", "own_0", "own_1", "pos_0", "pos_1", "rows"])
def statistics_kernel(
    x_ptr,  # [segments * R, width] unit rows
    y_ptr,  # [C, width] unit rows
    tau_ptr,  # [] fp32
    rest_ptr,  # [shares, segments * R] fp32, out, nats
    match_ptr,  # [shares, segments * R] fp32, out, nats
    R, C, own_0, own_1, pos_0, pos_1, rows, width,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tau = tl.load(tau_ptr)
    if tau >= UNSHIFTED_TAU:
        rest, match = _sums(
            x_ptr, y_ptr, R, C, own_0, own_1, pos_0, pos_1, width, LOG2_E / tau,
            BLOCK_I, BLOCK_J, BLOCK_D, WIDE, PRECISION, False,
        )  # fmt: skip
    else:
        rest, match = _sums(
            x_ptr, y_ptr, R, C, own_0, own_1, pos_0, pos_1, width, LOG2_E / tau,
            BLOCK_I, BLOCK_J, BLOCK_D, WIDE, PRECISION, True,
        )  # fmt: skip
    row, exists, _, _ = block(R, own_0, own_1, pos_0, pos_1, BLOCK_I)
    out = tl.program_id(1) * rows + row
    tl.store(rest_ptr + out, rest / LOG2_E, mask=exists)
    tl.store(match_ptr + out, match / LOG2_E, mask=exists)


# The loss of each row, softplus(rest - match), and its log-sum-exp, from those of the shares.
#   reads  2 fp32 a row and share;  writes  2 fp32 a row
@triton.jit(do_not_specialize=["rows", "shares"])
def merge_kernel(rest_ptr, match_ptr, loss_ptr, lse_ptr, rows, shares, PAIRED: tl.constexpr, BLOCK_I: tl.constexpr):
    row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    top = tl.full([BLOCK_I], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    match = tl.zeros([BLOCK_I], tl.float32)
    for share in range(shares):
        rest = tl.load(rest_ptr + share * rows + row, mask=row < rows, other=0.0)
        match += tl.load(match_ptr + share * rows + row, mask=row < rows, other=0.0)
        new_top = tl.maximum(top, rest)
        total = total * tl.exp(top - new_top) + tl.exp(rest - new_top)
        top = new_top
    rest = top + tl.log(total)
    if not PAIRED:
        match += NOTHING
    gap = rest - match
    e = tl.exp(-tl.abs(gap))
    one_more = 1.0 + e  # log(1 + e) to the last digit, however small e is (Kahan)
    log1p = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
    loss = tl.where(gap < 0.0, 0.0, gap) + log1p
    tl.store(loss_ptr + row, loss, mask=row < rows)
    tl.store(lse_ptr + row, tl.maximum(rest, match) + log1p, mask=row < rows)


@triton.jit
def _weights(s, lse_x, g_x, lse_y, g_y, SHIFTED: tl.constexpr):
    """What each column pulls with, positives aside; lse in base 2."""
    if SHIFTED:
        w = g_x[:, None] * tl.exp2(s - lse_x[:, None]) + g_y[None, :] * tl.exp2(s - lse_y[None, :])
    else:
        w = tl.exp2(s) * ((g_x * tl.exp2(-lse_x))[:, None] + (g_y * tl.exp2(-lse_y))[None, :])
    return w


@triton.jit
def _lse_and_g(lse_ptr, g_ptr, index, exists):
    """lse in base 2, and g times the scale of tile weights."""
    lse = tl.load(lse_ptr + index, mask=exists, other=0.0) * LOG2_E
    return lse, tl.load(g_ptr + index, mask=exists, other=0.0) * FP16_SCALE


@triton.jit
def _pulls(
    x_ptr, y_ptr, lse_x_ptr, g_x_ptr, lse_y_ptr, g_y_ptr, pull_ptr, R, C, own_0, own_1, pos_0, pos_1, width, scale,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, SLOPE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """tau dx and slope over this program's share of the columns, times the scale of tile weights."""
    row, exists, own, pos = block(R, own_0, own_1, pos_0, pos_1, BLOCK_I)
    a, a_end, b, b_end, begin, turn, end = plan(own, pos, C, BLOCK_I, BLOCK_J)
    x = load(x_ptr, row, exists, width, 0, BLOCK_D, True)
    lse_x, g_x = _lse_and_g(lse_x_ptr, g_x_ptr, row, exists)
    pull = tl.load(pull_ptr + row, mask=exists, other=0.0) * FP16_SCALE
    dx = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_I], tl.float32)
    for plain in tl.static_range(2):
        for u in tl.range(turn if plain else begin, end if plain else turn, num_stages=None if plain else 1):
            j = columns(u, a, a_end, b, b_end, C, BLOCK_J, not plain)
            y = load(y_ptr, j, j < C, width, 0, BLOCK_D, not plain)
            lse_y, g_y = _lse_and_g(lse_y_ptr, g_y_ptr, j, j < C)
            s = dot(x, tl.trans(y), tl.zeros([BLOCK_I, BLOCK_J], tl.float32), PRECISION) * scale
            if not plain:
                s = tl.where((j[None, :] == own[:, None]) | (j[None, :] >= C), NOTHING, s)
            w = _weights(s, lse_x, g_x, lse_y, g_y, SHIFTED)
            if not plain:
                w = tl.where(j[None, :] == pos[:, None], -pull[:, None], w)
            if SLOPE:
                slope += tl.sum(w * (s - scale), 1)
            dx = dot(w.to(y.dtype), y, dx, PRECISION)
    return dx, slope / scale


# Gradient. The same walk; the weights of a tile are formed in fp32, the positive's included, and only then rounded
# to the type of y, so that the difference 1 - P is never taken between rounded numbers.
#   reads  y once per program, lse and g;  writes  dx, 4 bytes an element and share
@triton.jit(do_not_specialize=["R", "C", "own_0", "own_1", "pos_0", "pos_1", "rows"])
def gradient_kernel(
    x_ptr,  # [segments * R, width] unit rows
    y_ptr,  # [C, width] unit rows
    tau_ptr,  # [] fp32
    lse_x_ptr,  # [segments * R] fp32, nats
    g_x_ptr,  # [segments * R] fp32, |g| <= 1
    lse_y_ptr,  # [C] fp32, nats
    g_y_ptr,  # [C] fp32, |g| <= 1
    pull_ptr,  # [segments * R] fp32, |pull| <= 2
    dx_ptr,  # [shares, segments * R, width] fp32, out, times tau
    slope_ptr,  # [shares, segments * R] fp32, out if SLOPE
    R, C, own_0, own_1, pos_0, pos_1, rows, width,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    tau = tl.load(tau_ptr)
    if tau >= UNSHIFTED_TAU:
        dx, slope = _pulls(
            x_ptr, y_ptr, lse_x_ptr, g_x_ptr, lse_y_ptr, g_y_ptr, pull_ptr, R, C, own_0, own_1, pos_0, pos_1, width,
            LOG2_E / tau, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, SLOPE, False,
        )  # fmt: skip
    else:
        dx, slope = _pulls(
            x_ptr, y_ptr, lse_x_ptr, g_x_ptr, lse_y_ptr, g_y_ptr, pull_ptr, R, C, own_0, own_1, pos_0, pos_1, width,
            LOG2_E / tau, BLOCK_I, BLOCK_J, BLOCK_D, PRECISION, SLOPE, True,
        )  # fmt: skip
    row, exists, _, _ = block(R, own_0, own_1, pos_0, pos_1, BLOCK_I)
    out = (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * width + tl.arange(0, BLOCK_D)
    tl.store(dx_ptr + out, dx / FP16_SCALE, mask=exists[:, None])
    if SLOPE:
        tl.store(slope_ptr + tl.program_id(1) * rows + row, slope / FP16_SCALE, mask=exists)


# Weights of wide rows: their dx does not fit in registers, so that the weights of some rows are stored, in the type
# of y, and multiplied by y as a matrix. The product reads and writes 4 D times what the store costs.
#   reads  x and y once per tile, mostly from L2;  writes  one element a pair
@triton.jit(do_not_specialize=["R", "C", "own", "pos"])
def weights_kernel(
    x_ptr, y_ptr, tau_ptr, lse_x_ptr, g_x_ptr, lse_y_ptr, g_y_ptr, pull_ptr,
    w_ptr,  # [R, C] out, rows `stride` apart, times the scale of tile weights
    slope_ptr,  # [R, tiles of columns] fp32, out if SLOPE
    R, C, own, pos, width, stride,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    scale = LOG2_E / tl.load(tau_ptr)
    row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    s = scale * scores(x_ptr, 0, row, row < R, y_ptr, 0, j, C, width, BLOCK_I, BLOCK_J, BLOCK_D, True, True, PRECISION)
    s = tl.where((j[None, :] == (own + row)[:, None]) | (j[None, :] >= C), NOTHING, s)
    lse_x, g_x = _lse_and_g(lse_x_ptr, g_x_ptr, row, row < R)
    lse_y, g_y = _lse_and_g(lse_y_ptr, g_y_ptr, j, j < C)
    pull = tl.load(pull_ptr + row, mask=row < R, other=0.0) * FP16_SCALE
    w = _weights(s, lse_x, g_x, lse_y, g_y, True)
    w = tl.where(j[None, :] == (pos + row)[:, None], -pull[:, None], w)
    out = row.to(tl.int64)[:, None] * stride + j[None, :]
    tl.store(w_ptr + out, w.to(w_ptr.dtype.element_ty), mask=(row < R)[:, None] & (j < C)[None, :])
    if SLOPE:
        slope = tl.sum(w * (s - scale), 1) / (scale * FP16_SCALE)
        tl.store(slope_ptr + row * tl.num_programs(1) + tl.program_id(1), slope, mask=row < R)


# How the softmax of a row is spread: its entropy, and whether no other column comes before its positive.
#   reads  y once per program, mostly from L2;  writes  2 fp32 a row
@triton.jit(do_not_specialize=["R", "C", "pos"])
def spread_kernel(
    x_ptr, y_ptr, tau_ptr,
    entropy_ptr,  # [R] fp32, out, nats
    hit_ptr,  # [R] fp32, out, 0 or 1
    R, C, pos, width,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scale = LOG2_E / tl.load(tau_ptr)
    row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    paired = pos + row
    x = load(x_ptr, row, row < R, width, 0, BLOCK_D, True)
    before = tl.full([BLOCK_I], NOTHING, tl.float32)  # the largest S of the columns before the positive, and after
    after = tl.full([BLOCK_I], NOTHING, tl.float32)
    match = tl.zeros([BLOCK_I], tl.float32)
    top = tl.full([BLOCK_I], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    moment = tl.zeros([BLOCK_I], tl.float32)  # sum of (S - top) exp(S - top)
    for start in range(0, C, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        y = x if WIDE else load(y_ptr, j, j < C, width, 0, BLOCK_D, True)
        s = scale * scores(
            x_ptr, x, row, row < R, y_ptr, y, j, C, width, BLOCK_I, BLOCK_J, BLOCK_D, WIDE, True, PRECISION
        )
        s = tl.where(j[None, :] < C, s, NOTHING)
        match += tl.sum(tl.where(j[None, :] == paired[:, None], s, 0.0), 1)
        before = tl.maximum(before, tl.max(tl.where(j[None, :] < paired[:, None], s, NOTHING), 1))
        after = tl.maximum(after, tl.max(tl.where(j[None, :] > paired[:, None], s, NOTHING), 1))
        new_top = tl.maximum(top, tl.max(s, 1))
        kept = tl.exp2(top - new_top)
        e = tl.exp2(s - new_top[:, None])
        moment = kept * (moment + (top - new_top) * total) + tl.sum(e * (s - new_top[:, None]), 1)
        total = kept * total + tl.sum(e, 1)
        top = new_top
    hit = (match > before) & (match >= after)  # argmax takes the first of equals
    tl.store(entropy_ptr + row, (tl.log2(total) - moment / total) / LOG2_E, mask=row < R)
    tl.store(hit_ptr + row, hit.to(tl.float32), mask=row < R)
