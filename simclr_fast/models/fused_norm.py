"""Batch normalisation in training, with a residual and a ReLU, in two passes forwards and two backwards, on GPUs.

What is read and written, in tensors of x's size, beside what PyTorch's own kernels for channels_last read and write
when they normalise, add in place and rectify in place, one after the other:

                                     forward          backward
    normalise                         3 of 3           5 of 5
    normalise, rectify                3 of 5           5 of 8
    normalise, add, rectify           4 of 8           7 of 8

Statistics read x; normalising reads x and the residual and writes y. Sums of the gradient read dy and x, after a
residual also y, and write the residual's gradient; the gradient reads this, or dy, and x, and writes dx. For the
backward pass x stays, and y where a ReLU follows a residual; a ReLU alone is found again from x.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def supports(x: Tensor) -> bool:
    """Whether `batch_norm` takes x, at no cost to the GPU.

    True for fp32, bf16 and fp16, [N, C] contiguous or [N, C, H, W] channels_last with at least one element, on an
    NVIDIA GPU of sm_80 or later or, under TRITON_INTERPRET=1, on the CPU; Triton must be installed.
    """
    if not (HAS_TRITON and x.dtype in FLOATS and x.ndim in (2, 4) and x.numel() and _runs_on(x.device)):
        return False
    return x.is_contiguous(memory_format=_layout(x))


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[relu]((x - mean) / sqrt(var + eps) * weight + bias [+ residual]), and the statistics.

    Differentiable once, in x, weight, bias and residual. Over a group, dx is complete, and the gradients of weight and
    bias are those of this rank's rows, as DDP expects them.

    Args:
        x: [N, C] or [N, C, H, W] of which `supports` is true.
        weight, bias: [C] fp32; no bias is a bias of 0.
        residual: of x's shape and dtype.
        relu: rectify what is returned.
        group: take the statistics over all its ranks, which pass equally many rows.

    Returns:
        y, of x's shape, dtype and layout; mean and population variance (of n values, not n - 1), [C] fp32, detached.

    Raises:
        ValueError: an argument breaks its rule.
    """
    if not supports(x):
        got = f"{list(x.shape)} with strides {list(x.stride())}, {x.dtype} on {x.device}"
        raise ValueError(f"x must be what fused_norm.supports says, got {got}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not _fits(value, x.shape[1:2], torch.float32, x.device):
            rule = f"{name} must be [{x.shape[1]}] float32 on {x.device}"
            raise ValueError(f"{rule}, got {list(value.shape)}, {value.dtype} on {value.device}")
    if residual is not None and not _fits(residual, x.shape, x.dtype, x.device):
        rule = f"residual must be like x, {list(x.shape)}, {x.dtype} on {x.device}"
        raise ValueError(f"{rule}, got {list(residual.shape)}, {residual.dtype} on {residual.device}")
    world = 1 if group is None else dist.get_world_size(group)
    name = "" if group is None or world == 1 else group.group_name
    return _forward(x, weight, bias, residual, eps, relu, name, world)


def _fits(value: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    return value.shape == shape and value.dtype == dtype and value.device == device


def _runs_on(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= 8
    return INTERPRETED and device.type == "cpu"


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def _kernels() -> ModuleType:
    return importlib.import_module("simclr_fast.kernels.batch_norm")


def _dense(value: Tensor, x: Tensor) -> Tensor:
    return value.contiguous(memory_format=_layout(x))


@torch.library.custom_op("simclr_fast::batch_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, relu: bool, group: str,
    world: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, mean and variance; the group is known by its name, "" where x is alone."""
    kernels = _kernels()
    mean, var = kernels.statistics(x)
    if group:
        mean, var = _over_ranks(mean, var, group, world)
    residual = None if residual is None else _dense(residual, x)
    return kernels.normalise(x, weight, bias, residual, mean, var, eps, relu), mean, var


@_forward.register_fake
def _(x, weight, bias, residual, eps, relu, group, world):
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, var


def _over_ranks(mean: Tensor, var: Tensor, group: str, world: int) -> tuple[Tensor, Tensor]:
    mean = mean.double()  # its square is added here and taken away again below
    moments = torch.stack([mean, var + mean.square()])
    dist.all_reduce(moments, group=_resolve_process_group(group))  # type: ignore[arg-type]
    mean, square = (moments / world).unbind()
    return mean.float(), (square - mean.square()).clamp(min=0).float()


@torch.library.custom_op("simclr_fast::batch_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, relu: bool, group: str, world: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d/dx, d/dweight, d/dbias; and, with y, the gradient before the ReLU, which is d/dresidual, else nothing."""
    kernels = _kernels()
    dy = _dense(dy, x)
    g, sums = kernels.gradient_sums(dy, x, y, weight, bias, mean, var, eps, relu)
    dweight, dbias = sums[1] * torch.rsqrt(var + eps), sums[0].clone()
    if group:
        dist.all_reduce(sums, group=_resolve_process_group(group))  # type: ignore[arg-type]
    count = world * x.numel() // x.shape[1]
    dx = kernels.gradient(g, x, weight, bias, mean, var, sums, count, eps, relu and y is None)
    return dx, dweight, dbias, dy.new_empty(0) if y is None else g


@_backward.register_fake
def _(dy, x, y, weight, bias, mean, var, eps, relu, group, world):
    g = dy.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), g


def _save(ctx, inputs, output) -> None:
    x, weight, bias, residual, *ctx.settings = inputs
    y, mean, var = output
    ctx.residual, ctx.relu, ctx.has_bias = residual is not None, inputs[5], bias is not None
    ctx.save_for_backward(x, y if residual is not None and ctx.relu else None, weight, bias, mean, var)
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    dx, dweight, dbias, g = _backward(dy, *ctx.saved_tensors, *ctx.settings)
    dresidual = (g if ctx.relu else dy) if ctx.residual else None
    return dx, dweight, dbias if ctx.has_bias else None, dresidual, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
