"""What bench/step_bench.py shows: tables for people and a picture, from its result lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _loss_report import number
from _step_contenders import ALONE, OURS
from _step_phases import PHASES

HEAD = (
    f"{'':26}{'images/s':>10}{'p20-p80':>15}{'ms':>8}{'ours/it':>9}{'p20-p80':>12}{'waiting':>9}{'GPU MiB':>9}"
    f"{'err loss, grad':>16}"
)
NOTES = (
    "Views: ours channels_last, on a GPU in the step's precision; the others' float32 and NCHW, cast in their steps.",
    "lightly and solo-learn: their parts, in this bench's loop.",
)
COLOURS = ("#e8c000", "#b0b0b0", "#0050b0", "#4f8fd0", "#d06000", "#7fb0e0", "#c02060", "#707070")


def table(lines: list[dict[str, Any]]) -> str:
    """At most 120 columns wide: what was measured on one data set, where ours spends its time, and what was not."""
    first = lines[0]
    ranks = f", {first['ranks']} ranks" if first["ranks"] > 1 else ""
    network = f"{first['arch']}, {first['image_size']} px, batch {first['batch']}, {first['precision']}{ranks}"
    out = [f"\n{network}; {first['data']}; {first['device']}"[:120], HEAD]
    out += [row(line) for line in lines if "ms" in line]
    for line in lines:
        if line.get("phases_ms"):
            out += ["", shares(line)]
        if line.get("communication_ms"):
            told = line["communication_ms"]
            out.append(f"of which communication {number(told['p50'])} ms ({number(told['p20'])}-{number(told['p80'])})")
        if line.get("largest_batch") is not None:
            memory = line["largest_memory_bytes"]
            told = f"{line['largest_batch']:,}, {number(memory and memory / 2**20)} MiB; beyond it: {line['larger']}"
            out.append(f"{line['contender']}: largest batch {told}"[:120])
    failed = [f"{line['contender']}: {line['status']}"[:120] for line in lines if line["status"] != "ok"]
    return "\n".join([*out, *failed, *NOTES])


def row(line: dict[str, Any]) -> str:
    rate, over, memory = line["images_per_s"], line.get("ours_over_it"), line.get("memory_bytes")
    spread = f"{number(rate['p20'])}-{number(rate['p80'])}"
    ratios = f"{over['p50']:9.2f}{over['p20']:7.2f}-{over['p80']:<4.2f}" if over else f"{'-':>9}{'-':>12}"
    found = [line.get(key) for key in ("error_loss", "error_gradient")]
    told = ", ".join("-" if value is None else f"{value:.0e}" for value in found)
    return (
        f"{line['contender']:26}{number(rate['p50']):>10}{spread:>15}{number(line['ms']['p50']):>8}{ratios}"
        f"{line['waiting']['p50']:>9.1%}{number(memory and memory / 2**20):>9}{told:>16}"
    )


def shares(line: dict[str, Any]) -> str:
    """The phases of a step, in ms and as shares of their sum."""
    spans = {phase: line["phases_ms"][phase]["p50"] for phase in PHASES}
    whole = sum(spans.values())
    small = sum(spans[phase] for phase in ("head", "loss", "LARS")) / whole
    return (
        f"a step of ours{''.join(f'{phase:>11}' for phase in PHASES)}\n"
        f"{'  ms':14}{''.join(f'{number(ms):>11}' for ms in spans.values())}\n"
        f"{'  share':14}{''.join(f'{ms / whole:>11.1%}' for ms in spans.values())}\n"
        f"  head, loss and LARS together: {small:.1%}"
    )


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    """A row for each data set: bars of images/s, and beside them the phases of ours."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(line["data"] for line in lines))
    with matplotlib.rc_context({"svg.hashsalt": "step", "font.size": 9}):
        figure, axes = pyplot.subplots(
            len(sets), 2, figsize=(10.4, 2.6 * len(sets)), squeeze=False, layout="constrained", width_ratios=(3, 2)
        )
        for (rates, where), data in zip(axes, sets, strict=True):
            shown = [x for x in lines if x["data"] == data and "ms" in x and x["contender"] != ALONE][::-1]
            bars(rates, shown)
            rates.set(title=data, xlabel="source images/s, two views of each")
            stacked(where, next((x for x in shown if x["contender"] == OURS), None))
        first = lines[0]
        figure.suptitle(
            f"{first['arch']}, {first['image_size']} px, batch {first['batch']}, {first['precision']}; "
            f"{first['device']}, torch {first['torch']}",
            fontsize=9,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def bars(axis: Any, shown: list[dict[str, Any]]) -> None:
    rates = [line["images_per_s"]["p50"] for line in shown]
    colours = ["#0050b0" if line["contender"].startswith(OURS) else "#7f9fc0" for line in shown]
    axis.barh([line["contender"] for line in shown], rates, color=colours)
    for k, rate in enumerate(rates):
        axis.text(rate, k, f" {number(rate)}", va="center", fontsize=8)
    axis.set_xlim(0, 1.2 * max(rates))
    axis.spines[["top", "right"]].set_visible(False)


def stacked(axis: Any, line: dict[str, Any] | None) -> None:
    """One column of the phases of a step, named beside it; where they are not known, nothing."""
    axis.axis("off")
    if line is None or not line.get("phases_ms"):
        return
    spans = {phase: line["phases_ms"][phase]["p50"] for phase in PHASES}
    whole, bottom = sum(spans.values()), 0.0
    for k, ((phase, ms), colour) in enumerate(zip(spans.items(), COLOURS, strict=True)):
        axis.bar(0, ms, bottom=bottom, color=colour, width=0.5)
        height = whole * (k + 0.5) / len(spans)
        axis.plot([0.26, 0.42], [bottom + ms / 2, height], color=colour, linewidth=0.8)
        axis.text(0.44, height, f"{phase} {number(ms)} ms, {ms / whole:.1%}", va="center", fontsize=8)
        bottom += ms
    axis.set(title=f"{OURS}: a step", xlim=(-0.3, 2))
