"""One optimiser step of a ResNet-50 and its head, against what else there is.

    python bench/lars_bench.py [--widths 1 2 4] [--quick] [--plot docs/lars.svg]

Times     of optimizer.step() from cold caches, as after a backward pass, on a GPU that is busy while the host prepares
          the step, as it is with that pass; p20, p50 and p80 over rounds in which the contenders take turns.
          ours/it: of the medians of both; the spread is p20 to p80 of the rounds.
Copy      of all parameters, in the same rounds: its bandwidth is 8 bytes a parameter over its time.
Share     of that bandwidth: on a GPU 28 bytes a parameter (norms: w and g; update: w, g and v, and w and v back), on a
          CPU 20 where w and g of a tensor fit into its largest cache, over the time.
Error     of the first step of 1x, |a - b| / |b| over all tensors, against float64.

Each result is a line of bench/results/lars.jsonl ($OUT/lars.jsonl, or FILE of --json). Packages to compare with:
pip install 'simclr_fast[peers]'; a picture needs 'simclr_fast[bench]'.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import CACHES, Stopwatch, append, as_bytes, interleave, progress, quantiles, ratio
from _loss_report import need_matplotlib
from torch import Tensor, nn

from simclr_fast.models.heads import projection_head
from simclr_fast.models.resnet import resnet
from simclr_fast.optim import LARS, lars_param_groups, steps

OURS = "simclr_fast"
LR, DECAY, TRUST = 1.0, 1e-6, 1e-3
Groups = list[dict[str, Any]]


class Foreach(LARS):
    """The fallback where the extension is not built."""

    _step_function = staticmethod(lambda device: steps.lars_foreach)


class Plain(LARS):
    """Tensor by tensor."""

    _step_function = staticmethod(lambda device: steps.lars_reference)


class Compiled:
    """The plain loop over all tensors, under torch.compile."""

    def __init__(self, groups: Groups) -> None:
        self.members = [(p, group) for group in groups for _, p in group["params"]]
        self.velocities = [torch.zeros_like(p) for p, _ in self.members]
        self.function = torch.compile(self.loop, fullgraph=True, dynamic=False)

    def loop(self, ws: list[Tensor], gs: list[Tensor], vs: list[Tensor]) -> None:
        for w, g, v, (_, group) in zip(ws, gs, vs, self.members, strict=True):
            d = g + group["weight_decay"] * w
            w_norm, d_norm = w.norm(), d.norm()
            ratio = torch.where((w_norm > 0) & (d_norm > 0), TRUST * w_norm / d_norm, 1.0) if group["adapt"] else 1.0
            v.mul_(0.9).add_(LR * ratio * d)
            w.sub_(v)

    @torch.no_grad()
    def step(self) -> None:
        ws = [p for p, _ in self.members]
        self.function(ws, [p.grad for p in ws], self.velocities)


def unnamed(groups: Groups) -> Groups:
    return [{**group, "params": [p for _, p in group["params"]]} for group in groups]


def lightly(groups: Groups) -> Any:
    peer = importlib.import_module("lightly.utils.lars").LARS
    return peer(unnamed(groups), lr=LR, momentum=0.9, trust_coefficient=TRUST)


def solo_learn(groups: Groups) -> Any:
    peer = importlib.import_module("solo.utils.lars").LARS
    return peer(unnamed(groups), lr=LR, momentum=0.9, eta=TRUST, exclude_bias_n_norm=True)


def apex(groups: Groups) -> Any:
    larc = importlib.import_module("apex.parallel.LARC").LARC
    return larc(torch.optim.SGD(unnamed(groups), lr=LR, momentum=0.9, fused=True), trust_coefficient=TRUST, clip=False)


def ours(kind: type[LARS]) -> Callable[[Groups], LARS]:
    return lambda groups: kind(groups, lr=LR, trust_coefficient=TRUST)


CONTENDERS: dict[str, Callable[[Groups], Any]] = {
    OURS: ours(LARS),
    "foreach": ours(Foreach),
    "plain loop": ours(Plain),
    "plain loop, compiled": Compiled,
    "lightly": lightly,
    "solo-learn": solo_learn,
    "apex LARC": apex,
}


PACKAGES = {"lightly": "lightly", "solo-learn": "solo-learn", "apex LARC": "apex"}


def model(width: int, device: str) -> nn.Module:
    """ResNet-50 and the projection head, with gradients; the same on every call."""
    torch.manual_seed(0)
    encoder = resnet("resnet50", width=width)
    module = nn.ModuleDict({"encoder": encoder, "head": projection_head("nonlinear", encoder.num_features)}).to(device)
    for p in module.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    return module


def first_step(build: Callable[[Groups], Any], device: str, dtype: torch.dtype) -> list[Tensor]:
    """What the first step adds to each tensor, float64."""
    module = model(1, device).to(dtype)
    before = [p.detach().double().clone() for p in module.parameters()]
    build(lars_param_groups(module, DECAY)).step()
    return [p.detach().double() - b for p, b in zip(module.parameters(), before, strict=True)]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b|."""
    squares = [((x - y).square().sum(), y.square().sum()) for x, y in zip(a, b, strict=True)]
    return float((sum(s for s, _ in squares) / sum(s for _, s in squares)) ** 0.5)


def busy(device: str) -> None:
    if device == "cuda":
        torch.cuda._sleep(4_000_000)  # cycles, some 2 ms


def bytes_moved(numels: list[int], device: str) -> int:
    if device == "cuda":
        return 28 * sum(numels)
    cache = max((as_bytes(path.read_text()) for path in CACHES.glob("index*/size")), default=1 << 25)
    return sum(n * (20 if 8 * n <= cache else 28) for n in numels)


