"""The images of a data set: found, checked one by one, and read as encoded bytes.

A sample is a stretch of a file, so an image file and a member of a tar are read alike. Every image is decoded once
before training, since a decoder in the middle of a run cannot skip one.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

KNOWN = ("shapes",)
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "PPM")  # what every engine decodes, by Pillow's names
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")
TEST_NAMES = ("test", "val", "valid", "validation")
CACHED_FROM = 1000  # images; checking fewer takes no time


class DataError(ValueError):
    """Data that cannot be used; the text names the path and the rule."""


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one part of a data set, in a fixed order."""

    names: Sequence[str]
    paths: Sequence[str]  # of the file that holds each image
    offsets: np.ndarray  # int64 [n], in bytes
    lengths: np.ndarray  # int64 [n], in bytes
    sizes: np.ndarray  # int64 [n, 2]: height, width
    labels: np.ndarray | None  # int64 [n], or None without classes

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        """The encoded image, uint8 [bytes]."""
        return np.fromfile(self.paths[index], np.uint8, int(self.lengths[index]), offset=int(self.offsets[index]))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set. `skipped` holds (name, reason) of what cannot be used."""

    name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


class _Sample(NamedTuple):
    name: str  # with the folders it lies in, below the root; "/" between them
    path: str
    offset: int
    length: int
    label: str = ""  # written beside the image; without it the folder may be the class
    height: int = 0
    width: int = 0
    fault: str = ""


def cache_folder() -> Path:
    """The program's folder for what can be made again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simclr_fast"


def open_dataset(spec: str, workers: int = 0) -> Dataset:
    """Find and check the images of a data set.

    Args:
        spec: `shapes`; or a folder with train/CLASS/* (and test/CLASS/*), of class folders, of images at any depth,
            or of tars; or one tar; or a text file of image paths, a tab and a class after each if it has classes.
            A class is the first folder below the root (for tars: or what `key.cls` says beside `key.jpg`).
        workers: threads that check the images; 0 is one for each core.
    Raises:
        DataError: there is no such path, or no image in it that can be read.
    """
    root = _root(spec)
    if root.is_dir():
        files = list(_walk(root, EXTENSIONS)) or list(_walk(root, (".tar",)))
    elif root.suffix.lower() in (".tar", ".txt"):
        files = [(root.name, str(root))]
    else:
        raise DataError(f"data must be a folder, a .tar or a .txt list of images, got {spec!r}")
    samples = _checked(files, workers or os.cpu_count() or 1)
    if not samples:
        raise DataError(
            f"data must hold images ({', '.join(EXTENSIONS)}, or .tar files of them), found none in {spec!r}"
        )
    return _assemble(spec if spec in KNOWN else root.name.split(".")[0], samples, spec)


def _root(spec: str) -> Path:
    if spec in KNOWN:
        from simclr_fast.data.shapes import make_shapes

        return make_shapes()
    root = Path(spec).expanduser()
    if root.name.lower().endswith(PACKED):
        raise DataError(f"data must not be compressed: unpack {spec!r} into a folder, or into a .tar, and give that")
    if not root.exists():
        near = difflib.get_close_matches(spec.lower(), KNOWN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"data must be an existing path or one of {', '.join(KNOWN)}, got {spec!r}{hint}")
    return root.resolve()


def _walk(root: Path, extensions: tuple[str, ...]) -> Iterable[tuple[str, str]]:
    """(name, path) of the files below a folder that have one of the extensions, in a fixed order."""
    seen = set()  # a link may lead back to a folder above it
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        for file in sorted(files):
            if file.lower().endswith(extensions) and not file.startswith("."):
                path = os.path.join(folder, file)
                yield os.path.relpath(path, root).replace(os.sep, "/"), path


def _checked(files: list[tuple[str, str]], workers: int) -> list[_Sample]:
    """The samples in these files, each decoded once; from the cache if every file's size and time are as they were."""
    listed = [(s.name, s.path) for _, path in files if path.lower().endswith(".txt") for s in _listed(Path(path))]
    facts = [_fact(*file) for file in [*files, *listed]]
    digest = hashlib.sha256(json.dumps([facts, FORMATS]).encode()).hexdigest()[:24]
    cache = cache_folder() / f"checked-{digest}.json"
    try:
        return [_Sample(*row) for row in json.loads(cache.read_text())]
    except (OSError, ValueError, TypeError):
        pass  # not checked before, or not by this version
    found = [sample for name, path, size, _ in facts[: len(files)] for sample in _samples(name, path, size)]
    samples = []
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it can read
        shown = time.monotonic()
        for sample in pool.map(_check, found):
            samples.append(sample)
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                print(f"checking images: {len(samples):,} of {len(found):,}", file=sys.stderr)
    if len(samples) >= CACHED_FROM and not any(sample.fault.startswith("OSError") for sample in samples):
        _store(cache, json.dumps(samples))
    return samples


