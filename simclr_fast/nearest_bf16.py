"""The k nearest rows found in bf16 and compared in float32, on a CPU: the result is that of float32.

A similarity s of unit rows x and y, computed from their roundings x' and y' and rounded itself, is off by at most

    bound = |x - x'| |y'| + |x| |y - y'| + d 2^-23 + 2^-8 |s|

So at least k rows of the bank have s >= t - bound, where t is the k-th largest among the maxima, in bf16, of disjoint
groups of rows; and whatever is below t - 2 bound in bf16 is not among the k nearest. The rest is compared in float32,
row by row of the bank, so that each is read from memory once for many queries.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simclr_fast.compiled import compiled as _compiled

GROUP = 16  # rows of the bank: i, i + n / GROUP, i + 2 n / GROUP, ...
BLOCK = 1024  # queries whose similarities are held at a time
NARROW = 16  # a query that more than this part of the bank may be near to is left to float32
PAIRS = 1 << 19  # of a query and a row of the bank, that are compared at a time


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, d] in bf16, and [n] how far each row is moved by that; not finite where a row is not."""
    small, moved = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x))
    for first in range(0, len(x), BLOCK):  # in the cache
        part = slice(first, first + BLOCK)
        small[part] = x[part]
        moved[part] = (x[part] - small[part].float()).norm(dim=1)
    return small, moved


def bounds(moved_bank: Tensor, moved_queries: Tensor, d: int) -> Tensor:
    """[m]: the bound above but for its last term, for unit rows, for one query and all of the bank."""
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
    served, similar = torch.zeros(m, dtype=torch.bool), torch.empty(min(BLOCK, m), n, dtype=torch.bfloat16)
    bank, queries = bank.contiguous(), queries.contiguous()
    of_queries = [one.numpy() for one in (values, indices, served, slack, queries)]

    def search(rows: slice, similar: Tensor) -> None:
        # Bits of bf16 numbers that are not negative are in the numbers' order; negative ones are below all these.
        _search(*(one[rows] for one in of_queries), similar.view(torch.int16).numpy(), bank.numpy())

    last = 0
    with ThreadPoolExecutor(threads) as pool:
        while last < m and int(served[:last].sum()) * 2 >= last:  # else the bank is so narrow that bf16 is no help
            first, last = last, min(last + BLOCK, m)
            block = torch.mm(queries16[first:last], bank16.T, out=similar[: last - first])
            share = -(-len(block) // threads)
            starts = range(0, len(block), share)
            parts = [slice(first + start, min(first + start + share, last)) for start in starts]
            for done in [pool.submit(search, *part) for part in zip(parts, block.split(share), strict=True)]:
                done.result()
    for rows in (~served).nonzero()[:, 0].split(BLOCK):
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
    rows, starts, most = np.empty(PAIRS + n, np.int32), np.zeros(m + 1, np.int64), max(n // NARROW, 2 * k)
    first = 0
    while first < m:
        last, count = first, 0
        while last < m and count <= PAIRS:
            _group(maxima, similar[last])
            cut = _cut(_largest(maxima, k, counts), slack[last])
            after = _pick(rows, count, count + most, similar[last], maxima, cut) if cut > 0 else count
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
    """Bits below which nothing is looked at, rounded down."""
    bits = np.full(1, t << 16, np.int32)
    number = bits.view(np.float32)
    number[0] -= np.float32(2) * (slack + number[0] * np.float32(2.0**-8))
    return bits[0] >> 16


@_compiled
def _pick(rows, count, most, similar, maxima, cut):
    """`count` and how many more rows of the bank are written behind it: those not below the cut, until above `most`."""
    groups = len(maxima)
    for g in range(groups):
        if maxima[g] >= cut and count <= most:
            for row in range(g, GROUP * groups, groups):
                rows[count] = row
                count += similar[row] >= cut
    for row in range(GROUP * groups, len(similar)):
        rows[count] = row
        count += similar[row] >= cut
    return count


@_compiled
def _compare(rows, starts, queries, bank):
    """Similarities, float32, of query i and the rows[starts[i]:starts[i + 1]] of the bank."""
    after = np.zeros(len(bank) + 1, np.int32)
    for row in rows:
        after[row + 1] += 1
    for row in range(len(bank)):
        after[row + 1] += after[row]
    pairs, owners = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
    for query in range(len(queries)):
        for pair in range(starts[query], starts[query + 1]):
            place = after[rows[pair]]
            after[rows[pair]] += 1
            pairs[place], owners[place] = pair, query
    exact = np.empty(len(rows), np.float32)
    for place in range(len(rows)):
        exact[pairs[place]] = _dot(queries[owners[place]], bank[rows[pairs[place]]])
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
