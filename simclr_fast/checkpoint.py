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
            copy = folder / f"{BEST}.new"
            copy.unlink(missing_ok=True)
            _link(new, copy)
            os.replace(copy, folder / BEST)
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)
        os.replace(new, folder / LAST)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into RuntimeError
        for leftover in (new, folder / f"{BEST}.new"):
            leftover.unlink(missing_ok=True)
        kept = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
        good = f"still good there: {', '.join(kept)}" if kept else "there is no earlier one"
        raise CheckpointError(f"could not write a checkpoint in {folder}: {error}; {good}") from error


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


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
