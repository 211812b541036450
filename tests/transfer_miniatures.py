"""Miniatures of the 12 transfer sets, on the disk as torchvision's own classes read them.

An image's class is its colour. `make(name, folder, patch, count)` writes a set with `count` images of each class for
each official part.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

COLOURS = ((220, 30, 30), (30, 200, 40), (40, 50, 220))
Maker = Callable[[Path, pytest.MonkeyPatch, int], None]


def pixels(kind: int, number: int, side: int = 32) -> np.ndarray:
    """uint8 [side, side + 4, 3] of the class's colour, with a little noise."""
    rng = np.random.default_rng([kind, number])
    return np.clip(np.array(COLOURS[kind]) + rng.integers(-20, 20, (side, side + 4, 3)), 0, 255).astype(np.uint8)


def write(path: Path, kind: int, number: int) -> None:
    """An image file of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(kind, number)).save(path, "JPEG", quality=95)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def food101(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    base = folder / "food101" / "food-101"
    (base / "meta").mkdir(parents=True)
    for first, split in enumerate(("train", "test")):
        listed: dict[str, list[str]] = {}
        for kind, label in enumerate(("pie", "soup", "waffles")):
            for k in range(first * count, (first + 1) * count):
                write(base / "images" / label / f"{k}.jpg", kind, k)
                listed.setdefault(label, []).append(f"{label}/{k}")
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))


def _cifar(kind: type, folder: Path, patch: pytest.MonkeyPatch, count: int, key: str) -> None:
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    for listed in ("train_list", "test_list"):
        for number, (name, _) in enumerate(getattr(kind, listed)):
            rows = [pixels(k % 3, 10 * number + k)[:, :32].transpose(2, 0, 1).ravel() for k in range(3 * count)]
            labels = [k % 3 for k in range(3 * count)]
            (base / name).write_bytes(pickle.dumps({"data": np.stack(rows), key: labels}))
        patch.setattr(kind, listed, [[name, md5(base / name)] for name, _ in getattr(kind, listed)])
    meta = base / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: ["cat", "dog", "frog"]}))
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


def cifar10(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    _cifar(datasets.CIFAR10, folder / "cifar10", patch, count, "labels")


def cifar100(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    _cifar(datasets.CIFAR100, folder / "cifar100", patch, count, "fine_labels")


def birdsnap(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    """Folders, for torchvision has no class."""
    for first, part in enumerate(("train", "test")):
        for kind, label in enumerate(("Acadian_Flycatcher", "Bay_breasted_Warbler", "Zone_tailed_Hawk")):
            for k in range(count):
                write(folder / "birdsnap" / part / label / f"{k}.jpg", kind, 100 * first + k)


def sun397(folder: Path, patch: pytest.MonkeyPatch, count: int, lists: bool = True) -> None:
    base = folder / "sun397" / "SUN397"
    labels = ("/a/abbey", "/b/bakery/shop", "/z/zoo")
    base.mkdir(parents=True)
    (base / "ClassName.txt").write_text("\n".join(labels) + "\n")
    for first, part in enumerate(("Training_01", "Testing_01")):
        names = []
        for kind, label in enumerate(labels):
            for k in range(count):
                names.append(f"{label}/sun_{'ab'[first]}{k:03d}.jpg")
                write(base / names[-1][1:], kind, 100 * first + k)
        if lists:
            (base / f"{part}.txt").write_text("\n".join(names) + "\n")


def stanford_cars(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    io_ = pytest.importorskip("scipy.io", reason="needs the extra evaluate")
    base = folder / "stanford_cars" / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    kind = np.dtype([("class", "O"), ("fname", "O")])
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = []
        for k in range(3 * count):
            write(base / f"cars_{split}" / f"{k + 1:05d}.jpg", k % 3, k + (100 if split == "test" else 0))
            rows.append((k % 3 + 1, f"{k + 1:05d}.jpg"))
        io_.savemat(base / path, {"annotations": np.array(rows, kind)})
    names = np.array(["Acura TL", "BMW M3", "Volvo 240"], "O")
    io_.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})


def fgvc_aircraft(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    base = folder / "fgvc_aircraft" / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    labels = ("727-200", "A300 B4", "Yak-42")
    (base / "variants.txt").write_text("\n".join(labels) + "\n")
    for first, split in enumerate(("train", "val", "test")):
        lines = []
        for k in range(3 * count):
            write(base / "images" / f"{first}{k:03d}.jpg", k % 3, 100 * first + k)
            lines.append(f"{first}{k:03d} {labels[k % 3]}")
        (base / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")


def voc2007(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    """Left half of one class's colour, right half of the next one's; a third object is difficult."""
    base = folder / "voc2007" / "VOCdevkit" / "VOC2007"
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "Annotations").mkdir()
    (base / "JPEGImages").mkdir()
    labels = ("aeroplane", "bird", "cat")
    for first, split in enumerate(("train", "val", "test")):
        names = []
        for k in range(3 * count):
            name, kinds = f"{first:03d}{k:03d}", [(k % 3, 0)]
            picture = pixels(k % 3, 100 * first + k)
            if k % 2:
                kinds += [((k + 1) % 3, 0), ((k + 2) % 3, 1)]
                picture[:, 18:] = pixels((k + 1) % 3, 100 * first + k)[:, 18:]
            Image.fromarray(picture).save(base / "JPEGImages" / f"{name}.jpg", quality=95)
            objects = "".join(
                f"<object><name>{labels[kind]}</name><difficult>{hard}</difficult></object>" for kind, hard in kinds
            )
            (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
            names.append(name)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")


def dtd(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    base = folder / "dtd" / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for first, split in enumerate(("train", "val", "test")):
        names = [f"{label}/{label}_{first}{k:03d}.jpg" for label in ("banded", "dotted", "woven") for k in range(count)]
        for number, name in enumerate(names):
            write(base / "images" / name, number // count, 100 * first + number)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")


def oxford_iiit_pet(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    base = folder / "oxford_iiit_pet" / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for first, split in enumerate(("trainval", "test")):
        lines = []
        for kind, label in enumerate(("Abyssinian", "Bengal", "pug")):
            for k in range(first * count, (first + 1) * count):
                write(base / "images" / f"{label}_{k}.jpg", kind, k)
                lines.append(f"{label}_{k} {kind + 1} 1 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def caltech101(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    base = folder / "caltech101" / "caltech101" / "101_ObjectCategories"
    for kind, label in enumerate(("BACKGROUND_Google", "accordion", "yin_yang")):
        for k in range(count + 30):
            write(base / label / f"image_{k + 1:04d}.jpg", kind, k)
    (base / "BACKGROUND_Google" / "tmp").write_bytes(b"")


def flowers102(folder: Path, patch: pytest.MonkeyPatch, count: int) -> None:
    io_ = pytest.importorskip("scipy.io", reason="needs the extra evaluate")
    base = folder / "flowers102" / "flowers-102"
    for k in range(9 * count):
        write(base / "jpg" / f"image_{k + 1:05d}.jpg", k % 3, k)
    numbers = np.arange(1, 9 * count + 1).reshape(3, 1, -1)
    io_.savemat(base / "setid.mat", dict(zip(("trnid", "valid", "tstid"), numbers, strict=True)))
    io_.savemat(base / "imagelabels.mat", {"labels": [[k % 3 + 1 for k in range(9 * count)]]})
    entries = dict(datasets.Flowers102._file_dict)
    for key in ("label", "setid"):
        entries[key] = (entries[key][0], md5(base / entries[key][0]))
    patch.setattr(datasets.Flowers102, "_file_dict", entries)


MAKERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        food101, cifar10, cifar100, birdsnap, sun397, stanford_cars, fgvc_aircraft, voc2007, dtd, oxford_iiit_pet,
        caltech101, flowers102,
    )
}  # fmt: skip


def make(name: str, folder: Path, patch: pytest.MonkeyPatch, count: int = 4) -> Path:
    """Write a miniature to folder/NAME; returns the folder."""
    MAKERS[name](folder, patch, count)
    return folder


def class_folders(root: Path, parts: dict[str, int], labels: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """PART/CLASS/* with so many images of each class in each part; the part "" is CLASS/* alone."""
    for first, (part, count) in enumerate(parts.items()):
        for kind, label in enumerate(labels):
            for k in range(count):
                write(root / part / label / f"{k}.jpg", kind, 100 * first + k)
    return root
