"""Several runs side by side: their figures, their curves, and the settings that differ; printed, and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from simclr_fast.checkpoint import LAST
from simclr_fast.cli import saved_settings
from simclr_fast.config import ConfigError
from simclr_fast.evaluation.page import distinct, images, name, readable, told
from simclr_fast.evaluation.results import aligned, in_training, read_all, writing
from simclr_fast.pages import charts, parts
from simclr_fast.pages.document import document
from simclr_fast.pages.parts import count, known, percents, plain
from simclr_fast.record import read_metrics, try_folder, write_text
from simclr_fast.report import CURVES, curve, median

TERMINAL = 30  # characters in a cell
LAST_OF = "The last record of each run; epochs and steps are of its last checkpoint where that is further."
BEST = "\u00a0★"
LOSS_SETTINGS = ("batch", "temperature", "loss_scale", "method")  # of runs whose losses can be compared
Rows = list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Several runs side by side, with the settings that differ."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")] = ()
    """Folders of two or more runs, finished or not."""

    out: str = "compare.html"
    """The page that is written: one file that needs nothing else."""


@dataclass(frozen=True)
class Run:
    """What a run's folder says."""

    folder: Path
    name: str  # that no other run of the comparison has
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]  # records, oldest first
    results: list[dict[str, Any]]  # evaluations, oldest first
    training: bool  # whether a trainer holds it now
    kept: dict[str, Any]  # step and epoch of its last checkpoint; nothing where that cannot be read

    @property
    def last(self) -> dict[str, Any]:
        return self.metrics[-1] if self.metrics else {}

    @property
    def reached(self) -> dict[str, Any]:
        """The step and the epoch of the last record, or of the last checkpoint where that is further."""
        return max(self.last, self.kept, key=lambda one: one["step"] if known(one.get("step")) else -1)

    @property
    def steps(self) -> str:
        """Of an unfinished run without a checkpoint it is only known that there were no fewer."""
        least = "at least " if self.last and not self.last.get("finished") and not self.kept else ""
        return f"{least}{count(self.reached.get('step'))}"

    @property
    def state(self) -> str:
        """How far it is."""
        if self.last.get("finished"):
            return "finished"
        reached = f"epoch {plain(self.reached.get('epoch', 0))} of {self.settings.get('epochs', '–')}"
        return f"in training, {reached}" if self.training else f"unfinished, {reached}"


def main(settings: Settings) -> int:
    """Print the comparison and write its page.

    Raises:
        ConfigError: fewer than two runs, one twice, or a folder that is no run.
        RunError: the page cannot be written.
    """
    out = Path(settings.out).expanduser()
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise ConfigError(f"out must be an .html file, got out={settings.out}")
    with writing(out.parent):
        try_folder(out.parent)
    runs = read(settings.runs)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page(runs))
    for warning in warnings(runs):
        print(f"{warning}\n")
    for title, rows in tables(runs):
        cells = [[first, *map(_ending, rest)] for first, *rest in [["", *(run.name for run in runs)], *rows]]
        print("\n".join([title, *aligned(cells), ""]))
    print(f"page {out}")
    return 0


