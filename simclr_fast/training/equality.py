"""Do R processes learn what one would? The trainer's own step on made-up views, on this machine's devices.

`python -m simclr_fast.doctor --ranks R` (or `--gpus G`) starts this in R processes. Every process takes its rows of a
global batch through some steps; the first one also takes the whole batch alone; what they did to the weights and to
BatchNorm's statistics is compared. In float64 that is equal to rounding. In lower precision a rounding that turns a
ReLU on or off moves an update by far more than itself; there the processes have to come as near to float64 as one does,
for one of a few draws of the views: such a ReLU spoils some of them, a fault all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from simclr_fast.distributed import Ranks
from simclr_fast.methods.simclr import Config, Method
from simclr_fast.optim import LARS, Schedule, lars_param_groups
from simclr_fast.training.step import Step

STEPS, IMAGES, SIDE = 3, 12, 32  # IMAGES: of each rank
PRECISIONS = ("fp64", "fp32", "bf16")
EXACT = 1e-10  # largest relative difference of a tensor's update in float64
DRAWS = 5
TIMES, PLUS = 2.0, 1e-3  # of one process's own distance from float64, in lower precision


def updates(
    precision: str,
    device: torch.device,
    rank: int,
    world: int,
    group: Any,
    batch: int,
    make: Any = Method,
    draw: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """What `STEPS` steps add to each parameter and statistic, float64 on the CPU; `options` are those of `Step`."""
    torch.manual_seed(0)
    method = make(Config(arch="resnet18", width=0.25, image_size=SIDE, head_features=32, temperature=0.2))
    dtype = torch.float64 if precision == "fp64" else torch.float32
    method.to(device, dtype, memory_format=torch.channels_last)
    optimizer = LARS(lars_param_groups(method, 1e-4), lr=0.1, trust_coefficient=0.02)
    before = {name: tensor.detach().clone() for name, tensor in method.state_dict().items()}
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    step = Step(method, optimizer, Schedule(1.0, 2, 10), batch=batch, group=group, autocast=autocast, seed=0, **options)
    own = batch // (world * step.chunks)
    for number in range(1, STEPS + 1):
        parts = []
        for k in range(step.chunks):
            first = (k * world + rank) * own
            views = [images(number, index, view, draw) for view in (0, 1) for index in range(first, first + own)]
            parts.append(torch.stack(views).to(device, dtype).contiguous(memory_format=torch.channels_last))
        step(number, parts)
    after = method.state_dict()
    return {name: (after[name].double() - before[name].double()).cpu() for name in after}


def images(step: int, index: int, view: int, draw: int) -> Tensor:
    """A made-up view, [3, SIDE, SIDE], float64; the two views of an image are alike."""
    own = torch.randn(3, SIDE, SIDE, generator=_generator(draw, step, index, 2), dtype=torch.float64)
    return own + 0.5 * torch.randn(own.shape, generator=_generator(draw, step, index, view), dtype=torch.float64)


def _generator(*words: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(words) % 2**63)


def difference(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest |a - b| / |b| of the tensors; inf where something did not move, or is not finite."""
    ratios = [float((found[name] - b).norm() / b.norm()) for name, b in truth.items()]
    return max(ratios) if all(ratio < torch.inf for ratio in ratios) else torch.inf


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """|a - b| / |b| of all parameters together, each tensor's update being scaled to norm 1 in b."""
    ratios = [float((found[name] - b).norm() / b.norm()) for name, b in truth.items()]
    return float(torch.tensor(ratios, dtype=torch.float64).square().mean().sqrt())


def judged(
    precision: str, found: dict[str, Tensor], alone: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[bool, str]:
    """Whether R processes (`found`) learn what one does (`alone`), `exact` being that in float64; and a sentence."""
    if precision == "fp64":
        off = difference(found, alone)
        return off <= EXACT, f"their updates differ by {off:.1e}, bound {EXACT:.0e}"
    off, own = distance(found, exact), distance(alone, exact)
    bound = TIMES * own + PLUS
    return off <= bound, f"{off:.1e} from float64, one process {own:.1e}; at most {TIMES:g} times that are allowed"


def main(argv: Sequence[str] | None = None) -> int:
    """One of the processes; the first one prints a line for each precision. Returns 2 if one differs by too much."""
    parser = argparse.ArgumentParser(prog="python -m simclr_fast.training.equality", description=__doc__)
    parser.add_argument("--gpus", type=int, default=0, help="0: on the CPU")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--accumulate", type=int, default=1, help="chunks, in the processes")
    parser.add_argument("--bn-images", type=int, help="of a BatchNorm block")
    args = parser.parse_args(argv)
    ranks = Ranks(use_gpu=args.gpus > 0)
    try:
        failed = _checks(ranks, args)
    finally:
        ranks.close()
    return 2 if failed else 0  # with another status, they would be started again


def _checks(ranks: Ranks, args: argparse.Namespace) -> int:
    """How many precisions differ by too much, on every rank."""
    batch, failed = IMAGES * ranks.world, 0
    bn_images = args.bn_images or batch // args.accumulate

    def compared(precision: str, draw: int) -> tuple[bool, str]:
        run = ranks.device, ranks.rank, ranks.world, ranks.group, batch
        found = updates(precision, *run, accumulate=args.accumulate, bn_images=bn_images, draw=draw)

        def judge() -> tuple[bool, str]:
            one = ranks.device, 0, 1, None, batch
            exact = updates("fp64", *one, bn_images=bn_images, draw=draw)
            alone = exact if precision == "fp64" else updates(precision, *one, bn_images=bn_images, draw=draw)
            return judged(precision, found, alone, exact)

        return ranks.from_main(judge)

    for precision in args.precisions:
        for draw in range(1 if precision == "fp64" else DRAWS):
            good, text = compared(precision, draw)
            if good:
                break
        failed += not good
        if ranks.main:
            kind = f"{ranks.world} processes on {ranks.device.type}, {STEPS} steps in {precision}"
            print(f"{'ok' if good else 'BROKEN':<7} {kind}: {text}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
