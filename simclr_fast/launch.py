"""The processes of one host: how many, started by a parent that passes signals on and starts them again."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from secrets import randbits

import torch
import torch.distributed as dist

from simclr_fast.config import ConfigError

RESTARTS = 3
PAUSE_S = 1.0  # between two starts
PATIENCE_S = 600.0  # for the checkpoint that a signal asks for; ranks that hang end themselves before
SETTLE_S = 5.0  # for the others to say their own error after one rank has failed
POLL_S = 0.1
STOPPED = (75, 130)  # a checkpoint was written after a signal; Ctrl-C
USER_ERROR = 2
DIVERGED = 3
FOR_GOOD = (USER_ERROR, DIVERGED)  # another start would end alike
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PARENT = "SIMCLR_FAST_PARENT"
_JOB = "SIMCLR_FAST_JOB"


def launched() -> bool:
    """Whether a launcher (ours or torchrun) started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def job() -> tuple[str, int]:
    """The job that this process is started for: (its name, "" if it has none; its launcher's number on this host).

    The number is the same at every start, however often ranks die or hosts join, and another for another launcher; 0 is
    that of none. A name can come again, for torchrun's is its --rdzv-id, "none" if none is given.
    """
    if _JOB in os.environ:
        return "", int(os.environ[_JOB])
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return name, _process(os.getppid()) if name else 0


def _process(number: int) -> int:
    """A number that no other process has, on any host or at any time; 0 where the system does not tell."""
    try:
        started = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return 0
    return int.from_bytes(blake2b(f"{host} {number} {started}".encode(), digest_size=8).digest(), "big")


def speaks_for_host() -> bool:
    """Whether this process prints the errors of its host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def world_size(gpus: int | None, ranks: int) -> int:
    """Processes that the flags ask for, checked against the GPUs that are visible.

    Raises:
        ConfigError: more GPUs are asked for than are visible, or `ranks` is given where there are GPUs to use.
    """
    visible = torch.cuda.device_count()
    if gpus is not None and gpus > visible:
        raise ConfigError(f"gpus must be at most the number of visible GPUs, {visible}, got gpus={gpus}")
    used = visible if gpus is None else gpus
    if used and ranks > 1:
        raise ConfigError(f"ranks counts CPU processes and needs gpus=0, got ranks={ranks}, gpus={used}")
    return int(os.environ["WORLD_SIZE"]) if launched() else used or ranks


def end_with_parent() -> None:
    """Have the kernel send TERM to this process when its launcher is killed, so that no rank trains on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
            sys.exit("the launcher was killed while this rank started")


def launch(module: str, argv: Sequence[str], ranks: int, checkpoint: Path | None = None) -> int:
    """Run `python -m module argv` as `ranks` processes on this host; none of them is left behind.

    TERM, USR1 and INT are passed on; the ranks then have 600 s to stop, and 5 s after a second INT. A rank has died if
    a signal ended it, or if its status is none of 0, 2 (user error), 3 (diverged), 75 (stopped) and 130 (Ctrl-C): the
    others are killed after 5 s, and all are started again, at most 3 times for one state of the file `checkpoint`, and
    never without such a file's name. The ranks find the number of starts before in TORCHELASTIC_RESTART_COUNT.

    A signal that came between two starts or after a rank has died, or that ended ranks that were not ready for it yet,
    is sent again to this process, if that has a handler for it: nobody has done yet what it asks for.

    Returns:
        The exit status: 0, else that of the rank that failed, which is 128 + n if signal n ended it. Of several 2 and 3
        count first, then a signal.
    """
    command, seen, number = [sys.executable, "-m", module, *argv], _state(checkpoint), randbits(63)
    attempt, left = 0, RESTARTS if checkpoint else 0
    with _noting(SIGNALS) as arrived:
        while not arrived:
            shared = {"TORCHELASTIC_RESTART_COUNT": attempt, _JOB: number}
            failed, passed = _run(command, ranks, shared, arrived)
            if failed is None:
                return 0
            rank, status = failed
            code = status if status > 0 else 128 - status
            if status in (*FOR_GOOD, *STOPPED) or (passed and -status not in passed):
                return code
            if not arrived:
                if _state(checkpoint) != seen:
                    left, seen = RESTARTS, _state(checkpoint)
                again = f"starting again from the last checkpoint, {left} more times at most" if left else "giving up"
                _say(f"rank {rank} {_ending(status)}; {again}")
                if not left:
                    return code
                attempt, left = attempt + 1, left - 1
                time.sleep(PAUSE_S)
    if callable(signal.getsignal(arrived[-1])):
        signal.raise_signal(arrived[-1])
    return 128 + arrived[-1]


def _run(
    command: list[str], ranks: int, variables: dict[str, int], arrived: list[int]
) -> tuple[tuple[int, int] | None, list[int]]:
    """Start all ranks once and wait until none is left: (rank, status) of the one that failed, or None; and the signals
    that were passed on."""
    # The ranks meet in a store of the parent's, so no port has to be guessed.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = variables | {
        "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True, _PARENT: os.getpid(),
    }  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            env = os.environ | {name: str(value) for name, value in own.items()}
            # In a session of its own: a terminal's Ctrl-C reaches it through the parent only.
            processes.append(subprocess.Popen(command, env=env, start_new_session=True))
        passed = _wait(processes, arrived)
        failed = _failures(processes)  # before the rest is killed
    finally:
        for process in processes:
            _kill(process)
    return next(iter(failed or _failures(processes)), None), passed


def _wait(processes: list[subprocess.Popen[bytes]], arrived: list[int]) -> list[int]:
    """Wait until no rank is left or their time is up; signals that arrive before a rank has died are passed on, and
    returned."""
    failed: list[tuple[int, int]] = []
    passed: list[int] = []
    deadline = math.inf
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if not failed and (failed := _failures(processes)):
            deadline = min(deadline, time.monotonic() + (PATIENCE_S if failed[0][1] in STOPPED else SETTLE_S))
        for signum in arrived[len(passed) :] if not failed or failed[0][1] in STOPPED else ():
            passed.append(signum)
            hurried = passed.count(signal.SIGINT) > 1
            deadline = min(deadline, time.monotonic() + (SETTLE_S if hurried else PATIENCE_S))
            for process in processes:
                process.send_signal(signum)
        time.sleep(POLL_S)
    return passed


def _failures(processes: list[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """(rank, status) of the ranks that failed: those for good first, then those that a signal ended, then the rest."""
    failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.poll()]
    return sorted(failed, key=lambda one: (one[1] not in FOR_GOOD, one[1] > 0))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a rank, if it still runs, and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    hint = " (as the kernel does when memory runs out)" if status == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{hint}"


def _state(file: Path | None) -> int:
    """When the file was written last, ns; 0 where there is none."""
    try:
        return file.stat().st_mtime_ns if file else 0
    except OSError:
        return 0


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk under the log; what a buffer keeps would fail again at the end
        os.write(2, f"{text}\n".encode())


@contextmanager
def _noting(signals: Sequence[signal.Signals]) -> Iterator[list[int]]:
    """The numbers of those signals that arrive within, in order, instead of what else they would do."""
    arrived: list[int] = []
    before = {one: signal.signal(one, lambda number, frame: arrived.append(number)) for one in signals}
    try:
        yield arrived
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
