"""The images of a data set: what is where, which of them are for what, and their encoded bytes.

A sample is a stretch of a file, so an image file and a member of a tar are read alike. Every image is decoded once
before training, since a decoder in the middle of a run cannot skip one.
"""

from __future__ import annotations

import difflib
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr_fast.data.sources import named
from simclr_fast.data.sources.check import examine
from simclr_fast.data.sources.files import Found, find, refuse_unfinished
from simclr_fast.data.sources.parts import Row, class_names, class_of, parted
from simclr_fast.data.sources.samples import (
    EXTENSIONS,
    DataError,
    Sample,
    cache_folder,
    datasets_folder,
    expanded,
    shown,
    write_whole,
)
from simclr_fast.data.sources.scan import Findings, scan

__all__ = [
    "KNOWN",
    "DataError",
    "Dataset",
    "Split",
    "cache_folder",
    "datasets_folder",
    "open_dataset",
    "write_skipped",
]

KNOWN: tuple[str, ...] = ("shapes", *named.NAMES)
PARTS = ("train", "test")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")
TOLERATE = 0.05  # the share of images that may be unreadable
FEW = 20  # images; of fewer, any number may be unreadable, for one is more than that share


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one part of a data set, in a fixed order."""

    names: Sequence[str]
    paths: Sequence[str]  # of the file that holds each image
    offsets: np.ndarray  # int64 [n], in bytes
    lengths: np.ndarray  # int64 [n], in bytes
    sizes: np.ndarray  # int64 [n, 2]: height, width
    labels: np.ndarray | None  # int64 [n], -1 for an image without one; None without classes
    pixels: np.ndarray | None = None  # uint8 [n, H, W, 3], of a set that is an array; then no file is read
    stamps: np.ndarray | None = None  # int64 [n], when each file was changed, ns

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        """The encoded image, uint8 [bytes]; of pixels a PNG.

        Raises:
            OSError: the file is gone, or it was changed and is not a whole image of the same size any more.
        """
        if self.pixels is not None:
            return _png(self.pixels[index])
        path, length = self.paths[index], int(self.lengths[index])
        with open(path, "rb") as file:
            stamp = os.fstat(file.fileno()).st_mtime_ns
            encoded = np.fromfile(file, np.uint8, length, offset=int(self.offsets[index]))
        if len(encoded) < length:
            raise OSError("it is shorter than when it was checked")
        # Only then is it decoded here: DALI may end the whole process at an image that it cannot decode.
        if self.stamps is not None and stamp != self.stamps[index]:
            verdict = examine(encoded.tobytes())
            if verdict.fault or (verdict.height, verdict.width) != tuple(self.sizes[index]):
                raise OSError(f"it was changed since it was checked: {verdict.fault or 'it has another size'}")
        return encoded


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set. (name, reason) of what cannot be read is in `skipped`, of what is of no part in `left_out`."""

    name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...] = ()  # sound ones, that no part or class of the set takes
    unseen: tuple[str, ...] = ()  # classes of test images that are left out, for no training image has them


