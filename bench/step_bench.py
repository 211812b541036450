"""A training step: where its time goes, and images/s beside plain PyTorch's and other packages' steps.

    python bench/step_bench.py [--arch resnet50] [--image-size 224] [--batch 256] [--data DIR] [--compile] [--ranks R]

Steps     the trainer's own (simclr_fast.training.step.Step); plain PyTorch as it is usually written (torchvision's
          ResNet, autocast, the loss from the whole 2N x 2N matrix, LARS in a loop; several ranks: DDP, and on GPUs
          SyncBatchNorm); lightly's and solo-learn's parts, in this bench's loop, not their Lightning's. Same network,
          same weights, same precision.
Views     as each one's users have them: ours channels_last, for bf16 on a GPU in bf16, as its input makes them; the
          others' float32 and NCHW, and autocast and the change of layout are part of their steps.
Check     of loss and gradient of each, of the batch that is timed, against the trainer's step in float32; one that
          differs by more than its precision explains is an error and is not timed.
images/s  of source images, two views each, all ranks together; p20, p50 and p80 over rounds in which the contenders
          take turns; one round is a few steps, with one synchronisation at their end.
Data      noise that lies on the device; with --data also real images: ours through the trainer's input, plain through a
          DataLoader with torchvision's transforms, lightly through one with its own. Streams start anew in each
          round, and what they made ahead is left out. 2,000 images at most are used, evenly spaced.
waiting   share of the time in which the host waits for the next batch; on a GPU it may have work meanwhile.
phases    of the trainer's step: see _step_phases.py. Those inside a compiled network cannot be seen.
--ranks   processes on this host. `a rank alone` is a rank's share of the batch without the others, all ranks at the
          same time; a step takes longer than that by what communication adds beyond what is hidden, waiting for
          the slowest rank included: this is what is shown as communication. On a CPU plain BatchNorm stays within
          a rank, so plain contenders are checked against ours of the same kind.
memory    a GPU's peak over a contender's first two steps, weights and the optimiser's state included.
--largest the largest batch, to 1/16, of which a GPU makes two steps, and its peak: ours and plain, channels_last;
          measured first, while nothing else is on the GPU.

Each result is a line of bench/results/step.jsonl ($OUT/step.jsonl, or FILE of --json). Packages to compare with:
pip install 'simclr_fast[peers]'; a picture needs 'simclr_fast[bench]'.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _data_contenders import Views, Work, policy_for
from _harness import append, interleave, progress, quantiles, ratio
from _loss_report import need_matplotlib
from _step_check import agreed, largest, peak_of, prepare, truth, weights
from _step_contenders import ALONE, OURS, Contender, Task, Trainer, contenders, synthetic
from _step_phases import phases
from _step_report import picture, table
from data_bench import as_files, thinned, version

from simclr_fast.data import DataError, open_dataset
from simclr_fast.distributed import Ranks
from simclr_fast.environment import cpu_has_bf16
from simclr_fast.launch import launched
from simclr_fast.training.costs import BENCHED

LARGEST = (OURS, "plain, channels_last")


@dataclass(frozen=True)
class Player:
    """A contender at work on noise, or on real images."""

    contender: Contender
    trainer: Trainer
    task: Task
    work: Work | None
    window: tuple[int, int]
    noise: Views
    seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def views(self) -> Generator[Views]:
        """A stream that has to be closed."""
        if self.work is None:
            yield from itertools.repeat(self.noise)
        with closing(self.contender.start(self.task, self.work, next(self.seeds))) as stream:
            yield from stream

    def lap(self) -> list[float]:
        """Milliseconds of a step, and the share of them in which the host waited for views."""
        (ahead, steps), waited = self.window, 0.0
        with closing(self.views()) as views:
            for _ in range(ahead):
                self.trainer.step(*next(views))
            self.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                asked = time.perf_counter()
                made = next(views)
                waited += time.perf_counter() - asked
                self.trainer.step(*made)
            self.synchronize()
            seconds = time.perf_counter() - began
        return [1e3 * seconds / steps, waited / seconds]

    def synchronize(self) -> None:
        if self.task.device.type == "cuda":
            torch.cuda.synchronize()


def alone(task: Task) -> Task:
    """The share of a rank as a task of its own."""
    ranks = copy.copy(task.ranks)
    ranks.rank, ranks.world, ranks.group = 0, 1, None
    return replace(task, batch=task.rows, ranks=ranks)


def limits(chosen: list[Contender], task: Task, batch: int) -> dict[Contender, dict[str, Any]]:
    """The largest batches from `batch` upwards, on an empty GPU."""
    found = {}
    for contender in (c for c in chosen if c.name in LARGEST):
        progress(f"largest batch: {contender.name}")
        found[contender] = largest(peak_of(contender, task), batch)
    return found


def ready(
    every: list[Contender], chosen: list[Contender], task: Task
) -> tuple[dict[Contender, Trainer], dict[Contender, dict[str, Any]]]:
    """The contenders that can be timed, the same on every rank, and what is known of all that are chosen."""
    state, trainers, found = weights(task), {}, {}
    truths = {
        name: truth(next(c for c in every if c.name == name), task, state)
        for name in dict.fromkeys(c.like for c in chosen if c.like)
    }
    for contender in chosen:
        if task.ranks.main:
            progress(f"check: {contender.name}")
        its = alone(task) if contender.name == ALONE else task
        trainer, facts = prepare(contender, its, state, truths.get(contender.like))
        facts["status"] = agreed(task.ranks, facts["status"])
        found[contender] = facts
        if trainer and facts["status"] == "ok":
            trainers[contender] = trainer
        elif contender.name == OURS:
            raise SystemExit(f"{OURS}: {facts['status']}")
    return trainers, found


def window_of(task: Task, work: Work | None) -> tuple[int, int]:
    """Steps of a round that are left out, as many as loaders hold batches ahead, and steps that are timed."""
    if work:
        return max(6, 2 * work.workers + 2), max(8, work.workers)
    return (2, 20) if task.device.type == "cuda" else (0, 2)


def timed(
    task: Task, work: Work | None, trainers: dict[Contender, Trainer], args: argparse.Namespace
) -> dict[Contender, dict[str, Any]]:
    """Times of the contenders in turns, and the phases of ours."""
    window = (0, 1) if args.quick else window_of(task, work)
    players = {}
    for contender, trainer in trainers.items():
        its = alone(task) if contender.name == ALONE else task
        players[contender] = Player(contender, trainer, its, work, window, synthetic(its, contender))
    if task.ranks.main:
        progress(f"time: {', '.join(c.name for c in players)}")
    most = 50 if task.ranks.group is None else args.rounds  # ranks must agree
    rounds = interleave({c: player.lap for c, player in players.items()}, args.seconds, args.rounds, most)
    columns = {c: tuple(zip(*laps, strict=True)) for c, laps in rounds.items()}
    own = next(ms for c, (ms, _) in columns.items() if c.name == OURS)
    results, communication = {}, None
    for contender, (ms, waiting) in columns.items():
        images = players[contender].task.batch * (task.ranks.world if contender.name == ALONE else 1)
        results[contender] = {
            "ms": quantiles(ms), "images_per_s": quantiles([1e3 * images / t for t in ms]), "raw_ms": list(ms),
            "waiting": quantiles(waiting), "ours_over_it": ratio(ms, own),
        }  # fmt: skip
        if contender.name == ALONE:
            communication = quantiles([a - b for a, b in zip(own, ms, strict=True)])
    ours = next(c for c in players if c.name == OURS)
    with closing(players[ours].views()) as views:
        spans = phases(trainers[ours], views, task.device, max(1, window[0]), window[1] * args.rounds)
    results[ours]["phases_ms"] = {phase: quantiles(times) for phase, times in spans.items()}
    results[ours]["communication_ms"] = communication
    return results


def common(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What all lines of a run tell alike."""
    packages = ("lightly", "solo-learn", "torchvision")
    load_average = os.getloadavg()[0]
    if load_average > 0.5 and task.ranks.main:
        progress(f"warning: other work runs here, load average {load_average:.1f}: times will be wrong")
    return {
        "peers": {name: version(name) for name in packages}, "load_average": load_average,
        "threads": torch.get_num_threads(), "arch": args.arch, "image_size": args.image_size, "batch": args.batch,
        "precision": task.precision, "ranks": task.ranks.world,
    }  # fmt: skip


