"""A benchmark ready to be evaluated: its images checked, and divided into training, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data import DataError, Split
from simclr_fast.data.sources import named
from simclr_fast.data.sources.dataset import array_split, checked
from simclr_fast.evaluation.benchmarks.layouts import POOL, Layout, look
from simclr_fast.evaluation.benchmarks.table import Benchmark

HELD_OUT = 0.1  # of the training images of a class, where there is no official validation set


@dataclass(frozen=True, eq=False)
class Task:
    """Images with their classes, and which of them are for what."""

    benchmark: Benchmark
    images: Split
    classes: tuple[str, ...]
    targets: Tensor
    """int64 [n], the classes; or [n, classes] for several an image: 1 is there, 0 is not, -1 does not count."""
    train: np.ndarray
    """int64, rows of the images that classifiers are fitted to while one is chosen; `val` and `test` likewise."""
    val: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def several(self) -> bool:
        """Whether an image may have several classes."""
        return self.targets.ndim == 2


def fingerprint(tasks: Sequence[Task]) -> str:
    """The number of images, and a digest of them, their classes, and what they are for."""
    digest = hashlib.sha256()
    for task in tasks:
        images = task.images
        digest.update("\n".join([task.benchmark.name, *images.names]).encode("utf-8", "surrogatepass"))
        for column in (images.lengths, images.sizes, task.targets.numpy(), task.train, task.val, task.test):
            digest.update(np.ascontiguousarray(column).tobytes())
    return f"{sum(len(task.images) for task in tasks)} images ({digest.hexdigest()[:12]})"


def open_task(
    benchmark: Benchmark, folder: Path, *, seed: int = 0, workers: int = 0, download: bool = False
) -> Task | None:
    """Open a benchmark from `folder`; None if nothing of it is there.

    Args:
        folder: has a folder for each benchmark, of its name.
        seed: of what is drawn at random.
        workers: processes that check the images; 0 is one for each core.
        download: fetch what is not there.
    Raises:
        DataError: it is not whole; it cannot be fetched; or a class is tested that there is nothing to learn from.
    """
    layout = look(benchmark, folder)
    if layout is None and download:
        if not benchmark.size:
            raise DataError(
                f"data {benchmark.name} must be copied into {folder / benchmark.name}, for there is no download of it"
            )
        options = list(benchmark.parts.values())
        named.fetch(benchmark.name, folder, benchmark.kind, benchmark.size, options)
        layout = look(benchmark, folder)
    if layout is None:
        return None
    notes = list(layout.notes)
    images, unreadable = _split(benchmark, layout, workers)
    if unreadable:
        notes.append(f"unreadable images, left out: {unreadable:,}")
    if layout.objects is not None:
        targets = torch.from_numpy(np.stack([layout.objects[name] for name in images.names]))
    else:
        assert images.labels is not None
        targets = torch.from_numpy(images.labels)
    parts = _parts(layout, images)
    task = _divided(benchmark, images, layout.classes, targets, parts, seed)
    _learnable(task, folder)
    return Task(**{**vars(task), "notes": (*notes, *task.notes, *_differences(task))})


def _split(benchmark: Benchmark, layout: Layout, workers: int) -> tuple[Split, int]:
    if layout.arrays is not None:
        return array_split(benchmark.name, *layout.arrays), 0
    classes = layout.classes if layout.objects is None else ()
    return checked(benchmark.name, layout.samples, classes, workers)


def _parts(layout: Layout, images: Split) -> np.ndarray:
    """The part of each image that can be read."""
    if layout.arrays is not None:
        return np.array(layout.parts)
    part = {sample.name: part for sample, part in zip(layout.samples, layout.parts, strict=True)}
    return np.array([part[name] for name in images.names])


def _divided(
    benchmark: Benchmark, images: Split, classes: tuple[str, ...], targets: Tensor, parts: np.ndarray, seed: int
) -> Task:
    rng, notes = np.random.default_rng(seed), []
    train, val, test, pool = (np.flatnonzero(parts == part) for part in ("train", "val", "test", POOL))
    labels = targets.numpy() if targets.ndim == 1 else np.zeros(len(targets), np.int64)
    if len(pool):
        assert benchmark.draw is not None
        train, test = draw(labels, pool, benchmark.draw, rng)
        notes.append(f"{len(train):,} training and {len(test):,} test images were drawn (seed {seed})")
    if not len(val) and len(train):
        train, val = hold_out(labels, train, rng)
        notes.append(f"{len(val):,} training images were held out for validation (seed {seed})")
    return Task(benchmark, images, classes, targets, train, val, test, tuple(notes))


def draw(
    labels: np.ndarray, rows: np.ndarray, counts: tuple[int, int | None], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Of each class so many rows for training, and so many others, or all, for testing; both in order.

    A class that has too few gives half to each where both counts are given, else all but one to training.
    """
    wanted, others = counts
    train, test = [], []
    for label in np.unique(labels[rows]):
        own = rng.permutation(rows[labels[rows] == label])
        most = len(own) // 2 if others is not None else len(own) - 1
        first = min(wanted, most)
        train.append(own[:first])
        test.append(own[first:] if others is None else own[first : first + others])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def hold_out(labels: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(the others, those held out): a tenth of each class's rows, at least one, none of a class with one; in order."""
    held = []
    for label in np.unique(labels[rows]):
        own = rows[labels[rows] == label]
        count = min(max(1, round(HELD_OUT * len(own))), len(own) - 1)
        held.append(rng.permutation(own)[:count])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(rows, chosen), chosen


def _has(targets: Tensor, count: int) -> np.ndarray:
    """bool [classes]: of which there is an image."""
    if targets.ndim == 2:
        return (targets == 1).any(0).numpy()
    return np.bincount(targets.numpy(), minlength=count) > 0


def _learnable(task: Task, folder: Path) -> None:
    """
    Raises:
        DataError: a part is empty, or a class is tested that has no training image.
    """
    name = f"data {task.benchmark.name} in {folder}"
    for what, rows in (("training", task.train), ("test", task.test)):
        if not len(rows):
            raise DataError(f"{name} must have {what} images that can be read, got none")
    if not len(task.val):
        raise DataError(
            f"{name} must have two training images or more of some class, to hold out one and choose by it, got one of "
            f"each of {len(task.classes)} classes"
        )
    known = np.concatenate([task.train, task.val])
    trained, tested = (_has(task.targets[rows], len(task.classes)) for rows in (known, task.test))
    unseen = [task.classes[k] for k in np.flatnonzero(tested & ~trained)]
    if unseen:
        raise DataError(
            f"{name} must have training images of every class that is tested, got none of {len(unseen)} "
            f"({', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''})"
        )
    if task.several and not (_has(task.targets[task.val], 0).any() and tested.any()):
        raise DataError(f"{name} must have objects in its validation and test images, got none that count")


def _differences(task: Task) -> list[str]:
    """What is not as it was for the paper."""
    benchmark = task.benchmark
    found = {
        "classes": (len(task.classes), benchmark.classes),
        "training images": (len(task.train) + len(task.val), benchmark.train),
        "test images": (len(task.test), benchmark.test),
    }
    other = [f"{have:,} {what}, not {want:,}" for what, (have, want) in found.items() if abs(have - want) > want / 200]
    return [f"not the paper's set: {', '.join(other)}"] if other else []
