"""What every protocol is given: the flags that they share, the encoder, the data, and features of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from simclr_fast.config import MOST_S, MOST_THREADS, ConfigError
from simclr_fast.data import Dataset, Split, fingerprint, open_dataset
from simclr_fast.distributed import Ranks
from simclr_fast.features import Extractor, embeddings
from simclr_fast.models.weights import PUBLISHED
from simclr_fast.pretrained import Encoder, EncoderFlags, run_folder


@dataclass(frozen=True, kw_only=True)
class Work(EncoderFlags):
    """Flags of all that takes an encoder over the images of a data set."""

    data: str | None = None
    """Images with labels, as for training. Without it: those of the run."""

    download: bool = False
    """Fetch a data set of torchvision's that is not there yet."""

    tolerate_unreadable: float = 0.05
    """Share of the images that may be unreadable; they are left out."""

    gpus: int | None = None
    """GPUs to use on this host, one process each; 0 is the CPU. Without it: all that are visible."""

    ranks: int = 1
    """Processes on the CPU, with --gpus 0."""

    workers: int | None = None
    """Threads that prepare images, for each process. Without it: one for each core."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the encoder. `auto` is bf16 on a GPU, and on a CPU that has bf16 instructions."""

    cache: bool = True
    """Keep features, and use those kept before, in the cache folder."""

    timeout: float = 1800.0
    """Seconds that a process waits for the others, before it ends with an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("ranks", self.ranks >= 1, "at least 1")
        self.require("tolerate_unreadable", 0 <= self.tolerate_unreadable <= 1, "a share, 0 to 1")
        self.require("timeout", self.timeout > 0, "positive")
        self.require("timeout", self.timeout <= MOST_S, f"at most {MOST_S:,} s")
        for name in ("gpus", "workers"):
            self.require(name, getattr(self, name) is None or getattr(self, name) >= 0, "0 or more")
        self.require("workers", (self.workers or 0) <= MOST_THREADS, f"at most {MOST_THREADS:,}")


@dataclass(frozen=True, kw_only=True)
class Common(Work):
    """Flags of all protocols that take an encoder."""

    seed: int = 0
    """Fixes what is drawn at random."""

    out: str | None = None
    """Folder of the results. Without it: `evaluations` in the run's folder, whose report shows them too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("seed", 0 <= self.seed < 2**63, "in [0, 2^63)")

    def require_mode(self, protocol: str, mode: str) -> None:
        """
        Raises:
            ConfigError: a flag is given that counts in another mode of the protocol alone.
        """
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for other, names in MODES[protocol].items():
            for name in names if other != mode else ():
                self.require(name, getattr(self, name) == usual[name], f"left out without --mode {other}")


MODES = {
    "linear": {"exact": ("holdout", "l2"), "sgd": ("batch", "epochs", "lr", "weight_decay")},
    "transfer": {"linear": (), "finetune": ("steps", "batch", "lrs", "decays")},
}
"""By protocol and mode the flags that count in that mode alone."""
TRIES = 3  # to load a checkpoint on every rank before the next one is written
NEUTRAL = (
    *("checkpoint", "data", "download", "tolerate_unreadable", "gpus", "ranks", "workers", "cache", "timeout", "out"),
    *("save", "overwrite"),
)
"""Fields that do not count as other settings of a result."""


