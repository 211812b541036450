"""SimCLR's input, JPEG files to two views of each: this package's engines beside what else makes them.

    python bench/data_bench.py [DATA ...] [--size 224 32] [--quick] [--stages] [--plot docs/data.svg]

DATA      for each size, or one for all. Without it: ../shared/data/photos-256.tar for sizes over 64 px; else the first
          2,000 images of ../shared/data/cifar10-jpeg.tar.gz, or, where that is not, the embedded set `shapes`. Peers
          read the same images as files in a temporary folder; all lies in the page cache. Of a larger set, 2,000
          images are taken, evenly spaced.
Views     over 64 px all of the paper's policy; else jitter of half the strength and no blur. float32, on the device.
images/s  of source images, each of which gives two views; p20, p50 and p80 over rounds in which the contenders take
          turns, each in a process of its own, from a stream that goes on: see _data_process.py.
ours/it   simclr_fast dali's images/s over it's, of the medians; the spread is p20 to p80 of the rounds.
CPU ms    user and system time of all processes and threads for each source image; memory: resident at a window's end,
          shared pages counted once; GPU: what the device's free memory lost to the process.
--stages  CPU time of each stage for each source image, one thread.

Each result is a line of bench/results/data.jsonl ($OUT/data.jsonl, or FILE of --json). Packages to compare with:
pip install 'simclr_fast[peers]'; a picture needs 'simclr_fast[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import product
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data_contenders import EVERY, OURS, SMALL, Contender, Work, policy_for
from _data_process import COLUMNS, Server, Taken, Window, row
from _harness import ROOT, append, interleave, progress, quantiles, ratio
from _loss_report import need_matplotlib, number

from simclr_fast.data import DataError, Split, open_dataset

DATA = ROOT.parent / "shared" / "data"
PHOTOS, CIFAR = DATA / "photos-256.tar", DATA / "cifar10-jpeg.tar.gz"
MOST = 2000  # images of a set


@dataclass(frozen=True)
class Job:
    """A contender and what it is told; `label` is its name in the results."""

    contender: Contender
    work: Work
    label: str


def data_for(size: int, folder: Path) -> str:
    """The images for a size where none are given; what must be unpacked comes into the folder."""
    if size > SMALL:
        return str(PHOTOS)
    if not CIFAR.exists():
        return "shapes"
    with tarfile.open(CIFAR) as tar:
        members = [member for member in tar if member.isfile() and member.name.startswith("train/")]
        chosen = members[:: max(1, len(members) // MOST)][:MOST]
        tar.extractall(folder, members=chosen, filter="data")
    return str(folder)


def thinned(split: Split, most: int = MOST) -> Split:
    """At most so many images of a split, evenly spaced."""
    if len(split) <= most:
        return split
    rows = np.arange(most) * len(split) // most
    columns = {field.name: getattr(split, field.name) for field in fields(split)}
    return Split(
        **{
            name: column[rows] if isinstance(column, np.ndarray) else column and [column[k] for k in rows]
            for name, column in columns.items()
        }
    )


def as_files(split: Split, folder: Path) -> tuple[str, ...]:
    """Each image of a split as a file, in a folder for a class, as some peers want them."""
    inside = folder / "class"
    inside.mkdir(parents=True)
    paths = [inside / f"{k:06d}{Path(name).suffix}" for k, name in enumerate(split.names)]
    for k, path in enumerate(paths):
        split.read(k).tofile(path)
    return tuple(map(str, paths))


def jobs(work: Work, args: argparse.Namespace) -> list[Job]:
    """Each contender, then the engine of ours for files with other shares of the decoder and numbers of workers."""
    chosen = [c for c in EVERY if not args.only or c.name == OURS or any(name in c.name for name in args.only)]
    found = [Job(c, work, c.name) for c in chosen]
    if args.hardware or len(args.workers) > 1:
        ours = next(c for c in EVERY if c.name == OURS)
        for workers, hardware in product(args.workers, args.hardware or [work.hardware]):
            label = f"{OURS}, {workers} workers" + (f", {hardware:g} on decoders" if args.hardware else "")
            found.append(Job(ours, replace(work, workers=workers, hardware=hardware), label))
    return found


def measure(work: Work, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each job; those that cannot run, or make something else, are said and not timed."""
    chosen, window = jobs(work, args), Window(args.images, args.least)
    statuses = {job.label: job.contender.missing or "ok" for job in chosen}
    with ExitStack() as stack:
        servers = {job.label: Server(job.contender.name, job.work) for job in chosen if statuses[job.label] == "ok"}
        for server in servers.values():
            stack.callback(server.close)
        for label, server in servers.items():
            progress(f"{work.policy.size} px, start: {label}")
            taken = server.take(0, None)
            statuses[label] = taken if isinstance(taken, str) else "ok"
        laps = {
            label: lap(server, window, label, statuses) for label, server in servers.items() if statuses[label] == "ok"
        }
        progress(f"{work.policy.size} px, time: {', '.join(laps)}")
        rounds = interleave(laps, args.seconds, args.rounds, 50) if laps else {}
    rounds = {label: taken for label, taken in rounds.items() if statuses[label] == "ok"}
    for job in chosen:
        line = {
            "size": work.policy.size, "images": len(work.split), "batch": job.work.batch, "workers": job.work.workers,
            "hardware": job.work.hardware, "contender": job.label, "note": job.contender.note,
            "status": statuses[job.label],
        }  # fmt: skip
        yield line | (results(job, rounds) if job.label in rounds else {})


