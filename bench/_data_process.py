"""A contender in a process of its own, so that its time, memory and threads are its own, and what fails fails alone.

A window of batches is timed between two deliveries of a stream that goes on, after as many as the workers hold ahead:
what is in work at its start is as much as at its end.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from math import ceil, nan
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from _data_contenders import EVERY, Absent, Views, Work

PROC = Path("/proc")
LIMIT_S = 600.0  # for an answer


@dataclass(frozen=True)
class Window:
    """How long: at least so many images, and so many seconds."""

    images: int
    seconds: float


@dataclass(frozen=True)
class Taken:
    """What a window took; nan where this system does not tell."""

    images_per_s: float  # source images
    cpu_ms: float  # of all processes and threads, for each source image
    first_batch_s: float  # from the start to the first batch
    memory_mib: float  # resident at the end; pages that processes share are counted once
    gpu_mib: float  # that became used since the process started
    processes: float  # that work


class Server:
    """The process of a contender."""

    def __init__(self, name: str, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=started, args=(there, name, work, multiprocessing.get_start_method()))
        self._process.start()
        there.close()

    def take(self, seed: int, window: Window | None) -> Taken | str:
        """What a window took, or why there is none; without a window, of two batches."""
        try:
            self._here.send((seed, window))
            if not self._here.poll(LIMIT_S):
                self.kill()  # or its late answer would be taken for the next window's
                return f"failed: no answer within {LIMIT_S:.0f} s"
            return self._here.recv()
        except (EOFError, OSError):
            return "failed: the process ended"

    def close(self) -> None:
        self._here.close()
        self._process.join(10)
        if self._process.is_alive():
            self.kill()

    def kill(self) -> None:
        """End the process, whatever it does, and those that it has started."""
        assert self._process.pid
        for pid in family(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.join()


def started(connection: Connection, name: str, work: Work, method: str) -> None:
    """`serve`, with workers that start as they do in a user's script: else they would start as this process did."""
    multiprocessing.set_start_method(method, force=True)
    serve(connection, name, work)


def serve(connection: Connection, name: str, work: Work) -> None:
    """Answer each (seed, window) until the other end closes."""
    contender = next(one for one in EVERY if one.name == name)
    gauge = Gauge(work.device)
    with contextlib.suppress(EOFError, OSError):
        while True:
            seed, window = connection.recv()
            try:
                stream = contender.start(work, seed)
                connection.send(measured(stream, work, contender.views, window, gauge))
            except ImportError as error:
                connection.send(f"not installed ({error})")
            except Absent as error:
                connection.send(f"cannot run here: {error}")
            except Exception as error:
                told = re.sub(r"(?:/[\w.+-]+)+/", "", str(error).strip()) or "no message"  # folders of this machine
                connection.send(f"failed: {type(error).__name__}: {told.splitlines()[0]}"[:300])


class Gauge:
    """What the device's memory lost to this process, when no other one is at work."""

    def __init__(self, device: str) -> None:
        self.cuda, self._held = device == "cuda", 0
        if self.cuda:
            torch.zeros(1, device="cuda")  # the context is not the contender's

    def free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.cuda else 0

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def mib(self, before: int) -> float:
        return (self._held + before - self.free()) / 2**20

    def keep(self, before: int) -> None:
        self._held += before - self.free()


def measured(stream: Iterator[Views], work: Work, views: int, window: Window | None, gauge: Gauge) -> Taken:
    """Start a stream, leave out what it has made ahead, time a window, and end it."""
    free, began = gauge.free(), time.perf_counter()
    try:
        check(next(stream), work, views)
        gauge.sync()
        first = time.perf_counter() - began
        for _ in range(max(2 * work.workers, 6) if window else 0):
            next(stream)
        gauge.sync()
        cpu, began, batches = cpu_seconds(family()), time.perf_counter(), 0
        each = max(1, work.workers)  # processes hand over as many batches at about one time
        least = each * max(2, ceil(window.images / work.batch / each)) if window else 1
        while batches < least or (window and time.perf_counter() - began < window.seconds):
            for _ in range(each if window else 1):
                last = next(stream)
                batches += 1
        gauge.sync()
        seconds, here = time.perf_counter() - began, family()
        images = batches * work.batch
        cpu = cpu_seconds(here) - cpu
        check(last, work, views)
        del last
        return Taken(images / seconds, 1e3 * cpu / images, first, resident_mib(here), gauge.mib(free), len(here))
    finally:
        stream.close()  # type: ignore[attr-defined]
        gc.collect()
        gauge.keep(free)


def check(batch: Views, work: Work, views: int) -> None:
    """
    Raises:
        RuntimeError: the batch is not what was asked for.
    """
    shape = (work.batch, 3, work.policy.size, work.policy.size)
    found = [(tuple(view.shape), view.dtype, view.device.type) for view in batch]
    if found != [(shape, torch.float32, work.device)] * views:
        raise RuntimeError(f"a batch must be {views} views, float32 {shape} on {work.device}, got {found}")
    low, high = -0.01, 1.01
    for view in batch:
        for channel, mean, std in zip(view.unbind(1), work.policy.mean, work.policy.std, strict=True):
            pixels = channel * std + mean
            if not (low <= float(pixels.min()) and float(pixels.max()) <= high and float(pixels.std()) > 0):
                raise RuntimeError("a batch must be images, normalised by the policy's mean and std")


def family(first: int | None = None) -> list[int]:
    """A process, by default this one, and all that it has started, and these, that live."""
    children: dict[int, list[int]] = {}
    for file in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(_stat(file)[1]), []).append(int(file.parent.name))
    found = [first or os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def _stat(file: Path) -> list[str]:
    return file.read_text().rpartition(")")[2].split()


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes, and of their children that have ended."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += sum(map(int, _stat(PROC / str(pid) / "stat")[11:15]))
    return total / os.sysconf("SC_CLK_TCK") if PROC.exists() else nan


def resident_mib(pids: list[int]) -> float:
    """Of all of them together."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pss = re.search(r"^Pss:\s+(\d+) kB", (PROC / str(pid) / "smaps_rollup").read_text(), re.M)
            total += int(pss[1]) if pss else 0
    return total / 1024 or nan


COLUMNS = tuple(field.name for field in fields(Taken))


def row(taken: Taken) -> list[float]:
    return list(astuple(taken))
