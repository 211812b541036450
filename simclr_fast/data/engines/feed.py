"""Encoded images, read ahead of their use; what cannot be read any more is replaced and said."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

import numpy as np

from simclr_fast.data.policy import Params
from simclr_fast.data.sources import TOLERATE, DataError, Split

log = logging.getLogger("simclr_fast.data")
T = TypeVar("T")

Batch = tuple[np.ndarray, tuple[Params, ...]]
"""What an engine is to make: images [B] of a split, and the parameters of each view of them."""

Plan = Callable[[int, Mapping[int, int]], Batch]
"""The batch of a step, given image -> image that takes its place."""


@dataclass
class Meter:
    """Where the time of the input goes, in seconds summed over the threads."""

    reading: float = 0.0
    rendering: float = 0.0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, stage: str, began: float) -> None:
        """Count the time since `began` (time.perf_counter) for `reading` or `rendering`."""
        with self._lock:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - began)


@dataclass(frozen=True)
class Settings:
    """How an engine works; none of it changes a view."""

    workers: int = 2  # threads, or processes of the torchvision engine
    memory_mib: int = 1024  # bound of the decoded images that are held at a time, and again of files read ahead
    ranks: int = 1  # that share the memory of this host
    hardware: float = 0.65  # share of JPEGs that a GPU's decoder engines get; the rest go to its cores
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True, eq=False)
class Loaded:
    """One batch, before it is decoded."""

    step: int
    indices: np.ndarray
    params: tuple[Params, ...]
    encoded: list[np.ndarray]


class Feed:
    """The batches of a plan, with the files of their images.

    An image that was good when it was checked and cannot be read now is replaced by the next one, for the rest of the
    run; the views keep the parameters of the one that is missing but for the window.
    """

    def __init__(self, split: Split, plan: Plan, meter: Meter) -> None:
        self.split, self.meter = split, meter
        self._plan = plan
        self._replaced: dict[int, int] = {}
        self._lock = Lock()

    def planned(self, step: int) -> Batch:
        """The batch of a step, of images that can be read as far as is known."""
        return self._plan(step, self._replaced)

    def load(self, step: int) -> Loaded:
        """The batch of a step, read."""
        while True:
            indices, params = self.planned(step)
            began = time.perf_counter()
            encoded = [self._read(int(index)) for index in indices]
            self.meter.add("reading", began)
            if all(image is not None for image in encoded):
                return Loaded(step, indices, params, [image for image in encoded if image is not None])

    def _read(self, index: int) -> np.ndarray | None:
        try:
            encoded = self.split.read(index)
        except (OSError, ValueError) as error:
            self.reject(index, getattr(error, "strerror", None) or str(error))
            return None
        return encoded

    def decoded(self, step: int, decode: Callable[[np.ndarray], T]) -> tuple[list[T], Loaded]:
        """The images of a step's batch, decoded one after the other, and the batch."""
        while True:
            batch, images = self.load(step), []
            for index, encoded in zip(batch.indices, batch.encoded, strict=True):
                try:
                    images.append(decode(encoded))
                except Exception as error:  # a decoder's own
                    self.reject(int(index), str(error))
                    break
            else:
                return images, batch

    def reject(self, index: int, reason: str) -> None:
        """Replace an image from now on.

        Raises:
            DataError: so many are missing that something is wrong with the disk.
        """
        with self._lock:
            if index in self._replaced:
                return
            n = len(self.split)
            good = ((index + k) % n for k in range(1, n))
            other = next((k for k in good if k not in self._replaced), None)
            names = self.split.names
            if other is None or len(self._replaced) + 1 > max(1, TOLERATE * n):
                raise DataError(
                    f"data must stay readable while they are used: {len(self._replaced) + 1} of {n} images became "
                    f"unreadable, the last one {names[index]}: {reason}; over {TOLERATE:.0%} the run stops"
                )
            self._replaced[index] = other
        log.warning("%s cannot be read any more (%s); %s takes its place", names[index], reason, names[other])

    @property
    def places(self) -> Mapping[int, int]:
        """Image -> image that takes its place."""
        return self._replaced

    def ahead(self, pool: ThreadPoolExecutor, steps: Sequence[int], settings: Settings) -> Iterator[Loaded]:
        """The batches of steps in order, read before they are asked for: one for each worker, if memory allows."""
        each = float(self.split.lengths.mean()) * len(self.planned(steps[0])[0])
        depth = max(2, min(settings.workers + 1, int(settings.memory_mib * 2**20 / max(each, 1))))
        loading: deque[Future[Loaded]] = deque()
        for k in range(len(steps) + depth):
            if k < len(steps):
                loading.append(pool.submit(self.load, steps[k]))
            if k >= depth and loading:
                yield loading.popleft().result()


def replaced(indices: np.ndarray, places: Mapping[int, int]) -> np.ndarray:
    """`indices` with those that are in `places` replaced, also those that replace others."""
    if not places:
        return indices
    out = indices.copy()
    for k, index in enumerate(out):
        while int(index) in places:
            index = places[int(index)]
        out[k] = index
    return out


def chunks(split: Split, indices: np.ndarray, limit: int) -> list[slice]:
    """Rows to be decoded together: as many as fit into `limit` bytes of pixels, at least one."""
    sizes = split.sizes[indices].prod(1) * 3
    out, first, held = [], 0, 0
    for k, size in enumerate(sizes.tolist()):
        if held + size > limit and k > first:
            out.append(slice(first, k))
            first, held = k, 0
        held += size
    return [*out, slice(first, len(indices))]
