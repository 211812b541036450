"""Transfer: the paper's 12 other data sets, by a linear classifier on frozen features or by fine-tuning (appendix B.8).

What is chosen is chosen by the set's own metric on validation images; then a classifier is fitted to training and
validation images together, and tested once.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from simclr_fast.config import ConfigError, choose
from simclr_fast.data.sources import datasets_folder
from simclr_fast.data.sources.samples import Ticker, expanded
from simclr_fast.evaluation import grid, logistic
from simclr_fast.evaluation.benchmarks import BENCHMARKS, Benchmark, Task, fingerprint, open_task, published
from simclr_fast.evaluation.job import NEUTRAL, Common, Job, results_folder
from simclr_fast.evaluation.measures import confusion, mean_average_precision, mean_per_class, top_k
from simclr_fast.evaluation.results import Result, short
from simclr_fast.evaluation.supervised import batch_for
from simclr_fast.features import images_digest


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """Food-101, CIFAR-10 and -100, Birdsnap, SUN397, Stanford Cars, FGVC Aircraft, VOC2007, DTD, Oxford Pets,
    Caltech-101, Oxford Flowers: each with its own metric, beside the paper's figures."""

    data: str | None = None
    """Folder that holds a folder for each set, of its name: as torchvision unpacks it there, or train/CLASS/*,
    test/CLASS/* and perhaps val/CLASS/*. Without it: $SIMCLR_FAST_DATA, or `datasets` in the cache folder."""

    sets: tuple[str, ...] = ()
    """food101 cifar10 cifar100 birdsnap sun397 stanford_cars fgvc_aircraft voc2007 dtd oxford_iiit_pet caltech101
    flowers102. Without it: those that are there."""

    mode: Literal["linear", "finetune"] = "linear"
    """`linear`: logistic regression on features of unaugmented images, over 45 values of the L2 regulariser.
    `finetune`: all weights, over the grid of --lrs and --decays, 57 trainings a set; the same command again goes on
    after those that are done."""

    steps: int = 20_000
    """finetune: steps of each training."""

    batch: int | None = None
    """finetune: images in a global batch. Without it: 256, or all where there are fewer."""

    lrs: tuple[float, ...] = grid.LRS
    """finetune: learning rates to choose from."""

    decays: tuple[float, ...] = grid.DECAYS
    """finetune: weight decays to choose from; each is divided by the learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("steps", self.steps >= 1, "at least 1")
        self.require("batch", self.batch is None or self.batch >= 2, "at least 2, for BatchNorm")
        self.require("lrs", bool(self.lrs) and all(0 < lr < math.inf for lr in self.lrs), "positive numbers")
        self.require("decays", bool(self.decays) and all(0 <= d < math.inf for d in self.decays), "numbers from 0 on")
        self.require_mode("transfer", self.mode)
        for name in self.sets:
            choose("sets", name, BENCHMARKS)
        self.require("sets", len(set(self.sets)) == len(self.sets), "names that differ")
        if self.download and not self.sets:
            raise ConfigError("sets must be named with --download: all that torchvision can fetch are 47 GiB")

    @property
    def folder(self) -> Path:
        """Of the data sets."""
        return expanded(self.data) if self.data is not None else datasets_folder()


@dataclass(frozen=True)
class Outcome:
    """What one set came to."""

    figure: float
    chosen: str
    notes: tuple[str, ...] = ()


def run(settings: Settings, job: Job) -> Result:
    """All sets that are named, or there."""
    tasks, absent = open_tasks(settings, job)
    outcomes = [(linear if settings.mode == "linear" else finetune)(task, job) for task in tasks]
    figures = {task.benchmark.title: outcome.figure for task, outcome in zip(tasks, outcomes, strict=True)}
    average = {f"average of {len(tasks)} sets": sum(figures.values()) / len(figures)} if len(tasks) > 1 else {}
    names = [task.benchmark.name for task in tasks]
    return Result(
        protocol="transfer",
        data="+".join(names) if len(names) <= 3 else f"{len(names)}-sets",
        figures=average | figures,
        resolved={"sets": names},
        data_digest=fingerprint(tasks),
        tables=[compared(settings.mode, tasks, list(figures.values())), _done(tasks, outcomes)],
        notes=_notes(settings.mode, tasks, outcomes, absent),
    )


def open_tasks(settings: Settings, job: Job) -> tuple[list[Task], list[str]]:
    """The sets to be evaluated, and the names of those that are not there.

    Raises:
        ConfigError: a set that was named is not there, or none is.
        DataError: one cannot be read, or fetched.
    """
    tasks, absent = list[Task](), list[str]()
    for name in settings.sets or BENCHMARKS:
        task = _open(BENCHMARKS[name], settings, job)
        if task is None:
            absent.append(name)
            continue
        tasks.append(task)
        job.say(
            f"{task.benchmark.title}: {len(task.train):,} training, {len(task.val):,} validation and "
            f"{len(task.test):,} test images in {len(task.classes)} classes"
        )
    folder = settings.folder
    if settings.sets and absent:
        lies = {name: BENCHMARKS[name].marker for name in absent}
        places = ", ".join(f"{folder / name}/{marker or 'train and test'}" for name, marker in lies.items())
        fetched = [name for name in absent if BENCHMARKS[name].size]
        sizes = ", ".join(f"{name} {BENCHMARKS[name].size}" for name in fetched)
        raise ConfigError(
            f"sets must be in {folder}, and {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not: there is no "
            f"{places}{f'; --download fetches it ({sizes})' if fetched else ''}"
        )
    if not tasks:
        missing = "" if folder.exists() else ", which is not there"
        rule = f"data must be a folder with a folder for each set ({', '.join(BENCHMARKS)})"
        raise ConfigError(f"{rule}, got {folder}{missing}")
    return tasks, absent


def _open(benchmark: Benchmark, settings: Settings, job: Job) -> Task | None:
    """On the main rank first, which fetches and checks what the others then find."""

    def opened(download: bool) -> Task | None:
        workers = job.ranks.threads if settings.workers is None else settings.workers
        return open_task(benchmark, settings.folder, seed=settings.seed, workers=workers, download=download)

    found: list[Task | None] = []
    job.ranks.from_main(lambda: found.append(opened(settings.download)), patient=True)
    task = found[0] if found else opened(False)
    said = fingerprint([task]) if task else "absent"
    job.ranks.agree(said, f"data must be the same on every rank, and {benchmark.name} is not")
    return task


def measured(benchmark: Benchmark, scores: Tensor, targets: Tensor) -> float:
    """The benchmark's metric, a fraction, of scores [n, classes] for the targets [n] or [n, classes]."""
    scores, targets = scores.cpu(), targets.cpu()
    if benchmark.metric == "11-point mAP":
        return mean_average_precision(scores, targets)
    if benchmark.metric == "mean per class":
        return mean_per_class(confusion(targets, scores.argmax(1), scores.shape[1]))
    return top_k(scores, targets, 1)


