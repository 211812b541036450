"""Every image of a data set decoded once before training, in processes of their own; what was found is remembered."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from simclr_fast.data.sources import check
from simclr_fast.data.sources.check import Verdict
from simclr_fast.data.sources.samples import Sample, Ticker, alone, cache_folder, write_whole

CACHED_FROM = 1000  # images; checking fewer takes no time
PROCESSES_FROM = 100  # images; for fewer, threads are done before processes have started
PER_PROCESS = 250  # images; with fewer to do, a process is not worth its start
CHUNK = 64  # images that a process is sent at a time
LIMIT_S = 60  # for one image, or all that a process was sent
SAVE_EVERY_S = 60

Job = tuple[str, int, int]  # path, offset, length


@dataclass(frozen=True, eq=False)
class Findings:
    """What the check of n images found."""

    sizes: np.ndarray  # int32 [n, 2]: height, width; 0 where there is a fault
    faults: dict[int, str]  # why an image cannot be used, by its index


def scan(samples: Sequence[Sample], root: str, workers: int = 0) -> Findings:
    """Decode every image once, but those that the cache knows by their path, place, length and time.

    Args:
        samples: where the images are; those that have a fault keep it.
        root: names the data set; the cache has one file for each.
        workers: processes (for few images threads) that decode; 0 is one for each core.
    """
    rules = [check.RULES, PIL.__version__, features.check("webp")]
    path = cache_folder() / f"checked-{_digest([root, *rules])}.npz"
    with ExitStack() as held:
        if len(samples) >= CACHED_FROM:  # one process of a host checks, the others read what it found
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(alone(path.with_suffix(".lock")))
        return _scan(samples, _Cache(path, samples), workers)


def _scan(samples: Sequence[Sample], cache: _Cache, workers: int) -> Findings:
    open_rows = cache.unknown
    ticker, saved = Ticker(), time.monotonic()
    jobs = (samples[row][1:4] for row in open_rows)
    try:
        with closing(verdicts(jobs, len(open_rows), workers)) as found:
            for done, (row, verdict) in enumerate(zip(open_rows, found, strict=True), 1):
                cache.note(row, verdict)
                if ticker.due():
                    ticker.show(_progress(done, len(open_rows), ticker.start, len(cache.faults)))
                if time.monotonic() - saved > SAVE_EVERY_S:
                    cache.save()
                    saved = time.monotonic()
    finally:  # what is done is kept, also at Ctrl-C
        ticker.close()
        cache.save()
    return Findings(cache.sizes, cache.faults)


def _progress(done: int, total: int, start: float, faults: int) -> str:
    rate = done / max(time.monotonic() - start, 1e-9)
    left = int((total - done) / rate)
    clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    return f"checking images: {done:,} of {total:,}, {rate:,.0f} images/s, {clock} left, {faults:,} unreadable"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def _keys(samples: Sequence[Sample]) -> np.ndarray:
    """uint64 [n]: of what must not change for the image to be the same."""
    keys = np.empty(len(samples), np.uint64)
    for row, (_, path, offset, length, stamp, *_) in enumerate(samples):
        text = f"{offset} {length} {stamp} {path}".encode("utf-8", "surrogatepass")
        keys[row] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    return keys


class _Cache:
    """What is known of the samples, from a file and from `note`.

    The file has columns: `keys` uint64 [n] ascending, `sizes` int32 [n, 2], and `faults`, JSON of {key: reason}.
    """

    def __init__(self, path: Path, samples: Sequence[Sample]) -> None:
        self.sizes = np.zeros((len(samples), 2), np.int32)
        self.faults = {row: sample.fault for row, sample in enumerate(samples) if sample.fault}
        self._path, self._keys = path, _keys(samples)
        self._known = np.zeros(len(samples), bool)
        self._changed = False
        if len(samples) >= CACHED_FROM:
            self._load()
        open_rows = ~self._known
        open_rows[list(self.faults)] = False
        self.unknown: list[int] = np.flatnonzero(open_rows).tolist()

    def note(self, row: int, verdict: Verdict) -> None:
        self.sizes[row] = verdict.height, verdict.width
        if verdict.fault:
            self.faults[row] = verdict.fault
        self._known[row] = not verdict.fault or verdict.lasting
        self._changed |= bool(self._known[row])

    def save(self) -> None:
        """Replace the file by what is known; if that cannot be, the next run checks again."""
        if not self._changed or len(self._keys) < CACHED_FROM:
            return
        rows = np.flatnonzero(self._known)
        rows = rows[np.argsort(self._keys[rows])]
        faults = {str(self._keys[row]): self.faults[row] for row in rows.tolist() if row in self.faults}
        buffer = io.BytesIO()
        packed = np.frombuffer(json.dumps(faults).encode(), np.uint8)
        np.savez(buffer, keys=self._keys[rows], sizes=self.sizes[rows], faults=packed)
        try:
            write_whole(self._path, buffer.getvalue())
            self._changed = False
        except OSError:
            pass

    def _load(self) -> None:
        try:
            with open(self._path, "rb") as opened, np.load(opened) as file:
                keys, sizes, faults = file["keys"], file["sizes"], json.loads(file["faults"].tobytes())
            if not (keys.dtype == np.uint64 and sizes.shape == (len(keys), 2) and isinstance(faults, dict)):
                return
            reasons = {int(key): str(reason) for key, reason in faults.items()}
            at_fault = np.array(list(reasons), np.uint64)
        except Exception:  # nothing or garbage is there, and numpy raises whatever the garbage leads to
            return
        at = np.minimum(np.searchsorted(keys, self._keys), max(len(keys) - 1, 0))
        known = keys[at] == self._keys if len(keys) else self._known
        self.sizes[known] = sizes[at[known]]
        own = np.isin(self._keys, at_fault) & known
        self._known = known
        for row in np.flatnonzero(own).tolist():
            self.faults.setdefault(row, reasons[int(self._keys[row])])


def verdicts(jobs: Iterable[Job], count: int, workers: int = 0) -> Generator[Verdict, None, None]:
    """The verdict on each image, in order; a few chunks are in work at a time.

    Args:
        jobs: path, offset and length of each.
        count: how many there are; from PROCESSES_FROM on they are decoded in processes, fewer in threads.
        workers: 0 is one for each core.
    """
    crew = _Crew() if count >= PROCESSES_FROM else None
    workers = workers or cores()
    workers = min(workers, max(count // PER_PROCESS, 1)) if crew else workers
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[list[Verdict]]] = deque()
    remaining = iter(jobs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it can read
            while True:
                while len(waiting) < 4 * workers and (chunk := list(itertools.islice(remaining, CHUNK))):
                    waiting.append(pool.submit(crew.check if crew else _check_here, chunk))
                if not waiting:
                    return
                yield from _result(waiting.popleft(), crew.watch if crew else lambda: None)
    finally:
        if crew:
            crew.close()
        pool.shutdown(cancel_futures=True)
        if crew:
            crew.reap()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_here(jobs: Sequence[Job]) -> list[Verdict]:
    return [check.check(*job) for job in jobs]


def _result(future: Future[list[Verdict]], watch: Callable[[], None]) -> list[Verdict]:
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            watch()


class _Worker:
    """A process that checks images."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", check.__file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.since, self.late = math.inf, False
        assert self._process.stdout
        if self._process.stdout.readline() != b"ready\n":
            self.close()
            raise OSError(f"{command} does not start")

    def ask(self, jobs: Sequence[Job]) -> list[Verdict] | None:
        """The verdicts, or None if the process has died."""
        line = json.dumps([(os.fsencode(path).decode("latin-1"), offset, length) for path, offset, length in jobs])
        assert self._process.stdin
        assert self._process.stdout
        self.since = time.monotonic()
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            return None
        self.since = math.inf
        return [Verdict(*found) for found in json.loads(answer)] if answer.endswith(b"\n") else None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> int:
        """End the process; its exit status."""
        self.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            try:
                pipe.close()
            except OSError:  # what it was sent last is lost
                pass
        return status


