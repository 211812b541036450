"""What is written for the user: whole or not at all, and over nothing that is there unless that is wanted."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from simclr_fast.config import ConfigError
from simclr_fast.record import try_folder


def check_target(
    path: Path, *, overwrite: bool, suffixes: Sequence[str] = (), files: Sequence[str] = (), name: str = "out"
) -> None:
    """Whether something can be written there.

    Args:
        suffixes: of which the file's must be one.
        files: of the folder that is to be written; with `overwrite`, one that holds anything else stays.
        name: of the setting.
    Raises:
        ConfigError: the suffix is another; something is there that must not be overwritten, or cannot be; the folder
            that it is to be in cannot be made or written.
    """
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"{name} must end with {' or '.join(suffixes)}, got {name}={path}")
    try:
        there, real = path.exists(), path.resolve()
        try_folder(real.parent)
    except (OSError, RuntimeError) as error:  # the latter of a link that leads to itself
        raise ConfigError(_unwritable(path, "folder" if files else "file", name, error)) from error
    if files and real == Path.cwd():
        raise ConfigError(f"{name} must be another folder than the current one, got {name}={path}")
    if there:
        _check_there(path, overwrite, files, name)


def _check_there(path: Path, overwrite: bool, files: Sequence[str], name: str) -> None:
    """Whether what is there may give way."""
    if path.is_dir() != bool(files):
        wanted, got = ("folder", "file") if files else ("file", "folder")
        raise ConfigError(f"{name} must be a {wanted}, and {path} is a {got}")
    if path.is_dir() and (others := sorted({child.name for child in path.iterdir()} - {*files})):
        raise ConfigError(
            f"{name} must be a folder that is new, empty, or of an earlier export, and {path} has {others[0]}"
        )
    if not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{name} must not exist yet, got {name}={path}; --overwrite replaces it")


@contextmanager
def whole(path: Path, name: str = "out") -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under, which then takes its place; after an error it is removed.

    Args:
        name: of the setting.
    Raises:
        OSError: it cannot be written; what was there stays. The text is a sentence for the user.
    """
    try:
        with _replacing(path) as partial:
            yield partial
    except OSError as error:
        raise OSError(_unwritable(path, "path", name, error)) from error


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """As `torch.save` does, which hides what the disk says. Raises OSError."""
    content = io.BytesIO()
    torch.save(state, content)
    path.write_bytes(content.getbuffer())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
    partial, old = (path.with_name(f".{path.name}.{kind}.{os.getpid()}") for kind in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for file in (partial, *partial.glob("*")):
            _finish(file)
        if path.is_dir():
            os.replace(path, old)
        os.replace(partial, path)
    except BaseException:  # Ctrl-C too
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        for left in (partial, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _unwritable(path: Path, kind: str, name: str, error: Exception) -> str:
    return f"{name} must be a {kind} that can be written, got {name}={path}: {getattr(error, 'strerror', '') or error}"


def _finish(path: Path) -> None:
    """Have a file outlive a power failure, and be for those whom others of this user's files are for."""
    if not path.is_file():
        return
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # some writers keep what they write to the user alone
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
