"""NT-Xent, the loss of SimCLR, as one registered op: value, gradient, exact negatives over all ranks.

With unit rows z, S = z z^T / tau, P = softmax of the rows of S without the diagonal, and g_i = dL/d(loss of row i):

    loss of row i = -log P[i, pos(i)] = softplus(log sum_{negatives} exp S[i, j] - S[i, pos(i)])
    dL/dz_i       = 1/tau sum_{j != i} (g_i P[i, j] + g_j P[j, i] - (g_i + g_j) [j = pos(i)]) z_j
    dL/dtau       = -1/(2 tau) sum_i <z_i, dL/dz_i>     (Euler: L depends on z z^T / tau alone)

Of the other ranks, a rank needs z and the row log-sum-exp, gathered in the forward pass: its own rows of the gradient
are then complete, and the backward pass has no collective. Gathered rows stay in the order of the ranks: view 1 of rank
0, its view 2, view 1 of rank 1, ...
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simclr_fast.losses import backends
from simclr_fast.losses.backends import Settings, require
from simclr_fast.losses.blocked import ABSENT, unit_rows


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
    return_stats: bool | str = False,
    eps: float = 1e-12,
) -> Any:
    """Normalised, temperature-scaled cross-entropy of N pairs of embeddings, in nats.

    Args:
        z1, z2: [N, D], any floating dtypes and strides, not normalised; row k of both shows image k.
        temperature: tau > 0, a number or a 0-dim tensor (learnable; its value is not checked).
        group: take negatives from all its ranks. Each passes as many rows and gets the loss of its own
            anchors; gradients averaged over the ranks, as DDP does, are those of the global batch.
        reduction: over the 2N anchors, view 1 first: "mean", "sum", "none" -> [2N]. Over several ranks the objective
            is the mean of what the ranks make of their losses, for "sum" the sum; with "none" the backward
            pass exchanges the upstream gradients, so that every rank has to run it.
        backend: "triton" (GPU of sm_80 or later, or CPU under TRITON_INTERPRET=1; not float64), "native" (tiles in
            PyTorch, any device), "reference" (the whole matrix, one rank), "auto": triton on such a GPU, else
            native.
        precision: of the products in triton, summed in float32; "auto" is "fp16", whose 10 bits suit unit
            rows. The other backends take "auto" and "fp32" and multiply as PyTorch is set to.
        scale: "paper", or "simclr_tf", twice that.
        grad_average: False where the gradients of the ranks are summed and not averaged.
        uneven: the ranks may pass different counts, also none. They are exchanged first, which waits for the device,
            and a rank's mean is its sum times ranks / global count.
        return_stats: also return detached 0-dim tensors over this rank's pairs: `contrastive_top1` (share of
            view-1 rows whose nearest view-2 row, of all ranks, is their own), `contrastive_entropy` (of
            that softmax, nats), `alignment` (mean squared distance of a pair). "all" adds `uniformity`: log of the
            mean of exp(-2 |z_i - z_j|^2) over the pairs of one view (arXiv:2005.10242), the two views averaged. A
            rank without rows gets NaN.
        eps: floor of the norm that rows are divided by, as in `F.normalize`.

    Returns:
        The loss, float32 (float64 if an input is); with `return_stats`, (loss, stats).

    Raises:
        ValueError: an argument breaks its rule.
    Source: Chen et al. 2020, arXiv:2002.05709, equation 1.
    """
    chosen = {"reduction": reduction, "backend": backend, "precision": precision}
    tau = backends.check({"z1": z1, "z2": z2}, temperature, eps, group, **chosen)
    require(
        (z1.shape[0] == z2.shape[0], "z1 and z2 must have one shape", [list(z1.shape), list(z2.shape)]),
        (scale in backends.SCALES, f"scale must be one of {backends.SCALES}", scale),
        (return_stats in (False, True, "all"), "return_stats must be False, True or 'all'", return_stats),
    )
    settings = backends.settings_of(group, uneven, z1, "z1 and z2", **chosen, grad_average=grad_average, eps=eps)
    if backend == "reference":
        loss, z = _reference(z1, z2, tau, reduction, eps)
        settings = settings._replace(backend="native", precision="auto")
    else:
        backends.refuse_transforms("nt_xent", z1, z2, tau)
        rows_alone = torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad) and not tau.requires_grad
        loss, _, z, *_ = _forward(z1, z2, tau, *settings._replace(rows_alone=rows_alone).packed())
    loss = 2 * loss if scale == "simclr_tf" else loss
    if not return_stats:
        return loss
    names = ("contrastive_top1", "contrastive_entropy", "alignment", "uniformity")
    stats = _stats(z.detach(), tau.detach(), z1.shape[0], return_stats == "all", *settings.packed())
    return loss, dict(zip(names[: len(stats)], stats.unbind(), strict=True))


def _reference(x1: Tensor, x2: Tensor, tau: Tensor, reduction: str, eps: float) -> tuple[Tensor, Tensor]:
    """Loss and z, through the whole matrix and PyTorch's own gradient: the yardstick."""
    with torch.autocast(x1.device.type, enabled=False):
        z = unit_rows(torch.cat([x1.to(tau.dtype), x2.to(tau.dtype)]), eps)[0]
        s = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
        labels = torch.arange(len(z), device=z.device).roll(len(x1))
        return F.cross_entropy(s, labels, reduction=reduction), z


def _places(n: int, settings: Settings) -> tuple[list[int], list[int]]:
    """Where view 1 and view 2 of this rank stand among the gathered rows, and where their positives do."""
    first = 2 * settings.first(n)
    return [first, first + n], [first + n, first]


