"""Packing: a data set becomes shuffled tar shards, in any number of runs.

A shard is read back from the disk and compared before it gets its name. The manifest is replaced after each, so a
run that was stopped anywhere goes on behind the last shard that it names. What is written depends on the images and
the settings alone, not on the workers or on where a run was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr_fast.data.commands.prepare import Prepared, prepare
from simclr_fast.data.commands.shards import PARTIAL, Manifest, Shard, Tar, shard_fault
from simclr_fast.data.policy import permutation
from simclr_fast.data.sources import FEW, TOLERATE, DataError, Dataset, Split
from simclr_fast.data.sources.samples import Ticker
from simclr_fast.data.sources.scan import cores

_TEMPORARY = re.compile(r"((train|test)-\d{6,}\.(tar|idx)|manifest\.json)" + re.escape(PARTIAL))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What decides the bytes of the shards, beside the images."""

    seed: int = 0  # of the order, in [0, 2^63)
    shard_mib: float = 256.0  # largest size of a shard in MiB, unless one image is larger
    per_shard: int | None = None  # images in a shard, in place of shard_mib
    short_side: int | None = None  # pixels; images with a longer one are made smaller and become JPEGs
    quality: int = 92  # of those JPEGs

    def __post_init__(self) -> None:
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        self._require("shard_mib", 0 < self.shard_mib < float("inf"), "positive")
        self._require("per_shard", self.per_shard is None or self.per_shard >= 1, "at least 1")
        self._require("short_side", self.short_side is None or self.short_side >= 1, "at least 1")
        self._require("quality", 1 <= self.quality <= 100, "in [1, 100]")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise DataError(f"{name} must be {rule}, got {name}={getattr(self, name)}")

    def facts(self) -> dict[str, Any]:
        """The settings that have an effect, by name."""
        without = {"shard_mib"} if self.per_shard else {"per_shard"}
        without |= set() if self.short_side else {"quality"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in without}


