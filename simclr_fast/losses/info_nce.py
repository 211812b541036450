"""InfoNCE: queries against keys, as one registered op on the kernels of NT-Xent. What MoCo, CMC, CPC and CLIP need.

With unit rows q and k, S = q k^T / tau and pos(i) = i:

    loss of query i = log sum_j exp S[i, j] - S[i, i];    of key j, if symmetric, the same down column j
    dL/dq_i         = 1/tau sum_j (g_i P[i, j] + h_j Q[i, j]) k_j   less (g_i + h_i) k_i / tau
    dL/dk_j         = 1/tau sum_i (g_i P[i, j] + h_j Q[i, j]) q_i   less (g_j + h_j) q_j / tau
    dL/dtau         = -1/tau sum_i <q_i, dL/dq_i>

P and Q are the softmax of the rows and of the columns of S, g and h dL/d(loss of a query, of a key). Queries, keys and
both log-sum-exps of all ranks are gathered in the forward pass; the backward pass has no collective.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simclr_fast.losses import backends, blocked
from simclr_fast.losses.backends import Settings, require
from simclr_fast.losses.blocked import ABSENT, unit_rows


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    symmetric: bool = False,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str = "auto",
    grad_average: bool = True,
    uneven: bool = False,
    return_stats: bool = False,
    eps: float = 1e-12,
) -> Any:
    """Normalised, temperature-scaled cross-entropy of N queries, each with one key among many, in nats.

    Args:
        query, key: [N, D], any floating dtypes and strides, not normalised; key i is the positive of query i, and
            the other keys, of all ranks of `group`, are its negatives.
        temperature: tau > 0, a number or a 0-dim tensor (learnable; its value is not checked).
        negatives: [M, D], further keys that no query matches, such as a queue. Every rank has its own.
        in_batch: False where `negatives` are the only negatives (MoCo).
        symmetric: the mean of this and of the loss of the keys among the queries (CLIP). `negatives` are not
            queries' rivals there.
        group, reduction, backend, precision, grad_average, uneven, eps: as in `nt_xent`, over the N queries.
        return_stats: also return detached 0-dim tensors over this rank's queries: `contrastive_top1` (share whose
            nearest key is their own), `contrastive_entropy` (of the softmax over the keys, nats),
            `alignment` (mean squared distance of a pair).

    Returns:
        The loss, float32 (float64 if an input is); with `return_stats`, (loss, stats).

    Raises:
        ValueError: an argument breaks its rule.
    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4; the symmetric form: arXiv:2103.00020, figure 3.
    """
    chosen = {"reduction": reduction, "backend": backend, "precision": precision}
    inputs = {"query": query, "key": key} | ({} if negatives is None else {"negatives": negatives})
    tau = backends.check(inputs, temperature, eps, group, **chosen)
    require(
        (query.shape[0] == key.shape[0], "query and key must have one shape", [list(query.shape), list(key.shape)]),
        (negatives is None or negatives.shape[0] >= 1, "negatives must be [M, D] with M >= 1, or None", "M = 0"),
        (in_batch or negatives is not None, "negatives must be given with in_batch=False", negatives),
        (in_batch or not symmetric, "symmetric must be False with in_batch=False", symmetric),
        (return_stats in (False, True), "return_stats must be False or True", return_stats),
    )
    settings = backends.settings_of(group, uneven, query, "query and key", **chosen, grad_average=grad_average, eps=eps)
    extra = key.new_empty(0, key.shape[1]) if negatives is None else negatives
    if backend == "reference":
        loss, u, m = _reference(query, key, extra, tau, in_batch, symmetric, reduction, eps)
        settings = settings._replace(backend="native", precision="auto")
    else:
        backends.refuse_transforms("info_nce", query, key, extra, tau)
        loss, _, _, u, m, _, _ = _forward(query, key, extra, tau, in_batch, symmetric, *settings.packed())
    if not return_stats:
        return loss
    stats = _stats(u.detach(), m.detach(), tau.detach(), query.shape[0], in_batch, *settings.packed())
    return loss, dict(zip(("contrastive_top1", "contrastive_entropy", "alignment"), stats.unbind(), strict=True))


def _reference(
    query: Tensor, key: Tensor, extra: Tensor, tau: Tensor, in_batch: bool, symmetric: bool, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and unit rows of queries and keys, and of negatives: the yardstick, through the whole matrix."""
    with torch.autocast(query.device.type, enabled=False):
        q, k, m = (unit_rows(x.to(tau.dtype), eps)[0] for x in (query, key, extra))
        labels = torch.arange(len(q), device=q.device)
        if in_batch:
            logits = q @ torch.cat([k, m]).T / tau
        else:
            logits, labels = torch.cat([(q * k).sum(1, keepdim=True), q @ m.T], 1) / tau, torch.zeros_like(labels)
        rows = F.cross_entropy(logits, labels, reduction="none")
        if symmetric:
            rows = (rows + F.cross_entropy(k @ q.T / tau, labels, reduction="none")) / 2
        loss = rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
        return loss, torch.cat([q, k]), m


