"""Which of the labelled images: class-balanced draws, fixed by a seed, and lists of names in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simclr_fast.config import ConfigError
from simclr_fast.data.policy import permutation
from simclr_fast.evaluation.job import Labelled


def stratified(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of about this share of each class, rounded, in order: never the last image of a class.

    Args:
        labels: int64 [n].
        share: in (0, 1).
    """
    place, count = _places(labels, seed)
    return np.flatnonzero(place < np.minimum(np.rint(share * count), count - 1)[labels])


def balanced(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of this share of all images, in order, spread evenly over the classes as far as these have so many.

    As the paper's subsets (section 4.2), some 12.8 images a class for 1 % of ImageNet. A larger share of the same seed
    has the smaller one in it.

    Raises:
        ConfigError: it is fewer than one image for each class that there is.
    """
    place, count = _places(labels, seed)
    total, known = round(share * len(labels)), int((count > 0).sum())
    if total < known:
        raise ConfigError(
            f"labels must leave an image for each of the {known} classes, got labels={100 * share:g}, which is {total} "
            f"of {len(labels):,} images"
        )
    taken = 0
    while np.minimum(count, taken + 1).sum() <= total and taken < count.max():
        taken += 1
    each = np.minimum(count, taken)
    more = [label for label in permutation(len(count), seed, 1) if count[label] > taken][: total - int(each.sum())]
    each[more] += 1
    return np.flatnonzero(place < each[labels])


def _places(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of each image in a shuffled order of its class [n], and the number of each class's images [K]."""
    shuffled = permutation(len(labels), seed, 0)
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = np.bincount(labels)
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    return place, count


def listed(path: Path, images: Labelled) -> np.ndarray:
    """Rows of the images that a text file names, in order: a name a line, as written here or as a file's alone.

    Raises:
        ConfigError: the file cannot be read or names no image, one that there is not or that has no label, one twice,
            or by a file's name that several have.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"subset must be a text file with an image's name on each line, got {path}: {error}"
        ) from error
    rows: dict[str, list[int]] = {}
    for row, index in enumerate(images.indices):
        name = images.split.names[index]
        for key in {name, name.rpartition("/")[2]}:
            rows.setdefault(key, []).append(row)
    unknown = [name for name in names if name not in rows]
    if unknown or not names:
        shown = f"{len(unknown):,} that are not there, the first {unknown[0]}" if unknown else "none"
        raise ConfigError(f"subset must name training images that have labels, and {path} names {shown}")
    several = next((name for name in names if len(rows[name]) > 1), None)
    if several is not None:
        raise ConfigError(
            f"subset must say which image it means, and {several} in {path} may be "
            f"{' or '.join(images.split.names[images.indices[row]] for row in rows[several][:2])}"
        )
    found, counts = np.unique([rows[name][0] for name in names], return_counts=True)
    if len(found) < len(names):
        twice = images.split.names[images.indices[found[counts.argmax()]]]
        raise ConfigError(f"subset must name each image once, and {path} names {twice} twice")
    return found
