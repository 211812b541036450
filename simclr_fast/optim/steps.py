"""The step of LARS for many tensors at once: fused in C++ and CUDA, with PyTorch's multi-tensor functions, and plain.

All take the same arguments, those of `lars_reference`. csrc/lars.h has the mathematics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import simclr_fast._C  # noqa: F401  registers simclr_fast::lars_step
except ImportError as error:
    _ABSENT = f"cannot be loaded ({error})"
else:
    _ABSENT = ""
    torch.library.register_fake("simclr_fast::lars_step", lambda *args: None)

Tensors = list[Tensor] | tuple[Tensor, ...]
HYPER = tuple("lr weight_decay momentum trust_coefficient adapt nesterov classic_momentum lr_outside maximize".split())
"""The numbers a parameter group hands to a step, in this order."""

CPU_CHUNK = 16384  # elements: weights and gradients of one lie in a core's first caches
GPU_CHUNK, GPU_CHUNKS = 8192, 4096  # a model is cut into about so many, of no less than so many elements
ENTRY, ROW = 9, 8  # words of a tensor and of a group on the device: see csrc/lars.cpp


def extension() -> str:
    """What the compiled step was built for: "cuda" (GPU and CPU), "cpu", or "" where there is none."""
    if _ABSENT:
        return ""
    cuda = torch._C._dispatch_has_kernel_for_dispatch_key("simclr_fast::lars_step", "CUDA")
    return "cuda" if cuda else "cpu"


def step_function(device: str) -> Callable[..., None]:
    """The fastest step for tensors on that type of device."""
    if device in ("cpu", extension()):
        if not _ABSENT:
            return torch.ops.simclr_fast.lars_step
        reason = f"simclr_fast._C {_ABSENT}; `pip install -e .` builds it"
    elif device == "cuda":
        reason = f"simclr_fast._C {_ABSENT or 'is without CUDA'}; `pip install -e .` builds it"
    else:
        reason = f"there is no fused step for {device}"
    _warn_once(f"LARS steps in plain PyTorch, more slowly: {reason}")
    return lars_foreach


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=7)  # the caller of LARS.step


def lars_reference(
    params: Tensors,
    grads: Tensors,
    velocities: Tensors,
    groups: Sequence[int],
    hyper: Tensor,
    lrs: Sequence[Tensor | None] | None = None,
    decays: Sequence[Tensor | None] | None = None,
    averages: Tensors = (),
    ema: float = 0.0,
    copies: Tensors = (),
    copied: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_norm: float | None = None,
    *workspace: Any,
) -> None:
    """One step, in place, tensor by tensor: the yardstick of the others.

    Args:
        params, grads, velocities: tensors w, g, v of one shape each; w and v of one dtype, float32 or float64.
        groups: for each tensor, its row of `hyper`.
        hyper: [groups, 9], float64 on the CPU: the values of `HYPER`.
        lrs, decays: for each group, a 0-dim tensor in place of the value in `hyper`, or None.
        averages, ema: running averages of all w, or none, and their decay.
        copies, copied: tensors to round params[copied[k]] to.
        grad_scale: 0-dim, what the gradients were multiplied by.
        found_inf: 0-dim: if not 0, nothing is changed.
        max_norm: the norm over all gradients is clipped to this.
        workspace: of the fused step, not used here.
    """
    if found_inf is not None and found_inf.item():
        return
    scale = 1.0 if grad_scale is None else 1 / grad_scale
    gs = [g.to(w.dtype) * scale for g, w in zip(grads, params, strict=True)]
    if max_norm is not None:
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gs]))
        gs = [g * (max_norm / (total + 1e-6)).clamp(max=1.0).to(g.dtype) for g in gs]
    for k, (w, g, v, group) in enumerate(zip(params, gs, velocities, groups, strict=True)):
        lr, decay, momentum, trust, adapt, nesterov, classic, lr_outside, maximize = _numbers(group, hyper, lrs, decays)
        d = (-g if maximize else g) + decay * w
        divisor = d if classic else _moved(v, d, 1.0, momentum, nesterov)[1]
        ratio = _trust_ratio(w, divisor, trust) if adapt else 1.0
        a, b = (1.0, lr * ratio) if not classic else (ratio, lr) if lr_outside else (lr * ratio, 1.0)
        velocity, update = _moved(v, d, a, momentum, nesterov)
        v.copy_(velocity)
        w.sub_(b * update)
        if averages:
            averages[k].lerp_(w, 1 - ema)
    for copy, k in zip(copies, copied, strict=True):
        copy.copy_(params[k])


def _numbers(group: int, hyper: Tensor, lrs: Any, decays: Any) -> list[Any]:
    lr, decay, *others = hyper[group].tolist()
    lr = lr if lrs is None or lrs[group] is None else lrs[group]
    decay = decay if decays is None or decays[group] is None else decays[group]
    return [lr, decay, *others]


def _moved(v: Tensor, d: Tensor, a: float | Tensor, m: float, nesterov: float) -> tuple[Tensor, Tensor]:
    velocity = m * v + a * d
    return velocity, m * velocity + a * d if nesterov else velocity


def _trust_ratio(w: Tensor, x: Tensor, trust: float) -> Tensor:
    w_norm, x_norm = torch.linalg.vector_norm(w), torch.linalg.vector_norm(x)
    return torch.where((w_norm > 0) & (x_norm > 0), trust * w_norm / x_norm, 1.0)


def lars_foreach(
    params: Tensors,
    grads: Tensors,
    velocities: Tensors,
    groups: Sequence[int],
    hyper: Tensor,
    lrs: Sequence[Tensor | None] | None = None,
    decays: Sequence[Tensor | None] | None = None,
    averages: Tensors = (),
    ema: float = 0.0,
    copies: Tensors = (),
    copied: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_norm: float | None = None,
    *workspace: Any,
) -> None:
    """`lars_reference` with PyTorch's multi-tensor functions, on any device, without making the host wait."""
    changed = [*params, *velocities, *averages, *copies]
    before = [t.clone() for t in changed] if found_inf is not None else []
    gs: Tensors = [g.to(w.dtype) for g, w in zip(grads, params, strict=True)]
    scale = torch.ones((), device=params[0].device) if grad_scale is None else 1 / grad_scale
    if max_norm is not None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gs))) * scale
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if grad_scale is not None or max_norm is not None:
        gs = torch._foreach_mul(gs, scale.to(gs[0].dtype))
    for group in set(groups):
        members = [k for k, other in enumerate(groups) if other == group]
        w, g, v = ([tensors[k] for k in members] for tensors in (params, gs, velocities))
        _foreach_move(w, g, v, _numbers(group, hyper, lrs, decays))
    if averages:
        torch._foreach_lerp_(list(averages), list(params), 1 - ema)
    if copies:
        torch._foreach_copy_(list(copies), [params[k] for k in copied])
    if found_inf is not None:
        for t, old in zip(changed, before, strict=True):
            t.copy_(torch.where(found_inf.bool(), old, t))


