"""kNN on features that are there already, against what else there is.

    python bench/knn_bench.py [--bank 50000] [--queries 10000] [--features 512] [--k 200] [--data DIR --checkpoint RUN]

Features  are made up: of 10 classes, behind a ReLU, with a spectrum that falls as 1 / sqrt(rank); or those of an
          encoder, of DIR's training and test images.
Times     from features to the class of every query; p20, p50 and p80 over rounds in which the contenders take turns.
          it/ours: of the medians of both; the spread is p20 to p80 of the rounds.
Same      the share of queries whose k neighbours are those of the search in float32, as sets; and the largest
          difference of the similarities, rank by rank.

Each result is a line of bench/results/knn.jsonl ($OUT/knn.jsonl, or FILE of --json). lightly's function comes with
pip install 'simclr_fast[peers]'.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import append, interleave, progress, quantiles, ratio
from torch import Tensor
from torch.nn import functional as F

from simclr_fast import knn
from simclr_fast.environment import cpu_has_bf16
from simclr_fast.nearest import nearest

CLASSES, TEMPERATURE, PART = 10, 0.1, 512  # PART: queries at a time for those that take a batch
Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def made_up(bank: int, queries: int, features: int) -> Sides:
    """(bank, its labels, queries, their labels)."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, features + 1).rsqrt()
    centres = torch.randn(CLASSES, features, generator=generator) * scales

    def side(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        return (torch.randn(count, features, generator=generator) * scales + 0.5 * centres[labels]).relu(), labels

    return (*side(bank), *side(queries))


def of_encoder(data: str, run: str) -> Sides:
    from simclr_fast.distributed import Ranks
    from simclr_fast.evaluation.job import Job
    from simclr_fast.evaluation.knn import Settings

    job = Job(Settings(checkpoint=run, data=data), Ranks(use_gpu=torch.cuda.is_available()), progress)
    train, test = job.labelled()
    return (*job.features(train, "training images"), *job.features(test, "test images"))


def ours(precision: str) -> Callable[[Sides, int, int], Tensor]:
    def run(sides: Sides, k: int, classes: int) -> Tensor:
        bank, labels, queries, _ = sides
        return knn.voted(*nearest(bank, queries, k, precision), labels, classes, TEMPERATURE).argmax(1)

    return run


def lightly(sides: Sides, k: int, classes: int) -> Tensor:
    predict = importlib.import_module("lightly.utils.benchmarking.knn").knn_predict
    bank, labels, queries, _ = sides
    bank, queries = F.normalize(bank).T.contiguous(), F.normalize(queries)
    return torch.cat([predict(part, bank, labels, classes, k, TEMPERATURE)[:, 0] for part in queries.split(PART)])


def scikit_learn(sides: Sides, k: int, classes: int) -> Tensor:
    neighbors = importlib.import_module("sklearn.neighbors")
    bank, labels, queries, _ = (side.cpu().numpy() for side in sides)
    model = neighbors.KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: torch.from_numpy((1 - distance) / TEMPERATURE).exp().numpy(),
    )
    return torch.from_numpy(model.fit(bank, labels).predict(queries))


CONTENDERS: dict[str, Callable[[Sides, int, int], Tensor]] = {
    "simclr_fast": ours("auto"),
    "simclr_fast, float32": ours("fp32"),
    "lightly": lightly,
    "scikit-learn": scikit_learn,
}


def measure(args: argparse.Namespace, sides: Sides) -> list[dict[str, Any]]:
    """A line for each contender."""
    bank, _, queries, truth = sides
    classes = int(max(sides[1].max(), truth.max())) + 1
    about = {
        "bank": len(bank), "queries": len(queries), "features": bank.shape[1], "classes": classes, "k": args.k,
        "source": "made up" if not args.data else Path(args.data).name, "bf16": cpu_has_bf16(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    values, indices = nearest(bank, queries, args.k, "fp32")
    found, said = nearest(bank, queries, args.k), {}
    same = (found[1].sort(1).values == indices.sort(1).values).all(1).double().mean().item()
    laps: dict[str, Callable[[], list[float]]] = {}
    lines = []
    for name in args.only or CONTENDERS:
        progress(f"check: {name}")
        try:
            said[name] = CONTENDERS[name](sides, args.k, classes)
        except ImportError as error:
            lines.append(about | {"contender": name, "status": f"not installed ({error})"})
            continue
        laps[name] = lambda name=name: timed(lambda: CONTENDERS[name](sides, args.k, classes))  # type: ignore[misc]
    progress(f"time: {', '.join(laps)}")
    times = {name: [1e-3 * lap[0] for lap in rounds] for name, rounds in interleave(laps, args.seconds, 3, 30).items()}
    for name, seconds in times.items():
        lines.append(
            about
            | {"contender": name, "status": "ok", "seconds": quantiles(seconds), "raw_s": seconds}
            | {"it_over_ours": ratio(seconds, times["simclr_fast"]) if "simclr_fast" in times else None}
            | {"top1": (said[name] == truth).double().mean().item()}
            | {"agrees": (said[name] == said.get("simclr_fast, float32", said[name])).double().mean().item()}
            | (
                {"same_sets": same, "largest_difference": float((found[0] - values).abs().max())}
                if name == "simclr_fast"
                else {}
            )
        )
    return lines


def timed(work: Callable[[], Any]) -> list[float]:
    """Milliseconds."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return [1e3 * (time.perf_counter() - began)]


def table(lines: list[dict[str, Any]]) -> str:
    first = lines[0]
    rows = [
        f"{first['queries']:,} queries in {first['bank']:,} x {first['features']}, k = {first['k']}, {first['source']};"
        f" {first['threads']} threads, {'bf16' if first['bf16'] else 'no bf16'}",
        f"{'':<24}{'s':>8}{'p20-p80':>16}{'it/ours':>9}{'p20-p80':>14}{'top-1':>8}",
    ]
    for line in lines:
        if line["status"] != "ok":
            rows.append(f"{line['contender']:<24}{line['status']}")
            continue
        s, own = line["seconds"], line["it_over_ours"]
        spread = f"{s['p20']:.2f}-{s['p80']:.2f}"
        shown = f"{own['p50']:>9.2f}{own['p20']:>8.2f}-{own['p80']:.2f}" if own else ""
        rows.append(f"{line['contender']:<24}{s['p50']:>8.2f}{spread:>16}{shown}{line['top1']:>9.1%}")
        if "same_sets" in line:
            rows.append(
                f"  same neighbours as float32 {line['same_sets']:.2%}, off by {line['largest_difference']:.0e}"
            )
    return "\n".join(rows)


def parsed(argv: Sequence[str] | None, about: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in ("bank", 50_000), ("queries", 10_000), ("features", 512), ("k", 200):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=120, help="for all rounds together")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--data", help="images with labels, for --checkpoint")
    parser.add_argument("--checkpoint", help="a run, whose encoder makes the features")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    if bool(args.data) != bool(args.checkpoint):
        parser.error("--data and --checkpoint must be given together")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv)
    sides = of_encoder(args.data, args.checkpoint) if args.data else made_up(args.bank, args.queries, args.features)
    if torch.cuda.is_available():
        sides = tuple(side.cuda() for side in sides)  # type: ignore[assignment]
    lines = [append("knn", line, args.json) for line in measure(args, sides)]
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