def linear(task: Task, job: Job) -> Outcome:
    """L2-regularised logistic regression, one-vs-rest where an image may have several classes.

    Images are resized so that their shorter side is the encoder's image size, and cropped to the central square; that
    is made of that square of the image itself.
    """
    benchmark = task.benchmark
    policy = replace(job.encoder.policy, test_crop=1.0)
    rows = np.concatenate([task.train, task.val, task.test])
    found = job.extractor.features(task.images, rows, name=f"{benchmark.title} images", policy=policy)
    known, tested = found[: -len(task.test)], found[-len(task.test) :]
    fit, best, alone = job.ranks.from_main(lambda: _fitted(task, job, known), patient=True)
    figure = measured(benchmark, fit.scores(tested), task.targets[task.test])
    job.say(f"{benchmark.title}: {benchmark.metric} {figure:.2%}, l2 {fit.l2:.1e} ({best:.2%} in validation)")
    notes = [] if fit.converged else [f"the fit ended short of its minimum, after {fit.iterations} steps"]
    if alone:
        notes.append(f"the best value, l2 {fit.l2:.0e}, is the last of those tried")
    return Outcome(figure, f"l2 {fit.l2:.1e}", tuple(notes))


def _fitted(task: Task, job: Job, h: Tensor) -> tuple[logistic.Fit, float, bool]:
    """On the main rank: the classifier for features of the training and then the validation images; the validation's
    score that chose its l2; and whether that is at an end of the values, with no equal within."""
    rows = np.concatenate([task.train, task.val])
    x, targets, first = h.to(job.ranks.device), task.targets[rows].to(job.ranks.device), len(task.train)
    classes, title, ticker = None if task.several else len(task.classes), task.benchmark.title, Ticker()

    def tell(done: int, l2: float, score: float) -> None:
        if ticker.due():
            ticker.show(f"{title}: {done} of {len(logistic.L2_VALUES)} values, l2 {l2:.1e} {score:.2%}")

    def score(scores: Tensor) -> float:
        return measured(task.benchmark, scores, targets[first:])

    try:
        tried = logistic.sweep(
            x[:first], targets[:first], x[first:], score, classes=classes, values=logistic.L2_VALUES, progress=tell
        )
    finally:
        ticker.close()
    best = logistic.best(tried)
    fit = logistic.fit(x, targets, best.l2, classes=classes, start=best.fit)
    alone = best.score > max(one.score for one in tried[1:-1])
    return replace(fit, weight=fit.weight.cpu(), bias=fit.bias.cpu()), best.score, alone


