"""The images of a benchmark as they lie on the disk: as torchvision's own class reads them, or in folders of parts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simclr_fast.data import DataError
from simclr_fast.data.sources import named
from simclr_fast.data.sources.files import find
from simclr_fast.data.sources.parts import class_names
from simclr_fast.data.sources.samples import Sample
from simclr_fast.evaluation.benchmarks.table import Benchmark

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by folder
BACKGROUND = "BACKGROUND_Google"
FIRST_SPLIT = {"train": "Training_01.txt", "test": "Testing_01.txt"}  # of SUN397
POOL = "all"  # the part of images that are yet to be divided
Row = tuple[str, str, str]  # part, path, class


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the images are, the part of each (train, val, test or all), and their classes."""

    classes: tuple[str, ...]
    parts: list[str]
    samples: list[Sample] = field(default_factory=list)  # whose label is the class, unless there are `objects`
    arrays: tuple[np.ndarray, np.ndarray] | None = None  # in place of samples: uint8 [n, H, W, 3], int64 [n]
    objects: dict[str, np.ndarray] | None = None  # by name, int64 [classes]: 1 is there, 0 is not, -1 does not count
    notes: tuple[str, ...] = ()


def look(benchmark: Benchmark, folder: Path) -> Layout | None:
    """What there is of a benchmark in `folder`/NAME, or as torchvision lays it out in the folder itself; or None.

    Raises:
        DataError: it is not whole, or not laid out in a way that is known; or a package is missing.
    """
    own = folder / benchmark.name
    for root in (own, folder):
        if benchmark.marker and (root / benchmark.marker).exists():
            return _opened(benchmark, root)
    return _in_folders(benchmark, own) if own.is_dir() else None


def _opened(benchmark: Benchmark, root: Path) -> Layout:
    if benchmark.needs and not importlib.util.find_spec(benchmark.needs):
        raise DataError(f"data {benchmark.name} needs the package {benchmark.needs}: pip install {benchmark.needs}")
    try:
        if benchmark.kind == "Caltech101" and not (root / benchmark.marker / BACKGROUND).is_dir():
            raise ValueError(f"there is no folder {BACKGROUND}, without which torchvision does not open it")
        sets = {part: named.opened_by(benchmark.kind, root, options) for part, options in benchmark.parts.items()}
        if hasattr(sets["test" if "test" in sets else POOL], "data"):
            return _arrays(sets)
        if benchmark.metric == "11-point mAP":
            return _objects(sets, root)
        return _listed(benchmark, sets, root)
    except Exception as error:  # whatever damaged files lead torchvision to
        raise DataError(
            f"data {benchmark.name} in {root} must be whole, as torchvision unpacks it, got: {named.sentence(error)}"
        ) from error


def _arrays(sets: dict[str, Any]) -> Layout:
    every = {part: named.pixels(one) for part, one in sets.items()}
    labels = np.concatenate([labels for _, labels in every.values()])
    classes = named.class_labels(sets["train"], int(labels.max()) + 1)
    parts = [part for part, (_, labels) in every.items() for _ in labels]
    return Layout(classes, parts, arrays=(np.concatenate([pixels for pixels, _ in every.values()]), labels))


def _listed(benchmark: Benchmark, sets: dict[str, Any], root: Path) -> Layout:
    rows = [(part, path, label) for part, one in sets.items() for path, label in _paths(one)]
    notes: tuple[str, ...] = ()
    if benchmark.kind == "SUN397":
        rows, notes = _first_split(rows, root)
    if benchmark.kind == "Caltech101":
        notes = (f"{BACKGROUND} is a class, the 102nd, as for Kornblith et al. (2019), whom the paper follows",)
    classes = tuple(sorted({label for _, _, label in rows}))
    samples = [named.sample(path, root, label) for _, path, label in rows]
    return Layout(classes, [part for part, _, _ in rows], samples, notes=notes)


def _paths(opened: Any) -> Iterator[tuple[str, str]]:
    """(path, class) in an order that does not depend on the disk."""
    if type(opened).__name__ == "Caltech101":
        folder = Path(opened.root) / "101_ObjectCategories"
        for category in [*opened.categories, BACKGROUND]:
            for path in sorted((folder / category).glob("image_*.jpg")):  # the background holds another file too
                yield str(path), category
        return
    pairs = named.listed(opened)
    classes = named.class_labels(opened, 1 + max((label for _, label in pairs), default=0))
    yield from sorted((path, classes[label]) for path, label in pairs)


