"""What the search for images, their check and the data sets by name share: a sample, the error, folders, progress."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
TEST_NAMES = ("test", "val", "valid", "validation")
PART_NAMES = ("train", *TEST_NAMES, "unlabeled", "unlabelled", "extra")  # folders that are parts beside `train`


class DataError(ValueError):
    """Data that cannot be used; the text names the path and the rule."""


class Sample(NamedTuple):
    """A stretch of a file that should be an image; with a `fault`, something that should have been there."""

    name: str  # with the folders it lies in, below the root; "/" between them; can be printed
    path: str  # of the file, for the system: where it is not UTF-8, with surrogates
    offset: int = 0  # bytes
    length: int = 0  # bytes
    stamp: int = 0  # when the file was changed, ns
    label: str | None = None  # written beside the image, "" for no class; without it the folder may be the class
    fault: str = ""


def cache_folder() -> Path:
    """The program's folder for what can be made again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simclr_fast"


def datasets_folder() -> Path:
    """Where data sets known by name are kept: $SIMCLR_FAST_DATA, or `datasets` in the cache; it may not exist yet."""
    return expanded(os.environ.get("SIMCLR_FAST_DATA") or str(cache_folder() / "datasets"))


def expanded(path: str) -> Path:
    """A path with the home folder in place of `~` or `~user`.

    Raises:
        DataError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"a path that starts with ~ must name a user of this computer, got {path!r}") from error


def shown(name: str) -> str:
    """A name that can be printed and written: bytes that are not UTF-8 become escapes like `\\xe9`."""
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that no byte stands for
        return name.encode("utf-8", "backslashreplace").decode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and put it in place, making its folder.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process holds this lock, where the file system has locks.

    Raises:
        OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where processes are not kept apart
        yield
        return
    with open(path, "w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Ticker:
    """Lines of progress on stderr: every second in place on a terminal, else one every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self.start = self._last = time.monotonic()
        self._width = 0

    def due(self) -> bool:
        """Whether it is time for a line."""
        return time.monotonic() - self._last >= (1 if self._terminal else 10)

    def show(self, line: str) -> None:
        """Write a line in the place of the last one."""
        self._last = time.monotonic()
        self._write(line, "" if self._terminal else "\n")

    def close(self) -> None:
        """End the line in place, if there is one."""
        if self._width:
            self._write("", "\r")

    def _write(self, line: str, end: str) -> None:
        start = "\r" if self._terminal else ""
        print(start + line.ljust(self._width if self._terminal else 0), end=end, file=sys.stderr, flush=True)
        self._width = len(line) if self._terminal else 0