def lap(server: Server, window: Window, label: str, statuses: dict[str, str]) -> Callable[[], list[float]]:
    """One window after the other, each with a seed of its own; one that fails is entered in the statuses,
    and asked no more."""
    seeds = iter(range(1, sys.maxsize))

    def run() -> list[float]:
        if statuses[label] != "ok":
            return [nan] * len(COLUMNS)
        taken = server.take(next(seeds), window)
        if isinstance(taken, Taken):
            return row(taken)
        statuses[label] = taken
        return [nan] * len(COLUMNS)

    return run


def results(job: Job, rounds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Quantiles of what the rounds of a job gave, and how much faster ours is."""
    columns = dict(zip(COLUMNS, map(list, zip(*rounds[job.label], strict=True)), strict=True))
    rates = columns["images_per_s"]
    found: dict[str, Any] = {"raw_images_per_s": rates, "processes": int(max(columns.pop("processes")))}
    found |= {key: None if any(map(isnan, raw)) else quantiles(raw) for key, raw in columns.items()}
    found["views_per_s"] = job.contender.views * found["images_per_s"]["p50"] or None
    if job.work.device == "cpu":
        del found["gpu_mib"]
    if OURS in rounds:
        found["ours_over_it"] = ratio([raw[0] for raw in rounds[OURS]], rates)
    return found


HEAD = (
    f"{'':34}{'images/s':>10}{'p20-p80':>17}{'views/s':>9}{'ours/it':>8}{'p20-p80':>12}{'CPU ms':>8}{'MiB':>7}"
    f"{'GPU':>7}{'proc.':>6}"
)


def table(lines: list[dict[str, Any]]) -> str:
    """At most 120 columns wide: what was measured of a size, and what was not."""
    first = lines[0]
    out = [
        f"\n{first['size']} px, {first['images']:,} images, batch {first['batch']}, {first['workers']} workers; "
        f"{first['device']}"[:120],
        HEAD,
    ]
    for line in lines:
        if line["status"] != "ok":
            continue
        rate, over = line["images_per_s"], line.get("ours_over_it")
        spread = f"{number(rate['p20'])}-{number(rate['p80'])}"
        ratios = f"{over['p50']:8.2f}{over['p20']:6.2f}-{over['p80']:<5.2f}" if over else f"{'-':>8}{'-':>12}"
        cells = [line["cpu_ms"], line["memory_mib"], line.get("gpu_mib")]
        cpu, memory, gpu = (number(cell["p50"]) if cell else "-" for cell in cells)
        out.append(
            f"{line['contender']:34}{number(rate['p50']):>10}{spread:>17}{number(line['views_per_s']):>9}{ratios}"
            f"{cpu:>8}{memory:>7}{gpu:>7}{line['processes']:>6}"
        )
    return "\n".join([*out, *(f"{x['contender']}: {x['status']}" for x in lines if x["status"] != "ok")])


def stage_table(lines: list[dict[str, Any]]) -> str:
    """Stages across, engines down."""
    widths = {line["stage"]: max(len(line["stage"]) + 2, 8) for line in lines}
    head = f"{'':22}" + "".join(f"{stage:>{width}}" for stage, width in widths.items())
    out = [f"\nCPU ms for each source image at {lines[0]['size']} px, one thread", head]
    for engine in dict.fromkeys(line["contender"] for line in lines):
        found = {line["stage"]: number(line["cpu_ms"]["p50"]) for line in lines if line["contender"] == engine}
        out.append(f"{engine:22}" + "".join(f"{found[stage]:>{width}}" for stage, width in widths.items()))
    return "\n".join(out)


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    """Bars: source images a second, a panel for each size; bounds are gray."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measured = [line for line in lines if "images_per_s" in line]
    sizes = list(dict.fromkeys(line["size"] for line in measured))
    with matplotlib.rc_context({"svg.hashsalt": "data", "font.size": 9}):
        figure, axes = pyplot.subplots(
            1, len(sizes), figsize=(5.2 * len(sizes), 3.2), squeeze=False, layout="constrained"
        )
        for axis, size in zip(axes[0], sizes, strict=True):
            shown = [line for line in measured if line["size"] == size][::-1]
            rates = [line["images_per_s"]["p50"] for line in shown]
            colours = ["#0050b0" if x["contender"].startswith("simclr_fast") else "#7f9fc0" for x in shown]
            colours = [c if x["views_per_s"] else "#b0b0b0" for c, x in zip(colours, shown, strict=True)]
            axis.barh([line["contender"] for line in shown], rates, color=colours)
            for k, rate in enumerate(rates):
                axis.text(rate, k, f" {rate:,.0f}", va="center", fontsize=8)
            axis.set_xlim(0, 1.2 * max(rates))
            axis.set(title=f"{size} px, {shown[0]['workers']} workers", xlabel="source images/s, two views of each")
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{lines[0]['device']}, torch {lines[0]['torch']}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", metavar="DATA", help="as of `train --data`: one for each size, or for all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 32], help="of a view, px")
    parser.add_argument("--batch", type=int, help="source images; 32, or 128 on a GPU")
    parser.add_argument("--images", type=int, help="least that a window has; 256, or 4,096 on a GPU")
    parser.add_argument(
        "--workers", type=int, nargs="+", help="the contenders' number; with more, ours has each in turn"
    )
    parser.add_argument(
        "--hardware", type=float, nargs="+", help="shares of JPEGs for a GPU's decoders that ours has in turn"
    )
    parser.add_argument("--seconds", type=float, default=300, help="for each size")
    parser.add_argument("--quick", action="store_true", help="two rounds of small windows")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"{OURS}, and names that hold one of these")
    parser.add_argument("--stages", action="store_true", help="also the CPU time of each stage")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the lines to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates to FILE (.svg, .png)")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    args.rounds, args.least = (2, 0.2) if args.quick else (5, 1.0)
    args.seconds = 0 if args.quick else args.seconds
    args.batch = args.batch or (16 if args.quick else 128 if on_gpu else 32)
    args.images = args.images or (64 if args.quick else 4096 if on_gpu else 256)
    args.workers = args.workers or [
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ]
    args.workers = list(dict.fromkeys(args.workers))
    if len(args.data) not in (0, 1, len(args.size)):
        parser.error(f"DATA must be one, or one for each --size, got {len(args.data)} for {len(args.size)} sizes")
    if min(*args.size, *args.workers, args.batch, args.images) < 1:
        parser.error("--size, --workers, --batch and --images must be at least 1")
    if args.hardware and not on_gpu:
        parser.error("--hardware is for --device cuda, whose decoders it is about")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device must be cpu where PyTorch sees no GPU, got cuda")
    if args.hardware and not all(0 <= share <= 1 for share in args.hardware):
        parser.error(f"--hardware must be shares, 0 to 1, got {args.hardware}")
    if args.plot:
        need_matplotlib()
    return args


