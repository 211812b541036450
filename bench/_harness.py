"""What every bench shares: result lines with device, versions and commit; times from cold caches, interleaved."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from simclr_fast.environment import versions

ROOT = Path(__file__).resolve().parents[1]
Key = TypeVar("Key")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def results_folder() -> Path:
    """`$OUT` where it is set, else bench/results."""
    folder = Path(os.environ.get("OUT", ROOT / "bench" / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache  # of the start: results that are being written are a difference too
def commit() -> str:
    """The commit of the checkout, with `+` where files differ from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def append(name: str, result: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Add one line to `path`, or to `NAME.jsonl` of the results, and return it."""
    line = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **versions(), **result}
    with open(path or results_folder() / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def progress(text: str) -> None:
    """One line on stderr, in place of the last one on a terminal."""
    print(f"\r{text:<100}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)
    sys.stderr.flush()


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"p{p}": float(ordered.quantile(p / 100)) for p in (20, 50, 80)}


class Stopwatch:
    """Times of the stages of a step that starts with cold caches: L2 of a GPU, all levels of a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            size = torch.cuda.get_device_properties(0).L2_cache_size
        else:
            size = max((as_bytes(path.read_text()) for path in CACHES.glob("index*/size")), default=1 << 26)
        self.other_data = torch.zeros(2 * size // 4, device=device)

    def lap(self, *stages: Callable[[Any], Any]) -> list[float]:
        """Milliseconds of each stage; a stage gets what the one before returned."""
        self.other_data.add_(1)
        marks, value = [self._mark()], None
        for stage in stages:
            value = stage(value)
            marks.append(self._mark())
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def interleave(
    laps: dict[Key, Callable[[], list[float]]], seconds: float, least: int, most: int
) -> dict[Key, list[list[float]]]:
    """Every round runs each lap once, forwards or backwards in turn; name -> a list of times for each round.

    As many rounds as fit into `seconds`, between `least` and `most`; the first, untimed, tells how many.
    """
    began = time.monotonic()
    for lap in laps.values():
        lap()
    rounds = int(min(most, max(least, seconds / (time.monotonic() - began))))
    times: dict[Key, list[list[float]]] = {name: [] for name in laps}
    for turn in range(rounds):
        for name in list(laps)[:: 1 if turn % 2 else -1]:
            times[name].append(laps[name]())
    return times


def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """own / other: of the medians, and the spread of what the single rounds gave."""
    spread = quantiles([a / b for a, b in zip(own, other, strict=True)])
    return spread | {"p50": statistics.median(own) / statistics.median(other)}


def as_bytes(size: str) -> int:
    """Of a size such as 2048K."""
    return int(size.strip().rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size.strip()[-1], 0)
