"""What a run writes while it goes on, and what the user sees of it: metrics.jsonl, TensorBoard, one progress line."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

METRICS = "metrics.jsonl"
PLAIN_INTERVAL_S = 10.0  # between lines where the output is no terminal
LOOK_S = 0.2  # who asks whether a run's folder is held, holds it for much less

_held: set[TextIO] = set()  # the locks of the folders that this process has claimed


def _let_go() -> None:
    """In a process that was forked off: it would hold the folder on after this one."""
    for lock in _held:
        lock.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class RunError(ValueError):
    """A run folder that cannot be used; the text says why and what to do."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError; what was there before is then as it was."""
    new = path.with_name(f".{path.name}.{token_hex(4)}")  # another process may write the same file
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def try_folder(folder: Path) -> None:
    """Whether a folder can be made and written; nothing is left there. Raises OSError."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    with tempfile.TemporaryFile(dir=there, buffering=0) as file:
        file.write(b"0")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a last line that was cut short is left out."""
    return [record for record, _ in _read(folder / METRICS)]


def _read(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Records, each with the byte where its line ends, up to the first line that is not whole."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield record, end


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
        for wait in (LOOK_S, None):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if wait is None:
                    said = f"another process is writing to {folder}; wait for it, or choose another --out"
                    raise RunError(said) from error
                time.sleep(wait)
                continue
            except OSError:  # a file system without locks
                pass
            break
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


class Recorder:
    """Metrics of a run: kept, and appended to metrics.jsonl and TensorBoard.

    A disk that is full or away does not end the run: what cannot be written is said once, kept, and written when that
    is possible again.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        """Go on with the records of `folder` up to `step`; those after it are cut off. None writes nothing."""
        self.records: list[dict[str, Any]] = []
        self._files: list[_Appended] = []
        self._failing = False
        if folder is None:
            return
        end = 0
        for record, after in _read(folder / METRICS):
            if record["step"] > step:
                break
            self.records.append(record)
            end = after
        self._lines = _Appended(folder / METRICS, end)
        self._events = _Appended(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
        self._files = [self._lines, self._events]
        self._events.add(_first_events(step + 1))
        self._put()

    def write(self, entry: dict[str, Any]) -> None:
        """Add one record; it has at least `step`. A number that is not finite is null in the file."""
        self.records.append(entry)
        if not self._files:
            return
        numbers = {name: value for name, value in entry.items() if isinstance(value, float)}
        unknown = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        self._lines.add(json.dumps(entry | unknown).encode() + b"\n")
        self._events.add(_scalars(entry["step"], {name: v for name, v in numbers.items() if name not in unknown}))
        self._put()

    def close(self) -> None:
        """Try once more to write what could not be written, and say what is lost."""
        self._put()
        for file in self._files:
            if file.waiting:
                _complain(f"{file.path} lacks its last {len(file.waiting)} records, which could not be written")

    def _put(self) -> None:
        failures = [f"{file.path}: {error.strerror}" for file in self._files if (error := file.put())]
        if failures and not self._failing:
            _complain(f"cannot write {failures[0]}; the run goes on, and metrics are kept and written later")
        if self._failing and not failures:
            _complain(f"metrics are written again, and {self._lines.path} is complete")
        self._failing = bool(failures)


class _Appended:
    """A file that grows by whole pieces, in order."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """Go on after the first `size` bytes; what follows them is cut off."""
        self.path, self.size = path, size
        self.waiting: list[bytes] = []

    def add(self, piece: bytes) -> None:
        self.waiting.append(piece)

    def put(self) -> OSError | None:
        """Write all that waits, or say why it still waits."""
        pieces = b"".join(self.waiting)
        try:
            with open(self.path, "ab") as file:  # opened anew: a network disk that was away leaves dead handles
                self.size = min(self.size, file.tell())  # it may have been removed
                file.truncate(self.size)  # half a piece that a failed write has left
                file.write(pieces)
        except OSError as error:
            return error
        self.size += len(pieces)
        self.waiting.clear()
        return None


def _first_events(step: int) -> bytes:
    """The head of a file of TensorBoard events; what earlier files have from `step` on is void."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    start = SessionLog(status=SessionLog.START)
    return _event(file_version="brain.Event:2") + _event(step=step, session_log=start)


def _scalars(step: int, values: dict[str, float]) -> bytes:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return _event(step=step, summary=Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in values.items()]))


def _complain(text: str) -> None:
    with suppress(OSError):  # the log may lie on the same disk
        print(text, file=sys.stderr, flush=True)


def _event(**fields: Any) -> bytes:
    """One TensorBoard event of now, framed. TensorBoard's own writer ends with the first write that fails."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()


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
        """A line that stays; nothing for an empty text."""
        if not text:
            return
        with suppress(OSError):  # output may go to a file on a disk that is full
            self._console.print(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
