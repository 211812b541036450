"""NT-Xent against what else there is: time, memory and error, for batches of 2N rows of D features.

    python bench/loss_bench.py [--quick] [--plot docs/loss.svg]

Times     forward, backward and both, of one uninterrupted step from cold caches; p20, p50 and p80 over rounds in
          which the contenders take turns. ours/it: of the medians of both; the spread is p20 to p80 of the rounds.
Memory    peak extra memory over forward and backward in a fresh process: see _memory.py.
Errors    |a - b| / |b| of loss and gradient against float64. A contender whose loss is another one, or differs by
          more than its precision explains, is an error and is not timed.
TFLOP/s   6 n^2 D over the time of both, n = 2N; CLIP's loss has N x N logits: 6 N^2 D.
Roofline  max(2 n^2 D / GEMM rate, n^2 / exp rate) + max(4 n^2 D / GEMM rate, n^2 / exp rate), over the time. Rates: on
          an H200 790 TFLOP/s (fp16) and 4.18e12 exp/s, for every precision; on a CPU, float32, seen in the same run.

Each result is a line of bench/results/loss.jsonl ($OUT/loss.jsonl, or FILE of --json). Packages to compare with:
pip install 'simclr_fast[peers]'; a picture needs 'simclr_fast[bench]'.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from _contenders import EVERY, OURS, Contender
from _harness import Stopwatch, append, progress
from _loss_report import need_matplotlib, picture, table
from _memory import Server
from _times import measure

TAU = 0.1
DIM = 128
ROOFLINE = {"H200": {"gemm_flops": 790e12, "exps": 4.18e12}}  # per second
Case = tuple[int, int]  # 2N, D
Results = dict[Case, dict[Contender, dict[str, Any]]]


def cases(device: str, quick: bool, sizes: list[int] | None) -> list[Case]:
    """What is measured: 2N at D = 128, then other D at two sizes."""
    if sizes:
        return [(n, DIM) for n in sizes]
    if quick:
        return [(n, DIM) for n in (256, 1024, 2048)]
    if device == "cpu":
        return [(1 << k, DIM) for k in range(8, 17)] + [(1024, D) for D in (64, 256, 512, 2048)] + [(4096, 512)]
    return [(1 << k, DIM) for k in range(8, 19)] + [(n, D) for D in (256, 1024, 2048) for n in (4096, 65536)]


def too_much(contender: Contender, n: int, D: int, args: argparse.Namespace) -> str | None:
    """Why this size is not tried, where it is not."""
    if contender.compiles and (args.quick or D != DIM):
        return f"skipped: compiling takes long, so only without --quick and at D = {DIM}"
    if args.device == "cpu":
        told = Path("/proc/meminfo")
        lines = dict(line.split(":") for line in told.read_text().splitlines()) if told.exists() else {}
        free = int(lines.get("MemAvailable", "16000000 kB").split()[0]) * 1024
        if n > 8192 and contender.name != OURS:
            return "skipped: beyond 2N = 8,192 a CPU times ours alone"
    else:
        free = torch.cuda.get_device_properties(0).total_memory
    need, most = contender.peak(n) if contender.peak else 0, free * (0.5 if args.device == "cpu" else 0.9)
    return f"skipped: would take {need / 1e9:.1f} GB, {most / 1e9:.1f} GB are allowed" if need > most else None


def rates(device: str) -> dict[str, float] | None:
    """FLOP/s of matrix products and exponentials/s: the reference figures of a GPU, or what this CPU reaches now."""
    if device == "cuda":
        return next((found for name, found in ROOFLINE.items() if name in torch.cuda.get_device_name(0)), None)
    watch, a, b = Stopwatch(device), torch.randn(2048, 2048), torch.randn(2048, 2048)
    line = torch.randn(1 << 16)  # stays in L2
    gemm = min(watch.lap(lambda _: a @ b)[0] for _ in range(10))
    exps = min(watch.lap(lambda _: [line.exp() for _ in range(100)])[0] for _ in range(10))
    return {"gemm_flops": 2 * 2048**3 / gemm * 1e3, "exps": 100 * len(line) / exps * 1e3}


def efficiency(kind: str, n: int, D: int, ms: float, rate: dict[str, float] | None) -> dict[str, Any]:
    """TFLOP/s, and the roofline's time over the time seen, where there is a roofline."""
    pairs = n**2 / (4 if kind == "CLIP" else 1)
    found: dict[str, Any] = {"tflops": 6 * pairs * D / ms / 1e9, "roofline_share": None, "roofline": rate}
    if rate:
        floor = sum(max(k * pairs * D / rate["gemm_flops"], pairs / rate["exps"]) for k in (2, 4))
        found["roofline_share"] = floor / ms * 1e3
    return found