def open_dataset(spec: str, workers: int = 0, *, download: bool = False, tolerate: float = TOLERATE) -> Dataset:
    """Find and check the images of a data set.

    Args:
        spec: a name in KNOWN (a folder of that name is `./NAME`); or a folder with train/CLASS/* (and test/CLASS/*), of
            class folders, of images at any depth, of Hugging Face's metadata and images, or of tars; or one tar; or a
            text file of image paths, a tab and a class after each if it has classes. A class is the first folder below
            the root (for tars: or what `key.cls` says beside `key.jpg`).
        workers: processes that check the images; 0 is one for each core.
        download: fetch a known data set that is not there yet.
        tolerate: the share of the images, of training and test together, that may be unreadable, 0 to 1. Of fewer
            than 20 images any number may be, if it is not 0. With 1, packed shards need not be all there either.
    Raises:
        DataError: there is no such path, or packing it has not ended, or no image in it that can be read, or more
            than `tolerate` cannot be read; or the data set of that name is not there, or cannot be fetched.
    """
    if not 0 <= tolerate <= 1:
        raise DataError(f"tolerate must be a share of the images, 0 to 1, got {tolerate}")
    if spec in named.NAMES:
        return _open_named(spec, workers, download, tolerate)
    root = _root(spec)
    if not root.is_dir() and root.suffix.lower() not in (".tar", ".txt"):
        raise DataError(f"data must be a folder, a .tar or a .txt list of images, got {spec!r}")
    if tolerate < 1:
        refuse_unfinished(root)
    found = find(root)
    if not found.samples:
        raise DataError(
            f"data must hold images ({', '.join(EXTENSIONS)}, or .tar files of them), found none in {spec!r}"
        )
    findings = scan(found.samples, str(root), workers)
    _tolerated(found.samples, findings, tolerate, spec)
    return _assemble(spec if spec in KNOWN else shown(root.name.split(".")[0]), found, findings)


def checked(name: str, samples: Sequence[Sample], classes: tuple[str, ...], workers: int = 0) -> tuple[Split, int]:
    """The images of a list that can be read, in its order, and how many cannot.

    Args:
        name: of the set, in what is remembered and in messages.
        classes: those that the samples' labels name, in order; none if the images have no such label.
        workers: processes that check the images; 0 is one for each core.
    Raises:
        DataError: over 5 % of the images cannot be read.
    """
    findings = scan(samples, name, workers)
    _tolerated(samples, findings, TOLERATE, name, remedy="remove them, or bring them back")
    rows = [Row(k, sample.name) for k, sample in enumerate(samples) if k not in findings.faults]
    return _split(samples, rows, findings.sizes, classes), len(findings.faults)


