"""NT-Xent, the loss of SimCLR, as one registered op: value, gradient, exact negatives over all ranks.

With unit rows z (every view 1, then every view 2), S = z z^T / tau, P = softmax of S without its diagonal:

    loss of row i = -log P[i, pos(i)] = softplus(log sum_{negatives} exp S[i, j] - S[i, pos(i)])
    dL/dz_i       = 1/tau sum_{j != i} (g_i P[i, j] + g_j P[j, i] - (g_i + g_j) [j = pos(i)]) z_j
    dL/dtau       = -1/(2 tau) sum_i <z_i, dL/dz_i>     (Euler: L depends on z z^T / tau alone)

where g_i = dL/d(loss of row i). Of the other ranks, a rank needs z and the row log-sum-exp, gathered in the
forward pass: its own rows of the gradient are then complete, and the backward pass has no collective.
losses/blocked.py and kernels/nt_xent.py hold the same three functions: `operand`, `statistics`, `gradient`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

KERNELS = {"native": "simclr_fast.losses.blocked", "triton": "simclr_fast.kernels.nt_xent"}
CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "backend": ("auto", "reference", *KERNELS),
    "precision": ("auto", "fp32", "tf32", "fp16", "bf16"),
    "scale": ("paper", "simclr_tf"),
}
TRITON_MAX_D = 256  # the widest rows whose gradient a program keeps in registers
HAS_TRITON = importlib.util.find_spec("triton") is not None


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str = "auto",
    scale: str = "paper",
    grad_average: bool = True,
    uneven: bool = False,
    return_stats: bool = False,
    eps: float = 1e-12,
) -> Any:
    """Normalised, temperature-scaled cross-entropy of N pairs of embeddings, in nats.

    Args:
        z1, z2: [N, D], any floating dtype and strides, not normalised; row k of both shows image k.
        temperature: tau > 0, a number or a 0-dim tensor (learnable; its value is not checked).
        group: take negatives from all its ranks. Each passes as many rows and gets the loss of its own
            anchors; gradients averaged over the ranks, as DDP does, are those of the global batch.
        reduction: over the 2N anchors, view 1 first: "mean", "sum", "none" -> [2N] (one rank only).
        backend: "triton" (CUDA, D <= 256, not float64; CPU under TRITON_INTERPRET=1), "native" (blocks, any
            device), "reference" (whole matrix, one rank), "auto": triton where it applies, else native.
        precision: of the products in triton, summed in float32; "auto" is "fp16", whose 10 bits suit unit
            rows. The other backends take "auto" and "fp32" and multiply as PyTorch is set to.
        scale: "paper", or "simclr_tf", twice that.
        grad_average: False where the gradients of the ranks are summed and not averaged.
        uneven: must be False, the ranks pass equal counts.
        return_stats: also return detached 0-dim tensors over this rank's pairs: `contrastive_top1` (share of
            view-1 rows whose nearest view-2 row, of all ranks, is their own), `contrastive_entropy` (of
            that softmax, nats), `alignment` (mean squared distance of a pair).
        eps: floor of the norm that rows are divided by, as in `F.normalize`.

    Returns:
        The loss, float32 (float64 for float64); with `return_stats`, (loss, stats).

    Raises:
        ValueError: an argument breaks its rule.
    Source: Chen et al. 2020, arXiv:2002.05709, equation 1.
    """
    inputs = [(list(z.shape), z.dtype, z.device) for z in (z1, z2)]
    dtype = torch.promote_types(z1.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        tau, valid = (
            temperature.to(z1.device, dtype),
            temperature.ndim == 0 and temperature.is_floating_point(),
        )
    else:
        tau, valid = z1.new_full((), temperature, dtype=dtype), 0 < temperature < math.inf
    chosen = {"reduction": reduction, "backend": backend, "precision": precision, "scale": scale}
    _require(
        (z1.ndim == 2 and 0 not in z1.shape, "z1 must be [N, D] with N >= 1 and D >= 1", inputs),
        (inputs[0] == inputs[1], "z1 and z2 must have one shape, dtype and device", inputs),
        (z1.is_floating_point(), "z1 and z2 must be floating", inputs),
        (valid, "temperature must be a finite number > 0, or a floating 0-dim tensor", temperature),
        (0 < eps < math.inf, "eps must be a finite number > 0", eps),
        (not uneven, "uneven must be False, the ranks pass equal counts", uneven),
        *((x in CHOICES[name], f"{name} must be one of {CHOICES[name]}", x) for name, x in chosen.items()),
    )
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    fits = z1.dtype != torch.float64 and z1.shape[1] <= TRITON_MAX_D
    if backend == "auto":
        backend = "triton" if z1.is_cuda and HAS_TRITON and fits else "native"
    triton, plain = backend == "triton", ("auto", "fp32" if dtype == torch.float32 else "auto")
    _require(
        (HAS_TRITON or not triton, "backend must not be 'triton' where Triton is not installed", backend),
        (fits or not triton, f"z1 must have D <= {TRITON_MAX_D}, not float64, for backend='triton'", inputs),
        (triton or precision in plain, f"precision must be in {plain} for {backend=}, {dtype}", precision),
        (world == 1 or reduction != "none", "reduction must be 'mean' or 'sum' with several ranks", reduction),
        (world == 1 or backend != "reference", "backend must not be 'reference' with several ranks", backend),
    )

    if backend == "reference":
        rows, z = _reference(z1, z2, tau, eps)
    else:
        gain = (world if grad_average else 1) / (world if reduction == "mean" else 1)
        name = group.group_name if group is not None and world > 1 else ""
        rows, z, _ = _forward(z1, z2, tau, backend, precision, eps, gain, name, rank, world)
    loss = rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
    loss = 2 * loss if scale == "simclr_tf" else loss
    if not return_stats:
        return loss
    names = ("contrastive_top1", "contrastive_entropy", "alignment")
    return loss, dict(zip(names, _stats(z.detach(), tau.detach(), z1.shape[0], rank).unbind(), strict=True))


def _require(*rules: tuple[bool, str, object]) -> None:
    for holds, rule, got in rules:
        if not holds:
            raise ValueError(f"{rule}, got {got}")


def _unit_rows(x1: Tensor, x2: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x / max(|x|, eps), [2N, D]; that divisor, and whether it is the norm, [2N, 1]; float32 (64 for 64).

    Rows are divided by their largest element first, so that no square under- or overflows.
    """
    x = torch.cat([x1, x2]).to(torch.promote_types(x1.dtype, torch.float32))
    largest = x.detach().abs().amax(1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 1)
    y = x / largest
    norm, floor = torch.linalg.vector_norm(y, dim=1, keepdim=True), eps / largest
    divisor = torch.maximum(norm, floor)
    return y / divisor, divisor * largest, norm > floor