class _Crew:
    """Processes that check images for threads, started when they are needed."""

    def __init__(self) -> None:
        self._idle: deque[_Worker] = deque()
        self._all: set[_Worker] = set()
        self._closed = self._none = False

    def check(self, jobs: Sequence[Job]) -> list[Verdict]:
        """A verdict for each. Where a process dies, its images are sent one by one; what ends it again is at fault."""
        found, reason = self._ask(jobs)
        if found is not None:
            return found
        if len(jobs) == 1:
            found, reason = self._ask(jobs)
            return [Verdict(fault=reason, lasting=False)] if found is None else found
        return [verdict for job in jobs if not self._closed for verdict in self.check([job])]

    def watch(self) -> None:
        """End the processes that take too long."""
        for worker in list(self._all):
            if time.monotonic() - worker.since > LIMIT_S:
                worker.late = True
                worker.kill()

    def close(self) -> None:
        """End all processes, also those at work."""
        self._closed = True
        for worker in list(self._all):
            worker.kill()

    def reap(self) -> None:
        """Wait for the processes that have been ended, once no thread uses them."""
        for worker in list(self._all):
            worker.close()

    def _ask(self, jobs: Sequence[Job]) -> tuple[list[Verdict] | None, str]:
        """The verdicts; or None, and why the process is no more."""
        worker = self._take()
        if worker is None:
            return _check_here(jobs), ""
        found = worker.ask(jobs)
        if found is not None:
            self._idle.append(worker)
            return found, ""
        self._all.discard(worker)
        late, status = worker.late, worker.close()
        return None, f"decoding it takes over {LIMIT_S} s" if late else f"decoding it ends the process ({status})"

    def _take(self) -> _Worker | None:
        """An idle process or a new one; None where no process can be had."""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        if self._none:
            return None
        try:
            worker = _Worker()
        except OSError:
            self._none = True
            return None
        self._all.add(worker)
        if self._closed:  # meanwhile
            worker.kill()
        return worker