def main(argv: list[str] | None = None) -> int:
    args, lines = parsed(argv), []
    packages = {c.package for c in EVERY if c.package}
    peers = {name: version(name) for name in sorted(packages)}
    common = {
        "peers": peers,
        "load_average": os.getloadavg()[0],
        "dtype": "float32",
        "threads": torch.get_num_threads(),
    }
    if common["load_average"] > 0.5:
        progress(f"warning: other work runs here, load average {common['load_average']:.1f}: rates will be wrong")
    for k, size in enumerate(args.size):
        with tempfile.TemporaryDirectory() as folder:
            spec = args.data[k % len(args.data)] if args.data else data_for(size, Path(folder, "data"))
            try:
                split = thinned(open_dataset(spec).train)
                files = as_files(split, Path(folder, "files"))
            except (DataError, OSError) as error:
                raise SystemExit(f"{size} px: {error}") from error
            batch = min(args.batch, len(split))
            work = Work(split, files, f"{folder}/files", policy_for(size), batch, args.workers[0], args.device)
            common |= {"data": CIFAR.name if spec == f"{folder}/data" else Path(spec).name}
            found = [append("data", {**common, **line}, args.json) for line in measure(work, args)]
            print(table(found), flush=True)
            lines += found
            if args.stages:
                from _data_stages import stages

                images, rounds = (16, 2) if args.quick else (128, 5)
                found = [append("data", {**common, **line}, args.json) for line in stages(work, images, rounds)]
                print(stage_table(found), flush=True)
    if args.plot:
        picture(lines, args.plot)
    return 1 if any(line["status"].startswith("failed") for line in lines) else 0


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
