"""A guard of the wait for data: it says that a reader stalls, and ends a process whose reader hangs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

WARN_S = 30.0
_SHARE = 0.9  # of the limit, after which the process ends: the others wait for it as long, and it is to speak first


def say(text: str) -> None:
    """Print a line on stderr that names this rank; it needs no lock that a hanging thread may hold."""
    os.write(2, f"rank {os.environ.get('RANK', '0')}: {text}\n".encode())


def watched(
    items: Iterable[T], limit_s: float, warn_s: float = WARN_S, say: Callable[[str], object] = say
) -> Iterator[T]:
    """The same items; a wait of `warn_s` seconds for one is reported, and shortly before `limit_s` the process ends.

    The process ends hard, with status 1: threads that hang in the kernel would hold up any other end. One thread
    watches all items.

    Args:
        say: takes the sentences, from that thread.
    """
    guard = _Guard(_SHARE * limit_s, warn_s, say)
    source = iter(items)
    try:
        while True:
            try:
                with guard:
                    item = next(source)
            except StopIteration:
                return
            yield item
    finally:
        guard.close()


class _Guard:
    """A context whose length is watched, to be entered many times."""

    def __init__(self, limit_s: float, warn_s: float, say: Callable[[str], object]) -> None:
        self._limit_s, self._warn_s, self._say = limit_s, warn_s, say
        self._since: float | None = None  # when the wait under way began
        self._told: float | None = None  # when that began which was reported last
        self._closed = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        since, self._since = self._since, None
        if since == self._told and since is not None:
            self._say(f"data came after {time.monotonic() - since:.0f} s")

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(min(1.0, self._warn_s / 4, self._limit_s / 40)):
            since = self._since
            if since is None:
                continue
            waited = time.monotonic() - since
            if waited >= self._limit_s:
                say(f"no data for {waited:.0f} s (--timeout): a reader hangs, so this process ends")
                os._exit(1)
            if waited >= self._warn_s and self._told != since:
                self._told = since
                self._say(f"waiting for data for {waited:.0f} s: a disk or a network file system does not answer")
