"""What a run writes while it goes on, and what the user sees of it: metrics.jsonl, TensorBoard, one progress line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

METRICS = "metrics.jsonl"
PLAIN_INTERVAL_S = 10.0  # between lines where the output is no terminal


class RunError(ValueError):
    """A run folder that cannot be used; the text says why and what to do."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a last line that was cut short is left out."""
    path = folder / METRICS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run's folder against a second process that would write into it.

    Raises:
        RunError: it cannot be made or written, or another process holds it.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"out must be a folder that can be written, got out={folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is writing to {folder}; wait for it, or choose another --out") from error
        yield


class Recorder:
    """Metrics of a run: appended to metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the records of `folder`, cut back to those up to `step`, where a resumed run takes up."""
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self.records = kept
        self._file: IO[str] = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it has at least `step`."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


class Progress:
    """One line that is redrawn on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, total: int, step: int, speak: bool) -> None:
        self.total, self._first, self._speak = total, step, speak
        self._live = speak and sys.stdout.isatty()
        self._start = self._shown = time.monotonic()

    def show(self, step: int, text: str, *, always: bool = False) -> None:
        """Show `text` and the time that is left, `step` of the run's steps being done."""
        now = time.monotonic()
        if not self._speak or not (always or now - self._shown > (0.2 if self._live else PLAIN_INTERVAL_S)):
            return
        self._shown = now
        left = (now - self._start) / max(1, step - self._first) * (self.total - step)
        line = f"{text} · {_clock(left)} left"
        if self._live:
            width = os.get_terminal_size().columns if sys.stdout.isatty() else 160
            print(f"\r\x1b[K{line[: width - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._speak:
            print(f"\r\x1b[K{text}" if self._live else text, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