def read(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders.

    Raises:
        ConfigError: fewer than two, one twice, or a folder that is no run.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if len(paths) < 2:
        raise ConfigError(f"runs must be two or more folders, got {len(paths)}")
    for path in paths:
        if not (path / "config.json").is_file():
            why = "has no config.json" if path.is_dir() else "is not there" if not path.exists() else "is a file"
            raise ConfigError(f"runs must be folders that the training wrote, and {path} {why}")
    twice = [path for path, times in Counter(path.resolve() for path in paths).items() if times > 1]
    if twice:
        raise ConfigError(f"runs must be different ones, got {twice[0]} more than once")
    return [
        Run(
            path,
            label,
            saved_settings(path / "config.json"),
            read_metrics(path),
            [result for result in read_all(path / "evaluations") if readable(result)],
            in_training(path),
            _kept(path),
        )
        for path, label in zip(paths, _names(paths), strict=True)
    ]


def tables(runs: Sequence[Run]) -> list[tuple[str, Rows]]:
    """Each a title and rows, a name and a cell for each run."""
    found = {"Training": _training(runs), "Evaluation": _evaluation(runs), "Settings that differ": differing(runs)}
    return [(title, rows) for title, rows in found.items() if rows]


def warnings(runs: Sequence[Run]) -> list[str]:
    """Why figures cannot be compared."""
    found = []
    data = {run.name: str(run.settings.get("data", "–")) for run in runs}
    if len(set(data.values())) > 1:
        said = ", ".join(f"{_ending(label)} on {_ending(one)}" for label, one in data.items())
        found.append(f"These runs are on different data, and their figures of training are not comparable: {said}.")
    if any(len({str(run.settings.get(key)) for run in runs}) > 1 for key in LOSS_SETTINGS):
        found.append(f"Losses are not comparable: runs differ in {_and(_differ(runs, LOSS_SETTINGS))}.")
    digests: dict[str, set[str]] = {}
    for result in (one for run in runs for one in run.results if one.get("data_digest")):
        digests.setdefault(str(result.get("data", "–")), set()).add(result["data_digest"])
    for label, several in sorted(digests.items()):
        if len(several) > 1:
            found.append(f"{label} are not the same images in all evaluations: {_and(sorted(several))}.")
    for (label, _), cells in _grouped(runs).items():
        if len(counts := _tested(cells)) > 1:
            numbers = _and([f"{number:,}" for number in sorted(filter(known, counts))])
            found.append(f"{label}: evaluated on different numbers of test images, {numbers}.")
    return found


def differing(runs: Sequence[Run]) -> Rows:
    """The settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [[key, *(str(run.settings.get(key, "–")) for run in runs)] for key in _differ(runs, keys)]


def page(runs: Sequence[Run]) -> str:
    """The comparison as HTML."""
    labels = [run.name for run in runs]
    content = "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings(runs))
    found = dict(tables(runs))
    for title, text in (("Training", LAST_OF), ("Evaluation", "")):
        if title in found:
            if any(BEST in cell for row in found[title] for cell in row[1:]):
                text = f"{text} ★ marks the best of a row.".strip()
            table = parts.table(f"{title} of {len(runs)} runs", ["figure", *labels], found[title])
            content += parts.section(title, text, table)
    content += _curves(runs)
    text = "All others are the same." if differing(runs) else "None: all are the same."
    table = parts.table("Settings", ["setting", *labels], differing(runs)) if differing(runs) else ""
    content += parts.section("Settings that differ", text, table)
    content += parts.section("Folders", "", parts.pairs("Folders", {run.name: run.folder.resolve() for run in runs}))
    unfinished = [f"{run.name} is {run.state}." for run in runs if run.state != "finished"]
    return document(f"{len(runs)} runs", "comparison", unfinished, content)


def _curves(runs: Sequence[Run]) -> str:
    drawn = "".join(
        charts.chart(title, {run.name: curve(run.metrics, key) for run in runs}, show) for key, title, show in CURVES
    )
    legend = charts.curve_legend([run.name for run in runs])
    return parts.section("Curves", "Over epochs.", f'{legend}<div class="charts grid">{drawn}</div>') if drawn else ""


def _training(runs: Sequence[Run]) -> Rows:
    return [
        ["state", *(run.state for run in runs)],
        ["epochs", *(plain(run.reached.get("epoch")) for run in runs)],
        ["steps", *(run.steps for run in runs)],
        ["loss", *(plain(run.last.get("loss")) for run in runs)],
        ["contrastive top-1", *percents(run.last.get("contrastive_top1") for run in runs)],
        ["kNN top-1", *_marked([_last(run, "knn_top1") for run in runs], _alike(runs))],
        ["images per second, median", *(count(median(run.metrics, "images_per_s")) for run in runs)],
    ]


def _evaluation(runs: Sequence[Run]) -> Rows:
    """A row for each figure of each kind of evaluation."""
    rows = []
    for (label, _), cells in _grouped(runs).items():
        figures = dict.fromkeys(figure for one in cells.values() for figure in one["figures"])
        same = len(_tested(cells)) < 2 and (_alike(runs) or all(one.get("data_digest") for one in cells.values()))
        for figure in figures:
            values = [cells[run.name]["figures"].get(figure) if run.name in cells else None for run in runs]
            notes = [_early(run, cells[run.name]) if run.name in cells else "" for run in runs]
            marked = [f"{text}{note}" for text, note in zip(_marked(values, same), notes, strict=True)]
            rows.append([f"{label}: {figure}", *marked])
    return rows


def _grouped(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """By kind of evaluation the newest result of each run that has one: protocol, images and settings are the same."""
    every = [one for run in runs for one in run.results]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for run in runs:
        for result in run.results:  # oldest first: the newest stays
            special = told(distinct(result, every))
            label = f"{name(result)} on {images(result, every)}{f' ({special})' if special else ''}"
            cells = found.setdefault((label, str(result.get("protocol"))), {})
            before = cells.get(run.name)
            if before and before.get("weights") == result.get("weights"):  # the figures of h, say, and later those of z
                result = {**result, "figures": {**before["figures"], **result["figures"]}}
            cells[run.name] = result
    return dict(sorted(found.items(), key=lambda one: (one[0][1], one[0][0])))


def _early(run: Run, result: Mapping[str, Any]) -> str:
    """Of which checkpoint, where that is not the run's last step."""
    step = result.get("step")
    return f" (step {step:,})" if known(step) and step != run.reached.get("step") else ""


def _kept(folder: Path) -> dict[str, Any]:
    """The step and the epoch of a run's last checkpoint, without its tensors; nothing where it cannot be read."""
    try:
        state = torch.load(folder / "checkpoints" / LAST, map_location="cpu", weights_only=True, mmap=True)
        config = state["config"]
        epoch = min(state["step"] * config["batch"] / state["images"], config["epochs"])
        return {"step": state["step"], "epoch": round(epoch, 3)}
    except Exception:  # torch raises a dozen kinds for damaged files
        return {}


def _alike(runs: Sequence[Run]) -> bool:
    """Whether all were trained on the same data."""
    return len({str(run.settings.get("data", "–")) for run in runs}) == 1


def _tested(cells: Mapping[str, Mapping[str, Any]]) -> set[Any]:
    """On how many images: one number, where figures can be compared."""
    return {one["counts"].get("test images") for one in cells.values() if one.get("counts")}


def _last(run: Run, key: str) -> object:
    """The last value that there is."""
    return next((record[key] for record in reversed(run.metrics) if known(record.get(key))), None)


def _marked(values: Sequence[object], comparable: bool) -> list[str]:
    """Fractions as per cent, the highest with a mark where there are others that it can be compared with."""
    numbers = [value for value in values if known(value)]
    best = max(numbers) if comparable and len(set(numbers)) > 1 else None
    marks = [BEST if best is not None and value == best else "" for value in values]
    return [text + mark for text, mark in zip(percents(values), marks, strict=True)]


def _differ(runs: Sequence[Run], keys: Any) -> list[str]:
    return [key for key in keys if len({str(run.settings.get(key, "–")) for run in runs}) > 1]


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _ending(text: str) -> str:
    """For the terminal: of long names and paths the ends differ."""
    return text if len(text) <= TERMINAL else f"…{text[1 - TERMINAL :]}"


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, and of those that are equal so many more that they differ."""
    resolved = [path.resolve() for path in paths]
    for length in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]
