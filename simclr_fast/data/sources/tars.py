"""The images of a tar: from the index beside it, where there is one that matches, else by walking it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from simclr_fast.data.sources.samples import EXTENSIONS, TEST_NAMES, Sample, cache_folder, shown, write_whole

BLOCK = 512
TYPE = 156  # where the type of a member is in its header
VERSION = "v1.2"  # of the index, as DALI's wds2idx writes it
CACHED_FROM = 1000  # images; a smaller tar is walked in no time
RULES = 2  # what was found by other rules is not taken from the cache
SPOTS = 16  # headers that are compared with the index
MAX_LABEL = 4096  # bytes
DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError)  # what tarfile raises
_PART = re.compile(rf"(?:^|[_.-])(train|{'|'.join(TEST_NAMES)})(?![a-z])")


class _Member(NamedTuple):
    name: str
    offset: int
    length: int
    fault: str = ""
    target: str = ""  # of a hard link: the member whose content it has


class _IndexError(ValueError):
    """The index does not match the tar."""


def tar_samples(tar: str, path: str) -> list[Sample]:
    """The images of a tar, with the text of `key.cls` as the label of `key.jpg`.

    The index `x.idx` beside `x.tar` (`wds2idx`, v1.2) saves the walk. One that does not match is named on stderr, and
    the tar is walked. A tar with `train`, `test` or the like as a word in its name, or in a folder's, is of that part.

    Args:
        tar: its name below the root.
    Returns:
        The samples in the order of the tar; one with a fault for what is damaged.
    """
    faults: list[str] = []
    try:
        stat = os.stat(path)
        cache, facts = _cache(path, stat)
        found = _remembered(cache, facts)
        if not found:
            members = _indexed(path, stat.st_size)
            if members is None:
                members = list(_walked(path, faults))
            found = _with_labels(path, members, stat.st_size, stat.st_mtime_ns)
            if not faults and len(found) >= CACHED_FROM:
                _remember(cache, facts, found)
    except DAMAGE as error:
        found, faults = [], [f"{_kind(error)}: {error}"]
    found += [Sample(tar, path, fault=fault) for fault in faults]
    return _in_part(tar, found)


def _cache(path: str, stat: os.stat_result) -> tuple[Path, list[Any]]:
    """Where the images of a tar are remembered, and what must be as then: the times and sizes of tar and index."""
    try:
        index = os.stat(Path(path).with_suffix(".idx"))
        facts = [stat.st_size, stat.st_mtime_ns, index.st_size, index.st_mtime_ns]
    except OSError:
        facts = [stat.st_size, stat.st_mtime_ns]
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
    return cache_folder() / f"members-{digest}.json", [RULES, *facts]


def _remembered(cache: Path, facts: list[Any]) -> list[Sample]:
    try:
        then, rows = json.loads(cache.read_bytes())
        return [Sample(*row) for row in rows] if then == facts else []
    except (OSError, ValueError, TypeError):  # nothing is there, or garbage
        return []


def _remember(cache: Path, facts: list[Any], samples: list[Sample]) -> None:
    try:
        write_whole(cache, json.dumps([facts, samples]).encode())
    except OSError:
        pass  # the next run walks again


def _in_part(tar: str, samples: list[Sample]) -> list[Sample]:
    words = (_PART.search(folder) for folder in reversed(tar.lower().split("/")))
    part = next((word for word in words if word), None)
    folders = tuple(f"{folder}/" for folder in ("train", *TEST_NAMES))
    if not part or any(s.name.startswith(folders) for s in samples):
        return samples
    return [s._replace(name=f"{part[1]}/{s.name}") for s in samples]


def _with_labels(path: str, members: Iterable[_Member], size: int, stamp: int) -> list[Sample]:
    samples, labels = [], {}
    with open(path, "rb") as file:
        for raw, offset, length, fault, _ in members:
            name = raw.removeprefix("./")
            stem, _, extension = name.rpartition(".")
            if any(folder.startswith(".") and folder.strip(".") for folder in name.split("/")):
                continue
            if extension.lower() == "cls" and not fault:
                file.seek(offset)
                labels[stem] = file.read(min(length, MAX_LABEL)).decode("utf-8", "backslashreplace").strip()
            elif name.lower().endswith(EXTENSIONS):
                fault = fault or ("the tar is cut short" if offset + length > size else "")
                samples.append((stem, Sample(shown(name), path, offset, length, stamp, fault=fault)))
    return [sample._replace(label=_label(labels, stem)) for stem, sample in samples]


def _label(labels: dict[str, str], stem: str) -> str | None:
    """Of `key.x` the label of that name, else that of `key`: webdataset's keys end at the first dot."""
    folder, slash, file = stem.rpartition("/")
    return labels.get(stem) or labels.get(folder + slash + file.partition(".")[0]) or None


def _kind(error: Exception) -> str:
    return "OSError" if isinstance(error, OSError) else "not a whole tar"


def _walked(path: str, faults: list[str]) -> list[_Member]:
    """The files in a tar; what is wrong with the tar itself is added to the faults."""
    members = list(_until_its_end(path, faults))
    if not any(member.target for member in members):
        return members
    files = {member.name.removeprefix("./"): member for member in members if not member.target}
    return [_resolved(member, files) for member in members]


