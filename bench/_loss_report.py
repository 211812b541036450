"""What bench/loss_bench.py shows: a table for people and a picture, from its result lines."""

from __future__ import annotations

import importlib.util
import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _contenders import EVERY, OURS

NAMES = [contender.name for contender in EVERY]
# Dark enough for text on white.
COLOURS = (
    "#0050b5",
    "#7a7a00",
    "#b30059",
    "#333333",
    "#8c564b",
    "#7f7f7f",
    "#a14a00",
    "#00796b",
    "#5e8c31",
    "#c62828",
    "#6a3fb5",
    "#1c7fb8",
    "#c2185b",
    "#9e6b00",
    "#546e7a",
)
HEAD = (
    f"{'':24}{'fwd ms':>8}{'bwd ms':>8}{'both ms':>8}{'p20-p80':>14}{'ours/it':>8}{'p20-p80':>11}"
    f"{'extra MiB':>10}{'err loss, grad':>15}{'TFLOP/s':>8}{'roof':>5}"
)


def number(value: float | None, digits: int = 3) -> str:
    """Three digits, without an exponent; a dash for what was not measured."""
    if value is None:
        return "-"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(places, 4)}f}"


def table(lines: list[dict[str, Any]]) -> str:
    """At most 120 columns wide; a block for each 2N and D, and who is missing."""
    last = lines[-1]
    out = [f"{last['device']}; torch {last['torch']}; commit {last['commit']}; p50 in ms"[:120]]
    measured = [line for line in lines if "2N" in line]
    for (n, D), block in itertools.groupby(measured, key=lambda line: (line["2N"], line["D"])):
        timed, other = [], defaultdict(list)
        for line in block:
            if "ms" in line:
                timed.append(line)
            else:
                other[line["status"]].append(label(line))
        out += ["", f"2N = {n:,}, D = {D}", HEAD, *map(row, timed)]
        for status, names in other.items():
            out += textwrap.wrap(f"{', '.join(names)}: {status}", 120, subsequent_indent="  ")
    absent = [f"  {line['contender']}: {line['status']}" for line in lines if "2N" not in line]
    return "\n".join([*out, *(["", "Not measured:", *absent] if absent else [])])


def row(line: dict[str, Any]) -> str:
    name = label(line)
    ms, over, extra = line["ms"], line.get("ours_over_it"), line.get("extra_bytes")
    spread = f"{number(ms['both']['p20'])}-{number(ms['both']['p80'])}"
    ratios = (share_of(over["p50"]), f"{share_of(over['p20'])}-{share_of(over['p80'])}") if over else ("-", "-")
    errors = ", ".join("-" if line[k] is None else f"{line[k]:.0e}" for k in ("error_loss", "error_gradient"))
    share = "-" if line["roofline_share"] is None else f"{line['roofline_share']:.0%}"
    return (
        f"{name:24}{number(ms['forward']['p50']):>8}{number(ms['backward']['p50']):>8}{number(ms['both']['p50']):>8}"
        f"{spread:>14}{ratios[0]:>8}{ratios[1]:>11}{number(extra and extra / 2**20):>10}{errors:>15}"
        f"{number(line['tflops']):>8}{share:>5}"
    )


def share_of(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.01 else "<.01"


def label(line: dict[str, Any]) -> str:
    """The contender's name, marked where its loss is another one."""
    name, loss = line["contender"], line["loss"]
    return name if loss == "NT-Xent" or loss in name else f"{name} ({loss})"


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'simclr_fast[bench]'")


def picture(lines: list[dict[str, Any]], path: Path, D: int) -> None:
    """Two panels against 2N: time of forward + backward, and peak extra memory; a line for each contender."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    look = {"svg.hashsalt": "loss", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    device = lines[-1]["device"]
    latest = {(x["contender"], x["2N"]): x for x in lines if x.get("D") == D and x["device"] == device and "ms" in x}
    dashed = (
        "; dashed: CLIP's loss, a quarter of the pairs" if any(x["loss"] == "CLIP" for x in latest.values()) else ""
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(look):
        figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 4.0), layout="constrained")
        for axis, title, value in (
            (axes[0], "Time, forward + backward [ms]", lambda x: x["ms"]["both"]["p50"]),
            (axes[1], "Peak extra memory [MiB]", lambda x: x["extra_bytes"] and x["extra_bytes"] / 2**20),
        ):
            panel(axis, latest, value)
            axis.set(title=title, xlabel=f"2N, rows of {D} features")
        figure.suptitle(f"{device}, torch {lines[-1]['torch']}{dashed}", fontsize=9)
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def panel(axis: Any, latest: dict[tuple[str, int], dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> None:
    """A line for each contender, named beside the panel."""
    ends = []
    for name, block in itertools.groupby(sorted(latest, key=lambda key: (NAMES.index(key[0]), key[1])), lambda k: k[0]):
        lines = [latest[key] for key in block]
        points = [(line["2N"], value(line)) for line in lines if value(line)]
        if points:
            look = {"color": COLOURS[NAMES.index(name) % len(COLOURS)], "linewidth": 2.6 if name == OURS else 1.2}
            axis.plot(*zip(*points, strict=True), "--" if lines[0]["loss"] == "CLIP" else "-", marker=".", **look)
            ends.append((points[-1], label(lines[0]), look["color"]))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda rows, _: f"{rows:,.0f}" if rows < 10000 else f"{rows / 1024:,.0f}k")
    axis.set_yscale("log")
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    low, high = (math.log(limit) for limit in axis.get_ylim())
    ends.sort(key=lambda end: end[0][1])
    heights = apart([(math.log(y) - low) / (high - low) for (_, y), *_ in ends], 0.052)
    for (point, name, colour), height in zip(ends, heights, strict=True):
        axis.annotate(
            name, point, (1.06, height), textcoords="axes fraction", va="center", color=colour, annotation_clip=False,
            fontweight="bold" if name == OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def apart(wanted: list[float], gap: float) -> list[float]:
    """Ascending heights moved to be at least `gap` apart and, if they can be, within 0 ... 1."""
    placed: list[float] = []
    for height in wanted:
        placed.append(max(height, placed[-1] + gap if placed else 0.0))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], placed[i + 1] - gap if i + 1 < len(placed) else 1.0)
    return placed
