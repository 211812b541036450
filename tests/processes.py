"""Processes that tests start: their environment, whether they still run, and waits that end."""

import os
import time
from pathlib import Path


def environment(**own):
    """That of a user, with these variables: without the interpreter that these tests run Triton's kernels in."""
    users = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return users | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in own.items()}


def until(holds, said=lambda: "", seconds=300):
    """Wait until `holds()`; when time is up, fail with what `said()` gives."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"still not after {seconds} s: {said()}"
        time.sleep(0.05)


def running(numbers):
    """Those of the processes that run; one that has ended and that nobody has asked for does not."""
    return [number for number in numbers if _state(number) not in ("", "Z", "X")]


def _state(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def children(process):
    """Numbers of the processes that this one has started."""
    return [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