def _reference(x1: Tensor, x2: Tensor, tau: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Losses of the 2N rows and z, through the whole matrix and PyTorch's own gradient: the yardstick."""
    with torch.autocast(x1.device.type, enabled=False):
        z, _, _ = _unit_rows(x1, x2, eps)
        s = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
        return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(x1)), reduction="none"), z


def _gather(own: Tensor, group: str, world: int) -> Tensor:
    """[2n, ...] of every rank as [2N, ...]: view 1 of all ranks, then view 2 of all ranks."""
    if world == 1:
        return own
    every = own.new_empty(world * len(own), *own.shape[1:])
    for whole, part in zip(every.chunk(2), own.chunk(2), strict=True):
        dist.all_gather_into_tensor(whole, part, group=_resolve_process_group(group))  # type: ignore[arg-type]
    return every


@torch.library.custom_op("simclr_fast::nt_xent", mutates_args=())
def _forward(
    x1: Tensor, x2: Tensor, tau: Tensor, backend: str, precision: str, eps: float, gain: float,
    group: str, rank: int, world: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses of the rank's 2n anchors; z and row log-sum-exp of all ranks. `gain` multiplies the gradient."""
    kernels = importlib.import_module(KERNELS[backend])
    with torch.autocast(x1.device.type, enabled=False):
        z = _gather(kernels.operand(_unit_rows(x1, x2, eps)[0], precision), group, world)
        rest, match = kernels.statistics(z, tau, len(x1), rank * len(x1), precision)
        rows = torch.logaddexp(rest - match, torch.zeros_like(rest))
        return rows, z, _gather(match + rows, group, world)


@_forward.register_fake
def _(x1, x2, tau, backend, precision, eps, gain, group, rank, world):
    own = 2 * x1.shape[0]  # not len(): that would fix N while compiling
    z = importlib.import_module(KERNELS[backend]).operand(tau.new_empty(own, x1.shape[1]), precision)
    return tau.new_empty(own), z.new_empty(world * own, z.shape[1]), tau.new_empty(world * own)


@torch.library.custom_op("simclr_fast::nt_xent_backward", mutates_args=())
def _backward(
    grad: Tensor, x1: Tensor, x2: Tensor, tau: Tensor, rows: Tensor, z: Tensor, lse: Tensor,
    backend: str, precision: str, eps: float, rank: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d/d[x1; x2], [2n, D], and d/dtau, given d/drows; with several ranks that is one number everywhere."""
    n, D = x1.shape
    with torch.autocast(x1.device.type, enabled=False):
        largest = grad.abs().amax()
        g = grad / torch.where(largest == 0, 1, largest)
        pull = -g * torch.expm1(-rows)  # g_i (1 - P[i, pos(i)]), exact where P is next to 1
        every_g = g if len(z) == 2 * n else g[:1].repeat(len(z))
        kernels = importlib.import_module(KERNELS[backend])
        dz = kernels.gradient(z, tau, lse, every_g, pull + pull.roll(n), rank * n, precision)[:, :D]
        dz = dz * (largest / tau)
        unit, divisor, active = _unit_rows(x1, x2, eps)
        radial = (unit * dz).sum(1, keepdim=True)
        return ((dz - unit * radial * active) / divisor).to(x1.dtype), radial.sum() / (-2 * tau)


@_backward.register_fake
def _(grad, x1, x2, tau, rows, z, lse, backend, precision, eps, rank):
    return x1.new_empty(2 * x1.shape[0], x1.shape[1]), torch.empty_like(tau)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.backend, ctx.precision, ctx.eps, ctx.gain, _, ctx.rank, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    dx, dtau = _backward((grad * ctx.gain).contiguous(), *saved, ctx.backend, ctx.precision, ctx.eps, ctx.rank)
    return *dx.chunk(2), dtau, *(None,) * 7


def _no_second_derivative(ctx, *_):
    raise RuntimeError("nt_xent has a first derivative only; backend='reference' has the second")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_no_second_derivative)


@torch.library.custom_op("simclr_fast::nt_xent_stats", mutates_args=())
def _stats(z: Tensor, tau: Tensor, n: int, rank: int) -> Tensor:
    """Top-1 and entropy over the view-2 rows of all ranks, and alignment, of this rank's n pairs, [3]."""
    total = tau.new_zeros(3)
    view1, view2 = z.to(tau.dtype).chunk(2)
    with torch.autocast(z.device.type, enabled=False):
        for own in torch.arange(rank * n, rank * n + n, device=z.device).split(max(1, (1 << 22) // len(z))):
            log_p = (view1[own] @ view2.T / tau).log_softmax(1)
            total[0] += (log_p.argmax(1) == own).sum()
            total[1] -= (log_p.exp() * log_p).sum()
            total[2] += (view1[own] - view2[own]).square().sum()
    return total / n


@_stats.register_fake
def _(z, tau, n, rank):
    return tau.new_empty(3)
