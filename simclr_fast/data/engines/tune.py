"""The input's settings for this machine, by a short measurement; and what to change when the trainer waits for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from simclr_fast.data.engines import choose
from simclr_fast.data.engines.feed import Meter, Settings
from simclr_fast.data.policy import Policy
from simclr_fast.data.sources import Split
from simclr_fast.data.sources.samples import cache_folder, write_whole
from simclr_fast.data.sources.scan import cores

SHARES = (0.5, 0.65, 0.8, 0.9, 1.0)  # of JPEGs for a GPU's decoder engines
SECONDS = 2.0  # for each candidate
ENOUGH = 0.97  # of the fastest: then fewer threads are better
WAITING = 0.1  # share of the time from which advice is given

SMALLER = "large files decode faster made smaller: python -m simclr_fast.data pack DATA SHARDS --short-side 256"

Rate = Callable[[Settings], float]


def tuned(settings: Settings, rate: Rate, threads: int, gpu_decodes: bool) -> tuple[Settings, dict[str, float]]:
    """The fastest settings, and the images/s of each candidate. `rate` measures one."""
    found: dict[str, float] = {}

    def best(candidates: list[Settings], name: Callable[[Settings], str]) -> Settings:
        rates = [rate(candidate) for candidate in candidates]
        found.update(zip(map(name, candidates), rates, strict=True))
        return next(c for c, r in zip(candidates, rates, strict=True) if r >= ENOUGH * max(rates))

    more = {threads + 1, 2 * threads} if settings.ranks == 1 else set()  # other ranks need the other cores
    counts = sorted({max(1, threads // 4), max(1, threads // 2), threads} | more)
    settings = best([dataclasses.replace(settings, workers=n) for n in counts], lambda s: f"{s.workers} workers")
    if gpu_decodes:
        shares = [dataclasses.replace(settings, hardware=share) for share in SHARES]
        settings = best(shares, lambda s: f"{s.workers} workers, {s.hardware:.0%} in hardware")
    return settings, found


def measured(split: Split, policy: Policy, batch: int, device: torch.device, engine: str) -> Rate:
    """images/s of an engine's views with given settings, after the first batches."""
    from simclr_fast.data import train_views

    def rate(settings: Settings) -> float:
        views = train_views(
            split, policy, batch=batch, seed=0, start_step=0, steps=1 << 30, device=device, engine=engine,
            settings=dataclasses.replace(settings, meter=Meter()),
        )  # fmt: skip
        for _ in range(4):  # what was made ahead
            next(views)
        began, made = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            made += len(next(views)[2])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
        return made / taken

    return rate