def finetune(task: Task, job: Job) -> Outcome:
    """All weights, over the grid."""
    settings, benchmark = job.settings, task.benchmark
    total = len(settings.lrs) * len(settings.decays)
    job.say(f"{benchmark.title}: {settings.steps:,} steps with each of {total} pairs, then with the best again")
    logits, best, tried = grid.search(
        task, job, lambda scores, targets: measured(benchmark, scores, targets),
        lrs=settings.lrs, decays=settings.decays, steps=settings.steps, batch=settings.batch,
        scores=scores_file(task, job),
    )  # fmt: skip
    figure = measured(benchmark, logits, task.targets[task.test])
    job.say(f"{benchmark.title}: {benchmark.metric} {figure:.2%} ({best.score:.2%} in validation)")
    notes = (f"{total - len(tried)} of {total} trainings diverged",) if len(tried) < total else ()
    return Outcome(figure, f"lr {best.lr:.1e}, decay {best.decay:.1e} / lr", notes)


def scores_file(task: Task, job: Job) -> Path:
    """Where the grid's scores are kept: beside the results, and another one where anything but the grid differs."""
    idle = {*NEUTRAL, "sets", "mode", "lrs", "decays"}
    settings = {k: v for k, v in asdict(job.settings).items() if k not in idle}
    settings["batch"] = batch_for(job.settings.batch, len(task.train), job.ranks.world)
    images = fingerprint([task]), images_digest(task.images, np.arange(len(task.images)))
    key = json.dumps([settings, images, job.encoder.digest(), job.extractor.precision], sort_keys=True)
    return results_folder(job.settings) / f"grid-{task.benchmark.name}-{short(key)}.jsonl"


def compared(mode: str, tasks: list[Task], figures: list[float]) -> dict[str, Any]:
    """Table of the figures beside the paper's."""
    methods = ("SimCLR", "supervised")
    rows: list[list[Any]] = []
    for task, figure in zip(tasks, figures, strict=True):
        name = task.benchmark.name
        rows.append([task.benchmark.title, task.benchmark.metric, figure, *(published(mode, m, name) for m in methods)])
    means = [sum(row[k] for row in rows) / len(rows) for k in range(2, 3 + len(methods))]
    if len(rows) > 1:
        rows.append([f"average of the {len(rows)} that ran", "", *means])
    how = "linear classifier on frozen features" if mode == "linear" else "fine-tuned"
    return {
        "title": f"Transfer, {how}, and the paper's ResNet-50 (1x)",
        "columns": ["data set", "metric", "this encoder", "paper: SimCLR", "paper: supervised"],
        "rows": rows,
    }


def _done(tasks: list[Task], outcomes: list[Outcome]) -> dict[str, Any]:
    rows = []
    for task, outcome in zip(tasks, outcomes, strict=True):
        counts = [f"{len(part):,}" for part in (task.classes, task.train, task.val, task.test)]
        rows.append([task.benchmark.title, *counts, outcome.chosen])
    return {
        "title": "Images, and what was chosen by validation",
        "columns": ["data set", "classes", "training", "validation", "test", "chosen"],
        "rows": rows,
    }


def _notes(mode: str, tasks: list[Task], outcomes: list[Outcome], absent: list[str]) -> list[str]:
    of_sets = [
        (task.benchmark.title, (*task.notes, *outcome.notes)) for task, outcome in zip(tasks, outcomes, strict=True)
    ]
    notes = [f"{title}: {'; '.join(said)}" for title, said in of_sets if said]
    if any(task.several for task in tasks):
        notes.append("VOC2007: an object that is marked difficult does not count, neither in training nor in testing")
    wide = ", ".join(f"{t.benchmark.title} {published(mode, 'SimCLR 4x', t.benchmark.name):.1%}" for t in tasks)
    notes.append(f"the paper's SimCLR, ResNet-50 (4x): {wide}")
    if absent:
        notes.append(f"not there, and left out: {', '.join(absent)}")
    return notes