def _resolved(member: _Member, files: dict[str, _Member]) -> _Member:
    if not member.target:
        return member
    file = files.get(member.target.removeprefix("./"))
    if file is None:
        return member._replace(fault=f"it is a hard link to {shown(member.target)}, which the tar does not hold")
    return file._replace(name=member.name)


def _until_its_end(path: str, faults: list[str]) -> Iterator[_Member]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
                if member.size < 0:
                    raise tarfile.ReadError(f"{shown(member.name)} has {member.size} bytes")
                if member.islnk():
                    yield _Member(member.name, 0, 0, target=member.linkname)
                elif member.isreg():
                    fault = "it is stored with holes (sparse), which is not supported" if member.issparse() else ""
                    yield _Member(member.name, member.offset_data, member.size, fault)
                archive.members = []  # type: ignore[attr-defined]  # a kilobyte each, which are kept otherwise
            end = archive.offset
        with open(path, "rb") as file:
            fault = _end_fault(file, end)
    except DAMAGE as error:
        fault = str(error) or type(error).__name__
    if fault:
        faults.append(f"not a whole tar: {fault}")


def _end_fault(file: BinaryIO, end: int) -> str:
    """What is wrong with the end of a tar, which begins at a byte of it, or nothing."""
    file.seek(end)
    block = file.read(BLOCK)
    if block.strip(b"\0"):
        return f"byte {end:,} should begin a member"
    if len(block) < BLOCK:
        return "its end is missing"
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            return f"more follows after its end at byte {end:,}, as where tars are put one behind the other"
    return ""


def _indexed(path: str, size: int) -> list[_Member] | None:
    """The members that the index beside a tar lists; None if there is no index, or none that matches."""
    index = Path(path).with_suffix(".idx")
    try:
        if not index.is_file():
            return None
        members = sorted(_parsed(index), key=lambda member: member.offset)
        with open(path, "rb") as file:
            _compare(members, file, size)
    except DAMAGE as error:
        print(f"the index {shown(str(index))} does not match its tar, which is read instead: {error}", file=sys.stderr)
        return None
    return members


def _parsed(index: Path) -> Iterator[_Member]:
    lines = index.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    version, _, count = lines[0].partition(" ")
    if version != VERSION:
        raise _IndexError(f"its version must be {VERSION}, got {version[:20]!r}")
    bundles = [line for line in lines[1:] if line]
    if not count.isdecimal() or len(bundles) != int(count):
        raise _IndexError(f"it has {len(bundles):,} lines and says {count[:20]!r}")
    for line in bundles:
        words = line.split(" ")
        if len(words) % 4:
            raise _IndexError(f"a line must be of extension, offset, size and name, got {line[:100]!r}")
        for k in range(0, len(words), 4):
            yield _Member(_unescaped(words[k + 3]), int(words[k + 1]), int(words[k + 2]))


def _unescaped(name: str) -> str:
    """wds2idx takes names from `tar --list`, which escapes bytes that are not ASCII."""
    if "\\" not in name:
        return name
    raw = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), os.fsencode(name))
    return raw.replace(b"\\\\", b"\\").decode("utf-8", "surrogateescape")


def _compare(members: list[_Member], file: BinaryIO, size: int) -> None:
    """Check that members lie inside the tar, one after the other, that some are where they should be, and the end.

    Raises:
        _IndexError: the index is of another tar.
    """
    if not members:
        raise _IndexError("it lists nothing")
    table = np.array([(member.offset, member.length) for member in members], np.int64)
    ends = table[:, 0] + -(-table[:, 1] // BLOCK) * BLOCK
    if (table[:, 1] < 0).any() or table[0, 0] < BLOCK or (table[:, 0] % BLOCK).any():
        raise _IndexError("an offset is not of a member")
    if (table[1:, 0] < ends[:-1] + BLOCK).any():
        raise _IndexError("its members overlap")
    if (table.sum(1) > size).any():
        raise _IndexError(f"it goes beyond the {size:,} bytes of the tar")
    for row in np.unique(np.linspace(0, len(members) - 1, SPOTS).astype(int)):
        _compare_header(members[row], file)
    gaps = np.flatnonzero(table[1:, 0] - BLOCK > ends[:-1])  # for what is no plain file, or a second header
    for row in np.unique(gaps[np.linspace(0, len(gaps) - 1, SPOTS).astype(int)]) if len(gaps) else ():
        file.seek(ends[row])
        if file.read(BLOCK)[TYPE : TYPE + 1] == tarfile.LNKTYPE:
            raise _IndexError("it leaves out hard links")
    file.seek(ends[-1])
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise _IndexError("the tar goes on after the last member that it lists")


def _compare_header(member: _Member, file: BinaryIO) -> None:
    file.seek(member.offset - BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise _IndexError(f"{shown(member.name)} is not where it says") from error
    elsewhere = len(member.name) > 100 or not member.name.isascii()  # a header before this one may have the name
    same_name = header.name == member.name or elsewhere
    if not (header.isreg() and header.size == member.length and same_name):
        raise _IndexError(f"it says {shown(member.name)}, the tar {shown(header.name)}")
