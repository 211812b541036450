"""What the contrastive losses share: their arguments' rules, the choice of backend, and other ranks' rows."""

from __future__ import annotations

import importlib
import importlib.util
import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.library import CustomOpDef

KERNELS = {"native": "simclr_fast.losses.blocked", "triton": "simclr_fast.kernels.nt_xent"}
CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "backend": ("auto", "reference", *KERNELS),
    "precision": ("auto", "fp32", "tf32", "fp16", "bf16"),
}
SCALES = ("paper", "simclr_tf")
EPS_MIN = 1.2e-38
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def all_gathered(rows: Tensor, world: int, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all `world` ranks of a group, one rank after the other; each has as many, contiguous."""
    every = rows.new_empty(world * len(rows), *rows.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter before torch 2.14
    gather(every, rows, group=group)
    return every


def require(*rules: tuple[bool, str, object]) -> None:
    """Raises a ValueError for the first rule, (holds, text, what was given), that does not hold."""
    for holds, rule, got in rules:
        if not holds:
            raise ValueError(f"{rule}, got {got!r}")


def check(inputs: dict[str, Tensor], temperature: float | Tensor, eps: float, group: Any, **chosen: str) -> Tensor:
    """The rules that all contrastive losses have; tau as a tensor, float64 if an input is, beside the inputs."""
    for name, x in inputs.items():
        require((isinstance(x, Tensor), f"{name} must be a tensor", type(x)))
        require(
            (x.ndim == 2 and x.shape[1] >= 1, f"{name} must be [N, D] with D >= 1", list(x.shape)),
            (x.dtype in FLOATS, f"{name} must be float16, bfloat16, float32 or float64", x.dtype),
            (x.layout == torch.strided, f"{name} must be dense", x.layout),
        )
    names, tensors, backend = " and ".join(inputs), list(inputs.values()), chosen["backend"]
    device, wide = tensors[0].device, any(x.dtype == torch.float64 for x in tensors)
    widths, devices = [x.shape[1] for x in tensors], [str(x.device) for x in tensors]
    ranked = group is None or isinstance(group, dist.ProcessGroup)
    require(
        (all(D == widths[0] for D in widths), f"{names} must be [N, D] of one D", widths),
        (all(x.device == device for x in tensors), f"{names} must be on one device", devices),
        (_number(eps) and EPS_MIN <= eps < math.inf, "eps must be a finite number >= 1.2e-38, float32's smallest", eps),
        *((x in CHOICES[name], f"{name} must be one of {CHOICES[name]}", x) for name, x in chosen.items()),
        (HAS_TRITON or backend != "triton", "backend must not be 'triton' where Triton is not installed", backend),
        (not wide or backend != "triton", f"{names} must not be float64 for backend='triton'", torch.float64),
        (
            backend != "reference" or chosen["precision"] in ("auto", "fp32"),
            "precision must be one of ('auto', 'fp32') for backend='reference'",
            chosen["precision"],
        ),
        (ranked, "group must be a process group that this rank belongs to, or None", group),
    )
    several = group is not None and dist.get_world_size(group) > 1
    require((not several or backend != "reference", "backend must not be 'reference' with several ranks", backend))
    dtype = torch.float64 if wide else torch.float32
    if isinstance(temperature, Tensor):
        rule = "temperature must be a number or a 0-dim tensor of a floating dtype"
        got = (list(temperature.shape), temperature.dtype)
        require((temperature.ndim == 0 and temperature.is_floating_point(), rule, got))
        return temperature.to(device, dtype)
    number = _number(temperature) and 0 < temperature < math.inf
    require((number, "temperature must be a finite number > 0, or a 0-dim tensor", temperature))
    return torch.full((), temperature, dtype=dtype, device=device)


def _number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) or isinstance(x, (np.floating, np.integer))


class Settings(NamedTuple):
    """What the ops of a loss need to know beside their tensors."""

    reduction: str
    backend: str
    precision: str
    grad_average: bool
    eps: float
    rows_alone: bool = False  # their gradient will be asked for, that of the temperature will not
    group: str = ""  # name of the process group; "" where there are no other ranks
    rank: int = 0
    world: int = 1
    counts: tuple[int, ...] = ()  # rows of every rank, if they differ

    def packed(self) -> tuple[str, list[int], float]:
        """As few arguments: PyTorch goes through all of an op's arguments, slowly, at every call."""
        words = f"{self.reduction} {self.backend} {self.precision} {self.group}"
        return words, [int(self.grad_average), int(self.rows_alone), self.rank, self.world, *self.counts], self.eps

    @classmethod
    def unpacked(cls, words: str, numbers: list[int], eps: float) -> Settings:
        reduction, backend, precision, group = words.split(" ", 3)
        average, rows_alone, rank, world, *counts = numbers
        flags = bool(average), eps, bool(rows_alone)
        return cls(reduction, backend, precision, *flags, group, rank, world, tuple(counts))

    def kernels(self, xs: list[Tensor]) -> tuple[ModuleType, str]:
        """The backend's module and its precision: what "auto" means for these inputs.

        Decided inside the ops and not before: torch.compile cannot trace the question which GPU this is.
        """
        backend, precision = self.backend, self.precision
        wide = any(x.dtype == torch.float64 for x in xs)
        if backend == "auto":
            backend = "triton" if HAS_TRITON and not wide and _has_tensor_cores(xs[0].device) else "native"
        if backend == "triton":
            interpreted = importlib.import_module(KERNELS["triton"]).INTERPRETED
            where = (
                "inputs must be on an NVIDIA GPU of sm_80 or later, or in Triton's interpreter, for backend='triton'"
            )
            require((_has_tensor_cores(xs[0].device) or interpreted, where, xs[0].device))
            precision = "fp16" if precision == "auto" else precision
        else:
            plain = ("auto",) if wide else ("auto", "fp32")
            rule = f"precision must be one of {plain} for backend={backend!r} and {xs[0].dtype}"
            require((precision in plain, rule, precision))
        return importlib.import_module(KERNELS[backend]), precision

    def first(self, n: int) -> int:
        """Rows of the ranks before this one."""
        return sum(self.counts[: self.rank]) if self.counts else self.rank * n

    def total(self, n: int) -> int:
        """Rows of all ranks."""
        return sum(self.counts) if self.counts else self.world * n

    def gather(self, own: Tensor, views: int = 1) -> Tensor:
        """The rows of every rank, one rank after the other; rank r passes views * counts[r], if counts differ.

        What is short is filled up for the exchange, and left out afterwards.
        """
        if self.world == 1:
            return own
        longest = views * max(self.counts) if self.counts else len(own)
        sent = own.contiguous()
        if len(own) < longest:
            sent = own.new_zeros(longest, *own.shape[1:])
            sent[: len(own)] = own
        every = all_gathered(sent, self.world, _resolve_process_group(self.group))  # type: ignore[arg-type]
        if not self.counts or min(self.counts) == max(self.counts):
            return every
        return torch.cat([part[: views * n] for part, n in zip(every.split(longest), self.counts, strict=True)])

    def views(self, rows: Tensor, n: int) -> list[Tensor]:
        """Both halves of every rank's gathered rows: those of view 1 and those of view 2."""
        counts = self.counts or [n] * self.world
        parts = rows.split([count for of_rank in counts for count in (of_rank, of_rank)])
        return [parts[view] if self.world == 1 else torch.cat(parts[view::2]) for view in (0, 1)]

    def reduced(self, rows: Tensor, total: int) -> Tensor:
        """The rank's loss, of whose rows all ranks have `total`: averaged over ranks, a mean is that of all rows."""
        if self.reduction == "none":
            return rows.clone()
        return rows.sum() * (self.world / total) if self.reduction == "mean" else rows.sum()

    def upstream(self, grad: Tensor, rows: Tensor, total: int, views: int = 1, alone: bool = False) -> list[Tensor]:
        """dL/d(loss of a row) over a factor that makes it at most 1: own rows, all ranks' rows, and that factor.

        L is the objective of all ranks together: the mean of their losses, or the sum for the reduction "sum". Where
        the ranks' gradients are averaged afterwards, the factor makes up for it. `alone`: no other rank needs them.
        """
        gain = self.world if self.grad_average else 1
        if self.reduction == "none":
            every = grad.to(rows.dtype) if alone else self.gather(grad.to(rows.dtype), views)
            largest = every.abs().amax() if len(every) else rows.new_zeros(())
            scale = torch.where(largest == 0, 1, largest)
            return [grad / scale, every / scale, largest * (gain / self.world)]
        every = rows.new_ones(total)
        return [every[: len(rows)], every, grad * (gain / (total if self.reduction == "mean" else 1))]


def _has_tensor_cores(device: torch.device) -> bool:
    """Whether the kernels can run there: an NVIDIA GPU of sm_80 or later."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def settings_of(group: dist.ProcessGroup | None, uneven: bool, x: Tensor, names: str, **options: Any) -> Settings:
    """Settings with this process's place in the group; exchanges the counts of rows, if they are uneven."""
    world = 1 if group is None else dist.get_world_size(group)
    if group is None or world == 1:
        require((x.shape[0] >= 1, f"{names} must be [N, D] with N >= 1", list(x.shape)))
        return Settings(**options)
    counts: list[int] = []
    if uneven:
        counts = all_gathered(torch.tensor([x.shape[0]], device=x.device), world, group).tolist()
        require((sum(counts) >= 1, f"{names} must have rows on some rank", counts))
    else:
        rule = f"{names} must be [N, D] with N >= 1 unless uneven=True"
        require((x.shape[0] >= 1, rule, list(x.shape)))
    return Settings(**options, group=group.group_name, rank=dist.get_rank(group), world=world, counts=tuple(counts))


def refuse_transforms(name: str, *tensors: Tensor) -> None:
    """Raises where torch.func or forward-mode differentiation would get no derivative, or a wrong one."""
    if torch.compiler.is_compiling():
        return
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    if wrapped or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"{name} cannot be transformed by torch.func (grad, vmap, jvp) nor differentiated forwards; "
            "use torch.autograd, or backend='reference'"
        )


def first_derivative_only(name: str, backward: CustomOpDef) -> None:
    """Makes a second derivative an error that says what to do."""

    def no_second_derivative(ctx, *_):
        raise RuntimeError(f"{name} has a first derivative only; backend='reference' has the second")

    backward.register_autograd(no_second_derivative)