def real_work(args: argparse.Namespace, task: Task, folder: Path) -> Work:
    """Real images, as a split for ours and as files for the others."""
    try:
        split = thinned(open_dataset(str(args.data)).train)
        files = as_files(split, folder / "files")
    except (DataError, OSError) as error:
        raise SystemExit(f"--data: {error}") from error
    if len(split) < args.batch:
        raise SystemExit(f"--data must have at least --batch images, {args.batch}, got {len(split)}")
    policy = policy_for(args.image_size)
    return Work(split, files, str(folder / "files"), policy, task.rows, args.workers, task.device.type)


def measure(args: argparse.Namespace, ranks: Ranks) -> Iterator[list[dict[str, Any]]]:
    """The lines of each data set, on every rank."""
    task = Task(args.arch, args.image_size, args.batch, args.precision, ranks)
    told = common(args, task)
    every = contenders(task, args.compile)
    chosen = [c for c in every if not args.only or c.own or any(name in c.name for name in args.only)]
    largest_of = limits(chosen, task, args.batch) if args.largest else {}
    trainers, known = ready(every, chosen, task)
    with tempfile.TemporaryDirectory() as folder:
        works = {"synthetic": None}
        if args.data:
            works[args.data.name] = real_work(args, task, Path(folder))
        for name, work in works.items():
            found = timed(task, work, trainers, args)
            yield [
                {**told, "data": name, "contender": c.name, "note": c.note}
                | facts | (largest_of.get(c, {}) | found[c] if c in found else {})
                for c, facts in known.items()
            ]  # fmt: skip


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arch", choices=BENCHED, help="resnet18, or resnet50 on a GPU")
    parser.add_argument("--image-size", type=int, help="of a view, px; 32, or 224 on a GPU")
    parser.add_argument("--batch", type=int, help="source images, over all ranks; 128, or 256 on a GPU")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as `train` has it")
    parser.add_argument("--seconds", type=float, default=120, help="for each data set, if the least rounds take less")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--ranks", type=int, default=1, help="processes, on a GPU each, or on the CPU")
    parser.add_argument("--data", type=Path, metavar="DATA", help="also real images, as of `train --data`")
    parser.add_argument("--workers", type=int, help="threads or processes that prepare images; one for each core")
    parser.add_argument("--largest", action="store_true", help="also the largest batch that fits into a GPU")
    parser.add_argument("--quick", action="store_true", help="few short rounds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"{OURS}, and names that hold one of these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the lines to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates to FILE (.svg, .png)")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    usual = ("resnet50", 224, 256) if on_gpu else ("resnet18", 32, 128)
    usual += (max(1, (os.cpu_count() or 1) // max(1, args.ranks)),)
    for name, value in zip(("arch", "image_size", "batch", "workers"), usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.rounds, args.seconds = (2, 0) if args.quick else (5, args.seconds)
    if args.precision == "auto":
        args.precision = "bf16" if on_gpu or cpu_has_bf16() else "fp32"
    if min(args.image_size, args.batch, args.ranks, args.workers) < 1:
        parser.error("--image-size, --batch, --ranks and --workers must be at least 1")
    if args.batch % args.ranks or args.batch < 2 * args.ranks:
        parser.error(f"--batch must be a multiple of --ranks and twice that at least, got {args.batch}, {args.ranks}")
    if on_gpu and args.ranks > torch.cuda.device_count():
        parser.error(
            f"--ranks must be at most the GPUs that PyTorch sees, {torch.cuda.device_count()}, got {args.ranks}"
        )
    if args.largest and (not on_gpu or args.ranks > 1):
        parser.error("--largest is for --device cuda and one rank")
    if args.data and not args.data.exists():
        parser.error(f"--data must be a folder or file, got {args.data}")
    if args.plot:
        need_matplotlib()
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if args.ranks > 1 and not launched():
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}", __file__]
        return subprocess.call([sys.executable, *command, *(sys.argv[1:] if argv is None else argv)])
    ranks, lines = Ranks(use_gpu=args.device == "cuda"), []
    try:
        for found in measure(args, ranks):
            if ranks.main:
                found = [append("step", line, args.json) for line in found]
                print(table(found), flush=True)
                lines += found
    finally:
        ranks.close()
    if args.plot and ranks.main:
        picture(lines, args.plot)
    return 1 if any(line["status"].startswith(("failed", "ERROR")) for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
