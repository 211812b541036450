"""CIFAR-10 by the clock: kNN and linear accuracy of a ResNet-18 against the time that `simclr_fast.train` took.

    python bench/cifar10_record.py [--epochs 100] [--seeds 3] [--data DIR | --data cifar10 --download] [--plot FILE]

Data      DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or torchvision's cifar10. Without it the 60,000 JPEGs (quality
          75) of ../shared/data/cifar10-jpeg.tar.gz, unpacked before the clock starts. Labels are used after training.
Training  `python -m simclr_fast.train` for each number of epochs and each seed, in a process of its own, with the flags
          of RECIPE, or those of the paper by --preset cifar10 (1,000 epochs). Flags that this script does not know are
          passed on, after those: --temperature 0.2, --batch 1024, --gpus 8 ...
seconds   of the whole command: imports, reading the images, compiling, training, its own kNN accuracies before and
          after, its report. training_seconds: of the steps alone, with compiling; from the run's metrics.
kNN       top-1 on the test images, 200 neighbours among all training images, weighted by exp(cosine / 0.1), float32.
linear    top-1 of a multinomial logistic regression on the frozen, standardised features, by L-BFGS; its L2 is the best
          of five on a tenth of the training images, held out; then it is fitted to all. No augmentation.
          Both are taken after the run, of its last checkpoint, without TF32, and are no part of its time:
          evaluation_seconds.

What 85 % kNN in 300 s takes: a ResNet-18 with the stem for small images is 3.33 GFLOP for a view of 32 px, forward and
backward (torch.utils.flop_counter), so 6.66 GFLOP for an image. E epochs of 50,000 images in 270 s, which leaves 30 s
for everything else, are 185 E images/s: 100 epochs 18,500 images/s or 123 TFLOP/s, an eighth of an H200's 989 TFLOP/s
(bf16, dense, its data sheet); 200 epochs 37,000 images/s or 247 TFLOP/s.

Each run is a line of bench/results/cifar10.jsonl ($OUT/cifar10.jsonl, or FILE of --json). --quick: 200 images, a narrow
network, one epoch: that it works, and no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import append, progress
from _loss_report import need_matplotlib
from _step_check import exact_fp32
from data_bench import CIFAR
from torch import Tensor

from simclr_fast import checkpoint, knn
from simclr_fast.cli import saved_settings
from simclr_fast.data import Policy, Split, eval_images, open_dataset
from simclr_fast.methods.simclr import Config, Method
from simclr_fast.record import read_metrics

RECIPE = (
    "--arch resnet18 --image-size 32 --batch 512 --temperature 0.5 --base-lr 1 --warmup-epochs 5 --weight-decay 1e-4 "
    "--head-layers 3 --dialect tf --jitter 0.5 --blur 0 --loss-scale simclr_tf --evaluations 1"
).split()
"""The paper's settings for CIFAR-10 but for a shorter warm-up, since runs are short."""
ON_GPU = ["--compile", "default"]
QUICK = "--width 0.125 --batch 32 --temperature 0.5 --warmup-epochs 0".split()
NEIGHBOURS, HELD_OUT = 200, 10
L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LITERATURE = (
    # docs/source/getting_started/benchmarks.rst of lightly e8d317f; README of solo-learn 9187ea3. ResNet-18.
    {"name": "lightly, 200 epochs, 1 x A6000", "minutes": 87.1, "knn": 0.848},
    {"name": "lightly, 800 epochs, 1 x A6000", "minutes": 331.1, "knn": 0.879},
    {"name": "solo-learn, 1,000 epochs, linear, of unknown time", "minutes": None, "linear": 0.9074},
)