def measure(width: int, args: argparse.Namespace, errors: dict[str, float], missing: dict[str, str]) -> list[dict]:
    """A line for each contender."""
    names = [name for name in CONTENDERS if name not in missing]
    if width > 1:  # a compiler's minutes and the memory of velocities
        names = [name for name in names if name not in ("plain loop, compiled", "plain loop")]
    module, watch = model(width, args.device), Stopwatch(args.device)
    params = list(module.parameters())
    numels = [p.numel() for p in params]
    optimizers = {name: CONTENDERS[name](lars_param_groups(module, DECAY)) for name in names}
    source, target = torch.ones(2, sum(numels), device=args.device).unbind()
    for optimizer in optimizers.values():
        optimizer.step()  # compiles, allocates

    def lap(work: Callable[[], Any]) -> Callable[[], list[float]]:
        return lambda: watch.lap(lambda _: busy(args.device), lambda _: work())[1:]

    laps = {name: lap(optimizer.step) for name, optimizer in optimizers.items()}
    laps["copy"] = lap(lambda: target.copy_(source))
    progress(f"time: ResNet-50 {width}x, {sum(numels) / 1e6:.1f} M parameters in {len(numels)} tensors")
    times = {name: [x for (x,) in rounds] for name, rounds in interleave(laps, args.seconds, 5, 200).items()}
    copy, ours_ms = quantiles(times["copy"])["p50"], times[OURS]
    lines = []
    for name, raw in times.items():
        ms = quantiles(raw)
        line = {"width": width, "parameters": sum(numels), "tensors": len(numels), "contender": name, "status": "ok"}
        line |= {
            "threads": torch.get_num_threads(),
            "ms": ms,
            "raw_ms": raw,
            "ours_over_it": ratio(ours_ms, raw),
            "error": errors.get(name),
        }
        moved = 8 * sum(numels) if name == "copy" else bytes_moved(numels, args.device)
        line |= {"bytes": moved, "share_of_copy": moved / (8 * sum(numels)) * copy / ms["p50"]}
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    rows = [f"\nResNet-50 {lines[0]['width']}x, {lines[0]['parameters'] / 1e6:.1f} M parameters"]
    heads = f"{'ms':>8s} {'p20-p80':>15s} {'ours/it':>8s} {'p20-p80':>11s} {'GB/s':>7s} {'copy':>5s} {'error':>8s}"
    rows.append(f"{'':22s} {heads}")
    for line in lines:
        ms, r = line["ms"], line["ours_over_it"]
        rows.append(
            f"{line['contender']:22s} {ms['p50']:8.3g} {ms['p20']:7.3g}-{ms['p80']:<7.3g} {r['p50']:8.2f} "
            f"{r['p20']:5.2f}-{r['p80']:<5.2f} {line['bytes'] / ms['p50'] / 1e6:7.3g} {line['share_of_copy']:5.0%} "
            + ("" if line["error"] is None else f"{line['error']:8.0e}")
        )
    return "\n".join(rows)


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    """Bars: milliseconds a step, a panel for each width."""
    import matplotlib.pyplot as plt

    widths = sorted({line["width"] for line in lines})
    figure, axes = plt.subplots(1, len(widths), figsize=(4 * len(widths), 2.6), squeeze=False, layout="constrained")
    for axis, width in zip(axes[0], widths, strict=True):
        shown = [line for line in lines if line["width"] == width][::-1]
        names = [line["contender"] for line in shown]
        ms = [line["ms"]["p50"] for line in shown]
        colors = ["#0050b0" if name == OURS else "#b0b0b0" if name == "copy" else "#7f9fc0" for name in names]
        axis.barh(names, ms, color=colors)
        for k, value in enumerate(ms):
            axis.text(value, k, f" {value:,.0f}" if value >= 100 else f" {value:.1f}", va="center", fontsize=8)
        axis.set_title(f"ResNet-50 {width}x, {shown[0]['parameters'] / 1e6:.0f} M", fontsize=10)
        axis.set_xlim(0, max(ms) * 1.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("ms a step")
    figure.suptitle(f"LARS, {lines[0]['device']}, torch {lines[0]['torch']}", fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4], help="of ResNet-50")
    parser.add_argument("--seconds", type=float, default=60, help="for each width")
    parser.add_argument("--quick", action="store_true", help="1x alone, without the compiled loop")
    parser.add_argument("--json", type=Path, help="append the lines to FILE")
    parser.add_argument("--plot", type=Path, help="draw the times to FILE (.svg, .png)")
    args = parser.parse_args()
    if args.plot:
        need_matplotlib()
    if steps.extension() not in ("cuda", args.device):
        parser.error(f"simclr_fast._C is not built for {args.device}: python setup.py build_ext --inplace")
    if args.quick:
        args.widths, args.seconds = [1], 10
        del CONTENDERS["plain loop, compiled"]
    truth, errors, missing = first_step(ours(Plain), args.device, torch.float64), {}, {}
    for name, build in CONTENDERS.items():
        progress(f"first step: {name}")
        try:
            errors[name] = distance(first_step(build, args.device, torch.float32), truth)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    peers = {name: missing.get(name) or importlib.metadata.version(package) for name, package in PACKAGES.items()}
    lines = []
    for width in args.widths:
        results = measure(width, args, errors, missing)
        lines += [append("lars", {"peers": peers, **line}, args.json) for line in results]
        print(table(results), flush=True)
    for name, reason in missing.items():
        append("lars", {"peers": peers, "contender": name, "status": reason}, args.json)
        print(f"{name}: {reason}")
    if args.plot:
        picture(lines, args.plot)


if __name__ == "__main__":
    main()
