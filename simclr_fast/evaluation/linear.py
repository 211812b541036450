"""Linear evaluation: a linear classifier on the frozen encoder's features h.

`exact` is logistic regression on the features of central crops, to its minimum (see logistic.py). `sgd` is the paper's
recipe (appendix B.6): augmented images, Nesterov momentum, 90 epochs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from simclr_fast.config import ConfigError
from simclr_fast.data.sources.samples import Ticker
from simclr_fast.evaluation import logistic
from simclr_fast.evaluation.job import Common, Job, Labelled
from simclr_fast.evaluation.measures import confusion, top_k
from simclr_fast.evaluation.results import Result
from simclr_fast.evaluation.subsets import stratified
from simclr_fast.evaluation.supervised import Frozen, Recipe, batch_for, classifier, fit

MEMORY = 16 * 2**30  # bytes of features and logits up to which the last fit is in float64


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """A linear classifier on the frozen encoder: exact on kept features, or by the paper's recipe."""

    mode: Literal["exact", "sgd"] = "exact"
    """`exact`: L2-regularised logistic regression on the features of central crops, to its minimum; fast. `sgd`: the
    paper's recipe, through the encoder again in each epoch."""

    holdout: float = 0.1
    """exact: share of the training images, of each class, on which the L2 regulariser is chosen."""

    l2: float | None = None
    """exact: the regulariser, for sum of cross-entropies + l2 |W|^2. Without it: the best of 45 from 1e-6 to 1e5."""

    batch: int | None = None
    """sgd: images in a global batch; 4096 in the paper. Without it: 256, or all where there are fewer."""

    epochs: int = 90
    """sgd: passes over the training images."""

    lr: float = 0.1
    """sgd: learning rate for a batch of 256; it grows with the batch."""

    weight_decay: float = 0.0
    """sgd: weight decay of the classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("holdout", 0 < self.holdout < 1, "a share, between 0 and 1")
        self.require("l2", self.l2 is None or self.l2 > 0, "positive")
        self.require("batch", self.batch is None or self.batch >= 1, "at least 1")
        self.require("epochs", self.epochs >= 1, "at least 1")
        self.require("lr", self.lr > 0, "positive")
        self.require("weight_decay", self.weight_decay >= 0, "0 or more")
        self.require_mode("linear", self.mode)


def run(settings: Settings, job: Job) -> Result:
    """Train the classifier, and test it once."""
    train, test = job.labelled()
    count = len(job.dataset.classes)
    found = (_exact if settings.mode == "exact" else _sgd)(settings, job, train, test, count)
    scores, truth = found.pop("scores"), torch.from_numpy(test.labels)
    counts = {"training images": len(train)} | found.pop("counts") | {"test images": len(test)}
    return Result(
        protocol="linear",
        data=job.dataset.name,
        figures={"top-1": top_k(scores, truth, 1), "top-5": top_k(scores, truth, 5)},
        counts=counts,
        classes=list(job.dataset.classes),
        confusion=confusion(truth, scores.argmax(1), count),
        **found,
    )


def _sgd(settings: Settings, job: Job, train: Labelled, test: Labelled, count: int) -> dict[str, Any]:
    batch = batch_for(settings.batch, len(train), job.ranks.world)
    recipe = Recipe.of_epochs(batch, len(train), settings.epochs, settings.lr, settings.weight_decay)
    job.say(f"linear classifier, {settings.epochs} epochs: {recipe}")
    head = classifier(job.encoder.num_features, count)
    fit(Frozen(job.encoder.network, head), train, recipe, job, name="linear classifier")
    h, _ = job.features(test, "test images")
    with torch.no_grad():
        counts = {"batch": batch, "steps": recipe.steps}
        return {"scores": head.cpu()(h), "counts": counts, "resolved": {"batch": batch}}


def _exact(settings: Settings, job: Job, train: Labelled, test: Labelled, count: int) -> dict[str, Any]:
    (x, y), (tested, _) = (
        job.features(images, name) for images, name in ((train, "training images"), (test, "test images"))
    )
    solved: dict[str, Any] = job.ranks.from_main(lambda: _solved(settings, job, train, x, y, count), patient=True)
    return solved | {"scores": tested @ solved.pop("weight").T + solved.pop("bias")}


def _solved(settings: Settings, job: Job, train: Labelled, x: Tensor, y: Tensor, count: int) -> dict[str, Any]:
    """On the main rank: the classifier, and what there is to say of it."""
    x, y = x.to(job.ranks.device), y.to(job.ranks.device)
    found: dict[str, Any] = {"tables": [], "notes": [], "counts": {}}
    start, l2 = None, settings.l2
    if l2 is None:
        held = torch.zeros(len(train), dtype=torch.bool, device=x.device)
        held[torch.from_numpy(stratified(train.labels, settings.holdout, settings.seed))] = True
        if not held.any():
            raise ConfigError(
                "holdout must leave training images to choose l2 on, and no class has images enough for "
                f"holdout={settings.holdout:g}: give --l2 (1, say), or --mode sgd"
            )
        tried = _swept(job, x, y, held, count)
        chosen = logistic.best(tried)
        start, l2 = chosen.fit, chosen.l2
        found["counts"] = {"of them held out to choose l2": int(held.sum())}
        shown = [one for k, one in enumerate(tried) if k % 4 == 0 or one is chosen]  # a value for each power of ten
        rows = [[f"{one.l2:.3g}{' (chosen)' if one is chosen else ''}", one.score] for one in shown]
        found["tables"] = [{"title": "L2 regulariser", "columns": ["l2", "top-1, held out"], "rows": rows}]
        if chosen in (tried[0], tried[-1]):
            found["notes"].append(f"l2 {l2:.3g} lies at the end of the values tried: a value beyond may be better")
        unfinished = sum(not one.fit.converged for one in tried)
        if unfinished:
            found["notes"].append(f"{unfinished} of the {len(tried)} fits that chose l2 stopped short of their minimum")
    wide = 8 * len(x) * (x.shape[1] + 6 * count) <= MEMORY
    options: dict[str, Any] = {} if wide else {"dtype": torch.float32, "tolerance": 1e-8}
    last = logistic.fit(x, y, l2, classes=count, start=start, **options)
    found["notes"].append(
        f"l2 {l2:.3g} (C {1 / (2 * l2):.3g}), {last.iterations} iterations on all {len(x):,} training images, within "
        f"{last.excess:.1g} nats an image of the minimum"
    )
    if not last.converged:
        found["notes"].append("the last fit stopped short of its minimum")
    return found | {"weight": last.weight.float().cpu(), "bias": last.bias.float().cpu()}


def _swept(job: Job, x: Tensor, y: Tensor, held: Tensor, count: int) -> list[logistic.Tried]:
    truth, values, ticker = y[held], len(logistic.L2_VALUES), Ticker()

    def tell(done: int, l2: float, score: float) -> None:
        if ticker.due():
            left = (time.monotonic() - ticker.start) / done * (values - done)
            ticker.show(f"l2 {l2:.3g}: top-1 {score:.1%}, {done} of {values} values, {left:.0f} s left")

    def score(scores: Tensor) -> float:
        return top_k(scores, truth, 1)

    try:
        tried = logistic.sweep(x[~held], y[~held], x[held], score, classes=count, progress=tell)
    finally:
        ticker.close()
    job.say(f"{values} values of l2 tried in {time.monotonic() - ticker.start:.1f} s")
    return tried
