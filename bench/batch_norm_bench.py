"""Batch normalisation of a ResNet-50 at 224 px, with residual and ReLU, against PyTorch's; on a GPU.

    python bench/batch_norm_bench.py [--batch 256] [--seconds 4] [--quick]

Every shape and combination that the network has, bf16, channels_last, in training: F.batch_norm, add_ and relu_ one
after the other, torch.compile of these, and ours. A round is a forward pass from cold caches and its backward pass, on
a GPU that is busy while the host prepares them; contenders take turns. p20, p50 and p80 of the rounds; ours/it: of the
medians.

Copy      of a tensor of x's size in the same rounds: its bandwidth is twice that size over its time.
Share     of that bandwidth: what ours has to read and write (simclr_fast/models/fused_norm.py) over the time, for all
          contenders alike.
Network   is the sum over its 53 layers.

Each result is a line of bench/results/batch_norm.jsonl ($OUT/batch_norm.jsonl, or FILE of --json).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _harness import Stopwatch, append, interleave, progress, quantiles, ratio
from torch import Tensor

from simclr_fast.models.fused_norm import batch_norm

OURS, PASSES, EPS = "simclr_fast", ("forward", "backward"), 1e-5


class Layer(NamedTuple):
    """A BatchNorm of maps of side x side, and what follows it."""

    channels: int
    side: int
    residual: bool
    relu: bool

    def moved(self) -> dict[str, int]:
        """Tensors of x's size that ours reads or writes."""
        return {"forward": 4, "backward": 7} if self.residual else {"forward": 3, "backward": 5}


def layers() -> Counter[Layer]:
    """ResNet-50's, and how often each occurs."""
    found = Counter({Layer(64, 112, False, True): 1})
    for group, depth in enumerate((3, 4, 6, 3)):
        width, side = 64 << group, 56 >> group
        found[Layer(width, side << (group > 0), False, True)] += 1  # before the stride
        found[Layer(width, side, False, True)] += 2 * depth - 1
        found[Layer(4 * width, side, True, True)] += depth
        found[Layer(4 * width, side, False, False)] += 1
    return found


def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return batch_norm(x, weight, bias, EPS, residual=residual, relu=relu)[0]


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    y = y if residual is None else y.add_(residual)
    return torch.relu_(y) if relu else y


def contenders() -> dict[str, Callable[..., Tensor]]:
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    return {OURS: ours, "plain": plain, "plain, compiled": compiled}


def busy(device: str) -> None:
    if device == "cuda":
        torch.cuda._sleep(4_000_000)  # cycles, some 2 ms


def measure(layer: Layer, batch: int, seconds: float, device: str, functions: dict[str, Callable[..., Tensor]]):
    """A line for each contender and pass, and the copy's."""
    torch.manual_seed(0)
    shape = (batch, layer.channels, layer.side, layer.side)
    x, other, dy = (
        torch.randn(shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    weight, bias = (torch.rand(layer.channels, device=device) for _ in range(2))
    residual = other if layer.residual else None
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    watch, target = Stopwatch(device), torch.empty_like(x)

    def lap(function: Callable[..., Tensor]) -> Callable[[], list[float]]:
        def forward(_: Any) -> Tensor:
            return function(x, weight, bias, residual, layer.relu)

        return lambda: watch.lap(lambda _: busy(device), forward, lambda y: torch.autograd.grad(y, leaves, dy))[1:]

    laps = {name: lap(function) for name, function in functions.items()}
    laps["copy"] = lambda: watch.lap(lambda _: busy(device), lambda _: target.copy_(x.detach()))[1:]
    times = interleave(laps, seconds, 5, 200)
    copy = [ms for (ms,) in times.pop("copy")]
    about = {**layer._asdict(), "batch": batch, "dtype": "bfloat16", "bytes": 2 * x.numel()}
    lines = [about | {"contender": "copy", "pass": "copy", "ms": quantiles(copy), "raw_ms": copy}]
    for k, stage in enumerate(PASSES):
        own = [rounds[k] for rounds in times[OURS]]
        for name, rounds in times.items():
            raw = [one[k] for one in rounds]
            ms = quantiles(raw)
            share = layer.moved()[stage] / 2 * quantiles(copy)["p50"] / ms["p50"]
            line = about | {"contender": name, "pass": stage, "ms": ms, "raw_ms": raw}
            lines.append(line | {"ours_over_it": ratio(own, raw), "share_of_copy": share})
    return lines


def table(layer: Layer, count: int, lines: list[dict[str, Any]]) -> str:
    after = " + residual" * layer.residual + " + relu" * layer.relu
    copy = lines[0]["bytes"] * 2 / lines[0]["ms"]["p50"] / 1e6
    rows = [f"\n{layer.channels} x {layer.side} x {layer.side}{after}, {count} times; copy {copy:.0f} GB/s"]
    for line in lines[1:]:
        ms = line["ms"]
        rows.append(
            f"{line['pass']:9s} {line['contender']:16s} {ms['p50']:8.3g} ms {ms['p20']:7.3g}-{ms['p80']:<7.3g} "
            f"ours/it {line['ours_over_it']['p50']:5.2f}  copy {line['share_of_copy']:5.0%}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--seconds", type=float, default=4, help="for each shape")
    parser.add_argument("--quick", action="store_true", help="the four largest shapes alone, without torch.compile")
    parser.add_argument("--json", type=Path, help="append the lines to FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the kernels have nothing to be compared with on a CPU")
    functions = contenders()
    wanted = list(layers().items())
    if args.quick:
        del functions["plain, compiled"]
        wanted = sorted(wanted, key=lambda item: item[0].channels * item[0].side ** 2)[-4:]
    network: Counter[tuple[str, str]] = Counter()
    for layer, count in wanted:
        progress(f"time: {layer}")
        lines = measure(layer, args.batch, args.seconds, "cuda", functions)
        for line in lines:
            append("batch_norm", line, args.json)
            network[line["pass"], line["contender"]] += count * line["ms"]["p50"]
        print(table(layer, count, lines), flush=True)
    print(f"\n{'These layers' if args.quick else 'Network'}, ms, sums of medians")
    for (stage, name), ms in network.items():
        print(f"{stage:9s} {name:16s} {ms:8.3f}")


if __name__ == "__main__":
    main()
