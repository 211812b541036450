"""The contrastive kernels in plain PyTorch, tile by tile; the functions are those of kernels/nt_xent.py.

Where x and y are the same rows, tiles below the diagonal are not made: a tile's weights serve its rows and its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# A tile fits into the caches of a core beside what it is made of: 1 MiB in float32.
ROWS, COLUMNS = 128, 2048
# |S| <= 1 / tau. From here on neither exp S nor exp(-lse) of 2^30 columns leaves the type: one exponential a pair.
UNSHIFTED_TAU = {torch.float32: 0.02, torch.float64: 0.003}
ABSENT = -(1 << 30)  # as own or pos: no row has such a column


def layout(D: int, dtype: torch.dtype, precision: str) -> tuple[int, torch.dtype]:
    """Width and dtype of an operand of rows of D, given the dtype of tau."""
    return D, dtype


def operand(xs: list[Tensor], dtype: torch.dtype, precision: str, eps: float) -> Tensor:
    """Unit rows as they are multiplied, [rows, D], float32 or float64."""
    R, D = xs[0].shape
    u = xs[0].new_empty(len(xs) * R, D, dtype=dtype)
    for x, out in zip(xs, u.view(len(xs), R, D), strict=True):
        for rows in _chunks(R):
            out[rows] = unit_rows(x[rows].to(dtype).contiguous(), eps)[0]
    return u


def unit_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x / max(|x|, eps), [R, D]; that divisor, and whether it is the norm, [R, 1].

    Rows are divided by their largest element first, so that no square under- or overflows.
    """
    largest = x.detach().abs().amax(1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 1)
    y = x / largest
    norm, floor = torch.linalg.vector_norm(y, dim=1, keepdim=True), eps / largest
    divisor = torch.maximum(norm, floor)
    return y / divisor, divisor * largest, norm > floor