def write_skipped(path: Path, dataset: Dataset) -> None:
    """Write what was skipped and what left out, in lines of name, tab, reason; where nothing was, remove the file.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    if not (rows := [*dataset.skipped, *dataset.left_out]):
        path.unlink(missing_ok=True)
        return
    lines = ["\t".join(map(one_line, pair)) + "\n" for pair in rows]
    write_whole(path, "".join(lines).encode())


def one_line(text: str) -> str:
    """The text with escapes for what would break a line or a column."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _png(pixels: np.ndarray) -> np.ndarray:
    """A PNG that packs nothing, ten times as quick to make as with Pillow."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b"")
    packed = [struct.pack(">I", len(data)) + kind + data + _checksum(kind + data) for kind, data in chunks]
    return np.frombuffer(b"\x89PNG\r\n\x1a\n" + b"".join(packed), np.uint8)


def _checksum(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def _root(spec: str) -> Path:
    if spec == "shapes":
        from simclr_fast.data.sources.shapes import make_shapes

        return make_shapes()
    root = expanded(spec)
    if root.name.lower().endswith(PACKED):
        raise DataError(f"data must not be compressed: unpack {spec!r} into a folder, or into a .tar, and give that")
    try:
        exists = root.exists()
    except OSError as error:  # a folder above it that may not be entered
        raise DataError(f"data must be a path that can be read, got {spec!r}: {error}") from error
    if not exists:
        near = difflib.get_close_matches(spec.lower(), KNOWN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"data must be an existing path or one of {', '.join(KNOWN)}, got {spec!r}{hint}")
    return root.resolve()


def _open_named(name: str, workers: int, download: bool, tolerate: float) -> Dataset:
    data = named.load(name, download)
    if data.arrays:
        train, test = (array_split(name, *data.arrays[part]) if part in data.arrays else None for part in PARTS)
        assert train is not None
        return Dataset(name, train, test, data.classes, ())
    samples = [sample for part in PARTS for sample in data.samples.get(part, ())]
    findings = scan(samples, f"{data.folder} {name}", workers)
    _tolerated(samples, findings, tolerate, name)
    rows, start = {}, 0
    for part in PARTS:
        count = len(data.samples.get(part, ()))
        rows[part] = [Row(k, samples[k].name) for k in range(start, start + count) if k not in findings.faults]
        start += count
    train, test = (_split(samples, rows[part], findings.sizes, data.classes) for part in PARTS)
    return Dataset(name, train, test if len(test) else None, data.classes, _unreadable(samples, findings))


def array_split(name: str, pixels: np.ndarray, labels: np.ndarray) -> Split:
    """Images uint8 [n, H, W, 3] that are an array, with their classes [n]."""
    n, height, width, _ = pixels.shape
    return Split(
        names=[f"{k:0{len(str(n - 1))}d}" for k in range(n)],
        paths=[name] * n,
        offsets=np.zeros(n, np.int64),
        lengths=np.full(n, 3 * height * width, np.int64),
        sizes=np.tile(np.array([height, width], np.int64), (n, 1)),
        labels=labels.astype(np.int64),
        pixels=pixels,
    )


def _tolerated(samples: Sequence[Sample], findings: Findings, tolerate: float, spec: str, remedy: str = "") -> None:
    """
    Args:
        remedy: in place of the flag that tolerates more.
    Raises:
        DataError: too many images cannot be read.
    """
    bad, total = len(findings.faults), len(samples)
    if not bad:
        return
    row = min(findings.faults)
    first = f"{samples[row].name}: {findings.faults[row]}"
    if bad == total:
        raise DataError(f"data must hold images that can be read, all {total:,} in {spec!r} fail; {first}")
    remedy = remedy or f"remove them, or raise --tolerate-unreadable ({_rounded_up(bad, total)})"
    if bad > tolerate * total + 1e-9 and (total >= FEW or tolerate == 0):
        raise DataError(
            f"data must hold at most {100 * tolerate:g} % images that cannot be read, got {bad:,} of {total:,} in "
            f"{spec!r}, the first {first}; {remedy}"
        )


def _rounded_up(bad: int, total: int) -> float:
    """A share with two digits that is surely enough."""
    return min(1.0, (100 * bad // total + 1) / 100)


def _assemble(name: str, found: Found, findings: Findings) -> Dataset:
    """Part the samples into train and test, and label them."""
    samples = found.samples
    parts = parted(samples, findings.faults)
    train, test, left_out = parts.train, parts.test, [*found.left_out, *parts.left_out]
    classes, unseen = class_names({class_of(samples, row) for row in train}), set[str]()
    if classes:
        labels = [(row, class_of(samples, row)) for row in test]
        left_out += [(row.name, _not_in_train(label)) for row, label in labels if label not in classes]
        unseen = {label for _, label in labels if label and label not in classes}
        test = [row for row, label in labels if label in classes]
    trained, tested = (_split(samples, rows, findings.sizes, classes) for rows in (train, test))
    faults = _unreadable(samples, findings)
    return Dataset(name, trained, tested if test else None, classes, faults, tuple(left_out), tuple(sorted(unseen)))


def _not_in_train(label: str) -> str:
    return f"class {label!r} is not in train" if label else "it has no class"


def _unreadable(samples: Sequence[Sample], findings: Findings) -> tuple[tuple[str, str], ...]:
    return tuple((samples[k].name, fault) for k, fault in sorted(findings.faults.items()))


def _split(samples: Sequence[Sample], rows: list[Row], sizes: np.ndarray, classes: tuple[str, ...]) -> Split:
    number = {name: k for k, name in enumerate(classes)}
    chosen = [samples[row.sample] for row in rows]
    return Split(
        names=[row.name for row in rows],
        paths=[s.path for s in chosen],
        offsets=np.array([s.offset for s in chosen], np.int64),
        lengths=np.array([s.length for s in chosen], np.int64),
        sizes=sizes[[row.sample for row in rows]].astype(np.int64).reshape(-1, 2),
        labels=np.array([number[class_of(samples, row)] for row in rows], np.int64) if classes else None,
        stamps=np.array([s.stamp for s in chosen], np.int64),
    )