def prepared(
    settings: Settings, split: Split, policy: Policy, batch: int, device: torch.device, engine: str, *, measure: bool
) -> Settings:
    """`settings` with what suits this machine: as measured now, or before, for this engine and size of view.

    Args:
        batch: images of one rank.
    """
    chosen = choose(engine, split, device, settings.ranks)[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    key = json.dumps([chosen, policy.size, policy.dialect, name, settings.workers, platform.node()])
    path = cache_folder() / f"input-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if measure:
        rate = measured(split, policy, batch, device, engine)
        best, rates = tuned(settings, rate, settings.workers, chosen == "dali" and device.type == "cuda")
        shown = ", ".join(f"{name}: {value:,.0f}" for name, value in rates.items())
        print(f"input measured, images/s ({shown}): {best.workers} workers", file=sys.stderr)
        with suppress(OSError):  # then the next run measures again
            write_whole(path, json.dumps({"workers": best.workers, "hardware": best.hardware}).encode())
        return best
    try:
        kept = json.loads(path.read_text())
        return dataclasses.replace(settings, workers=int(kept["workers"]), hardware=float(kept["hardware"]))
    except (OSError, ValueError, KeyError, TypeError):
        return settings


def settings_for(
    split: Split, policy: Policy, device: torch.device, *, engine: str, batch: int, threads: int, ranks: int,
    memory_mib: int, workers: int | None, measure: bool, shared: Callable[[Callable[[], Any]], Any],
) -> tuple[Settings, str]:  # fmt: skip
    """How images are prepared, which changes none of them; and a sentence that says it.

    Args:
        batch, threads: images and threads of this rank; `ranks` share the host.
        workers: given by the user, else as measured before, or with `measure` now.
        shared: gives all ranks what the main one finds.
    Raises:
        ValueError: the engine cannot be used.
    """
    chosen, note = choose(engine, split, device, ranks)
    settings = Settings(threads, memory_mib=memory_mib, ranks=ranks)
    if workers is not None:
        settings = dataclasses.replace(settings, workers=workers)
    else:

        def suitable() -> tuple[int, float]:
            found = prepared(settings, split, policy, batch, device, engine, measure=measure)
            return found.workers, found.hardware

        count, hardware = shared(suitable) if measure else suitable()
        settings = dataclasses.replace(settings, workers=count, hardware=hardware)
    kind = "processes" if chosen == "torchvision" else "threads"
    return settings, f"{note}; {settings.workers} {kind} a rank"


class Waits:
    """How long the trainer waited for its input, and what to change."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._seconds = self._waited = self._cpu = self._read = 0.0
        self._first = True
        self.start()

    def start(self) -> None:
        """Begin an interval: what went by since the last one, such as an evaluation, is not counted."""
        self._from = time.monotonic(), _cpu_seconds(), self.settings.meter.reading

    def add(self, waited: float) -> None:
        """End an interval with so many seconds of waiting; the first is left out, when nothing is made ahead yet."""
        if not self._first:
            began, cpu, read = self._from
            self._seconds += time.monotonic() - began
            self._waited += waited
            self._cpu += _cpu_seconds() - cpu
            self._read += self.settings.meter.reading - read
        self._first = False

    def advice(self, engine: str, device: torch.device) -> str:
        """A sentence that says which resource is short, where over 10 % of the time went by waiting."""
        if self._waited <= WAITING * self._seconds:
            return ""
        start = f"waiting for data took {self._waited / self._seconds:.0%} of the time: "
        workers, here = max(1, self.settings.workers), max(1, cores() // self.settings.ranks)
        if self._read > 0.5 * workers * self._seconds:
            return start + (
                "the disk is short, threads spend most of their time reading. Put the data on a local disk, or pack "
                "them into shards: python -m simclr_fast.data pack DATA SHARDS"
            )
        if engine == "torchvision":
            return start + "this is the slow engine; use DALI (pip install nvidia-dali-cuda130), or raise --workers"
        if engine == "dali" and device.type == "cuda":
            return start + f"decoding is short. --tune-input finds the share for the decoder engines; {SMALLER}"
        if self._cpu > 0.85 * here * self._seconds:
            more = "more cores, or a GPU, help" + (f"; {SMALLER}" if engine == "dali" else "")
            return start + f"the CPU is short, all {here} cores are busy: {more}"
        if workers < here:
            return start + f"{workers} of {here} cores prepare images; raise --workers, or let --tune-input choose"
        return start + "--tune-input finds the number of threads that suits this machine"


def memory_in_use(device: torch.device) -> str:
    """A sentence on a GPU's memory: PyTorch's part, and that of all others, such as DALI."""
    free, total = torch.cuda.mem_get_info(device)
    by_torch, gib = torch.cuda.memory_reserved(device), 2**30
    return (
        f"GPU memory: {by_torch / gib:.1f} GiB by PyTorch, {(total - free - by_torch) / gib:.1f} GiB by DALI, CUDA and "
        f"other programs, {free / gib:.1f} GiB free of {total / gib:.0f}"
    )


def _cpu_seconds() -> float:
    """Of all threads of this process, and of its processes that have ended."""
    return sum(os.times()[:4])
