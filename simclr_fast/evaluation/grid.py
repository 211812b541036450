"""Fine-tuning of all weights over a grid of learning rates and weight decays (appendix B.8)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast.data.sources.samples import alone
from simclr_fast.evaluation.benchmarks import Task
from simclr_fast.evaluation.finetune import Classifier, tested
from simclr_fast.evaluation.job import Job, Labelled
from simclr_fast.evaluation.results import LOCK, writing
from simclr_fast.evaluation.supervised import Recipe, batch_for, fit
from simclr_fast.record import RunError, write_text

LRS = tuple(float(f"{10 ** (-4 + 3 * k / 6):.4g}") for k in range(7))
DECAYS = (0.0, *(float(f"{10 ** (-6 + 3 * k / 6):.4g}") for k in range(7)))


@dataclass(frozen=True)
class Tried:
    """A point of the grid."""

    lr: float
    decay: float
    score: float


def search(
    task: Task, job: Job, score: Callable[[Tensor, Tensor], float], *, lrs: Sequence[float], decays: Sequence[float],
    steps: int, batch: int | None, scores: Path,
) -> tuple[Tensor, Tried, list[Tried]]:  # fmt: skip
    """Fine-tune on the training images with each pair, and with the best again on those of validation too.

    The loss is the cross-entropy; where an image may have several classes the sum of theirs, each against the rest. The
    learning rate falls to 0 by half a cosine, which the paper does not say.

    Args:
        score: (logits [n, K], targets) to a number, the higher the better; on the validation images.
        decays: weight decays, which are divided by the learning rate.
        batch: None is 256, or all images where they are fewer.
        scores: a file for the score of each pair; one that is there is of the same search, which then goes on.
    Returns:
        The logits [n, K] of the test images, the best pair that does not diverge then, and all that did not before.
        Of equals the first wins.
    Raises:
        RunError: every pair diverges.
    """
    title, total = task.benchmark.title, len(lrs) * len(decays)
    known, failure = job.ranks.from_main(lambda: _read(scores)), RunError()
    pairs = [(lr, decay) for lr in lrs for decay in decays]
    for number, (lr, decay) in enumerate(pairs, 1):
        name = f"{title}, {number} of {total}, lr {lr:.1e}, decay {decay:.1e}"
        if (lr, decay) in known:
            found = "diverged" if math.isnan(known[lr, decay]) else f"{known[lr, decay]:.2%} in validation"
            job.say(f"{name}: {found}, says {scores}")
            continue
        try:
            logits = _tuned(task, job, task.train, task.val, lr, decay, steps, batch, name)
            known[lr, decay] = score(logits, task.targets[task.val])
            job.say(f"{name}: {known[lr, decay]:.2%} in validation")
        except RunError as error:
            known[lr, decay] = math.nan
            job.say(f"{name}: {error}")
        job.ranks.from_main(lambda: _write(scores, known))  # with those of other processes, at other pairs
    tried = [Tried(*pair, known[pair]) for pair in pairs if not math.isnan(known[pair])]
    if not tried:
        raise RunError(f"lrs must be lower: each of the {total} trainings on {title} diverged, got lrs={list(lrs)}")
    rows, name = np.concatenate([task.train, task.val]), f"{title}, training and validation images"
    # Best first, by the main rank's scores: those of hosts may differ in a bit.
    for best in job.ranks.from_main(lambda: sorted(tried, key=lambda one: -one.score)):
        try:
            return _tuned(task, job, rows, task.test, best.lr, best.decay, steps, batch, name), best, tried
        except RunError as error:
            failure = error
            job.say(f"{name}, lr {best.lr:.1e}, decay {best.decay:.1e}: {error}; the next best pair")
    raise failure


def _tuned(
    task: Task, job: Job, rows: np.ndarray, asked: np.ndarray, lr: float, decay: float, steps: int, batch: int | None,
    name: str,
) -> Tensor:  # fmt: skip
    """Logits of `asked` by a copy of the encoder that was trained on `rows`."""
    size = batch_for(batch, len(rows), job.ranks.world)
    model = Classifier(job.encoder, 0, len(task.classes))
    set_momentum(model.encoder.network, len(rows) / size)
    targets = task.targets[rows]
    labels = np.zeros(len(rows), np.int64) if task.several else targets.numpy()
    recipe = Recipe(batch=size, steps=steps, lr=lr, weight_decay=decay / lr)
    loss = several if task.several else F.cross_entropy
    fit(model, Labelled(task.images, rows, labels), recipe, job, name=name, targets=targets, loss=loss)
    logits = tested(model, job, task.images, asked, name)
    if not logits.isfinite().all():
        raise RunError(f"lr must be lower: {name} ends in logits that are not finite")
    return logits


def _read(path: Path) -> dict[tuple[float, float], float]:
    """Scores by learning rate and decay; nan of a pair that diverged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {(lr, decay): score for lr, decay, score in map(json.loads, lines)}
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be read, without which the search begins anew: {error}") from error


def _write(path: Path, scores: dict[tuple[float, float], float]) -> None:
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.parent / LOCK):
            every = _read(path) | scores
            write_text(path, "".join(f"{json.dumps([*pair, score])}\n" for pair, score in every.items()))


def set_momentum(model: nn.Module, steps_per_epoch: float) -> None:
    """Let BatchNorm's statistics keep max(1 - 10 / steps per epoch, .9) of what they were at each step."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = min(10 / steps_per_epoch, 0.1)


def several(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of K answers, yes or no, summed, mean over the images; a target of -1 does not count."""
    each = F.binary_cross_entropy_with_logits(logits, (targets == 1).to(logits), reduction="none")
    return (each * (targets >= 0)).sum(1).mean()