def statistics(
    x: Tensor, y: Tensor, tau: Tensor, own: list[int], pos: list[int], precision: str
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row of x, [rows]; without positives the loss means nothing."""
    total, match = x.new_zeros(2, len(x)).unbind()
    top = x.new_full((len(x),), -torch.finfo(x.dtype).max)
    shifted = tau < UNSHIFTED_TAU[x.dtype]
    triangle = x is y and not shifted
    for rows, columns, s, at_own, at_pos in _tiles(x, y, tau, own, pos, triangle):
        paired = s.diagonal(at_pos)
        match[rows.start + max(0, -at_pos) :][: len(paired)] = paired
        if triangle:
            match[columns.start + max(0, at_pos) :][: len(paired)] = paired
        paired.fill_(-math.inf)
        s.diagonal(at_own).fill_(-math.inf)
        if shifted:
            before, top[rows] = top[rows].clone(), torch.maximum(top[rows], s.amax(1))
            total[rows] *= (before - top[rows]).exp_()
            total[rows] += s.sub_(top[rows, None]).exp_().sum(1)
        else:
            s.exp_()
            if triangle:
                _keep_above_diagonal(s, rows, columns)
                total[columns] += s.sum(0)
            total[rows] += s.sum(1)
    rest = total.log_().add_(top) if shifted else total.log_()
    if pos[0] == ABSENT:
        return rest, rest
    loss = torch.logaddexp(rest - match, rest.new_zeros(()))
    return loss, match + loss


def gradient(
    x: Tensor, y: Tensor, tau: Tensor, lse_x: Tensor, g_x: Tensor, lse_y: Tensor, g_y: Tensor, pull: Tensor,
    own: list[int], pos: list[int], precision: str,
) -> Tensor:  # fmt: skip
    """tau dL/dx, [1, rows, D]; x and y may be the same object only if lse, g and the rows' places are too."""
    dx = torch.zeros_like(x)
    shifted = tau < UNSHIFTED_TAU[x.dtype]
    triangle = x is y and not shifted
    weight_x, weight_y = g_x * (-lse_x).exp(), g_y * (-lse_y).exp()
    other = x.new_empty(ROWS * COLUMNS)
    for rows, columns, w, at_own, at_pos in _tiles(x, y, tau, own, pos, triangle):
        w.diagonal(at_own).fill_(-math.inf)
        term = other[: w.numel()].view_as(w)
        if shifted:
            torch.sub(w, lse_y[columns], out=term).exp_().mul_(g_y[columns])
            w.sub_(lse_x[rows, None]).exp_().mul_(g_x[rows, None]).add_(term)
        else:
            w.exp_().mul_(torch.add(weight_x[rows, None], weight_y[columns], out=term))
        paired = w.diagonal(at_pos)
        paired.copy_(-pull[rows.start + max(0, -at_pos) :][: len(paired)])
        if triangle:
            _keep_above_diagonal(w, rows, columns)
            dx[columns].addmm_(w.T, x[rows])
        dx[rows].addmm_(w, y[columns])
    return dx[None]


def project(dx: Tensor, xs: list[Tensor], factor: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """Gradients of the rows before they were normalised, and <u, du> of each row, `factor` times; overwrites dx."""
    R, D = xs[0].shape
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    radial = dx.new_empty(len(xs), R)
    for x, out, du, radial_x in zip(xs, outs, dx.view(len(xs), R, D), radial, strict=True):
        for rows in _chunks(R):
            u, divisor, active = unit_rows(x[rows].to(dx.dtype).contiguous(), eps)
            along = (u * du[rows].mul_(factor)).sum(1, keepdim=True)
            out[rows] = du[rows].sub_(u.mul_(along * active)).div_(divisor)
            radial_x[rows] = along[:, 0]
    return outs, radial.view(-1)


def spread(x: Tensor, y: Tensor, tau: Tensor, pos: int, precision: str) -> tuple[Tensor, Tensor]:
    """Entropy of the softmax of each row, nats, and 1 where its positive comes first, [rows]."""
    entropy, hit = x.new_empty(2, len(x)).unbind()
    for rows in _chunks(len(x), max(1, ROWS * COLUMNS // len(y))):
        positive = torch.arange(pos + rows.start, pos + rows.stop, device=x.device)
        entropy[rows], hit[rows] = _softmax(x[rows] @ y.T / tau, positive)
    return entropy, hit


def spread_beside(x: Tensor, k: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """As `spread`, where the positive of row i is row i of k, before the columns of y."""
    x, k, y = (rows.to(tau.dtype) for rows in (x, k, y))
    entropy, hit = x.new_empty(2, len(x)).unbind()
    for rows in _chunks(len(x), max(1, ROWS * COLUMNS // len(y))):
        match = torch.linalg.vecdot(x[rows], k[rows])[:, None]
        s = torch.cat([match, x[rows] @ y.T], 1) / tau
        entropy[rows], hit[rows] = _softmax(s, torch.zeros(len(s), device=s.device))
    return entropy, hit


def _softmax(s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    log_p = s.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1), (log_p.argmax(1) == positive).to(s.dtype)


def _tiles(
    x: Tensor, y: Tensor, tau: Tensor, own: list[int], pos: list[int], triangle: bool
) -> Iterator[tuple[slice, slice, Tensor, int, int]]:
    """Rows, columns and S of tiles, and the diagonals of each that hold the rows' own and their positive columns."""
    R, C, held = len(x) // len(own), len(y), x.new_empty(ROWS * COLUMNS)
    for view in range(len(own)):
        for place in _chunks(R, ROWS):
            rows = slice(view * R + place.start, view * R + place.stop)
            scaled = x[rows] / tau
            for start in range(rows.start if triangle else 0, C, COLUMNS):
                columns = slice(start, min(start + COLUMNS, C))
                shape = rows.stop - rows.start, columns.stop - columns.start
                s = torch.mm(scaled, y[columns].T, out=held[: shape[0] * shape[1]].view(shape))
                yield rows, columns, s, own[view] + place.start - start, pos[view] + place.start - start


def _keep_above_diagonal(s: Tensor, rows: slice, columns: slice) -> None:
    if columns.start < rows.stop:
        s.triu_(rows.start - columns.start + 1)


def _chunks(n: int, size: int = 4096) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