def unpacked(folder: Path, per_class: int | None) -> Path:
    """The JPEGs of the archive beside the repository; of each class of each part at most so many.

    Raises:
        SystemExit: there is no archive.
    """
    if not CIFAR.exists():
        raise SystemExit(f"no {CIFAR.name} in ../shared/data: give --data DIR, or --data cifar10 --download")
    with tarfile.open(CIFAR) as tar:
        members = [member for member in tar if member.isfile()]
        seen: dict[str, int] = defaultdict(int)
        for member in members:
            seen[str(Path(member.name).parent)] += 1
            if per_class is None or seen[str(Path(member.name).parent)] <= per_class:
                tar.extract(member, folder, filter="data")
    return folder


def trained(flags: list[str], out: Path) -> dict[str, float]:
    """Train, and tell the times.

    Raises:
        SystemExit: the training failed.
    """
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "simclr_fast.train", *flags, "--out", str(out), "--resume", "never"])
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"training ended with status {done.returncode}")
    records = [record for record in read_metrics(out) if "finished" not in record]
    batch = json.loads((out / "config.json").read_text())["batch"]
    steps = [after["step"] - before for after, before in zip(records, [0, *(r["step"] for r in records)], strict=False)]
    spans = [n * batch / record["images_per_s"] for n, record in zip(steps, records, strict=True)]
    return {
        "seconds": seconds,
        "training_seconds": sum(spans),
        "images_per_s_median": statistics.median(record["images_per_s"] for record in records),
    }


