"""The k nearest rows found in bf16 and compared in float32, on a CPU: the result is that of float32.

A similarity of unit rows x and y, computed in float32 from their roundings x' and y', is off by at most

    bound = |x - x'| |y'| + |x| |y - y'| + d 2^-23

and is then rounded to bf16, which keeps the order. Let t be the k-th largest among the maxima, in bf16, of disjoint
groups of rows: at least k rows had halfway from the number below t to t, or more, before that was rounded. So the k
nearest rows had no less than that - 2 bound, and what is below this, rounded, is not among them. The rest is compared
in float32, row by row of the bank, so that each is read from memory once for many queries.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simclr_fast.compiled import compiled as _compiled

GROUP = 16  # rows of the bank: i, i + n / GROUP, i + 2 n / GROUP, ...
BLOCK, NUMBERS = 2048, 1 << 29  # queries, and similarities, that are held at a time
CACHED = 1024  # rows that are rounded at a time
NARROW = 16  # a query that more than this part of the bank may be near to is left to float32
PAIRS = 1 << 19  # of a query and a row of the bank, that are compared at a time


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, d] in bf16, and [n] how far each row is moved by that; not finite where a row is not."""
    small, moved = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x))
    for first in range(0, len(x), CACHED):
        part = slice(first, first + CACHED)
        small[part] = x[part]
        moved[part] = (x[part] - small[part].float()).norm(dim=1)
    return small, moved


def bounds(moved_bank: Tensor, moved_queries: Tensor, d: int) -> Tensor:
    """[m]: the bound above, for unit rows, for one query and all of the bank."""
    largest = moved_bank.max()
    return moved_queries * (1 + largest) + largest + d * 2.0**-23 + 1e-6  # 1e-6: unit rows are so in float32