def _ahead(kernels: ModuleType, n: int, settings: Settings) -> bool:
    """Whether the gradient is made in the forward pass: the native backend does that with small matrices."""
    uniform = settings.reduction != "none" and settings.world == 1
    return settings.rows_alone and uniform and hasattr(kernels, "at_once") and 2 * n <= kernels.SMALL


@torch.library.custom_op("simclr_fast::nt_xent", mutates_args=())
def _forward(
    x1: Tensor, x2: Tensor, tau: Tensor, words: str, numbers: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the losses of the rank's 2n anchors; z and row log-sum-exp of all ranks; tau dx if it is made `_ahead`."""
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([x1, x2])
    with torch.autocast(x1.device.type, enabled=False):
        if _ahead(kernels, len(x1), settings):
            rows, z, lse, dx = kernels.at_once([x1, x2], tau, eps)
            return settings.reduced(rows, len(z)), rows, z, lse, dx
        own = kernels.operand([x1, x2], tau.dtype, precision, eps)
        z = settings.gather(own, views=2)
        rows, lse = kernels.statistics(own, z, tau, *_places(len(x1), settings), precision)
        return settings.reduced(rows, len(z)), rows, z, settings.gather(lse, views=2), tau.new_empty(0, own.shape[1])


@_forward.register_fake
def _(x1, x2, tau, words, numbers, eps):
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([x1, x2])
    n = x1.shape[0]  # not len(): that would fix N while compiling
    width, dtype = kernels.layout(x1.shape[1], tau.dtype, precision)
    loss, rows = tau.new_empty(2 * n if settings.reduction == "none" else ()), tau.new_empty(2 * n)
    total, dx = 2 * settings.total(n), tau.new_empty(2 * n if _ahead(kernels, n, settings) else 0, width)
    return loss, rows, tau.new_empty(total, width, dtype=dtype), tau.new_empty(total), dx


@torch.library.custom_op("simclr_fast::nt_xent_backward", mutates_args=())
def _backward(
    grad: Tensor, x1: Tensor, x2: Tensor, tau: Tensor, rows: Tensor, z: Tensor, lse: Tensor, dx: Tensor,
    slope: bool, words: str, numbers: list[int], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d/dx1, d/dx2, and <z, dz> of the rank's anchors, or with `slope` what has the same sum over all ranks."""
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([x1, x2])
    n, (own, pos) = len(x1), _places(len(x1), settings)
    with torch.autocast(x1.device.type, enabled=False):
        g, every_g, factor = settings.upstream(grad, rows, len(z), views=2)
        if _ahead(kernels, n, settings):
            dx1, dx2 = (part * (factor / tau) for part in dx.chunk(2))
            return dx1.to(x1.dtype), dx2.to(x2.dtype), torch.zeros_like(rows)
        miss = -g * torch.expm1(-rows)  # g_i (1 - P[i, pos(i)]), exact where P is next to 1
        x, lse_x = (z, lse) if settings.world == 1 else (t[own[0] : own[0] + 2 * n] for t in (z, lse))
        pull = miss + miss.roll(n)
        dz, slopes = kernels.gradient(x, z, tau, lse_x, g, lse, every_g, pull, own, pos, precision, slope)
        (dx1, dx2), radial = kernels.project(dz, x, [x1, x2], factor / tau, eps)
        return dx1, dx2, radial if slopes is None else slopes * (factor / tau)


@_backward.register_fake
def _(grad, x1, x2, tau, rows, *_):
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (x1, x2)), torch.empty_like(rows)


def _save(ctx, inputs, output) -> None:
    ctx.settings = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors  # once: checkpointing gives them out no more often
    dx1, dx2, radial = _backward(grad.contiguous(), *saved, ctx.needs_input_grad[2], *ctx.settings)
    dtau = radial.sum() / (-2 * saved[2]) if ctx.needs_input_grad[2] else None
    return dx1, dx2, dtau, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
backends.first_derivative_only("nt_xent", _backward)


@torch.library.custom_op("simclr_fast::nt_xent_stats", mutates_args=())
def _stats(z: Tensor, tau: Tensor, n: int, every: bool, words: str, numbers: list[int], eps: float) -> Tensor:
    """Top-1, entropy and alignment of this rank's n pairs, and the uniformity of its rows if it is wanted, [3 or 4]."""
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([z, tau])
    first, (own, _), (view1, view2) = settings.first(n), _places(n, settings), settings.views(z, n)
    with torch.autocast(z.device.type, enabled=False):
        x1, x2 = z[own[0] : own[1]], z[own[1] : own[1] + n]
        entropy, hit = kernels.spread(x1, view2, tau, first, precision)
        gap = x1.to(tau.dtype) - x2.to(tau.dtype)
        found = [hit.mean(), entropy.mean(), torch.linalg.vecdot(gap, gap).mean()]
        if every:  # exp(-2 |z_i - z_j|^2) = exp(S - 4) at tau = 1/4
            quarter, sums = torch.full_like(tau, 0.25), []
            for x, y in ((x1, view1), (x2, view2)):
                x = y if settings.world == 1 else x
                sums.append(kernels.statistics(x, y, quarter, [first], [ABSENT], precision)[1].logsumexp(0))
            found.append((sums[0] + sums[1]) / 2 - 4 - math.log(max(n * (len(view1) - 1), 1)))
        return torch.stack(found).to(tau.dtype)


@_stats.register_fake
def _(z, tau, n, every, *_):
    return tau.new_empty(4 if every else 3)
