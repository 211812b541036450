"""Data sets by name, read and fetched by torchvision's own classes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simclr_fast.data.sources.samples import DataError, Sample, alone, datasets_folder, shown

TIMEOUT_S = 60  # without a byte from the network
ARCHIVES = ("*.gz", "*.tgz", "*.zip", "*.tar")  # which torchvision leaves beside what it has unpacked

Options = dict[str, Any]


@dataclass(frozen=True)
class _Recipe:
    """Which class of torchvision.datasets, how much is fetched, and the options of the splits that make each part."""

    kind: str
    size: str
    train: tuple[Options, ...]
    test: tuple[Options, ...] = ()
    needs: str = ""  # a package that the class imports besides


_FLAGS = (({"train": True},), ({"train": False},))
_NAMED = (({"split": "train"},), ({"split": "test"},))
_THREE = (({"split": "train"}, {"split": "val"}), ({"split": "test"},))
_RECIPES = {
    "cifar10": _Recipe("CIFAR10", "163 MiB", *_FLAGS),
    "cifar100": _Recipe("CIFAR100", "161 MiB", *_FLAGS),
    "stl10": _Recipe("STL10", "2.5 GiB", ({"split": "train+unlabeled"},), ({"split": "test"},)),
    "svhn": _Recipe("SVHN", "235 MiB", *_NAMED, needs="scipy"),
    "food101": _Recipe("Food101", "4.7 GiB", *_NAMED),
    "flowers102": _Recipe("Flowers102", "330 MiB", *_THREE, needs="scipy"),
    "dtd": _Recipe("DTD", "600 MiB", *_THREE),
    "oxford_iiit_pet": _Recipe("OxfordIIITPet", "775 MiB", ({"split": "trainval"},), ({"split": "test"},)),
    "fgvc_aircraft": _Recipe("FGVCAircraft", "2.6 GiB", ({"split": "trainval"},), ({"split": "test"},)),
    "eurosat": _Recipe("EuroSAT", "90 MiB", ({},)),
    "imagenette": _Recipe("Imagenette", "1.5 GiB", ({"split": "train"},), ({"split": "val"},)),
    "mnist": _Recipe("MNIST", "11 MiB", *_FLAGS),
    "fashion_mnist": _Recipe("FashionMNIST", "30 MiB", *_FLAGS),
}
NAMES = tuple(_RECIPES)


@dataclass(frozen=True, eq=False)
class Named:
    """A data set as it lies on the disk: arrays, or samples, for each of its parts, `train` and perhaps `test`."""

    folder: Path
    classes: tuple[str, ...]
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # uint8 [n, H, W, 3], int64 [n]
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # whose label is the class


def load(name: str, download: bool = False) -> Named:
    """A data set from `datasets_folder()`: from its folder NAME, or as torchvision lays it out in the folder itself.

    Training images are those of train and val where there is a test part besides. STL10's include the unlabelled ones,
    of label -1; SVHN's do not include `extra`. EuroSAT has no test part.

    Args:
        name: one of NAMES.
        download: fetch it if it is not there, into the folder NAME, all or nothing.
    Raises:
        DataError: it is not there, not whole, or cannot be fetched; or a package is missing that torchvision needs.
    """
    folder, recipe = datasets_folder(), _RECIPES[name]
    if recipe.needs and not importlib.util.find_spec(recipe.needs):
        raise DataError(f"data {name} needs the package {recipe.needs}: pip install {recipe.needs}")
    found = _present(name, folder)
    if isinstance(found, Named):
        return found
    if not download:
        local = f"; the folder of that name here is ./{name}" if Path(name).exists() else ""
        raise DataError(
            f"data {name} must be in {folder} ({found}): --download fetches it, {recipe.size}; where it is already, "
            f"set SIMCLR_FAST_DATA to that folder{local}"
        )
    if (folder / name).exists():
        raise DataError(f"data {name} in {folder / name} must be whole ({found}): remove that folder, then fetch it")
    fetch(name, folder, recipe.kind, recipe.size, recipe.train + recipe.test)
    found = _present(name, folder)
    if isinstance(found, Named):
        return found
    raise DataError(f"data {name} in {folder / name} must be whole, got: {found}")


def _present(name: str, folder: Path) -> Named | str:
    """The data set, or why it cannot be had."""
    reason = ""
    for root in (folder / name, folder):
        if not root.is_dir():
            continue
        try:
            return _read(name, root)
        except Exception as error:  # whatever damaged files lead torchvision to
            reason = reason or sentence(error)
    return reason or "there is no such folder"


def sentence(error: Exception) -> str:
    """An error of torchvision's, of the network or the disk, in one line."""
    words = str(error).split("You can use download")[0].split()  # which names an argument of torchvision's
    return shown(" ".join(words).rstrip(".") or type(error).__name__)


