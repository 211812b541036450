"""What an encoder has learnt of a data set: its kNN accuracy, and pictures of its views and neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast import knn
from simclr_fast.data import Dataset, Policy, Split, eval_images, train_views

EVAL_BATCH = 250
BANK = 50_000  # images, evenly spaced, that stand for a larger training set
PIXEL_NUMBERS = 2**28  # numbers in the bank's images up to which kNN on raw pixels is computed
SHOWN_VIEWS, SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 6, 6

Sharded = Callable[[int, Callable[[slice], Tensor]], Tensor]


class Stop(Protocol):
    """What may cut an evaluation short."""

    def asked(self) -> bool:
        """Whether this rank wants that."""

    def agree(self) -> None:
        """Called by every rank; raises on every rank if one of them wants it."""


class Probe:
    """Looks at encoders through one data set. The labels are used here and nowhere else."""

    def __init__(
        self,
        dataset: Dataset,
        policy: Policy,
        sharded: Sharded,
        autocast: AbstractContextManager,
        engine: dict[str, Any],
    ) -> None:
        """
        Args:
            sharded: `Ranks.sharded`, which spreads the images over the ranks.
            autocast: the precision that the encoder runs in.
            engine: `workers`, `device` and `engine` of the input pipeline.
        """
        self.dataset, self.policy, self._sharded, self._autocast, self._engine = (
            dataset,
            policy,
            sharded,
            autocast,
            engine,
        )
        self.train, self.test = dataset.train, dataset.test
        labels = self.train.labels
        known = np.arange(len(self.train)) if labels is None else np.flatnonzero(labels >= 0)
        self.bank = known[np.unique(np.linspace(0, len(known) - 1, min(BANK, len(known))).astype(np.int64))]

    @property
    def labelled(self) -> bool:
        """Whether there are labels and test images, and so an accuracy."""
        test = self.test
        return self.train.labels is not None and len(self.bank) > 0 and test is not None and test.labels is not None

    @property
    def note(self) -> str:
        """Why there is no accuracy, or nothing."""
        if self.labelled:
            return ""
        return f"no kNN accuracy: the data have no {'test images' if self.train.labels is not None else 'classes'}"

    def accuracy(self, encoder: nn.Module, stop: Stop | None = None) -> float:
        """kNN accuracy on the test images, a fraction; the training images are the neighbours.

        Raises:
            What `stop` does; it is asked after each batch of images.
        """
        assert self.test is not None
        assert self.test.labels is not None
        assert self.train.labels is not None
        bank = self._features(encoder, self.train, self.bank, stop)
        queries = self._features(encoder, self.test, np.arange(len(self.test)), stop)
        labels = [
            torch.as_tensor(labels, device=bank.device) for labels in (self.train.labels[self.bank], self.test.labels)
        ]
        return knn.accuracy(bank, labels[0], queries, labels[1])

    def untrained(self, encoder: nn.Module, given: bool = False) -> dict[str, float]:
        """Accuracies without training: of raw pixels, and of an encoder with its first weights.

        Args:
            given: these are not random, and come with the statistics of their BatchNorm.
        """
        if not self.labelled:
            return {}
        found = {}
        if len(self.bank) * 3 * self.policy.size**2 <= PIXEL_NUMBERS:
            found["raw pixels"] = self.accuracy(nn.Flatten())
        if given:
            return found | {"initial encoder": self.accuracy(encoder)}
        some = np.random.default_rng(0).permutation(self.bank)[: 4 * EVAL_BATCH]  # in folders a class follows another
        with self._autocast:
            calibrated = knn.calibrated(encoder, self._images(self.train, some))
        return found | {"untrained encoder": self.accuracy(calibrated)}

    def pictures(self, encoder: nn.Module, seed: int) -> dict[str, Any]:
        """For the report: `views`, uint8 [n, 3, S, S, 3] (image, view 1, view 2), and `neighbours` of test images."""
        batch = min(SHOWN_VIEWS, len(self.train))
        first, second, indices = next(
            iter(train_views(self.train, self.policy, batch=batch, seed=seed, start_step=0, steps=1, **self._engine))
        )
        originals = self._pixels(self.train, np.asarray(indices))
        return {
            "views": np.stack([originals, *(to_uint8(view, self.policy) for view in (first, second))], axis=1),
            "neighbours": self._neighbours(encoder),
        }

    def _neighbours(
        self, encoder: nn.Module
    ) -> list[tuple[np.ndarray, str | None, list[tuple[np.ndarray, str | None, float]]]]:
        split = self.test or self.train
        queries = np.linspace(0, len(split) - 1, min(SHOWN_QUERIES, len(split))).astype(np.int64)
        skip = int(split is self.train)  # an image's nearest neighbour in its own set is itself
        similarities, rows = knn.nearest(
            self._features(encoder, self.train, self.bank),
            self._features(encoder, split, queries),
            SHOWN_NEIGHBOURS + skip,
        )
        found = []
        for query, similar, row, image in zip(queries, similarities, rows, self._pixels(split, queries), strict=True):
            near = self.bank[row[skip:].cpu().numpy()]
            labels = [self._label(self.train, index) for index in near]
            triples = list(zip(self._pixels(self.train, near), labels, similar[skip:].tolist(), strict=True))
            found.append((image, self._label(split, query), triples))
        return found

    def _label(self, split: Split, index: int) -> str | None:
        label = -1 if split.labels is None else int(split.labels[index])
        return self.dataset.classes[label] if label >= 0 else None

    def _images(self, split: Split, indices: np.ndarray) -> Any:
        return eval_images(split, self.policy, batch=EVAL_BATCH, indices=indices, **self._engine)

    def _features(self, encoder: nn.Module, split: Split, indices: np.ndarray, stop: Stop | None = None) -> Tensor:
        with self._autocast:
            found = self._sharded(
                len(indices), lambda rows: knn.features(encoder, _until(stop, self._images(split, indices[rows])))
            )
        if stop is not None:
            stop.agree()
        return found

    def _pixels(self, split: Split, indices: np.ndarray) -> np.ndarray:
        return np.concatenate([to_uint8(images, self.policy) for images, _ in self._images(split, indices)])


def _until(stop: Stop | None, batches: Iterator[Any]) -> Iterator[Any]:
    """At least the first of the batches: what has been computed is still exchanged with the other ranks."""
    for batch in batches:
        yield batch
        if stop is not None and stop.asked():
            return


def to_uint8(images: Tensor, policy: Policy) -> np.ndarray:
    """Images that a policy has prepared, [n, 3, S, S], as they look: uint8 [n, S, S, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (policy.mean, policy.std))
    return ((images.cpu().float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