def _foreach_move(w: Tensors, g: Tensors, v: Tensors, numbers: list[Any]) -> None:
    """Step the tensors of a group."""
    lr, decay, momentum, trust, adapt, nesterov, classic, lr_outside, maximize = numbers
    d = torch._foreach_mul(w, decay)
    torch._foreach_add_(d, g, alpha=-1 if maximize else 1)

    def ratios(x: Tensors) -> Tensor:
        w_norms, x_norms = (torch.stack(torch._foreach_norm(t)) for t in (w, x))
        return torch.where((w_norms > 0) & (x_norms > 0), trust * w_norms / x_norms, 1.0)

    if classic and adapt:
        torch._foreach_mul_(d, list((ratios(d) if lr_outside else lr * ratios(d)).unbind()))
    elif classic and not lr_outside:
        torch._foreach_mul_(d, lr)
    torch._foreach_mul_(v, momentum)
    torch._foreach_add_(v, d)
    update = v
    if nesterov:
        update = torch._foreach_mul(v, momentum)
        torch._foreach_add_(update, d)
    if not classic and adapt:
        update = torch._foreach_mul(update, list((lr * ratios(update)).unbind()))
    elif not classic or lr_outside:
        update = torch._foreach_mul(update, lr)
    torch._foreach_sub_(w, update)


def workspace(params: Tensors, groups: int) -> tuple[int, Tensor, list[Tensor]]:
    """What the fused step of these tensors needs besides them: chunk, chunks and scratch, as csrc/lars.cpp says."""
    device, numels = params[0].device, [p.numel() for p in params]
    chunk = CPU_CHUNK
    if device.type == "cuda":
        chunk = max(GPU_CHUNK, math.ceil(sum(numels) / GPU_CHUNKS / GPU_CHUNK) * GPU_CHUNK)
    chunks = chunk_table(numels, chunk)
    scratch = [torch.zeros(4, len(chunks), dtype=torch.float64, device=device)]
    if device.type == "cuda":
        words = len(params) * (ENTRY + 1) + groups * ROW
        scratch.append(torch.zeros(words, dtype=torch.int64, device=device))
        scratch.append(torch.zeros(len(params), ENTRY, dtype=torch.int64, device="cpu"))
    return chunk, chunks.to(device), scratch


def chunk_table(numels: Sequence[int], chunk: int) -> Tensor:
    """[chunks, 3] int64: tensor, first element and end of each chunk of `chunk` elements, a last one less, in order."""
    sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
    counts = (sizes + chunk - 1) // chunk
    owners = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    starts = (torch.arange(len(owners), device="cpu") - (counts.cumsum(0) - counts)[owners]) * chunk
    return torch.stack([owners, starts, torch.minimum(starts + chunk, sizes[owners])], dim=1)
