"""Where the images of a data set lie: folders, tars, lists, and Hugging Face's metadata files."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simclr_fast.data.sources.samples import EXTENSIONS, DataError, Sample, Ticker, shown
from simclr_fast.data.sources.tars import tar_samples

MANIFEST = "manifest.json"  # of a packed data set
METADATA = ("metadata.jsonl", "metadata.csv")
LABEL_COLUMNS = ("label", "labels", "class")  # the first that is there


@dataclass(frozen=True)
class Found:
    """What there is. `left_out` holds (name, reason) of images that are not of the set, though they may be sound."""

    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def find(root: Path) -> Found:
    """The images below a folder (where there are none, those of its tars), of a tar, or of a list, in a fixed order.

    A folder that holds `metadata.jsonl` or `metadata.csv` with a column `file_name` has the images that it lists, each
    of the class in the column `label`, else `labels`, else `class`, of none where that is empty; without such a column
    folders are classes as ever. Lines whose images are missing count as images that cannot be read.

    Raises:
        DataError: the list is not text or cannot be read.
    """
    if root.is_dir():
        ticker = Ticker()
        found = _in_folder(root, ticker)
        ticker.close()
        return found
    name, path = shown(root.name), str(root)
    return Found(tar_samples(name, path) if root.suffix.lower() == ".tar" else list(_listed(root)))


def refuse_unfinished(root: Path) -> None:
    """Look whether a folder is of packed shards that are not all there.

    Raises:
        DataError: the manifest of a packed data set says that packing it has not ended.
    """
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
    except (OSError, ValueError):  # none, or another program's
        return
    if isinstance(manifest, dict) and "layout" in manifest and manifest.get("complete") is False:
        raise DataError(
            f"data must be packed to the end, but {str(root / MANIFEST)!r} says that it is not complete: give the "
            "same `python -m simclr_fast.data pack` again, it goes on where it stopped"
        )


def _in_folder(root: Path, ticker: Ticker) -> Found:
    found, tars = Found(), []
    broken: list[Sample] = []  # folders
    listed: dict[str, set[str] | None] = {}  # by folder: the images that the nearest metadata at or above it lists
    for folder, files, error in _folders(str(root)):
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        if error:
            broken.append(Sample(shown(prefix) or ".", folder, fault=f"OSError: {error}"))
            continue
        own = _from_metadata(folder, files, prefix)
        if own is not None:
            found.samples.extend(own)
        allowed = listed.get(os.path.dirname(folder)) if own is None else {sample.path for sample in own}
        listed[folder] = allowed
        for file in files:
            path, name = os.path.join(folder, file), shown(prefix + file)
            if file.lower().endswith(".tar"):
                tars.append((name, path))
            elif file.lower().endswith(EXTENSIONS) and allowed is None:
                found.samples.append(_sample(name, path))
            elif file.lower().endswith(EXTENSIONS) and allowed is not None and path not in allowed:
                found.left_out.append((name, "the metadata do not list it"))
            if ticker.due():
                ticker.show(f"finding images: {len(found.samples):,}")
    if found.samples and tars:
        _leave_out(tars, found)
    else:
        for k, tar in enumerate(tars):
            found.samples.extend(tar_samples(*tar))
            if ticker.due():
                ticker.show(f"finding images: {len(found.samples):,} in {k + 1:,} of {len(tars):,} tars")
    found.samples.extend(broken)
    return found


def _leave_out(tars: list[tuple[str, str]], found: Found) -> None:
    first = found.samples[0].name
    print(f"{len(tars):,} tars are left out, since there are images beside them, the first {first}", file=sys.stderr)
    found.left_out.extend((name, f"a tar, and there are images beside it, the first {first}") for name, _ in tars)


def _folders(root: str) -> Iterator[tuple[str, list[str], str]]:
    """(folder, its files in order, why it cannot be listed or nothing) of all below a folder."""
    seen = set()  # a link may lead back to a folder above it
    errors: list[OSError] = []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=errors.append):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(subfolder for subfolder in subfolders if not subfolder.startswith("."))
        yield folder, sorted(file for file in files if not file.startswith(".")), ""
    for error in errors:
        yield str(error.filename), [], str(error)


def _sample(name: str, path: str, label: str | None = None) -> Sample:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # a link to nothing; it is counted when it is checked
        return Sample(name, path, label=label)
    return Sample(name, path, 0, stat.st_size, stat.st_mtime_ns, label)


def _listed(path: Path) -> Iterator[Sample]:
    """The images of a text file: a path in each line, from its folder on; a tab and a class after it if it has one."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"a list of images must be readable, got {str(path)!r}: {error}") from error
    if "\0" in text:
        raise DataError(f"a list of images must be UTF-8 text, got NUL bytes in {str(path)!r}")
    for line in text.split("\n"):
        name, _, label = line.strip().partition("\t")
        if name:
            yield _sample(shown(name), str(path.parent / name), shown(label.strip()) or None)


def _from_metadata(folder: str, files: list[str], prefix: str) -> list[Sample] | None:
    """The images that the metadata in a folder list; None if there are none, or none with a column `file_name`."""
    name = next((name for name in METADATA if name in files), "")
    if not name:
        return None
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(_json_rows(file) if name.endswith(".jsonl") else csv.DictReader(file))
    except (OSError, csv.Error) as error:
        return [Sample(shown(prefix + name), path, fault=f"it cannot be read: {error}")]
    if not any(isinstance(row, dict) and "file_name" in row for row in rows):
        return None
    columns = {column for row in rows if isinstance(row, dict) for column in row}
    column = next((column for column in LABEL_COLUMNS if column in columns), None)
    samples: dict[str, Sample] = {}
    for number, row in enumerate(rows, 1):
        image = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(image, str) or not image or "\0" in image:
            line = f"{prefix}{name}, image {number}"
            samples[line] = Sample(shown(line), path, fault="it has no file_name")
            continue
        target = os.path.normpath(os.path.join(folder, image))
        label = None if column is None else _label(row.get(column))
        samples.setdefault(target, _sample(shown(prefix + image), target, label))
    return list(samples.values())


def _json_rows(lines: Iterable[str]) -> Iterator[Any]:
    for line in lines:
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                yield None


def _label(value: object) -> str:
    """The class that a value of the column names; numbers as text, nothing for what is neither."""
    return shown(str(value).strip()) if isinstance(value, str | int | float) else ""
