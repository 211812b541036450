"""The contrastive kernels in plain PyTorch, tile by tile; the functions are those of kernels/nt_xent.py.

Where x and y are the same rows, tiles below the diagonal are not made: a tile's weights serve its rows and its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# A tile fits into the caches of a core beside what it is made of: 1 MiB in float32. A small matrix is one tile.
ROWS, COLUMNS, SMALL = 128, 2048, 512
CHUNK = 4096  # rows that are normalised at a time
# |S| <= 1 / tau. From here on neither exp S nor exp(-lse) of 2^30 columns leaves the type: one exponential a pair.
UNSHIFTED_TAU = {torch.float32: 0.02, torch.float64: 0.003}
ABSENT = -(1 << 30)  # as own or pos: no row has such a column


class Tile(NamedTuple):
    """Rows and columns of a tile, S there, and the diagonals that hold the rows' own and their positive columns."""

    rows: slice
    columns: slice
    s: Tensor
    own: list[int]
    pos: list[int]

    def places(self, diagonal: int) -> tuple[Tensor, slice]:
        """The elements of a diagonal, and the rows that they are in."""
        elements = self.s.diagonal(diagonal)
        first = self.rows.start + max(0, -diagonal)
        return elements, slice(first, first + len(elements))


def layout(D: int, dtype: torch.dtype, precision: str) -> tuple[int, torch.dtype]:
    """Width and dtype of an operand of rows of D, given the dtype of tau."""
    return D, dtype


def operand(xs: list[Tensor], dtype: torch.dtype, precision: str, eps: float) -> Tensor:
    """Unit rows as they are multiplied, [rows, D], float32 or float64."""
    u = xs[0].new_empty(len(xs) * len(xs[0]), xs[0].shape[1], dtype=dtype)
    for rows, x in _parts(xs, dtype):
        divisor = _plain_divisor(x, eps)
        if divisor is None:
            u[rows] = unit_rows(x, eps)[0]
        else:
            torch.div(x, divisor, out=u[rows])
    return u


def unit_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x / max(|x|, eps), [R, D]; that divisor, and whether it is the norm, [R, 1].

    Rows are divided by their largest element first, so that no square under- or overflows.
    """
    largest = x.detach().abs().amax(1, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)
    y = x / largest
    norm, floor = torch.linalg.vector_norm(y, dim=1, keepdim=True), eps / largest
    divisor = torch.maximum(norm, floor)
    return y / divisor, divisor * largest, norm > floor


def statistics(
    x: Tensor, y: Tensor, tau: Tensor, own: list[int], pos: list[int], precision: str
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row of x, [rows]; without positives the loss means nothing."""
    shifted, triangle = _ways(x, y, tau)
    total, match = x.new_zeros(len(x)), x.new_zeros(len(x))
    top = x.new_full((len(x),), -torch.finfo(x.dtype).max) if shifted else total
    for tile in _tiles(x, y, tau, own, pos, triangle):
        rows, columns, s = tile[:3]
        for diagonal in tile.pos:
            elements, at = tile.places(diagonal)
            match[at] = elements
            if triangle:  # the same pairs, the other way round
                match[columns.start + max(0, diagonal) :][: len(elements)] = elements
            elements.fill_(-math.inf)
        for diagonal in tile.own:
            s.diagonal(diagonal).fill_(-math.inf)
        if shifted:
            before, top[rows] = top[rows].clone(), torch.maximum(top[rows], s.amax(1))
            total[rows] *= (before - top[rows]).exp_()
            total[rows] += s.sub_(top[rows, None]).exp_().sum(1)
        else:
            s.exp_()
            if triangle:
                _keep_above_diagonal(tile)
                total[columns] += s.sum(0)
            total[rows] += s.sum(1)
    rest = total.log_().add_(top) if shifted else total.log_()
    if pos[0] == ABSENT:
        return rest, rest
    loss = torch.logaddexp(rest - match, rest.new_zeros(()))
    return loss, match.add_(loss)


