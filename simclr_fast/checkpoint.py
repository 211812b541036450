"""Checkpoints of a run: written whole or not at all, checked when read; the last two and the best kept."""

from __future__ import annotations

import errno
import os
import shutil
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
TRIES = 3  # in a row that may fail before a run stops
RETRY_S = 300.0  # between them: about the time in which a disk is tidied up or a server comes back


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the text says what is still good."""


class Checkpoints:
    """The checkpoints of a run, which goes on when one cannot be written and tries again later."""

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, which is made when it is first needed."""
        self.folder = folder
        self.failures = 0
        """Writes that failed in a row: 0 after a `save` means that it has written."""
        self._again = 0.0

    def due(self) -> bool:
        """Whether a write failed and it is time to try again."""
        return self.failures > 0 and time.monotonic() >= self._again

    def save(self, state: dict[str, Any], *, best: bool, final: bool = False) -> str:
        """Write a checkpoint as the function `save` does, but for the five minutes after a failure.

        Args:
            final: the run ends or is interrupted here: try in any case, and raise what fails.
        Returns:
            A sentence for the user, where writing failed or works again; else "".
        Raises:
            CheckpointError: three writes in a row have failed, or a `final` one.
        """
        if self.failures and not self.due() and not final:
            return ""
        try:
            save(self.folder, state, best=best)
        except CheckpointError as error:
            self.failures += 1
            self._again = time.monotonic() + RETRY_S
            if final or self.failures >= TRIES:
                raise
            left = "once more" if self.failures == TRIES - 1 else f"{TRIES - self.failures} more times"
            return f"{error}. The run goes on, and tries {left}, in {RETRY_S / 60:.0f} minutes"
        failed, self.failures = self.failures, 0
        return f"checkpoints can be written again in {self.folder}" if failed else ""

    def keep_best(self) -> tuple[bool, str]:
        """Keep the newest checkpoint as the best one too, if the last `save` has written it.

        Returns:
            Whether it is kept, and a sentence for the user where that failed.
        """
        newest = next((path for path in (self.folder / LAST, self.folder / PREVIOUS) if path.exists()), None)
        if self.failures or newest is None:
            return False, ""
        try:
            _copy(newest, self.folder / BEST)
            _sync_names(self.folder)
        except OSError as error:
            return False, f"could not keep {newest} as {BEST}: {error}. The run goes on"
        return True, ""


def save(folder: Path, state: dict[str, Any], *, best: bool) -> None:
    """Write `state` as the last checkpoint; the one before it is kept, and `best` says that it is also the best so far.

    Args:
        folder: the run's `checkpoints/` folder, made if absent. No other process writes into it.
        state: tensors, numbers, strings, and dicts and lists of these.
    Raises:
        CheckpointError: the disk is full or not writable. What the folder holds is then still good.
    """
    new = folder / f"{LAST}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        _require_space(folder, _size(state))
        with open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if best:
            _copy(new, folder / BEST)
        if (folder / LAST).exists():
            _copy(folder / LAST, folder / PREVIOUS)
        os.replace(new, folder / LAST)
        _sync_names(folder)
    except (OSError, RuntimeError) as error:
        kept = []
        with suppress(OSError):
            kept = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
            _remove_unfinished(folder)
        # torch's zip writer hides what the disk said behind a RuntimeError of its own.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        good = f"still good there: {', '.join(kept)}" if kept else "there is no earlier one"
        raise CheckpointError(f"could not write a checkpoint in {folder}: {reason}; {good}") from error


def load(folder: Path, *, aside: bool = True) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that can be read, on the CPU, and a line for each that could not.

    Args:
        aside: whether the damaged ones get other names, as a run that goes on needs it.
    Returns:
        (state, complaints); state is None where no checkpoint was ever finished.
    Raises:
        CheckpointError: there are checkpoints and none of them can be read.
    """
    complaints: list[str] = []
    damaged: list[Path] = []
    for name in (LAST, PREVIOUS, BEST):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = read(path)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError | MemoryError):
                raise  # the file may be good
            complaints.append(str(error))
            damaged.append(path)
            continue
        for bad in damaged if aside else []:
            os.replace(bad, bad.with_name(f"{bad.name}.bad"))  # the next one must not push the good one out
        return state, complaints
    if complaints:
        raise CheckpointError("; ".join(complaints) + "; start afresh with --resume never")
    return None, complaints


def read(path: Path) -> dict[str, Any]:
    """One checkpoint file, on the CPU.

    Raises:
        CheckpointError: it is missing, truncated, damaged in a single bit of its content, or no checkpoint.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**17))
            file.read()  # what the disk says of the file's end, zipfile would take for damage
            if not zipfile.is_zipfile(file):
                raise zipfile.BadZipFile("it is no checkpoint, or not a whole one")
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()  # torch.load does not look at the checksums that torch.save writes
        if part is not None:
            raise CheckpointError(f"{part} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise a dozen kinds for damaged files
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot read {path}: {first}") from error


def _size(state: Any) -> int:
    """Bytes that a checkpoint takes, but for names and headers: whole storages, each once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)

    visit(state)
    return sum(storages.values())


def _require_space(folder: Path, needed: int) -> None:
    """Raise OSError where the file system says that it has less than `needed` bytes left."""
    disk = os.statvfs(folder)
    free = (disk.f_bfree if os.geteuid() == 0 else disk.f_bavail) * disk.f_frsize
    if disk.f_blocks and free < needed:  # some network file systems count no blocks
        shown = f"it needs about {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {shown}")


def _remove_unfinished(folder: Path) -> None:
    """Remove what a write that failed or was killed has left."""
    for unfinished in folder.glob("*.new"):
        unfinished.unlink(missing_ok=True)


def _sync_names(folder: Path) -> None:
    """Have the new names outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not do this for folders
            raise
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    """Put the file under a second name, whole or not at all."""
    new = target.with_name(f"{target.name}.new")
    try:
        os.link(source, new)
    except OSError:  # a file system without links
        shutil.copyfile(source, new)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
    os.replace(new, target)
    new.unlink(missing_ok=True)  # the rename does nothing where both are already the same file