def extra_memory(here: list[Contender], wanted: list[Case], results: Results, device: str) -> None:
    """Fill in `extra_bytes`; who runs out of memory here is not timed either."""
    with Server(device) as server:
        for contender in here:
            open_cases = [case for case in wanted if results[case][contender]["status"] == "ok"]
            for part in [[case] for case in open_cases] if device == "cpu" else [open_cases]:
                progress(f"memory: {contender.name}, 2N, D = {', '.join(map(str, part))}")
                for case, told in zip(part, server.extra_bytes(contender.name, part, TAU), strict=True):
                    results[case][contender]["extra_bytes"] = told if isinstance(told, int) else None
                    if isinstance(told, str):
                        results[case][contender]["status"] = told


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, and write a line for each contender and case, and for each contender that cannot run here."""
    missing = {c: why for c in EVERY if (why := c.missing(TAU, args.device))}
    chosen = [c for c in EVERY if not args.only or c.name == OURS or any(name in c.name for name in args.only)]
    here = [c for c in chosen if c not in missing]
    wanted = cases(args.device, args.quick, args.sizes)
    results: Results = {(n, D): {c: {"status": too_much(c, n, D, args) or "ok"} for c in here} for n, D in wanted}
    common = {
        "peers": {c.package: missing.get(c) or c.version for c in EVERY if c.package},
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "temperature": TAU,
        "dtype": "float32",
    }
    if common["load_average"] > 0.5:
        progress(f"warning: other work runs here, load average {common['load_average']:.1f}: times will be wrong")
    lines = []

    def write(contender: str, kind: str, **found: Any) -> None:
        lines.append(append("loss", {**common, "contender": contender, "loss": kind, **found}, args.json))

    for contender in (c for c in chosen if c in missing):
        write(contender.name, contender.kind, status=missing[contender])
    extra_memory(here, wanted, results, args.device)
    rate = rates(args.device)
    for n, D in wanted:
        progress(f"time: 2N = {n}, D = {D}")
        measure((n, D), results[n, D], TAU, args.device, seconds=2 if args.quick or args.device == "cuda" else 15)
        for contender, found in results[n, D].items():
            if "ms" in found:
                found |= efficiency(contender.kind, n, D, found["ms"]["both"]["p50"], rate)
            write(contender.name, contender.kind, **{"2N": n, "D": D, **found})
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes, few rounds: within a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="2N", help=f"these, at D = {DIM}, instead")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"{OURS} and contenders whose names hold one of these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file, not to bench/results")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="measure nothing, show these results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory against 2N (.svg or .png)")
    args = parser.parse_args(argv)
    if any(n < 2 or n % 2 for n in args.sizes or []):
        parser.error(f"--sizes must be even and at least 2, got {args.sizes}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where PyTorch sees no GPU, got cuda")
    if args.source and not args.source.is_file():
        parser.error(f"--from must be a file of results, got {args.source}")
    if args.plot:
        need_matplotlib()
    lines = [json.loads(line) for line in args.source.read_text().splitlines()] if args.source else run(args)
    print(table(lines))
    if args.plot:
        picture(lines, args.plot, DIM)
    return 1 if any("ERROR" in line["status"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
