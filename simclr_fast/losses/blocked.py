"""NT-Xent in blocks of rows, in plain PyTorch. Same names and contract as kernels/nt_xent.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of S that are held at a time: 16 MiB in float32.
BLOCK_ELEMENTS = 1 << 22


def operand(z: Tensor, precision: str) -> Tensor:
    """z as it is multiplied: float32, or float64."""
    return z


def statistics(z: Tensor, tau: Tensor, n: int, first: int, precision: str) -> tuple[Tensor, Tensor]:
    """`rest` and `match`, [2n], of images first .. first + n - 1 of z, [2N, D]."""
    rest, match = z.new_empty(2, 2 * n).unbind()
    for here, i, positive in _blocks(n, len(z) // 2, first):
        s = (z[i] @ z.T).div_(tau)
        match[here] = s[:, positive].diagonal()
        s[:, i].diagonal().fill_(-math.inf)
        s[:, positive].diagonal().fill_(-math.inf)
        rest[here] = s.logsumexp(1)
    return rest, match


def gradient(z: Tensor, tau: Tensor, lse: Tensor, g: Tensor, pull: Tensor, first: int, precision: str) -> Tensor:
    """tau dL/dz of the same anchors, [2n, D]."""
    dz = z.new_empty(len(pull), z.shape[1])
    for here, i, positive in _blocks(len(pull) // 2, len(z) // 2, first):
        s = (z[i] @ z.T).div_(tau)
        w = (s - lse[i, None]).exp_().mul_(g[i, None]).add_((s - lse).exp_().mul_(g))
        w[:, i].diagonal().zero_()
        w[:, positive].diagonal().copy_(-pull[here])
        torch.mm(w, z, out=dz[here])
    return dz


def _blocks(n: int, N: int, first: int) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks of anchors: their places among the 2n, rows of z, and rows of their positives."""
    size = max(1, BLOCK_ELEMENTS // (2 * N))
    for view in (0, 1):
        for start in range(0, n, size):
            starts = view * n + start, view * N + first + start, (1 - view) * N + first + start
            here, i, positive = (slice(at, at + min(size, n - start)) for at in starts)
            yield here, i, positive
