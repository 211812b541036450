"""The format of packed data sets: tar shards, an index beside each, and a manifest of them.

Everything is written under a temporary name, and renamed once it is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from simclr_fast import __version__
from simclr_fast.data.sources import DataError

MANIFEST, PARTIAL = "manifest.json", ".partial"
LAYOUT = 1  # of the manifest and the names of the shards
BLOCK, RECORD = 512, 10240  # bytes; a tar is made of blocks, and its length is a multiple of the record
INDEX_VERSION = "v1.2"  # of DALI's wds2idx


class Shard(NamedTuple):
    """A finished shard: images `first` to `end` of its part's shuffled order, but for those that were lost."""

    name: str  # of the tar
    images: int
    bytes: int
    sha256: str
    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds; `manifest.json` is its JSON."""

    source: str  # name of the data set that was packed
    settings: Mapping[str, Any]  # those that have an effect
    images: Mapping[str, int]  # of each part of the source
    digests: Mapping[str, str]  # of the names, sizes and labels of each part
    classes: tuple[str, ...]
    shards: tuple[Shard, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()  # (part/name, reason) of images that could not be read while packing
    complete: bool = False
    version: str = __version__  # of simclr_fast
    layout: int = LAYOUT

    def having(self, shard: Shard) -> Manifest:
        """With a shard, in place of one of its name."""
        shards = {each.name: each for each in (*self.shards, shard)}
        return dataclasses.replace(self, shards=tuple(shards.values()))

    def differences(self, other: Manifest) -> list[str]:
        """What makes `other` another set: lines `name: ours -> theirs`."""
        mine, theirs = ({**m.settings, **m._counts()} for m in (self, other))
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        lines = [f"{name}: {mine.get(name)} -> {theirs.get(name)}" for name in names]
        same = self.digests == other.digests and self.classes == other.classes
        return lines if lines or same else ["names, sizes or labels of the images"]

    def _counts(self) -> dict[str, int]:
        return {f"{part} images": count for part, count in self.images.items()} | {"classes": len(self.classes)}

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest."""
        replace_text(folder / MANIFEST, json.dumps(self._json(), indent=1) + "\n")

    def _json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"shards": [shard._asdict() for shard in self.shards]}

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The folder's manifest; None if it has none, or another program's.

        Raises:
            DataError: it cannot be read, or is of another layout.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or "layout" not in values:
                return None
            if values["layout"] != LAYOUT:
                raise DataError(f"{path} must be of layout {LAYOUT}, got {values['layout']!r}")
            values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
            for name in ("classes", "lost"):
                values[name] = tuple(tuple(row) if name == "lost" else row for row in values[name])
            return cls(**values)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
            raise DataError(f"{path} must be the manifest of packed shards: {type(error).__name__}: {error}") from error


def shard_fault(folder: Path, shard: Shard) -> str:
    """What is wrong with a shard or its index, or nothing: size, checksum and every member's place are compared."""
    path = folder / shard.name
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return f"it has {size:,} bytes, not {shard.bytes:,}"
        if (sha256 := _sha256(path)) != shard.sha256:
            return f"its checksum is {sha256[:12]}..., not {shard.sha256[:12]}..."
        if path.with_suffix(".idx").read_text() != index_text(path):
            return "its index does not match"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        return str(error)
    return ""


def index_text(path: Path) -> str:
    """The index of a tar, as wds2idx writes it: a line for each sample, with kind, offset, size, name of its files."""
    samples: dict[str, list[tuple[str, int, int, str]]] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isreg():
                key, _, kind = member.name.partition(".")
                samples.setdefault(key, []).append((kind, member.offset_data, member.size, member.name))
    return _index(list(samples.values()))


def _index(samples: list[list[tuple[str, int, int, str]]]) -> str:
    lines = [" ".join(f"{kind} {at} {size} {name}" for kind, at, size, name in files) for files in samples]
    return "\n".join([f"{INDEX_VERSION} {len(samples)}", *lines, ""])


class Tar:
    """A shard under its temporary name."""

    def __init__(self, folder: Path, part: str, number: int) -> None:
        self.path = folder / f"{part}-{number:06d}.tar"
        self.partial = _partial(self.path)
        self.file = open(self.partial, "wb", buffering=2**20)
        self.hash, self.bytes = hashlib.sha256(), 0
        self.samples: list[list[tuple[str, int, int, str]]] = []

    def size_with(self, files: Mapping[str, bytes]) -> int:
        """Bytes of the finished shard if it ended behind one more sample."""
        more = sum(BLOCK + _whole(len(content), BLOCK) for content in files.values())
        return _whole(self.bytes + more + 2 * BLOCK, RECORD)

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """Append a sample: files by kind."""
        self.samples.append([])
        for kind, content in files.items():
            header = tarfile.TarInfo(f"{key}.{kind}")
            header.size = len(content)
            self._write(header.tobuf(tarfile.USTAR_FORMAT))
            self.samples[-1].append((kind, self.bytes, len(content), header.name))
            self._write(content + bytes(_whole(len(content), BLOCK) - len(content)))

    def finish(self, first: int, end: int) -> Shard:
        """Give the shard and its index their names, once what is on the disk is what was written."""
        self._write(bytes(_whole(self.bytes + 2 * BLOCK, RECORD) - self.bytes))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if (found := _sha256(self.partial)) != self.hash.hexdigest():
            raise DataError(f"{self.path.name} does not read back as it was written: its checksum is {found}")
        replace_text(self.path.with_suffix(".idx"), _index(self.samples))
        os.replace(self.partial, self.path)
        return Shard(self.path.name, len(self.samples), self.bytes, self.hash.hexdigest(), first, end)

    def discard(self) -> None:
        """Close it, and remove what has no name yet."""
        try:
            self.file.close()
        finally:
            self.partial.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.hash.update(content)
        self.bytes += len(content)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = _partial(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _sha256(path: Path) -> str:
    """Of what the disk holds, as far as the system can be told to forget its own copy."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()
