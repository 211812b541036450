"""Processes: how ranks are started, what they share, and BatchNorm over the global batch."""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_fast.config import ConfigError

T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher (ours or torchrun) started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


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


def launch(module: str, argv: Sequence[str], ranks: int) -> int:
    """Run `python -m module argv` as `ranks` processes on this host through torch's elastic launcher.

    Returns:
        The exit status: 0, or that of the first rank that failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    plan = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, max_restarts=0, start_method="spawn",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    try:
        elastic_launch(plan, sys.executable)("-m", module, *argv)
    except ChildFailedError as error:
        return abs(error.get_first_failure()[1].exitcode) or 1
    except (KeyboardInterrupt, SignalException):
        return 130
    return 0


class Ranks:
    """This process among the others: `rank`, `world`, `per_host`, `device`, and `group` (None when alone)."""

    def __init__(self, use_gpu: bool) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.per_host = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = max(1, cores // self.per_host)
        self.device = torch.device("cuda", local) if use_gpu else torch.device("cpu")
        if use_gpu:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(self.threads)
        self.group: dist.ProcessGroup | None = None
        if self.world > 1:
            _end_with_parent()
            dist.init_process_group("nccl" if use_gpu else "gloo", device_id=self.device if use_gpu else None)
            self.group = dist.group.WORLD

    @property
    def main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def from_main(self, compute: Callable[[], T]) -> T:
        """What `compute` gives, or raises, on the main rank, on every rank."""
        if self.group is None:
            return compute()
        outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.main:
            try:
                outcome = [(compute(), None)]
            except Exception as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        value, failure = outcome[0]
        if failure is not None:
            raise failure
        return cast(T, value)

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
        if self.group is not None:
            dist.destroy_process_group()

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
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts)[:count]


def _end_with_parent() -> None:
    """Have the kernel end this process when its launcher is killed, so that no rank trains on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def data_parallel(module: nn.Module) -> nn.Module:
    """DistributedDataParallel that sends no buffers: BatchNorm's statistics are equal on all ranks already."""
    parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # before torch 2.13
    return nn.parallel.DistributedDataParallel(module, **{name: False})  # type: ignore[arg-type]


def global_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm take its statistics over all ranks, as the original does; torch has this for GPUs only."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        module.__class__ = _GLOBAL.get(type(module), type(module))
    return model


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training statistics are those of the global batch (equal counts on all ranks)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), axes, correction=0)
        # float64: the square of the mean is added here and taken away again below.
        mean, var = mean.double(), var.double()
        moments = _SumOverRanks.apply(torch.stack([mean, var + mean**2])) / dist.get_world_size()
        mean, square = moments.unbind()
        var = square - mean**2
        count = x.numel() // x.shape[1] * dist.get_world_size()
        self._update(mean.detach(), var.detach() * (count / (count - 1)))
        shape = (1, -1, *(1 for _ in axes[1:]))
        scale = self.weight / torch.sqrt(var + self.eps).to(self.weight.dtype)
        shift = -mean.to(scale.dtype) * scale + (0 if self.bias is None else self.bias)
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def _update(self, mean: Tensor, var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)


class _GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    pass


class _GlobalBatchNorm2d(_GlobalBatchNorm, nn.BatchNorm2d):
    pass


_GLOBAL: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _GlobalBatchNorm1d,
    nn.BatchNorm2d: _GlobalBatchNorm2d,
}
