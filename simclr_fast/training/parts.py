"""The views as the loop takes them: some at a step, and how long it waited for them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from simclr_fast.training.stall import watched


class Parts:
    """Takes views from an iterator whose stalls are reported; past `limit_s` seconds of waiting the process ends."""

    def __init__(self, views: Iterator[Tensor], limit_s: float) -> None:
        self._views = watched(views, limit_s)
        self.start()

    def start(self) -> None:
        """Begin an interval."""
        self._began, self.waited = time.monotonic(), 0.0  # seconds of the interval that went by waiting

    def seconds(self) -> float:
        """Length of the interval so far."""
        return time.monotonic() - self._began

    def take(self, count: int) -> Iterator[Tensor]:
        """The next `count` tensors, each waited for when it is asked for."""
        for _ in range(count):
            asked = time.monotonic()
            views = next(self._views)
            self.waited += time.monotonic() - asked
            yield views
