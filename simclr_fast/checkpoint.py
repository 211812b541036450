"""Checkpoints of a run: written whole or not at all, the last two and the best kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the text says what is still good."""


def save(folder: Path, state: dict[str, Any], *, best: bool) -> None:
    """Write `state` as the last checkpoint; the one before it is kept, and `best` says that it is also the best so far.

    Args:
        folder: the run's `checkpoints/` folder, made if absent.
        state: tensors, numbers, strings, and dicts and lists of these.
    Raises:
        CheckpointError: the disk is full or not writable. Earlier checkpoints are then as they were.
    """
    new = folder / f"{LAST}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if best:
            _copy(new, folder / BEST)
        if (folder / LAST).exists():
            _copy(folder / LAST, folder / PREVIOUS)
        os.replace(new, folder / LAST)
    except (OSError, RuntimeError) as error:
        for name in (LAST, PREVIOUS, BEST):
            (folder / f"{name}.new").unlink(missing_ok=True)
        # torch's zip writer hides what the disk said behind a RuntimeError of its own.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
        good = f"still good there: {', '.join(kept)}" if kept else "there is no earlier one"
        raise CheckpointError(f"could not write a checkpoint in {folder}: {reason}; {good}") from error


def load(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that can be read, on the CPU, and a line for each that could not.

    Returns:
        (state, complaints); state is None where no checkpoint was ever finished.
    Raises:
        CheckpointError: there are checkpoints and none of them can be read.
    """
    complaints: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            return read(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
            os.replace(path, folder / f"{name}.bad")  # the next one must not push the good one out
    if complaints:
        raise CheckpointError("; ".join(complaints) + "; start afresh with --resume never")
    return None, complaints


def read(path: Path) -> dict[str, Any]:
    """One checkpoint file, on the CPU.

    Raises:
        CheckpointError: it is missing, truncated or no checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged files
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(f"cannot read {path}: {first}") from error


def _copy(source: Path, target: Path) -> None:
    """Put the file under a second name, whole or not at all."""
    new = target.with_name(f"{target.name}.new")
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:  # a file system without links
        shutil.copyfile(source, new)
    os.replace(new, target)
