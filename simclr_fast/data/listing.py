"""The list of a data set's images that a run keeps, so that a later change can be told by name."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from simclr_fast.data.sources.dataset import Dataset, one_line
from simclr_fast.data.sources.samples import write_whole

LISTED = "images.tsv.gz"


def write_images(path: Path, dataset: Dataset) -> None:
    """Write a line for each image: part, class, bytes, height x width, name; tabs between, gzip.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    lines = [f"{part}\t{about}\t{name}\n" for (part, name), about in _images(dataset).items()]
    write_whole(path, gzip.compress("".join(lines).encode("utf-8", "backslashreplace"), 1, mtime=0))


def changes(path: Path, dataset: Dataset) -> str:
    """How a data set differs from a list, as "1 is gone (ant/7.jpg), 2 are new (the first ...)".

    Returns:
        "" where the list does not tell: it is missing or damaged, or holds the same images in another order.
    """
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        rows = [line.split("\t", 4) for line in text.split("\n")[:-1]]
        listed = {(row[0], row[4]): "\t".join(row[1:4]) for row in rows}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, IndexError):
        return ""
    images = _images(dataset)
    gone = [image for image in listed if image not in images]
    new = [image for image in images if image not in listed]
    other = [image for image, about in images.items() if listed.get(image, about) != about]
    kinds = ("is gone", "are gone", gone), ("is new", "are new", new), ("has changed", "have changed", other)
    return ", ".join(_told(*kind) for kind in kinds if kind[-1])


def _told(one: str, several: str, images: list[tuple[str, str]]) -> str:
    part, name = images[0]
    shown = name if part == "train" else f"{name} of the test images"
    return f"1 {one} ({shown})" if len(images) == 1 else f"{len(images):,} {several} (the first {shown})"


def _images(dataset: Dataset) -> dict[tuple[str, str], str]:
    """(part, name) -> class, bytes and size of each image."""
    found = {}
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        if split is None:
            continue
        labels = split.labels.tolist() if split.labels is not None else [-1] * len(split)
        rows = zip(split.names, labels, split.lengths.tolist(), split.sizes.tolist(), strict=True)
        for name, label, length, (height, width) in rows:
            kind = one_line(dataset.classes[label]) if label >= 0 else ""
            found[part, one_line(name)] = f"{kind}\t{length}\t{height} x {width}"
    return found
