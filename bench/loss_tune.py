"""Which block sizes are fastest here: times the launch table's entry for D and precision, and its neighbours.

    python bench/loss_tune.py [--rows 65536] [--dim 128] [--precision fp16] [--fields 2]

A neighbour differs from the entry in up to FIELDS of its fields. The statistics kernel is timed as the forward pass,
the gradient kernel as the backward pass, from a cold L2. What a GPU cannot launch, or gives another loss or gradient,
is left out. Each candidate is a line of bench/results/loss_tune.jsonl ($OUT/loss_tune.jsonl); the table stays as it is.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator

import torch
from _harness import Stopwatch, append, interleave, progress, quantiles
from _memory import failure, inputs
from torch import Tensor

from simclr_fast.kernels.nt_xent import LAUNCH, Launch
from simclr_fast.losses import nt_xent

VALUES = {"rows": (64, 128), "columns": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4), "programs": (1, 2)}
KERNELS = ("statistics", "gradient")  # in the order of an entry of the table
TAU = 0.1


def neighbours(entry: Launch, fields: int) -> Iterator[Launch]:
    """The entry, then all that differ from it in at most `fields` fields."""
    yield entry
    names = [name for name in VALUES if name in Launch._fields]
    for values in itertools.product(*(VALUES[name] for name in names)):
        candidate = entry._replace(**dict(zip(names, values, strict=True)))
        if 0 < sum(a != b for a, b in zip(candidate, entry, strict=True)) <= fields:
            yield candidate


def width(D: int, precision: str) -> int:
    """Of the launch table's entry for D features: the least that holds them, or the widest."""
    known = sorted(w for w, p in LAUNCH if p == precision)
    return next((w for w in known if D <= w), known[-1])


def tune(kernel: str, rows: int, D: int, precision: str, fields: int, device: str) -> list[tuple[float, Launch]]:
    """(ms, candidate), fastest first."""
    views, watch = inputs(rows, D, device), Stopwatch(device)
    key = width(D, precision), precision
    table, at = LAUNCH[key], KERNELS.index(kernel)

    def forward(_: object = None) -> Tensor:
        return nt_xent(*views, TAU, backend="triton", precision=precision)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, views)

    def values() -> Tensor:
        loss = forward()
        return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in backward(loss))])

    def lap(candidate: Launch) -> list[float]:
        use(candidate)
        return [watch.lap(forward, backward)[at]]

    def use(candidate: Launch) -> None:
        LAUNCH[key] = (candidate, table[1]) if at == 0 else (table[0], candidate)

    laps, expected = {}, values()
    try:
        for candidate in neighbours(table[at], fields):
            progress(f"{kernel}: {candidate}")
            use(candidate)
            try:
                error = float((values() - expected).norm() / expected.norm())
            except Exception as problem:
                progress(f"{kernel}: {candidate}: {failure(problem)}")
                continue
            if error < 1e-3:
                laps[candidate] = lambda candidate=candidate: lap(candidate)
            else:
                progress(f"{kernel}: {candidate}: other values, {error:.1e}")
        times = interleave(laps, seconds=20, least=3, most=50)
    finally:
        LAUNCH[key] = table
    found = []
    for candidate, rounds in times.items():
        raw = [ms for (ms,) in rounds]
        ms = quantiles(raw)
        found.append((ms["p50"], candidate))
        append("loss_tune", {"kernel": kernel, "2N": rows, "D": D, "precision": precision, **candidate._asdict(),
                             "in_table": candidate == table[at], "ms": ms, "raw_ms": raw})  # fmt: skip
    return sorted(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536, metavar="2N")
    parser.add_argument("--dim", type=int, default=128, metavar="D")
    parser.add_argument("--precision", default="fp16", choices=sorted({precision for _, precision in LAUNCH}))
    parser.add_argument("--fields", type=int, default=2, help="how many fields of an entry may change at once")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("loss_tune needs a GPU (TRITON_INTERPRET=1 only shows that it works)")
    for kernel in KERNELS:
        found = tune(kernel, args.rows, args.dim, args.precision, args.fields, device)
        print(f"{kernel}, 2N = {args.rows:,}, D = {args.dim}, {args.precision}: ms, {', '.join(Launch._fields)}")
        in_table = LAUNCH[width(args.dim, args.precision), args.precision][KERNELS.index(kernel)]
        for ms, candidate in found[:10]:
            print(f"  {ms:10.4f}  {tuple(candidate)}{'  <- the table' if candidate == in_table else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