def _read(name: str, root: Path) -> Named:
    recipe = _RECIPES[name]
    opened = {
        part: [opened_by(recipe.kind, root, options) for options in getattr(recipe, part)] for part in ("train", "test")
    }
    opened = {part: sets for part, sets in opened.items() if sets}
    if hasattr(opened["train"][0], "data"):
        arrays = {part: pixels(sets[0]) for part, sets in opened.items()}
        count = 1 + max(int(labels.max()) for _, labels in arrays.values())
        return Named(root, class_labels(opened["train"][0], count), arrays)
    pairs = {part: [pair for one in sets for pair in listed(one)] for part, sets in opened.items()}
    classes = class_labels(opened["train"][0], 1 + max(label for part in pairs.values() for _, label in part))
    samples = {part: [sample(path, root, classes[label]) for path, label in pairs[part]] for part in pairs}
    return Named(root, classes, samples=samples)


def opened_by(kind: str, root: Path, options: Options, download: bool = False) -> Any:
    """What torchvision's class of that name makes of a folder."""
    from torchvision import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old pickles make numpy warn
        return getattr(datasets, kind)(str(root), download=download, **options)


def class_labels(opened: Any, count: int) -> tuple[str, ...]:
    """Names of the classes in torchvision's order; numbers where it has none."""
    names = getattr(opened, "classes", None) or map(str, range(count))
    return tuple(name if isinstance(name, str) else name[0] for name in names)


def pixels(one: Any) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, H, W, 3], int64 [n]) of a class that holds an array."""
    images, labels = np.asarray(one.data), np.asarray(one.targets if hasattr(one, "targets") else one.labels, np.int64)
    if images.ndim == 3:
        images = np.broadcast_to(images[..., None], (*images.shape, 3))
    elif images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    if images.strides[0] < max(images.strides):  # an image would be read from all over the array
        images = np.ascontiguousarray(images)
    if len(images) != len(labels):
        raise ValueError(f"it has {len(images):,} images and {len(labels):,} labels")
    return images, labels


def listed(opened: Any) -> list[tuple[str, int]]:
    """(path, class) of the images of a class that lists files."""
    for both in ("samples", "_samples"):
        if hasattr(opened, both):
            return list(getattr(opened, both))
    paths = opened._images if hasattr(opened, "_images") else opened._image_files
    return list(zip(map(str, paths), opened._labels, strict=True))


def sample(path: str, root: Path, label: str | None = None) -> Sample:
    """An image file, named by its path below the root."""
    name = shown(os.path.relpath(path, root).replace(os.sep, "/"))
    try:
        stat = os.stat(path)
    except OSError:  # it is counted when it is checked
        return Sample(name, path, label=label)
    return Sample(name, path, 0, stat.st_size, stat.st_mtime_ns, label)


def fetch(name: str, folder: Path, kind: str, size: str, options: Sequence[Options]) -> None:
    """Download a data set into folder/NAME, and put it there when it is whole; one process does so, others wait.

    Args:
        kind: torchvision's class, which is asked for what each of the `options` says.
        size: how much it is, for the message.
    Raises:
        DataError: the network, the disk or the archive fails.
    """
    print(f"fetching {name}, {size}, into {folder / name}", file=sys.stderr)
    partial = folder / f".{name}.partial"
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / f".{name}.lock"):
            if (folder / name).exists():  # another process was first
                return
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            socket.setdefaulttimeout(TIMEOUT_S)
            try:
                for each in options:
                    opened_by(kind, partial, each, download=True)
                for pattern in ARCHIVES:
                    for archive in partial.rglob(pattern):
                        archive.unlink()
                os.replace(partial, folder / name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:  # of the network, the disk or the archive
        raise DataError(
            f"data {name} cannot be fetched into {folder}: {sentence(error)}; where there is no network, copy what "
            f"torchvision unpacks there, or set SIMCLR_FAST_DATA to where it is"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