def gradient(
    x: Tensor, y: Tensor, tau: Tensor, lse_x: Tensor, g_x: Tensor, lse_y: Tensor, g_y: Tensor, pull: Tensor,
    own: list[int], pos: list[int], precision: str, slope: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """tau dL/dx, [1, rows, D], and if wanted slopes: over all rows of all ranks they add up to <x, tau dL/dx>.

    x and y may be the same object only if lse, g and the rows' places are too.
    """
    shifted, triangle = _ways(x, y, tau)
    dx, slopes, other = torch.zeros_like(x), x.new_zeros(len(x)), None
    if not shifted:
        weight_x = g_x * (-lse_x).exp_()
        weight_y = weight_x if x is y else g_y * (-lse_y).exp_()
    for tile in _tiles(x, y, tau, own, pos, triangle):
        rows, columns, w = tile[:3]
        if other is None:
            other = torch.empty_like(w)  # no later tile is larger
        term = other.view(-1)[: w.numel()].view_as(w)
        s = w - 1 / tau if slope else w
        for diagonal in tile.own:
            w.diagonal(diagonal).fill_(-math.inf)
        if shifted:
            torch.sub(w, lse_y[columns], out=term).exp_().mul_(g_y[columns])
            w.sub_(lse_x[rows, None]).exp_().mul_(g_x[rows, None]).add_(term)
        else:
            w.exp_().mul_(torch.add(weight_x[rows, None], weight_y[columns], out=term))
        for diagonal in tile.pos:
            elements, at = tile.places(diagonal)
            torch.neg(pull[at], out=elements)
        if triangle:
            _keep_above_diagonal(tile)
            dx[columns].addmm_(w.T, x[rows])
        dx[rows].addmm_(w, y[columns])
        if slope:  # no row needs its own: what a tile adds to its columns is counted with its rows
            slopes[rows] += torch.linalg.vecdot(w, s) * (2 * tau if triangle else tau)
    return dx[None], slopes if slope else None


def at_once(xs: list[Tensor], tau: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row of both views, unit rows, their log-sum-exp, and tau dL/dx for the sum of the losses.

    For a matrix of one tile, which is made once instead of twice: its share of a step is what calls of PyTorch cost.
    """
    ((_, x),) = _parts(xs, tau.dtype)
    n, divisor = len(xs[0]), _plain_divisor(x, eps)
    if divisor is None:
        z, divisor, active = unit_rows(x, eps)
    else:
        z, active = x / divisor, divisor > eps
    s = (z / tau) @ z.T
    match = s.diagonal(n).repeat(2)
    for diagonal in (0, n, -n):
        s.diagonal(diagonal).fill_(-math.inf)
    shifted = bool(tau < UNSHIFTED_TAU[z.dtype])
    rest = s.logsumexp(1) if shifted else s.exp_().sum(1).log_()
    loss = torch.logaddexp(rest - match, rest.new_zeros(()))
    lse = match.add_(loss)
    if shifted:
        p = s.sub_(lse[:, None]).exp_()
        w = p + p.T
    else:
        weight = (-lse).exp_()
        w = s.mul_(weight[:, None] + weight)
    pull = torch.expm1(-loss)  # P[i, pos(i)] - 1, exact where P is next to 1
    for pairs in (w.diagonal(n), w.diagonal(-n)):
        torch.add(pull[:n], pull[n:], out=pairs)
    dx = w @ z
    along = torch.linalg.vecdot(z, dx)[:, None]
    return loss, z, lse, dx.addcmul_(z, along * active, value=-1).div_(divisor)


def project(dx: Tensor, u: Tensor, xs: list[Tensor], factor: Tensor, eps: float) -> tuple[list[Tensor], Tensor]:
    """Gradients of the rows before they were normalised, and <u, du> of each row, `factor` times; overwrites dx."""
    radial = dx.new_empty(dx.shape[1])
    for rows, x in _parts(xs, dx.dtype):
        divisor, active = _plain_divisor(x, eps), None
        if divisor is None:
            _, divisor, active = unit_rows(x, eps)
        du = dx[0, rows].mul_(factor)
        along = torch.linalg.vecdot(u[rows], du)
        radial[rows] = along
        along = along[:, None] * (divisor > eps if active is None else active)
        du.addcmul_(u[rows], along, value=-1).div_(divisor)
    outs = dx.view(len(xs), *xs[0].shape)
    return [out.to(x.dtype, copy=True) for out, x in zip(outs, xs, strict=True)], radial


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
    for rows in _chunks(len(x), max(1, (1 << 22) // len(y))):
        match = torch.linalg.vecdot(x[rows], k[rows])[:, None]
        s = torch.cat([match, x[rows] @ y.T], 1) / tau
        entropy[rows], hit[rows] = _softmax(s, torch.zeros(len(s), device=s.device))
    return entropy, hit


def _softmax(s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    log_p = s.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1), (log_p.argmax(1) == positive).to(s.dtype)


def _ways(x: Tensor, y: Tensor, tau: Tensor) -> tuple[bool, bool]:
    """Whether exponentials need a shift, and whether tiles below the diagonal can be left out."""
    shifted = bool(tau < UNSHIFTED_TAU[x.dtype])
    return shifted, x is y and not shifted and len(x) > SMALL


def _tiles(x: Tensor, y: Tensor, tau: Tensor, own: list[int], pos: list[int], triangle: bool) -> Iterator[Tile]:
    """All tiles, or those on and above the diagonal, S in the same memory each time."""
    if x is y:  # own and pos of both views are diagonals of the whole matrix, that end where their view does
        segments = [(0, [own[0]], sorted({pos[0], -pos[0]}) if len(pos) == 2 else pos)]
    else:
        R = len(x) // len(own)
        segments = [(view * R, [own[view]], [pos[view]]) for view in range(len(own))]
    R, C = len(x) // len(segments), len(y)
    height, width = (max(R, 1), C) if max(R, C) <= SMALL else (ROWS, COLUMNS)
    held = x.new_empty(height * width)
    for first, owns, poss in segments:
        for place in _chunks(R, height):
            rows = slice(first + place.start, first + place.stop)
            scaled = x[rows] / tau
            for columns in _chunks(C, width, rows.start if triangle else 0):
                shape = rows.stop - rows.start, columns.stop - columns.start
                s = torch.mm(scaled, y[columns].T, out=held[: shape[0] * shape[1]].view(shape))
                shift = place.start - columns.start
                yield Tile(
                    rows,
                    columns,
                    s,
                    *([shift + at for at in places if _crosses(shift + at, shape)] for places in (owns, poss)),
                )


def _crosses(diagonal: int, shape: tuple[int, int]) -> bool:
    return -shape[0] < diagonal < shape[1]


def _keep_above_diagonal(tile: Tile) -> None:
    if tile.columns.start < tile.rows.stop:
        tile.s.triu_(tile.rows.start - tile.columns.start + 1)


def _plain_divisor(x: Tensor, eps: float) -> Tensor | None:
    """max(|x|, eps), [R, 1], if no square under- or overflows."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    low, high = norm.aminmax() if len(x) else (1, 1)
    return norm.clamp_min_(eps) if low > 1e-15 and high < 1e15 else None


def _parts(xs: list[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all xs, one x after the other, in one or several contiguous parts."""
    R = len(xs[0])
    if len(xs) * R <= CHUNK:
        yield slice(0, len(xs) * R), torch.cat([x.to(dtype) for x in xs])
        return
    for view, x in enumerate(xs):
        for rows in _chunks(R, CHUNK):
            yield slice(view * R + rows.start, view * R + rows.stop), x[rows].to(dtype).contiguous()


def _chunks(n: int, size: int, start: int = 0) -> Iterator[slice]:
    return (slice(first, min(first + size, n)) for first in range(start, n, size))
