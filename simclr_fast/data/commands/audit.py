"""A look at a whole data set: what is in it, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simclr_fast.data.commands.pack import Progress
from simclr_fast.data.commands.shards import MANIFEST, Manifest, shard_fault
from simclr_fast.data.sources import Dataset, Split
from simclr_fast.data.sources.samples import shown
from simclr_fast.data.sources.scan import cores

FIRST = 20  # that many unreadable images, and left-out ones, are named
FIRST_COPIES = 5  # and that many images that there are several times
QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of one part that can be read."""

    images: int
    formats: dict[str, int]  # how many there are of each, by Pillow's names
    short_side: dict[str, int]  # quantiles, pixels
    bytes: dict[str, int]  # quantiles
    per_class: dict[str, int]  # quantiles of the number of images of a class; empty without classes
    unlabelled: int
    small: int  # images whose short side is below `Report.image_size`


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` found."""

    name: str
    parts: dict[str, Part]
    classes: tuple[str, ...]
    image_size: int
    unreadable: int
    first_unreadable: list[tuple[str, str]]  # (name, reason)
    left_out: int  # images that are not of the set, though they may be sound
    first_left_out: list[tuple[str, str]]  # (name, reason)
    copies: int  # images whose bytes are those of an earlier one
    copies_across: int  # of those, images of the test part that are in train
    first_copies: list[list[str]]  # names of images that are alike
    shards: int | None  # as the manifest lists them; None where there is no manifest
    shard_faults: list[tuple[str, str]]  # (name, reason)

    @property
    def clean(self) -> bool:
        """Whether every image can be read and every shard is as its manifest says; images left out do not count."""
        return not self.unreadable and not self.shard_faults

    def json(self) -> dict[str, Any]:
        """The report as values that JSON has."""
        return dataclasses.asdict(self) | {"clean": self.clean}

    def lines(self) -> Iterator[str]:
        """The report as text."""
        yield f"{shown(self.name)}: {_count(len(self.classes), 'class', 'classes')}"
        for name, part in self.parts.items():
            yield from _part_lines(name, part, self.image_size)
        across = f", {self.copies_across:,} of them in test and in train" if self.copies_across else ""
        yield f"copies      {_count(self.copies, 'image')} with the bytes of an earlier one{across}"
        yield from (f"            {' = '.join(names)}" for names in self.first_copies)
        if self.shards is not None:
            yield f"shards      {self.shards:,} in the manifest, {_count(len(self.shard_faults), 'fault')}"
            yield from (f"            {name}: {reason}" for name, reason in self.shard_faults)
        if self.left_out:
            yield from _named_lines("left out", self.left_out, self.first_left_out)
        yield from _named_lines("unreadable", self.unreadable, self.first_unreadable)
        yield "clean" if self.clean else "not clean"


def check(dataset: Dataset, *, folder: Path | None = None, image_size: int = 224, workers: int = 0) -> Report:
    """Read every image of an opened data set once more and report.

    Args:
        dataset: opened with `tolerate=1`, so that it opens whatever share of it cannot be read.
        folder: of packed shards, whose checksums and indices are then compared with their manifest.
        image_size: pixels; images with a shorter side are counted.
        workers: threads that read; 0 is one for each core.
    Raises:
        DataError: the manifest cannot be read.
    """
    splits = {"train": dataset.train} | ({"test": dataset.test} if dataset.test else {})
    progress = Progress("reading images", sum(map(len, splits.values())))
    facts = {name: _read(split, workers or cores(), progress) for name, split in splits.items()}
    progress.close()
    faults = [*dataset.skipped, *(fault for name, part in facts.items() for fault in part.faults(splits[name]))]
    left_out = dataset.left_out
    shards, shard_faults = _shards(folder) if folder else (None, [])
    return Report(
        name=dataset.name,
        parts={name: _part(split, facts[name], len(dataset.classes), image_size) for name, split in splits.items()},
        classes=tuple(map(shown, dataset.classes)),
        image_size=image_size,
        unreadable=len(faults),
        first_unreadable=_first(faults),
        left_out=len(left_out),
        first_left_out=_first(left_out),
        **_copies(splits, facts),
        shards=shards,
        shard_faults=shard_faults,
    )


@dataclass(frozen=True, eq=False)
class _Facts:
    """What reading the n images of a part gave."""

    formats: list[str]  # by Pillow's names; or why the image cannot be read
    bytes: np.ndarray  # int64 [n], 0 where it cannot be read
    digests: np.ndarray  # uint8 [n, 16]

    def faults(self, split: Split) -> list[tuple[str, str]]:
        return [(split.names[row], self.formats[row]) for row in np.flatnonzero(self.bytes == 0).tolist()]


def _read(split: Split, workers: int, progress: Progress) -> _Facts:
    formats: list[str] = []
    sizes, digests = np.zeros(len(split), np.int64), np.zeros((len(split), 16), np.uint8)
    waiting: deque[Future[tuple[str, int, bytes]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for index in range(len(split) + 4 * workers):
            if index < len(split):
                waiting.append(pool.submit(_fact, split, index))
            if index >= 4 * workers and waiting:
                kind, size, digest = waiting.popleft().result()
                row = len(formats)
                formats.append(kind)
                sizes[row], digests[row] = size, np.frombuffer(digest, np.uint8)
                progress.add(1, size)
    return _Facts(formats, sizes, digests)


def _fact(split: Split, index: int) -> tuple[str, int, bytes]:
    """(format, bytes, digest) of an image, or (reason, 0, nothing in particular)."""
    try:
        encoded = split.read(index).tobytes()
        with Image.open(io.BytesIO(encoded)) as image:  # which reads its header alone
            if (image.height, image.width) == tuple(split.sizes[index]):
                return str(image.format), len(encoded), hashlib.blake2b(encoded, digest_size=16).digest()
        reason = "it has changed since it was checked"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # Pillow's plug-ins raise anything
        reason = str(error) or type(error).__name__
    return reason, 0, bytes(16)


def _part(split: Split, facts: _Facts, classes: int, image_size: int) -> Part:
    good = facts.bytes > 0
    sides = split.sizes[good].min(axis=1)
    labels = np.zeros(0, np.int64) if split.labels is None else split.labels[good]
    return Part(
        images=int(good.sum()),
        formats=dict(Counter(kind for kind, fine in zip(facts.formats, good, strict=True) if fine).most_common()),
        short_side=_quantiles(sides),
        bytes=_quantiles(facts.bytes[good]),
        per_class=_quantiles(np.bincount(labels[labels >= 0], minlength=classes)) if classes else {},
        unlabelled=int((labels < 0).sum()),
        small=int((sides < image_size).sum()),
    )


def _copies(splits: dict[str, Split], facts: dict[str, _Facts]) -> dict[str, Any]:
    """The report's fields about images with the same bytes."""
    good = np.concatenate([part.bytes > 0 for part in facts.values()])
    in_train = np.arange(len(good)) < len(splits["train"])
    rows = np.flatnonzero(good)
    digests = np.concatenate([part.digests for part in facts.values()])[good].view("V16").ravel()
    _, first, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    first = first[group]  # of each image: the first one like it
    later = np.flatnonzero(first != np.arange(len(rows)))
    several = [rows[group == each].tolist() for each in list(dict.fromkeys(group[later].tolist()))[:FIRST_COPIES]]
    names = [f"{part}/{shown(name)}" for part, split in splits.items() for name in split.names] if several else []
    return {
        "copies": len(later),
        "copies_across": int((in_train[rows[first[later]]] & ~in_train[rows[later]]).sum()),
        "first_copies": [[names[row] for row in alike[:FIRST_COPIES]] for alike in several],
    }


def _shards(folder: Path) -> tuple[int | None, list[tuple[str, str]]]:
    """How many shards the manifest lists, and what is wrong with them."""
    manifest = Manifest.load(folder)
    if manifest is None:
        return None, []
    progress, faults = Progress("verifying shards", sum(shard.images for shard in manifest.shards)), []
    for shard in manifest.shards:
        if fault := shard_fault(folder, shard):
            faults.append((shard.name, fault))
        progress.add(shard.images, shard.bytes)
    progress.close()
    listed = {shard.name for shard in manifest.shards}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    faults += [(shown(name), "the manifest does not list it") for name in strangers]
    if not manifest.complete:
        faults.append((MANIFEST, "packing has not been finished; the same command goes on"))
    return len(manifest.shards), faults


def _quantiles(values: np.ndarray) -> dict[str, int]:
    """Values that occur, by the names in QUANTILES; nothing of no values."""
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return {name: int(value) for name, value in zip(QUANTILES, found, strict=True)}


def _part_lines(name: str, part: Part, image_size: int) -> Iterator[str]:
    formats = ", ".join(f"{count:,} {kind}" for kind, count in part.formats.items())
    yield f"{name:<11} {_count(part.images, 'image')}: {formats}"
    for what, quantiles in (("short side", part.short_side), ("bytes", part.bytes), ("per class", part.per_class)):
        if quantiles:
            text = ", ".join(f"{name} {value:,}" for name, value in quantiles.items())
            yield f"  {what:<9} {text}"
    if part.small:
        yield f"  small     {_count(part.small, 'image')} with a side below {image_size} pixels"
    if part.unlabelled:
        yield f"  no class  {_count(part.unlabelled, 'image')}"


def _first(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(shown(name), shown(reason)) for name, reason in pairs[:FIRST]]


def _named_lines(what: str, count: int, first: list[tuple[str, str]]) -> Iterator[str]:
    yield f"{what:<11} {_count(count, 'image')}"
    yield from (f"            {name}: {reason}" for name, reason in first)
    if count > len(first):
        yield f"            and {count - len(first):,} more"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