def searched(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """As `nearest`, for float32 rows of length 1 or 0 and k <= n / GROUP, by as many threads as torch uses.

    None where a row is not finite: nothing bounds the errors then.
    """
    (bank16, moved_bank), (queries16, moved_queries) = rounded(bank), rounded(queries)
    slack = bounds(moved_bank, moved_queries, bank.shape[1])
    if not slack.isfinite().all():
        return None
    (m, n), threads = (len(queries), len(bank)), torch.get_num_threads()
    values, indices = queries.new_empty(m, k), torch.empty(m, k, dtype=torch.int64)
    most = max(1, min(BLOCK, NUMBERS // n, m))
    served, similar = torch.zeros(m, dtype=torch.bool), torch.empty(most, n, dtype=torch.bfloat16)
    bank, queries = bank.contiguous(), queries.contiguous()
    of_queries = [one.numpy() for one in (values, indices, served, slack, queries)]

    def search(rows: slice, similar: Tensor) -> None:
        # Bits of bf16 numbers that are not negative are in the numbers' order; negative ones are below all these.
        _search(*(one[rows] for one in of_queries), similar.view(torch.int16).numpy(), bank.numpy())

    last = 0
    with ThreadPoolExecutor(threads) as pool:
        while last < m and int(served[:last].sum()) * 2 >= last:  # else the bank is so narrow that bf16 is no help
            first, last = last, min(last + most, m)
            block = torch.mm(queries16[first:last], bank16.T, out=similar[: last - first])
            share = -(-len(block) // threads)
            starts = range(0, len(block), share)
            parts = [slice(first + start, min(first + start + share, last)) for start in starts]
            for done in [pool.submit(search, *part) for part in zip(parts, block.split(share), strict=True)]:
                done.result()
    for rows in (~served).nonzero()[:, 0].split(most):
        values[rows], indices[rows] = (queries[rows] @ bank.T).topk(k)
    return values, indices


@_compiled
def _search(values, indices, served, slack, queries, similar, bank):
    """The neighbours, float32 and int64 [m, k], and for which queries they are there.

    Not so for those to which the k nearest are hardly similar, or most rows as similar as these: float32 is faster.

    slack: float32 [m], of `bounds`; similar: int16 [m, n], similarities in bf16.
    """
    (m, n), k = similar.shape, values.shape[1]
    maxima, counts = np.empty(n // GROUP, np.int16), np.empty(2048, np.int32)
    rows, starts, most = np.empty(PAIRS + n + 1, np.int32), np.zeros(m + 1, np.int64), max(n // NARROW, 2 * k)
    near = np.empty(n // GROUP + 1, np.int32)
    first = 0
    while first < m:
        last, count = first, 0
        while last < m and count <= PAIRS:
            _group(maxima, similar[last])
            cut = _cut(_largest(maxima, k, counts), slack[last])
            after = _pick(rows, count, similar[last], maxima, cut, near) if cut > 0 else count
            served[last] = count < after <= count + most
            count = after if served[last] else count
            last += 1
            starts[last] = count
        starts[first] = 0
        exact = _compare(rows[:count], starts[first : last + 1], queries[first:last], bank)
        for query in range(first, last):
            if served[query]:
                a, b = starts[query], starts[query + 1]
                _sort(values[query], indices[query], exact[a:b], rows[a:b])
        first = last


@_compiled
def _group(maxima, similar):
    groups = len(maxima)
    maxima[:] = similar[:groups]
    for i in range(1, GROUP):
        for g in range(groups):
            maxima[g] = max(maxima[g], similar[i * groups + g])


@_compiled
def _largest(maxima, k, counts):
    """The k-th largest, or 0 where that is negative; by a histogram of the upper bits, then one of the lower."""
    counts[:] = 0
    for x in maxima:
        if x > 0:
            counts[x >> 4] += 1
    upper = len(counts) - 1
    while upper > 0 and counts[upper] < k:
        k -= counts[upper]
        upper -= 1
    counts[:16] = 0
    for x in maxima:
        if x >> 4 == upper:
            counts[x & 15] += 1
    lower = 15
    while lower > 0 and counts[lower] < k:
        k -= counts[lower]
        lower -= 1
    return (upper << 4) + lower


@_compiled
def _cut(t, slack):
    """Bits below which nothing is looked at; 0 where that is nothing."""
    bits = np.full(1, (t << 16) - (1 << 15), np.int32)
    number = bits.view(np.float32)
    number[0] -= np.float32(2) * slack
    return (bits[0] + 0x7FFF + (bits[0] >> 16 & 1)) >> 16 if number[0] > 0 else 0  # to the nearest, ties to even


@_compiled
def _pick(rows, count, similar, maxima, cut, near):
    """`count` and how many more rows of the bank are written behind it: those that are not below the cut.

    near: int32, longer than `maxima`; indices of no sign, as they cannot count from the end, take less time.
    """
    groups, found, last = len(maxima), np.uint64(0), np.uint64(count)
    for g in range(groups):
        near[found] = g
        found += np.uint64(maxima[g] >= cut)
    for i in range(GROUP):
        part = similar[i * groups : (i + 1) * groups]
        for g in near[:found]:
            rows[last] = i * groups + g
            last += np.uint64(part[np.uint64(g)] >= cut)
    for row in range(GROUP * groups, len(similar)):
        rows[last] = row
        last += np.uint64(similar[row] >= cut)
    return np.int64(last)


@_compiled
def _compare(rows, starts, queries, bank):
    """Similarities, float32, of query i and the rows[starts[i]:starts[i + 1]] of the bank."""
    after = np.zeros(len(bank) + 1, np.int64)
    for row in rows:
        after[np.uint64(row + 1)] += 1
    for row in range(len(bank)):
        after[row + 1] += after[row]
    pairs = np.empty(len(rows), np.int64)  # by row of the bank: the query, in the lower half the place in `rows`
    for query in range(len(queries)):
        for pair in range(starts[query], starts[query + 1]):
            row = np.uint64(rows[pair])
            pairs[np.uint64(after[row])] = query << 32 | pair
            after[row] += 1
    exact = np.empty(len(rows), np.float32)
    for both in pairs:
        pair = both & 0xFFFFFFFF
        exact[pair] = _dot(queries[both >> 32], bank[rows[pair]])
    return exact


@_compiled(fastmath={"reassoc", "contract"})  # sums side by side
def _dot(x, y):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@_compiled
def _sort(values, indices, exact, rows):
    """The largest in descending order; at least k are positive, whose bits are in the numbers' order."""
    bits, keys = exact.view(np.int32), np.empty(len(exact), np.int64)
    for i in range(len(keys)):
        keys[i] = (np.int64(bits[i]) << 32) | i
    keys.sort()
    for i in range(len(values)):
        chosen = keys[len(keys) - 1 - i] & 0xFFFFFFFF
        values[i], indices[i] = exact[chosen], rows[chosen]
