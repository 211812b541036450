"""Processes: how ranks are started, and what they share."""

from __future__ import annotations

import gc
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_fast.config import ConfigError
from simclr_fast.launch import end_with_parent, launched

T = TypeVar("T")
LOOK_S = (0.01, 1.0)  # between looks for what the main rank has to say: at first, and at most
SAME_S = 2.0  # in which ranks come to the same error; less than a launcher leaves them after one has failed
LOST = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)  # of ranks that are away


class Ranks:
    """This process among the others: `rank`, `world`, `per_host`, `device`, and `group` (None when alone)."""

    def __init__(self, use_gpu: bool, timeout: float = 600.0) -> None:
        """
        Args:
            timeout: seconds that a rank waits for the others, before it ends with an error.
        Raises:
            ConfigError: there are more processes than GPUs.
        """
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.per_host = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = max(1, cores // self.per_host)
        if use_gpu and local >= (visible := torch.cuda.device_count()):
            raise ConfigError(
                f"processes on a host must be at most its visible GPUs, {visible}, got {self.per_host} (the launcher's "
                "--nproc-per-node)"
            )
        self.device = torch.device("cuda", local) if use_gpu else torch.device("cpu")
        if use_gpu:
            torch.cuda.set_device(self.device)
        else:
            asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
            own = not asked.isdecimal() or dist.is_torchelastic_launched()  # torchrun sets it to 1 by itself
            torch.set_num_threads(self.threads if own else max(1, min(self.threads, int(asked))))
        self.group: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        self._patient = 0  # calls of `from_main` so far whose end is in the store
        if self.world > 1:
            end_with_parent()
            patience = timedelta(seconds=timeout)
            self._store, _, _ = next(dist.rendezvous("env://", timeout=patience))
            self._store.set_timeout(patience)
            dist.init_process_group(
                "nccl" if use_gpu else "gloo",
                timeout=patience,
                store=self._store,
                rank=self.rank,
                world_size=self.world,
                device_id=self.device if use_gpu else None,
            )
            self.group = dist.group.WORLD

    @property
    def main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line on the main rank."""
        if self.main:
            print(text, flush=True)

    def from_main(self, compute: Callable[[], T], *, patient: bool = False) -> T:
        """What `compute` gives, or raises, on the main rank, on every rank.

        Args:
            patient: the others wait as long as it takes, and not the group's `timeout`.
        """
        if self.group is None:
            return compute()
        outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.main:
            try:
                outcome = [(compute(), None)]
            except Exception as error:
                outcome = [(None, error)]
        if patient:
            self._patient += 1
            self._meet(f"simclr_fast/computed/{self._patient}")
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        value, failure = outcome[0]
        if failure is not None:
            raise failure
        return cast(T, value)

    def _meet(self, key: str) -> None:
        """Wait until the main rank is here too."""
        assert self._store is not None
        if self.main:
            self._store.set(key, "")
            return
        pause, longest = LOOK_S
        while not self._store.check([key]):  # not its `wait`, which has a limit and keeps other threads off the store
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def ends_alike(self, text: str) -> bool:
        """Whether the main rank ends with this error too, as it does after one of the user's settings; for each rank
        that ends with one, the main one among them."""
        if self._store is None:
            return True
        key, end = "simclr_fast/error", time.monotonic() + SAME_S
        try:
            if self.main:
                self._store.set(key, text)
                return True
            while not self._store.check([key]):
                if time.monotonic() > end:
                    return False
                time.sleep(LOOK_S[0])
            return self._store.get(key).decode() == text
        except RuntimeError:  # it was in the main rank's process, which has ended
            return self.main

    def agree(self, value: str, complaint: str) -> None:
        """
        Raises:
            ConfigError: `value` differs among the ranks; on every rank.
        """
        if self.group is None:
            return
        values: list[str | None] = [None] * self.world
        dist.all_gather_object(values, value)
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            first = different[0]
            raise ConfigError(f"{complaint}, got {values[0]} on rank 0 and {values[first]} on rank {first}")

    def close(self) -> None:
        """Leave the group, and wait for its threads, as far as nothing else holds it.

        A thread of Gloo that lets go of a tensor while Python is being torn down ends the process with SIGABRT.
        """
        if self.group is not None:
            self.group = None
            error = sys.exception()  # under way, or about to be told by Python: its frames hold the group
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__cause__ or error.__context__
            gc.collect()
            dist.destroy_process_group()

    def gather(self, values: list[float]) -> list[list[float]]:
        """The numbers of all ranks, in their order."""
        if self.group is None:
            return [values]
        every: list[list[float]] = [[]] * self.world
        dist.all_gather_object(every, values)
        return every

    def most(self, value: int) -> int:
        """The largest of all ranks' numbers."""
        return int(max(row[0] for row in self.gather([value])))

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a tensor over the ranks."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values = values / self.world
        return values

    def sharded(self, count: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """Rows `compute(slice)` of all `count` items, in order, on every rank; each computes a contiguous share."""
        share = -(-count // self.world)
        # A rank without a share computes the last row once more; it is cut off below.
        rows = compute(slice(min(self.rank * share, count - 1), min(count, (self.rank + 1) * share)))
        if self.group is None:
            return rows
        padded = rows.new_zeros(share, *rows.shape[1:])
        padded[: len(rows)] = rows
        whole = padded.new_empty(self.world * share, *rows.shape[1:])
        dist.all_gather(list(whole.split(share)), padded, group=self.group)
        return whole[:count]


def unreachable(error: RuntimeError) -> str:
    """The sentence for an error that says that other ranks are away; "" for any other error."""
    if not (launched() and (isinstance(error, dist.DistError) or LOST.search(str(error)))):
        return ""
    said = re.sub(r"^\[[^]]*\] ?", "", str(error).splitlines()[0]).split(". ")[0]
    return f"rank {os.environ.get('RANK', '0')}: the other ranks cannot be reached ({said})"


def data_parallel(module: nn.Module) -> nn.Module:
    """DistributedDataParallel that sends no buffers: BatchNorm's statistics are equal on all ranks already.

    Gradients are averaged in buckets while the backward pass still runs.
    """
    parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # before torch 2.13
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, **{name: False})  # type: ignore[arg-type]