def _columns(u: Tensor, m: Tensor, n: int, in_batch: bool, settings: Settings) -> tuple[Tensor, Tensor]:
    """All queries and all columns that they are compared with, from the gathered rows and the negatives."""
    if not in_batch:
        return u[:n], m
    queries, keys = settings.views(u, n)
    return queries, torch.cat([keys, m]) if len(m) else keys


@torch.library.custom_op("simclr_fast::info_nce", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, extra: Tensor, tau: Tensor, in_batch: bool, symmetric: bool,
    words: str, numbers: list[int], eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss; losses of the rank's queries, and of its keys; unit rows of all queries and keys, and of the negatives;
    log-sum-exp of all queries, and of all keys. What is not needed is empty; without in_batch "all" is one rank's."""
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([query, key, extra])
    n = len(query)
    with torch.autocast(query.device.type, enabled=False):
        own = kernels.operand([query, key], tau.dtype, precision, eps)
        m = kernels.operand([extra], tau.dtype, precision, eps)
        u = settings.gather(own, views=2) if in_batch else own
        queries, columns = _columns(u, m, n, in_batch, settings)
        pos = [settings.first(n) if in_batch else ABSENT]
        rows_q, lse_q = kernels.statistics(own[:n], columns, tau, [ABSENT], pos, precision)
        rows_k, lse_k = tau.new_empty(0), tau.new_empty(0)
        if in_batch:
            lse_q = settings.gather(lse_q)
        else:  # the positive is not among the columns
            match = torch.linalg.vecdot(own[:n].to(tau.dtype), own[n:].to(tau.dtype)) / tau
            rows_q = torch.logaddexp(lse_q - match, tau.new_zeros(()))
            lse_q = match + rows_q
        if symmetric:
            rows_k, lse_k = kernels.statistics(own[n:], queries, tau, [ABSENT], pos, precision)
            lse_k = settings.gather(lse_k)
        rows = (rows_q + rows_k) / 2 if symmetric else rows_q
        return settings.reduced(rows, settings.total(n)), rows_q, rows_k, u, m, lse_q, lse_k


@_forward.register_fake
def _(query, key, extra, tau, in_batch, symmetric, words, numbers, eps):
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([query, key, extra])
    n = query.shape[0]
    total = settings.total(n) if in_batch else n
    width, dtype = kernels.layout(query.shape[1], tau.dtype, precision)
    u, m = (tau.new_empty(rows, width, dtype=dtype) for rows in (2 * total, extra.shape[0]))
    rows_k, lse_k = (n, total) if symmetric else (0, 0)
    shapes = ((n,) if settings.reduction == "none" else (), (n,), (rows_k,))
    return *(tau.new_empty(shape) for shape in shapes), u, m, tau.new_empty(total), tau.new_empty(lse_k)


@torch.library.custom_op("simclr_fast::info_nce_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, extra: Tensor, tau: Tensor, rows_q: Tensor, rows_k: Tensor, u: Tensor,
    m: Tensor, lse_q: Tensor, lse_k: Tensor, wanted: list[bool], in_batch: bool, symmetric: bool,
    words: str, numbers: list[int], eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d/dquery, d/dkey, d/dnegatives, empty where not wanted, and <q, dq> of the rank's queries, or, if the gradient of
    the temperature is wanted, what has the same sum over all ranks."""
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([query, key, extra])
    n, first, absent = len(query), settings.first(len(query)) if in_batch else 0, [ABSENT]
    pos = [first] if in_batch else absent
    dq, dk, dm, radial = query.new_empty(0), key.new_empty(0), extra.new_empty(0), tau.new_empty(0)
    with torch.autocast(query.device.type, enabled=False):
        g, every_g, factor = settings.upstream(grad, rows_q, settings.total(n), alone=not in_batch)
        factor = factor / (2 * tau if symmetric else tau)
        q, k = u[2 * first : 2 * first + n], u[2 * first + n : 2 * first + 2 * n]
        queries, columns = _columns(u, m, n, in_batch, settings)
        pull = -g * torch.expm1(-rows_q)
        lse_own, (lse_columns, g_columns) = lse_q[first : first + n], _silent(len(columns), g)
        if symmetric:
            pull = pull - g * torch.expm1(-rows_k)
            lse_columns[: len(lse_k)], g_columns[: len(lse_k)] = lse_k, every_g
        if wanted[0]:
            of_columns = lse_columns, g_columns
            du, slopes = kernels.gradient(
                q, columns, tau, lse_own, g, *of_columns, pull, absent, pos, precision, wanted[3]
            )
            if not in_batch:
                du[0] -= pull[:, None] * k
                cosines = torch.linalg.vecdot(q.to(tau.dtype), k.to(tau.dtype))
                slopes = None if slopes is None else slopes - pull * (cosines - 1)
            (dq,), radial = kernels.project(du, q, [query], factor, eps)
            radial = radial if slopes is None else slopes * factor
        if wanted[1]:
            if in_batch:
                of_keys = lse_columns[first : first + n], g_columns[first : first + n]
                du, _ = kernels.gradient(k, queries, tau, *of_keys, lse_q, every_g, pull, absent, pos, precision)
            else:
                du = (-pull[:, None] * q)[None]
            (dk,), _ = kernels.project(du, k, [key], factor, eps)
        if wanted[2]:
            quiet = _silent(len(m), g)
            du, _ = kernels.gradient(m, q, tau, *quiet, lse_own, g, quiet[1], absent, absent, precision)
            (dm,), _ = kernels.project(du, m, [extra], factor, eps)
        return dq, dk, dm, radial


@_backward.register_fake
def _(grad, query, key, extra, tau, rows_q, rows_k, u, m, lse_q, lse_k, wanted, *_):
    grads = zip((query, key, extra), wanted[:3], strict=True)
    dq, dk, dm = (x.new_empty(x.shape if want else (0,)) for x, want in grads)
    return dq, dk, dm, tau.new_empty(query.shape[0] if wanted[0] else 0)


def _silent(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """lse and g of rows that have no loss of their own."""
    return like.new_full((count,), math.inf), like.new_zeros(count)


def _save(ctx, inputs, output) -> None:
    ctx.settings = inputs[4:]
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    query, key, negatives, temperature = ctx.needs_input_grad[:4]
    wanted = [query or temperature, key, negatives, temperature]
    saved = ctx.saved_tensors  # once: checkpointing gives them out no more often
    *grads, radial = _backward(grad.contiguous(), *saved, wanted, *ctx.settings)
    dtau = -radial.sum() / saved[3] if temperature else None
    needed = (query, key, negatives)
    return *(x if need else None for x, need in zip(grads, needed, strict=True)), dtau, *(None,) * 5


_forward.register_autograd(_differentiate, setup_context=_save)
backends.first_derivative_only("info_nce", _backward)


@torch.library.custom_op("simclr_fast::info_nce_stats", mutates_args=())
def _stats(
    u: Tensor, m: Tensor, tau: Tensor, n: int, in_batch: bool, words: str, numbers: list[int], eps: float
) -> Tensor:
    """Top-1 and entropy over the columns, and alignment, of the rank's queries, [3]."""
    settings = Settings.unpacked(words, numbers, eps)
    kernels, precision = settings.kernels([u, tau])
    first = settings.first(n) if in_batch else 0
    with torch.autocast(u.device.type, enabled=False):
        q, k = u[2 * first : 2 * first + n], u[2 * first + n : 2 * first + 2 * n]
        _, columns = _columns(u, m, n, in_batch, settings)
        if in_batch:
            entropy, hit = kernels.spread(q, columns, tau, first, precision)
        else:
            entropy, hit = blocked.spread_beside(q, k, columns, tau)
        gap = q.to(tau.dtype) - k.to(tau.dtype)
        return torch.stack([hit.mean(), entropy.mean(), torch.linalg.vecdot(gap, gap).mean()]).to(tau.dtype)


@_stats.register_fake
def _(u, m, tau, n, *_):
    return tau.new_empty(3)