def _fact(name: str, path: str) -> tuple[str, str, int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # a link to nothing; it is counted when it is checked
        return name, path, 0, 0
    return name, path, stat.st_size, stat.st_mtime_ns


def _store(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # the next run checks again


def _samples(name: str, path: str, size: int) -> Iterable[_Sample]:
    """The images that a file says it holds."""
    if name.lower().endswith(".tar"):
        return _tar_members(name, path, size)
    if name.lower().endswith(EXTENSIONS):
        return [_Sample(name, path, 0, size)]
    return _listed(Path(path))


def _tar_members(tar: str, path: str, size: int) -> list[_Sample]:
    """Images of a tar, with the text of `key.cls` as the label of `key.jpg`. A tar named train... is of that part."""
    part = re.match(rf"(train|{'|'.join(TEST_NAMES)})(?![a-z])", tar.lower())
    samples, labels = [], {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                key, _, extension = name.rpartition(".")
                if not member.isreg() or Path(name).name.startswith("."):
                    continue
                if extension.lower() == "cls":
                    content = archive.extractfile(member)
                    labels[key] = content.read().decode().strip() if content else ""
                elif name.lower().endswith(EXTENSIONS):
                    fault = "the tar is cut short" if member.offset_data + member.size > size else ""
                    samples.append(_Sample(name, path, member.offset_data, member.size, fault=fault))
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        samples.append(_Sample(tar, path, 0, 0, fault=f"not a whole tar: {error}"))
    folders = tuple(f"{folder}/" for folder in ("train", *TEST_NAMES))
    prefix = f"{part[1]}/" if part and not any(s.name.startswith(folders) for s in samples) else ""
    return [s._replace(name=prefix + s.name, label=labels.get(s.name.rpartition(".")[0], "")) for s in samples]


def _listed(path: Path) -> list[_Sample]:
    samples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"a list of images must be UTF-8 text, got {str(path)!r}: {error}") from error
    for line in lines:
        name, _, label = line.strip().partition("\t")
        image = path.parent / name
        if name:
            samples.append(_Sample(name, str(image), 0, image.stat().st_size if image.exists() else 0, label.strip()))
    return samples


def _check(sample: _Sample) -> _Sample:
    """Decode the whole image, strictly."""
    if sample.fault:
        return sample
    try:
        encoded = np.fromfile(sample.path, np.uint8, sample.length, offset=sample.offset)
        if not encoded.size:
            return sample._replace(fault="it has zero bytes")
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            if image.format not in FORMATS:
                return sample._replace(fault=f"{image.format} is not supported, only {', '.join(FORMATS)}")
            image.load()
            if image.format in ("JPEG", "MPO") and not _whole_segments(encoded):
                return sample._replace(fault="its header is damaged")
            return sample._replace(height=image.height, width=image.width)
    except Image.UnidentifiedImageError:
        return sample._replace(fault="it is not an image")
    except OSError as error:
        # With a number it comes from the disk and may pass, so it is not remembered; without, it is Pillow's.
        return sample._replace(fault=f"OSError: {error}" if error.errno else str(error))
    except Exception as error:
        return sample._replace(fault=str(error) or type(error).__name__)


def _whole_segments(jpeg: np.ndarray) -> bool:
    """Whether the segments of a JPEG lead to its scan. Where they do not, Pillow searches on and DALI fails."""
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker == 0xDA:
            return True
        place += 1 if marker == 0xFF else 2 + 256 * int(jpeg[place + 2]) + int(jpeg[place + 3])
    return False


def _assemble(name: str, samples: list[_Sample], spec: str) -> Dataset:
    """Part the samples into train and test, and label them."""
    skipped = [(s.name, s.fault) for s in samples if s.fault]
    good = [s for s in samples if not s.fault]
    if not good:
        first = ": ".join(skipped[0])
        raise DataError(f"data must hold images that can be read, all {len(skipped)} in {spec!r} fail; {first}")
    good = _below_common_folder(good)
    parts: dict[str, list[_Sample]] = {}
    for sample in good:
        parts.setdefault(sample.name.split("/")[0].lower(), []).append(sample)
    train, test = good, []
    if "train" in parts:
        train = [s._replace(name=s.name.split("/", 1)[1]) for s in parts["train"]]
        found = next((parts[part] for part in TEST_NAMES if part in parts), [])
        test = [s._replace(name=s.name.split("/", 1)[1]) for s in found]
    classes = _classes(train)
    if classes:
        skipped += [(s.name, f"class {_class(s)!r} is not in train") for s in test if _class(s) not in classes]
        test = [s for s in test if _class(s) in classes]
    return Dataset(name, _split(train, classes), _split(test, classes) if test else None, classes, tuple(skipped))


def _below_common_folder(samples: list[_Sample]) -> list[_Sample]:
    while len({s.name.split("/")[0] for s in samples}) == 1 and all("/" in s.name for s in samples):
        samples = [s._replace(name=s.name.split("/", 1)[1]) for s in samples]
    return samples


def _class(sample: _Sample) -> str:
    return sample.label or sample.name.rpartition("/")[0].split("/")[0]


def _classes(samples: list[_Sample]) -> tuple[str, ...]:
    """The classes, in order; none unless every image has one and there are two or more. Numbers sort as numbers."""
    names = {_class(sample) for sample in samples}
    if len(names) < 2 or "" in names:
        return ()
    return tuple(sorted(names, key=lambda n: (len(n), n) if all(map(str.isdigit, names)) else (0, n)))


def _split(samples: list[_Sample], classes: tuple[str, ...]) -> Split:
    number = {name: k for k, name in enumerate(classes)}
    return Split(
        names=[s.name for s in samples],
        paths=[s.path for s in samples],
        offsets=np.array([s.offset for s in samples], np.int64),
        lengths=np.array([s.length for s in samples], np.int64),
        sizes=np.array([(s.height, s.width) for s in samples], np.int64),
        labels=np.array([number[_class(s)] for s in samples], np.int64) if classes else None,
    )