class Job:
    """One evaluation, as one rank sees it."""

    def __init__(self, settings: Any, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Load the encoder.

        Args:
            say: where sentences go; nothing on other ranks than the main one.
        """
        self.settings, self.ranks, self.say = settings, ranks, say
        self.encoder = self._loaded()
        self.run = run_folder(settings.checkpoint)
        self.notes: list[str] = []  # on the data, for the result
        self.extractor = Extractor(
            self.encoder, ranks, precision=settings.precision, workers=settings.workers, cache=settings.cache, say=say
        )

    def _loaded(self) -> Encoder:
        """The same encoder on every rank, also of a run that goes on and writes checkpoints meanwhile."""
        for _ in range(TRIES):
            encoder = self.settings.encoder()
            try:
                self.ranks.agree(encoder.digest(), "checkpoint must be the same on every rank")
            except ConfigError as error:
                differing = error
                continue
            return encoder
        raise differing

    @cached_property
    def dataset(self) -> Dataset:
        """The data set of --data, or of the run.

        Raises:
            ConfigError: neither says one.
            DataError: it cannot be opened.
        """
        spec = self.settings.data or self._data_of_run()

        def opened(download: bool) -> Dataset:
            tolerate = self.settings.tolerate_unreadable
            return open_dataset(spec, workers=self.ranks.threads, download=download, tolerate=tolerate)

        first: list[Dataset] = []  # the main rank fetches and checks what the others then find
        self.ranks.from_main(lambda: first.append(opened(self.settings.download)), patient=True)
        found = first[0] if first else opened(False)
        self.ranks.agree(fingerprint(found), f"data must be the same on every rank, and {spec} is not")
        classes = f" in {len(found.classes)} classes" if found.classes else ""
        test = f", {len(found.test):,} test images" if found.test else ""
        self.say(f"{found.name}: {len(found.train):,} training images{classes}{test}")
        for rows, what in ((found.skipped, "cannot be read"), (found.left_out, "are of no part or class")):
            if rows:
                self.notes.append(f"left out {len(rows):,} images that {what}, the first {rows[0][0]}: {rows[0][1]}")
                self.say(self.notes[-1])
        return found

    def _data_of_run(self) -> str:
        from simclr_fast.cli import saved_settings

        if self.run is None:
            raise ConfigError("data must be given with --data, for the checkpoint is not in a run's folder")
        return str(saved_settings(self.run / "config.json")["data"])

    def labelled(self) -> tuple[Labelled, Labelled]:
        """The training and the test images that have labels.

        Raises:
            ConfigError: there are none, no test images, or test images of classes that training has no image of.
        """
        data, spec = self.dataset, self.settings.data or "the run's"
        if data.train.labels is None or not (data.train.labels >= 0).any():
            raise ConfigError(f"data must have labels (class folders train/CLASS/*), {spec} has none")
        if not data.unseen and (data.test is None or data.test.labels is None or not (data.test.labels >= 0).any()):
            raise ConfigError(f"data must have labelled test images (test/CLASS/*), {spec} has none")
        train, test = Labelled.of(data.train), Labelled.of(data.test) if data.test else None
        tested = set(test.labels.tolist()) if test else set()
        unseen = [*data.unseen, *(data.classes[label] for label in sorted(tested - set(train.labels.tolist())))]
        if unseen or test is None:
            raise ConfigError(
                f"data must have training images of every class that is tested, {spec} has none of {len(unseen)} "
                f"({', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''})"
            )
        return train, test

    def features(self, images: Labelled, name: str, **options: Any) -> tuple[Tensor, Tensor]:
        """(h [n, num_features] float32, labels int64 [n]), on the CPU."""
        found = self.extractor.features(images.split, images.indices, name=name, **options)
        return found, torch.from_numpy(images.labels)

    def embeddings(self, h: Tensor) -> Tensor:
        """z = g(h), [n, d] float32, on the CPU."""
        return embeddings(self.encoder, h)


@dataclass(frozen=True)
class Labelled:
    """Images of a split that have labels."""

    split: Split
    indices: np.ndarray  # int64 [n], of the images in the split
    labels: np.ndarray  # int64 [n], their classes

    @classmethod
    def of(cls, split: Split) -> Labelled:
        assert split.labels is not None
        indices = np.flatnonzero(split.labels >= 0)
        return cls(split, indices, split.labels[indices])

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, rows: np.ndarray) -> Labelled:
        """Some of them."""
        return Labelled(self.split, self.indices[rows], self.labels[rows])


def results_folder(settings: Any) -> Path:
    """Where results are written: --out, or `evaluations` in the run, NAME-evaluations beside another file or folder,
    and in the current folder for published weights."""
    if settings.out is not None:
        return Path(settings.out).expanduser()
    run = run_folder(settings.checkpoint)
    if run is not None:
        return run / "evaluations"
    if settings.checkpoint in PUBLISHED:
        return Path(f"{settings.checkpoint}-evaluations")
    path = Path(os.path.abspath(Path(settings.checkpoint).expanduser()))
    return path.with_name(f"{path.name if path.is_dir() else path.stem}-evaluations")