def _first_split(rows: list[Row], root: Path) -> tuple[list[Row], tuple[str, ...]]:
    """SUN397 as its first official split has it, where the lists of that lie beside the images."""
    base = root / "SUN397"
    for folder in (base, base / "Partitions", root, root / "Partitions"):
        if all((folder / name).is_file() for name in FIRST_SPLIT.values()):
            break
    else:
        names = " and ".join(FIRST_SPLIT.values())
        return rows, (f"{names} are not there: 50 + 50 images of each class were drawn, not the official first split",)
    part_of = {
        line.strip().lstrip("/"): part
        for part, name in FIRST_SPLIT.items()
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
        if line.strip()
    }
    below = [(os.path.relpath(path, base).replace(os.sep, "/"), path, label) for _, path, label in rows]
    chosen = [(part_of[name], path, label) for name, path, label in below if name in part_of]
    if len(chosen) < len(part_of):
        raise ValueError(
            f"{len(part_of) - len(chosen):,} of the {len(part_of):,} images that its lists name are missing"
        )
    return chosen, ()


def _objects(sets: dict[str, Any], root: Path) -> Layout:
    """Of VOC: a class is there if an object of it is not difficult, and does not count if all of them are."""
    from xml.etree.ElementTree import parse

    parts, samples, found = [], [], dict[str, dict[str, int]]()
    for part, one in sets.items():
        for path, annotation in zip(one.images, one.annotations, strict=True):
            sample = named.sample(path, root)
            has = found.setdefault(sample.name, {})
            known = one.parse_voc_xml(parse(annotation).getroot())["annotation"]
            for item in known["object"]:
                state = -1 if item.get("difficult") == "1" else 1
                has[item["name"]] = max(state, has.get(item["name"], -1))
            parts.append(part)
            samples.append(sample)
    classes = tuple(sorted({label for has in found.values() for label in has}))
    objects = {name: np.array([has.get(label, 0) for label in classes], np.int64) for name, has in found.items()}
    return Layout(classes, parts, samples, objects=objects)


def _in_folders(benchmark: Benchmark, root: Path) -> Layout:
    """train/CLASS/*, test/CLASS/* and perhaps val/CLASS/*; or CLASS/*, where images are drawn from a class."""
    name, notes = f"data {benchmark.name} in {root}", []
    wanted = f", or {benchmark.marker} as torchvision unpacks it" if benchmark.marker else ""
    found = find(root).samples
    first = {sample.name.split("/")[0].lower() for sample in found if "/" in sample.name}
    pooled = benchmark.draw is not None and not first & {"train", "test"}
    if not pooled and not {"train"} <= first & PARTS.keys():
        raise DataError(f"{name} must hold train/CLASS/* and test/CLASS/*{wanted}, got {_some(first)}")
    parts, samples = [], []
    for sample in found:
        place, _, rest = (POOL, "", sample.name) if pooled else sample.name.partition("/")
        label, _, file = rest.partition("/")
        part = POOL if pooled else PARTS.get(place.lower(), "")
        if part and not file:
            raise DataError(f"{name} must have a folder for each class, train/CLASS/*, got {sample.name}")
        if part:
            parts.append(part)
            samples.append(sample._replace(label=label))
    if len(samples) < len(found):
        notes.append(f"images in neither train, val nor test, left out: {len(found) - len(samples):,}")
    if not pooled and "test" not in parts:
        if "val" not in parts:
            raise DataError(f"{name} must hold test/CLASS/*, got {_some(first)}")
        parts = ["test" if part == "val" else part for part in parts]
        notes.append("there is no test folder: the images of val are tested, and others held out for validation")
    classes = class_names({str(sample.label) for sample in samples})
    if not classes:
        raise DataError(f"{name} must hold two classes or more, got {_some({str(s.label) for s in samples})}")
    if benchmark.metric == "11-point mAP":
        return _several(classes, parts, samples, notes)
    return Layout(classes, parts, samples, notes=tuple(notes))


def _several(classes: tuple[str, ...], parts: list[str], samples: list[Sample], notes: list[str]) -> Layout:
    """Of an image that lies in the folders of several classes, one is kept, with all of these."""
    kept: dict[tuple[str, str], Sample] = {}
    objects: dict[str, np.ndarray] = {}
    for part, sample in zip(parts, samples, strict=True):
        one = kept.setdefault((part, sample.name.rpartition("/")[2]), sample._replace(label=None))
        objects.setdefault(one.name, np.zeros(len(classes), np.int64))[classes.index(str(sample.label))] = 1
    note = "class folders do not say which objects are difficult: all count"
    return Layout(classes, [part for part, _ in kept], list(kept.values()), objects=objects, notes=(*notes, note))


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return (
        f"the folders {', '.join(listed[:5])}{', ...' if len(listed) > 5 else ''}" if listed else "no folder of images"
    )