class Progress:
    """Lines on standard error now and then: images done, images/s, MB/s, time left."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.images, self.bytes = what, total, 0, 0
        self.ticker = Ticker()

    def add(self, images: int, size: int) -> None:
        """Count images, and bytes of them."""
        self.images, self.bytes = self.images + images, self.bytes + size
        if self.ticker.due():
            self.ticker.show(self.line(time.monotonic() - self.ticker.start))

    def line(self, seconds: float) -> str:
        """The line after so many seconds."""
        seconds = max(seconds, 1e-9)
        left = round((self.total - self.images) * seconds / max(self.images, 1))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        rates = f"{self.images / seconds:,.0f} images/s, {self.bytes / seconds / 1e6:,.1f} MB/s"
        return f"{self.what}: {self.images:,} of {self.total:,} images, {rates}, {clock}"

    def close(self) -> None:
        """End a line in place."""
        self.ticker.close()


def pack(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    settings: Packing | None = None,
    source: str = "",
    workers: int = 0,
    tolerate: float = TOLERATE,
) -> Manifest:
    """Write a data set as tar shards, train-000000.tar, ... and test-000000.tar, ..., that `open_dataset` opens.

    Each image is `KEY.jpg` (or png, webp, bmp, ppm: what it is), where it has a class followed by `KEY.cls`, the
    class's name; KEY is its place in the shuffled order. Beside each tar lies the index that DALI's wds2idx would
    write. Bytes are kept as they are, metadata and all, unless `settings.short_side` makes an image smaller: then
    neither the EXIF orientation is applied nor the ICC profile kept, since the engines heed neither. A folder that
    holds an unfinished set of the same images and settings is finished; shards that are damaged are written again.
    A damaged shard whose images are all gone is removed. A finished set stays complete unless something is written.
    Classes are opened in the order of their names, and none if an image has none, which stderr tells.

    Args:
        folder: where to write; it is made, or empty, or holds such a set.
        source: what the data set was opened from; the folder must not lie in it.
        workers: threads that read and resize; 0 is one for each core.
        tolerate: the share of a part's images that may vanish while it is packed, in all runs together, 0 to 1; of
            fewer than 20 any number may, if it is not 0.
    Raises:
        DataError: the folder cannot be written or is not fit, or holds another set; too many images vanished.
    """
    target, settings = Path(folder).absolute(), settings or Packing()
    origin = Path(source).expanduser().resolve() if source else None
    if origin and origin in (target.resolve(), *target.resolve().parents):
        raise DataError(f"the folder of the shards must lie outside what is packed, got {str(target)!r} in {source!r}")
    parts = {"train": dataset.train} | ({"test": dataset.test} if dataset.test else {})
    fresh = Manifest(
        source=dataset.name,
        settings=settings.facts(),
        images={part: len(split) for part, split in parts.items()},
        digests={part: _digest_of(split) for part, split in parts.items()},
        classes=tuple(_class_text(name) for name in dataset.classes),
    )
    if len(set(fresh.classes)) < len(fresh.classes):
        raise DataError("classes must differ when written as UTF-8")
    _tell_unlabelled(parts)
    packer = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _claimed(target):
            manifest = _found(target, fresh)
            packer = _Packer(target, manifest, settings, workers or cores(), tolerate)
            return packer.run(parts)
    except OSError as error:
        whole = len(packer.manifest.shards) if packer else 0
        reason = f"{error.strerror or error}; {whole} shards in it are whole, and the same command goes on"
        raise DataError(f"the folder {str(target)!r} cannot be written: {reason}") from error


class _Packer:
    """Writes the shards that a manifest lacks."""

    def __init__(self, folder: Path, manifest: Manifest, settings: Packing, workers: int, tolerate: float) -> None:
        self.folder, self.manifest, self.settings = folder, manifest, settings
        self.workers, self.tolerate = workers, tolerate
        self.lost = dict(manifest.lost)  # by part/name
        self.lost_of = Counter(name.partition("/")[0] for name in self.lost)  # parts

    def run(self, parts: Mapping[str, Split]) -> Manifest:
        """Every part; the finished manifest."""
        damaged = self._damaged()
        if damaged:
            self._reopen()
        done = sum(shard.images for shard in self.manifest.shards) - sum(shard.images for shard in damaged)
        self.progress = Progress("packing", sum(map(len, parts.values())) - done)
        for part, split in parts.items():
            mine = [shard for shard in self.manifest.shards if _place(shard)[0] == part]
            for shard in mine:
                number = _place(shard)[1]
                if shard in damaged and not self._fill(part, split, number, shard.first, shard.end, limited=False):
                    self._drop(shard)
            number, first = (_place(mine[-1])[1] + 1, mine[-1].end) if mine else (0, 0)
            self._fill(part, split, number, first, len(split))
            if not any(_place(shard)[0] == part for shard in self.manifest.shards):
                raise DataError(f"images must stay while they are packed, but all {len(split):,} of {part} are gone")
        if not self.manifest.complete or self.lost != dict(self.manifest.lost):
            self._save(dataclasses.replace(self.manifest, complete=True))
        return self.manifest

    def _damaged(self) -> list[Shard]:
        """Shards of the manifest that are not as it says."""
        damaged, progress = [], Progress("verifying shards", sum(shard.images for shard in self.manifest.shards))
        for shard in self.manifest.shards:
            if fault := shard_fault(self.folder, shard):
                damaged.append(shard)
                print(f"{shard.name} is written again: {fault}", file=sys.stderr)
            progress.add(shard.images, shard.bytes)
        progress.close()
        return damaged

    def _fill(self, part: str, split: Split, number: int, first: int, end: int, limited: bool = True) -> bool:
        """Images `first` to `end` of the shuffled order, into shards from `number` on, or into one alone.

        Returns whether the last one holds an image, and so was written.
        """
        if first == end:
            return False
        order = permutation(len(split), self.settings.seed, 0)[first:end].tolist()
        tar = Tar(self.folder, part, number)
        try:
            for place, (index, sample) in enumerate(self._samples(split, order), first):
                if sample.fault:
                    self._lose(part, split, index, sample.fault)
                    continue
                self._find(part, split, index)
                files = {sample.kind: sample.content} | self._label(split, index)
                if limited and self._is_full(tar, files):
                    self._keep(tar, first, place)
                    number, first = number + 1, place
                    tar = Tar(self.folder, part, number)
                tar.add(f"{place:09d}", files)
                self.progress.add(1, len(sample.content))
            if tar.samples:
                self._keep(tar, first, end)
            return bool(tar.samples)
        finally:
            tar.discard()
            self.progress.close()

    def _is_full(self, tar: Tar, files: Mapping[str, bytes]) -> bool:
        if self.settings.per_shard:
            return len(tar.samples) >= self.settings.per_shard
        return bool(tar.samples) and tar.size_with(files) > self.settings.shard_mib * 2**20

    def _label(self, split: Split, index: int) -> dict[str, bytes]:
        label = -1 if split.labels is None else int(split.labels[index])
        return {"cls": self.manifest.classes[label].encode()} if label >= 0 else {}

    def _keep(self, tar: Tar, first: int, end: int) -> None:
        self._reopen()
        self._save(self.manifest.having(tar.finish(first, end)))

    def _drop(self, shard: Shard) -> None:
        """Remove a damaged shard of which no image is left."""
        path = self.folder / shard.name
        for each in (path, path.with_suffix(".idx")):
            each.unlink(missing_ok=True)
        shards = tuple(each for each in self.manifest.shards if each != shard)
        self._save(dataclasses.replace(self.manifest, shards=shards))
        print(f"{shard.name} is removed: none of its images can be read any more", file=sys.stderr)

    def _reopen(self) -> None:
        """Say that the folder is not complete, before any of its shards changes."""
        if self.manifest.complete:
            self._save(dataclasses.replace(self.manifest, complete=False))

    def _save(self, manifest: Manifest) -> None:
        manifest = dataclasses.replace(manifest, lost=tuple(self.lost.items()))
        manifest.save(self.folder)
        self.manifest = manifest

    def _lose(self, part: str, split: Split, index: int, reason: str) -> None:
        self._find(part, split, index)
        self.lost[f"{part}/{split.names[index]}"] = reason
        self.lost_of[part] += 1
        lost = self.lost_of[part]
        few = len(split) < FEW and self.tolerate > 0
        if lost > self.tolerate * len(split) + 1e-9 and not few:
            raise DataError(
                f"images must stay while they are packed, but {lost:,} of {len(split):,} cannot be read any more; the "
                f"last is {part}/{split.names[index]}: {reason}"
            )

    def _find(self, part: str, split: Split, index: int) -> None:
        """An image is not lost, whatever an earlier run saw."""
        if self.lost.pop(f"{part}/{split.names[index]}", None) is not None:
            self.lost_of[part] -= 1

    def _samples(self, split: Split, order: list[int]) -> Iterator[tuple[int, Prepared]]:
        """What becomes of the images, in order, prepared by threads a little ahead."""
        waiting: deque[tuple[int, Future[Prepared]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            for index in order:
                waiting.append(
                    (index, pool.submit(prepare, split, index, self.settings.short_side, self.settings.quality))
                )
                if len(waiting) > 4 * self.workers:
                    index, job = waiting.popleft()
                    yield index, job.result()
            for index, job in waiting:
                yield index, job.result()


def _found(folder: Path, fresh: Manifest) -> Manifest:
    """The manifest to go on with: the folder's, or a new one where the folder is empty."""
    manifest = found = Manifest.load(folder)
    left = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    if manifest is None:
        others = sorted({path.name for path in folder.iterdir()} - {path.name for path in left})
        if others:
            raise DataError(f"the folder of the shards must be empty or hold such shards, {folder} has {others[0]!r}")
        manifest = fresh
    if differences := manifest.differences(fresh):
        text = "; ".join(differences)
        raise DataError(f"the folder {str(folder)!r} holds another set, choose another or remove it ({text})")
    for path in left:
        path.unlink()
    if found is None:
        manifest.save(folder)
    return manifest


def _tell_unlabelled(parts: Mapping[str, Split]) -> None:
    count = sum(int((split.labels < 0).sum()) for split in parts.values() if split.labels is not None)
    if count:
        print(f"{count:,} images have no class, so the shards will be opened without classes", file=sys.stderr)


def _place(shard: Shard) -> tuple[str, int]:
    part, _, number = Path(shard.name).stem.partition("-")
    return part, int(number)


def _class_text(name: str) -> str:
    text = name.encode("utf-8", "backslashreplace").decode()
    if not text or text != text.strip():
        raise DataError(f"a class must have a name without space around it, got {name!r}")
    return text


def _digest_of(split: Split) -> str:
    digest = hashlib.sha256()
    for name in split.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for numbers in (split.lengths, split.sizes, np.zeros(0) if split.labels is None else split.labels):
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return digest.hexdigest()


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against a second process that would pack into it."""
    try:
        import fcntl
    except ImportError:  # Windows, where processes are not kept apart
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is packing into {str(folder)!r}") from error
        yield
    finally:
        os.close(handle)
