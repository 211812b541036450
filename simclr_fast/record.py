"""What a run writes while it goes on, and what the user sees of it: metrics.jsonl, TensorBoard, one progress line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

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
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise RunError(f"out must be a folder that can be written, got out={folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another process is writing to {folder}; wait for it, or choose another --out") from error
        except OSError:  # a file system without locks
            pass
        yield


class Recorder:
    """Metrics of a run: kept, and appended to metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path | None, step: int) -> None:
        """Open the records of `folder`, cut back to those up to `step`, where the run takes up; None writes nothing."""
        self.records: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.records = [entry for entry in read_metrics(folder) if entry["step"] <= step]
        write_text(folder / METRICS, "".join(json.dumps(entry) + "\n" for entry in self.records))
        self._file = open(folder / METRICS, "a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        """Add one record; it has at least `step`."""
        self.records.append(entry)
        if self._file is None:
            return
        self._file.write(json.dumps(entry) + "\n")
        for name, value in entry.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class Progress:
    """One line that is redrawn on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, speak: bool) -> None:
        self._console = Console(quiet=not speak, highlight=False, markup=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False)

    @contextmanager
    def running(self, step: int, total: int) -> Iterator[None]:
        """Around the work whose progress is shown: `step` of `total` steps are done already."""
        self._first, self._total = step, total
        self._start = self._shown = time.monotonic()
        with self._live if self._console.is_terminal else nullcontext():
            yield

    def show(self, step: int, text: str, *, always: bool = False) -> None:
        """Show `text` and the time that is left, `step` steps being done."""
        now = time.monotonic()
        if not always and now - self._shown < (0.2 if self._console.is_terminal else PLAIN_INTERVAL_S):
            return
        self._shown = now
        left = (now - self._start) / max(1, step - self._first) * (self._total - step)
        line = f"{text} · {_clock(left)} left"
        if self._console.is_terminal:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.say(line)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
