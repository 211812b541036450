"""Stopping between two steps: what signals ask for, agreed by all ranks, and the marker that asks for a new start."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from simclr_fast.record import write_text

EXIT_REQUEUE = 75
"""Exit status of a run that TERM or USR1 stopped and that has a checkpoint to go on from."""
MARKER = "requeue"
"""File in a run's folder with the same meaning, for launchers that hide the exit status."""
GRACE_S = 100.0
TOGETHER_S = 0.5  # in which all ranks come to the same end; one that ends earlier gives the others errors
_NONE = 0  # no signal has this number
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def write_marker(folder: Path, step: int) -> None:
    """Say in the run's folder that it was stopped with a checkpoint of `step` and is to be started again."""
    write_text(folder / MARKER, f"{step}\n")


def remove_marker(folder: Path) -> None:
    """Take that back."""
    (folder / MARKER).unlink(missing_ok=True)


class Interrupted(Exception):
    """A signal, of number `signum`, has ended work that a new start does again; on every rank."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interrupt:
    """TERM, USR1 and INT wait for the end of the step, within this context; a second INT raises KeyboardInterrupt.

    If the step does not end within `grace_s` seconds, or three times the longest time so far between two steps' ends,
    as in a collective that hangs, the process ends with status 1; in an evaluation that a new start does again it ends
    after `grace_s`, as stopped. A signal that nothing has answered is sent again after this context.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, grace_s: float = GRACE_S) -> None:
        """To be used in the main thread; `group` are the ranks that stop together, None is this process alone."""
        self._signal, self._grace_s = 0, grace_s
        self._exchange = None if group is None else _Exchange(group, device)
        self._stopping = threading.Event()
        self._longest_s = 0.0  # between two calls of `wanted`, evaluations left out
        self._requeue: Callable[[], object] | None = None  # while an evaluation runs that is done again

    def __enter__(self) -> Self:
        self._asked = time.monotonic()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        # The interpreter runs a handler only between two of its own steps; the descriptor hears of a signal at once.
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._guard = threading.Thread(target=self._end_in_time, daemon=True)
        self._guard.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        answered = self._stopping.is_set()
        signal.set_wakeup_fd(self._told_before)
        self._stopping.set()
        os.write(self._told, bytes([_NONE]))
        self._guard.join()
        os.close(self._told)
        os.close(self._heard)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self._exchange is not None:
            self._exchange.receive()
        if kind is None and self._signal and not answered:
            os.kill(os.getpid(), self._signal)

    def wanted(self, checkpoint: bool = False) -> tuple[int, bool]:
        """What all ranks agree to do now. To be called by every rank, once after each step.

        With a group it is what the ranks knew one step before, so that nobody waits for the step under way.

        Args:
            checkpoint: whether this rank wants a checkpoint; it is asked once, until the answer has come.
        Returns:
            (number of the signal to stop for, or 0; whether any rank wants a checkpoint), the same on every rank.
        """
        now = time.monotonic()
        self._longest_s, self._asked = max(self._longest_s, now - self._asked), now
        if self._exchange is None:
            signum, due = self._signal, checkpoint
        else:
            signum, asked = self._exchange.receive()
            due = bool(asked)
            self._exchange.send(self._signal, checkpoint and not due)
        if signum:
            self._stopping.set()
        return signum, due

    @contextmanager
    def evaluating(self, requeue: Callable[[], object] | None) -> Iterator[None]:
        """Around an evaluation between two steps, which looks at `asked` and calls `agree`.

        Args:
            requeue: where a checkpoint has a new start do the evaluation: leaves the marker that asks for one.
        """
        self._longest_s = max(self._longest_s, time.monotonic() - self._asked)
        self._requeue = requeue
        try:
            yield
        finally:
            self._requeue, self._asked = None, time.monotonic()

    def asked(self) -> bool:
        """Whether this rank has had a signal, which `agree` then answers."""
        return self._signal != _NONE

    def agree(self) -> None:
        """To be called by every rank, between two steps.

        Raises:
            Interrupted: some rank has had a signal; on every rank.
        """
        signum = self._signal
        if self._exchange is not None:
            earlier = self._exchange.receive()[0]
            self._exchange.send(max(earlier, self._signal), 0)
            signum = self._exchange.receive()[0]
        if signum:
            self._stopping.set()
            raise Interrupted(signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == self._signal == signal.SIGINT:
            self._signal = 0
            raise KeyboardInterrupt
        self._signal = signum

    def _end_in_time(self) -> None:
        """In a thread: wait for a signal, then for the end of the step; when time is up, end the process."""
        while (number := os.read(self._heard, 1)[0]) not in (_NONE, *SIGNALS):
            pass
        if number == _NONE or self._stopping.wait(self._grace_s):
            return
        if self._requeue is None and self._stopping.wait(max(0.0, 3 * self._longest_s - self._grace_s)):
            return
        again, status, grace_s = self._requeue, 1, self._grace_s
        if again is None:
            grace_s = max(grace_s, 3 * self._longest_s)
            text = "no step ended within {} s of {}; ended without a checkpoint"
        else:
            status = 128 + number if number == signal.SIGINT else EXIT_REQUEUE
            text = "the evaluation did not end within {} s of {}; ended, and the same command does it again"
            if status == EXIT_REQUEUE:
                with suppress(OSError):
                    again()
        said = text.format(f"{grace_s:.3g}", signal.Signals(number).name)
        with suppress(OSError):
            os.write(2, f"rank {os.environ.get('RANK', '0')}: {said}\n".encode())
        time.sleep(TOGETHER_S if again else 0)
        os._exit(status)


class _Exchange:
    """The maximum over the ranks of two small numbers, given at one step and read at the next."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._numbers = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._ready: Callable[[], object] | None = None

    def send(self, *numbers: int) -> None:
        """Give this rank's numbers; `receive` comes before the next call."""
        self._numbers.copy_(torch.tensor(numbers, dtype=torch.int32))
        if self._device.type != "cuda":
            work = dist.all_reduce(self._numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._ready = work.wait
            return
        # All in the order of the stream: the host goes on, and waits for the event one step later.
        there = self._numbers.to(self._device, non_blocking=True)
        dist.all_reduce(there, dist.ReduceOp.MAX, group=self._group)
        self._numbers.copy_(there, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._ready = copied.synchronize

    def receive(self) -> list[int]:
        """The maxima of what the ranks gave last, zeros before the first time."""
        if self._ready is not None:
            self._ready()
            self._ready = None
        return self._numbers.tolist()
