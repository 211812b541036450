"""Both views of a batch from uint8 pixels by `simclr_fast.data.augment`, beside other transforms on the same device.

    python bench/augment_bench.py [--device cuda] [--batch N] [--quick]

Cases     224 px: crops that are resized already, a batch of them for each view, all of the paper's policy. 32 px:
          pixels of a set that lies on the device, cropped and resized too, jitter of half the strength, no blur.
Times     of both views from cold caches; p20, p50 and p80 over rounds in which the contenders take turns. ours/it: of
          the medians, ours being the one in float32; the spread is p20 to p80 of the rounds.
Bytes     that must move for these parameters: a view's window once, on a GPU again where there is jitter, for the mean
          that contrast is about; the 64 bytes of its parameters as often; and what is written.
Share     of a copy's bandwidth in the same rounds: bytes over the time, over twice the copied bytes over its time.
Error     |a - b| / |b| of up to 32 images' views against backend="reference" in float64, and the largest, in 1/255.
          Only of those that take the same parameters; the others draw their own.

Each result is a line of bench/results/augment.jsonl ($OUT/augment.jsonl, or FILE of --json). Packages to compare with:
pip install 'simclr_fast[peers]' kornia.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data_contenders import blur_taps, policy_for, v2_policy
from _harness import Stopwatch, append, interleave, progress, quantiles, ratio
from _loss_report import number
from torch import Tensor

from simclr_fast.data import Params, Policy, augment
from simclr_fast.data.policy import PACKED, SIGMAS

OURS = "simclr_fast float32"
EXACT = 32  # images whose views are also made in float64
HELD = 2048  # images of a set that lies on the device
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Case:
    """What is made: for each view, images uint8 [N, H, W, 3], parameters [B, 16] and which image each view is of."""

    policy: Policy
    crop: bool
    images: tuple[Tensor, Tensor]
    params: tuple[Tensor, Tensor]
    index: Tensor

    def views(self, first: int | None = None, **options: Any) -> list[Tensor]:
        """Both views of the batch, or of its first images: [B, 3, S, S] each."""
        size = self.policy.size if self.crop else None
        return [
            augment(images, params[:first], size=size, index=self.index[:first], dialect=self.policy.dialect, **options)
            for images, params in zip(self.images, self.params, strict=True)
        ]


def pixels(n: int, side: int, seed: int) -> np.ndarray:
    """Blocks of colour and noise, uint8 [n, side, side, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 226, (n, -(-side // 8), -(-side // 8), 3), dtype=np.uint8)
    fine = rng.integers(0, 30, (n, side, side, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side] + fine


def case(size: int, batch: int, device: str) -> Case:
    policy, crop = policy_for(size), size <= 64
    held = max(HELD, batch) if crop else batch
    first = torch.from_numpy(pixels(held, size, 0)).to(device)
    images = (first, first if crop else torch.from_numpy(pixels(held, size, 1)).to(device))
    index = np.random.default_rng(2).permutation(held)[:batch] if crop else np.arange(batch)
    sizes = np.full((batch, 2), size)
    drawn: list[Params] = [policy.draw(0, np.zeros(batch, np.int64), index, view, sizes) for view in (0, 1)]
    params = tuple(torch.from_numpy(one.packed()).to(device) for one in drawn)
    return Case(policy, crop, images, (params[0], params[1]), torch.from_numpy(index).to(device))


def bytes_moved(params: Tensor, size: int, crop: bool, width: int, two_passes: bool) -> int:
    """Of views of `width` bytes a number, by their parameters [B, 16]: see the top of this file."""
    rows = params.cpu().double()
    window = (rows[:, 2] * rows[:, 3] if crop else torch.full((len(rows),), float(size * size))) * 3
    passes = 1 + rows[:, 5] if two_passes else torch.ones(len(rows))
    return int(((window + 4 * PACKED) * passes).sum()) + len(rows) * size * size * 3 * width


def errors(case: Case, truth: list[Tensor], options: dict[str, Any]) -> dict[str, float]:
    """Relative, and the largest in 1/255 of the range of pixels."""
    std = torch.tensor(case.policy.std, dtype=torch.float64, device=truth[0].device)[:, None, None]
    made, wanted = torch.cat(case.views(EXACT, **options)).double(), torch.cat(truth)
    difference = made - wanted
    return {
        "error": float(difference.norm() / wanted.norm()),
        "error_levels": 255 * float((difference * std).abs().max()),
    }


def torchvision_single(case: Case) -> Callable[[], Any]:
    """Image by image."""
    view = v2_policy(case.policy, case.crop)
    batches = chosen(case)
    return lambda: [torch.stack([view(image) for image in batch]) for batch in batches]


def torchvision_batch(case: Case) -> Callable[[], Any]:
    """All images of a batch get the same parameters."""
    view = v2_policy(case.policy, case.crop)
    batches = chosen(case)
    return lambda: [view(batch) for batch in batches]


def kornia(case: Case) -> Callable[[], Any]:
    """Own parameters for each image, of float32."""
    K, policy = importlib.import_module("kornia.augmentation"), case.policy
    s, taps = policy.jitter_strength, blur_taps(policy.size)
    crop = K.RandomResizedCrop((policy.size,) * 2, (policy.min_area, 1.0), resample="bicubic", cropping_mode="resample")
    steps = [
        *([crop] if case.crop else []),
        K.RandomHorizontalFlip(p=policy.flip),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=policy.jitter_p, same_on_batch=False),
        K.RandomGrayscale(p=policy.gray_p),
        *([K.RandomGaussianBlur((taps, taps), SIGMAS, p=policy.blur_p)] if policy.blur_p else []),
        K.Normalize(policy.mean, policy.std),
    ]
    view, batches = torch.nn.Sequential(*steps), chosen(case)
    return lambda: [view(batch.float() / 255) for batch in batches]


def chosen(case: Case) -> list[Tensor]:
    """The images of the batch, as others take them: uint8 [B, 3, H, W]."""
    return [images[case.index].permute(0, 3, 1, 2).contiguous() for images in case.images]


SAME = "all images of a batch get the same parameters, so its time hangs on what is drawn"
PEERS = {
    "torchvision v2, image by image": (torchvision_single, "torchvision", ""),
    "torchvision v2, one draw a batch": (torchvision_batch, "torchvision", SAME),
    "kornia": (kornia, "kornia", "crops are not antialiased"),
}


def lines_of(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each contender and for the copy."""
    size, batch, on_gpu = case.policy.size, len(case.index), args.device == "cuda"
    progress(f"{size} px: reference")
    truth = case.views(EXACT, dtype=torch.float64, backend="reference")
    watch, laps, found = Stopwatch(args.device), {}, {}

    def add(name: str, work: Callable[[], Any], **told: Any) -> None:
        found[name] = {"status": "ok", **told}
        laps[name] = lambda: watch.lap(lambda _: work())

    for dtype in DTYPES if on_gpu else ("float32",):
        options = {"dtype": DTYPES[dtype], "backend": args.backend}
        width = DTYPES[dtype].itemsize
        moved = sum(bytes_moved(params, size, case.crop, width, on_gpu) for params in case.params)
        told = errors(case, truth, options)
        add(f"simclr_fast {dtype}", lambda options=options: case.views(**options), bytes=moved, dtype=dtype, **told)
    options = {"dtype": torch.float32, "backend": "reference"}
    if not args.quick:
        add(
            "plain PyTorch, view by view",
            lambda: case.views(**options),
            dtype="float32",
            **errors(case, truth, options),
        )
    for name, (build, package, note) in PEERS.items():
        try:
            work = build(case)
            shape = (batch, 3, size, size)
            if [tuple(view.shape) for view in work()] != [shape] * 2:
                found[name] = {"status": f"failed: its views are not {list(shape)}"}
                continue
        except ImportError as error:
            found[name] = {"status": f"not installed ({error})"}
        except Exception as error:  # a peer's own
            found[name] = {"status": f"failed: {type(error).__name__}: {error}"[:200]}
        else:
            add(name, work, dtype="float32", note=note, version=importlib.metadata.version(package))
    source = torch.ones(2 * batch, 3, size, size, device=args.device)
    target = torch.empty_like(source)
    add("copy", lambda: target.copy_(source), dtype="float32", bytes=2 * source.nbytes)
    progress(f"{size} px, time: {', '.join(laps)}")
    rounds = interleave(laps, args.seconds, 3, 200)
    times = {name: [one for (one,) in raw] for name, raw in rounds.items()}
    rate = 2 * source.nbytes / quantiles(times["copy"])["p50"]
    for name, raw in times.items():
        ms = quantiles(raw)
        moved = found[name].get("bytes")
        found[name] |= {"ms": ms, "raw_ms": raw, "ours_over_it": ratio(times[OURS], raw)}
        found[name] |= {"images_per_s": None if name == "copy" else 1e3 * batch / ms["p50"]}
        found[name] |= {"share_of_copy": moved / ms["p50"] / rate if moved else None}
    common = {"size": size, "crop": case.crop, "batch": batch, "threads": torch.get_num_threads()}
    return [{**common, "contender": name, **told} for name, told in found.items()]


def table(lines: list[dict[str, Any]]) -> str:
    """At most 120 columns wide."""
    first = lines[0]
    rows = [
        f"\n{first['size']} px, {first['batch']} images, both views{first['crop'] * ', cropped'}; {first['device']}"[
            :120
        ],
        f"{'':34}{'ms':>9}{'p20-p80':>17}{'ours/it':>9}{'images/s':>11}{'GB/s':>8}{'copy':>6}{'error':>9}{'max/255':>9}",
    ]
    for line in lines:
        if line["status"] != "ok":
            rows.append(f"{line['contender']}: {line['status']}")
            continue
        ms, share = line["ms"], line["share_of_copy"]
        error = f"{line['error']:9.0e}{number(line['error_levels']):>9}" if "error" in line else f"{'-':>9}{'-':>9}"
        speed = f"{line['bytes'] / ms['p50'] / 1e6:8.3g}{share:6.0%}" if share else f"{'-':>8}{'-':>6}"
        rows.append(
            f"{line['contender']:34}{number(ms['p50']):>9}{number(ms['p20']) + '-' + number(ms['p80']):>17}"
            f"{line['ours_over_it']['p50']:9.2f}{number(line['images_per_s']):>11}{speed}{error}"
        )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, nargs="+", default=[224, 32], help="of a view, px; cropped up to 64")
    parser.add_argument("--batch", type=int, help="images; 256, on a CPU 32 at 224 px")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "native"), help="of ours")
    parser.add_argument("--seconds", type=float, default=60, help="for each size")
    parser.add_argument("--quick", action="store_true", help="few rounds, without plain PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the lines to FILE")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where PyTorch sees no GPU, got cuda")
    if min(*args.size, args.batch or 1) < 1:
        parser.error("--size and --batch must be at least 1")
    args.seconds, failed = 0 if args.quick else args.seconds, False
    for size in args.size:
        batch = args.batch or (32 if args.device == "cpu" and size > 64 else 256)
        common = {"load_average": os.getloadavg()[0]}
        found = lines_of(case(size, batch, args.device), args)
        lines = [append("augment", {**common, **line}, args.json) for line in found]
        print(table(lines), flush=True)
        failed |= any(line["status"].startswith("failed") for line in lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