def features(out: Path, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [n, d] and labels [n] of the training images and of the test images, by a run's last checkpoint."""
    cfg = Config.of(saved_settings(out / "config.json"), "config.json")
    method = Method(cfg)
    method.load_state_dict(checkpoint.read(out / "checkpoints" / checkpoint.LAST)["method"])
    encoder = method.encoder.to(device, memory_format=torch.channels_last)
    dataset = open_dataset(cfg.data)
    policy = Policy(cfg.image_size, dialect=cfg.dialect)

    def of(split: Split | None) -> tuple[Tensor, Tensor]:
        if split is None or split.labels is None:
            raise SystemExit("the data must have labelled training and test images")
        found = knn.features(encoder, eval_images(split, policy, batch=500, device=device))
        return found, torch.as_tensor(split.labels, device=device)

    return *of(dataset.train), *of(dataset.test)


def regression(x: Tensor, labels: Tensor, l2: float) -> Tensor:
    """Weights [d + 1, classes] of a multinomial logistic regression on x [n, d]; the last row is the bias."""
    classes = int(labels.max()) + 1
    weights = torch.zeros(x.shape[1] + 1, classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(scores(x, weights), labels) + l2 / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach()


def scores(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]


def share_right(x: Tensor, labels: Tensor, weights: Tensor) -> float:
    return float((scores(x, weights).argmax(1) == labels).float().mean())


def linear(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy on `queries` [m, d] of a classifier fitted to `bank` [n, d], and the L2 that was chosen for it."""
    mean, std = bank.mean(0), bank.std(0).clamp(min=1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    shuffled = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0)).to(bank.device)
    held, rest = shuffled.tensor_split([-(-len(bank) // HELD_OUT)])
    found = {l2: share_right(bank[held], bank_labels[held], regression(bank[rest], bank_labels[rest], l2)) for l2 in L2}
    best = max(found, key=found.__getitem__)
    return share_right(queries, labels, regression(bank, bank_labels, best)), best


def run(flags: list[str], device: str) -> dict[str, Any]:
    """Train and evaluate once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        times = trained(flags, out)
        began = time.monotonic()
        with exact_fp32():
            found = features(out, device)
            accuracy, l2 = linear(*found)
            near = knn.accuracy(*found, k=NEIGHBOURS)
        return {
            **times, "evaluation_seconds": time.monotonic() - began, "knn_top1": near, "linear_top1": accuracy,
            "l2": l2, "train_images": len(found[0]), "test_images": len(found[2]),
            "config": json.loads((out / "config.json").read_text()) | {"data": None, "out": None},
        }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each number of epochs: means over the seeds, and their standard deviations where there are several."""
    out = [
        "",
        *textwrap.wrap(f"CIFAR-10 from {lines[0]['data']}, {lines[0]['device']}; {lines[0]['recipe']}", 120),
        f"{'epochs':>8}{'seeds':>7}{'kNN %':>16}{'linear %':>16}{'minutes':>16}{'training':>10}{'images/s':>10}",
    ]
    for epochs in dict.fromkeys(line["epochs"] for line in lines):
        runs = [line for line in lines if line["epochs"] == epochs]
        columns = [[100 * r["knn_top1"] for r in runs], [100 * r["linear_top1"] for r in runs]]
        columns.append([r["seconds"] / 60 for r in runs])
        cells = "".join(f"{spread(column):>16}" for column in columns)
        training = statistics.mean(r["training_seconds"] for r in runs) / 60
        rate = statistics.mean(r["images_per_s_median"] for r in runs)
        out.append(f"{epochs:>8}{len(runs):>7}{cells}{training:>10.2f}{rate:>10,.0f}")
    return "\n".join(out)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over minutes: each run, and what others have published, in gray."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "cifar10", "font.size": 9}):
        figure, axis = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
        minutes = [line["seconds"] / 60 for line in lines]
        for key, marker, name in (("knn_top1", "o", f"kNN, k = {NEIGHBOURS}"), ("linear_top1", "^", "linear")):
            values = [100 * line[key] for line in lines]
            axis.plot(minutes, values, marker, color="#0050b0", label=f"simclr_fast, {name}", mfc="none")
        for peer in LITERATURE:
            value = 100 * peer.get("knn", peer.get("linear"))
            if peer["minutes"] is None:
                axis.axhline(value, color="#909090", linewidth=0.8, linestyle="--")
            else:
                axis.plot(peer["minutes"], value, "s", color="#909090")
            axis.annotate(
                f"{peer['name']}: {value:.1f} %", (peer["minutes"] or min(minutes), value), (0, -11), fontsize=7,
                textcoords="offset points", ha="right" if peer["minutes"] else "left", color="#606060",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(y=0.1)
        axis.set(xlabel="minutes, the whole command", ylabel="top-1, %")
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.legend(loc="lower right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"CIFAR-10, {lines[0]['device']}; gray: published, not measured here", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def parsed(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--epochs", type=int, nargs="+", help="a run for each; 100, or with --preset its 1,000")
    parser.add_argument("--seeds", type=int, default=3, help="train with seeds 0 ... SEEDS - 1")
    parser.add_argument("--data", help="DIR, or torchvision's cifar10")
    parser.add_argument("--download", action="store_true", help="fetch torchvision's")
    parser.add_argument("--preset", choices=("cifar10",), help="the paper's settings in place of the recipe")
    parser.add_argument("--quick", action="store_true", help="a toy size, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the lines to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy over minutes to FILE (.svg, .png)")
    args, flags = parser.parse_known_args(argv)
    args.epochs = args.epochs or ([1] if args.quick else [1000] if args.preset else [100])
    if min(*args.epochs, args.seeds) < 1:
        parser.error("--epochs and --seeds must be at least 1")
    if args.plot:
        need_matplotlib()
    return args, flags


def main(argv: list[str] | None = None) -> int:
    args, passed = parsed(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = ["--preset", args.preset] if args.preset else RECIPE + (ON_GPU if device == "cuda" else [])
    recipe = [*recipe, *(QUICK if args.quick else []), *passed]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or str(unpacked(Path(folder), 20 if args.quick else None))
        flags = [*recipe, "--data", data, *(["--download"] if args.download else [])]
        for epochs in args.epochs:
            for seed in range(args.seeds):
                progress(f"{epochs} epochs, seed {seed}")
                found = run([*flags, "--epochs", str(epochs), "--seed", str(seed)], device)
                named = Path(args.data).name if args.data else f"{CIFAR.name}, quality 75"
                said = {"data": named, "quick": args.quick, "recipe": " ".join(recipe)}
                lines.append(append("cifar10", {**said, "epochs": epochs, "seed": seed, **found}, args.json))
    print(table(lines), flush=True)
    if args.plot:
        picture(lines, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
