"""Nearest neighbours by cosine similarity: exact, in blocks, and on a CPU with bf16 instructions searched in bf16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_fast.environment import cpu_has_bf16

try:
    from simclr_fast import nearest_bf16
except ImportError:  # without numba: float32 alone
    nearest_bf16 = None  # type: ignore[assignment]

PRECISIONS = ("auto", "bf16", "fp32")
BLOCK = 512  # queries whose similarities are held at a time
LARGE = 4096  # rows of the bank from which the search in bf16 is faster


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, precision: str = "auto") -> tuple[Tensor, Tensor]:
    """Similarities and indices [m, k] of the k rows of `bank` [n, d] nearest to each row of `queries` [m, d].

    Args:
        bank, queries: floating, on one device, not normalised. Rows of zeros are similar to nothing: 0.
        k: at most n are given.
        precision: of the search: `fp32`, `bf16` (on a CPU, for k of up to a 16th of n), or `auto`, bf16 where that is
            faster. The result is the same: similarities are float32, in descending order; of equal ones any is given.
    Raises:
        ValueError: the bank has no rows, the widths differ, k is below 1, or there is no such precision.
    """
    if bank.ndim != 2 or queries.ndim != 2 or not len(bank) or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank must be [n, d] and queries [m, d], n > 0, got {[*bank.shape]} and {[*queries.shape]}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision}")
    bank, queries, k = F.normalize(bank.float()), F.normalize(queries.float()), min(k, len(bank))
    if not len(queries):
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    fast = precision == "bf16" or (precision == "auto" and len(bank) >= LARGE and cpu_has_bf16())
    if fast and nearest_bf16 and bank.device.type == "cpu" and k * nearest_bf16.GROUP <= len(bank):
        if served := nearest_bf16.searched(bank, queries, k):
            return served
    found = [(part @ bank.T).topk(k) for part in queries.split(BLOCK)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
