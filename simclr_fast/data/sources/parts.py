"""Which images are for training and which for testing, by their folders, and which class each is of."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from simclr_fast.data.sources.samples import EXTENSIONS, PART_NAMES, TEST_NAMES, DataError, Sample


class Row(NamedTuple):
    """One of the samples."""

    sample: int
    name: str  # below the folder of its part


@dataclass(frozen=True)
class Parted:
    """The images of each part, and (name, reason) of those that are of none."""

    train: list[Row]
    test: list[Row] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def parted(samples: Sequence[Sample], faults: Collection[int]) -> Parted:
    """Part the samples by their first folders.

    `train` is a part where a test folder stands beside it, or no folder but those in PART_NAMES. Folders are compared
    before unreadable images are dropped, so that these do not change what the others are for.

    Args:
        faults: indices of the samples that cannot be used.
    Raises:
        DataError: no training image can be used.
    """
    placed = [Row(k, sample.name) for k, sample in enumerate(samples) if k not in faults or _has_place(sample)]
    placed = _below_common_folder(placed)
    good = [row for row in placed if row.sample not in faults]
    parts = {_first_folder(row) for row in placed}
    tests = [part for part in TEST_NAMES if part in parts]
    if "train" not in parts or not (tests or parts <= {"", *PART_NAMES}):
        return Parted(good)
    chosen: dict[str, list[Row]] = {part: [] for part in ("train", *tests[:1])}
    left_out = []
    for row in good:
        part = _first_folder(row)
        if part in chosen:
            chosen[part].append(Row(row.sample, row.name.split("/", 1)[1]))
        else:
            left_out.append((row.name, f"it is neither in train nor in {tests[0] if tests else 'test'}"))
    if not chosen["train"]:
        raise DataError(f"data must hold images in train that can be read, got only {len(good):,} in other folders")
    return Parted(chosen["train"], chosen[tests[0]] if tests else [], left_out)


def class_of(samples: Sequence[Sample], row: Row) -> str:
    """What is written beside the image, else its first folder; "" for no class."""
    label = samples[row.sample].label
    return row.name.rpartition("/")[0].split("/")[0] if label is None else label


def class_names(found: set[str]) -> tuple[str, ...]:
    """The classes, in order; none unless every image has one and there are two or more. Numbers sort as numbers."""
    if len(found) < 2 or "" in found:
        return ()
    if all(map(str.isdigit, found)):
        return tuple(sorted(found, key=lambda name: (len(name), name)))
    return tuple(sorted(found))


def _has_place(sample: Sample) -> bool:
    """Whether a sample with a fault says how folders are laid out: an image does, a tar or a folder only in a part."""
    return sample.name.lower().endswith(EXTENSIONS) or sample.name.split("/")[0].lower() in PART_NAMES


def _first_folder(row: Row) -> str:
    return row.name.split("/")[0].lower() if "/" in row.name else ""


def _below_common_folder(rows: list[Row]) -> list[Row]:
    common = os.path.commonprefix([min(row.name for row in rows), max(row.name for row in rows)])
    cut = common.rfind("/") + 1
    return [Row(k, name[cut:]) for k, name in rows] if cut else rows
