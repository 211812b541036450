"""BatchNorm as the original has it: exact statistics over a block of the global batch, whichever ranks hold it.

The population variance (of n values, not n - 1) divides the activations and also enters the running variance, where
torch's own layers put n / (n - 1) of it. Source: github.com/google-research/simclr, resnet.py.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast.models import fused_norm

Norm = nn.modules.batchnorm._BatchNorm


class Scope:
    """What the layers of one network take their statistics over, and what becomes of them.

    A rank's rows hold `pieces` blocks, one after the other, or one part of a block that the ranks of `group` share.
    """

    def __init__(self) -> None:
        self.pieces = 1
        self.group: dist.ProcessGroup | None = None
        self.everyone: dist.ProcessGroup | None = None  # of several groups, whose running statistics are averaged
        self.mode = "update"  # of the running statistics: at once; or "keep" for `commit`; or "ignore"
        self.kept: list[tuple[BatchNorm, Tensor, Tensor]] = []  # of one pass: compiled code depends on its length
        self._passes: list[list[tuple[BatchNorm, Tensor, Tensor]]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        return Scope()  # a copied network stands alone

    @contextmanager
    def set_to(self, mode: str):
        """Within: what becomes of the statistics."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def end_pass(self) -> None:
        """Put what one forward pass has kept to the rest."""
        kept, self.kept = self.kept, []
        self._passes += [kept] if kept else []

    @torch.no_grad()
    def commit(self, skipped: Tensor) -> None:
        """Move the running statistics by the mean of all that was kept; not if `skipped` (0-dim) is 1."""
        passes, self._passes = self._passes, []
        if not passes:
            return
        layers = [layer for layer, _, _ in passes[0]]
        every = [torch.cat([part for _, mean, var in kept for part in (mean, var)]) for kept in passes]
        fresh = torch.stack(every).mean(0)
        if self.everyone is not None:
            dist.all_reduce(fresh, group=self.everyone)
            fresh /= dist.get_world_size(self.everyone)
        running = [buffer for layer in layers for buffer in layer.buffers_of_statistics()[:2]]
        counts = [layer.buffers_of_statistics()[2] for layer in layers]
        old = torch.cat(running)
        weights = [old.new_full((2 * layer.num_features,), layer.momentum or 0.0) for layer in layers]
        moved = torch.where(skipped > 0, old, old.lerp(fresh.to(old.dtype), torch.cat(weights)))
        torch._foreach_copy_(running, moved.split([len(buffer) for buffer in running]))
        torch._foreach_add_(counts, (skipped == 0).to(counts[0].dtype))


class BatchNorm(Norm):
    """Normalises over all axes but the second; forward(x, residual, relu) also adds and rectifies."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scope = Scope()

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:  # type: ignore[override]
        """[relu](normalised x [+ residual]), [B, C] or [B, C, H, W], of x's dtype."""
        self._check_input_dim(x)
        if not self.training and self.running_mean is not None:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return _finished(y, residual, relu)
        pieces = self.scope.pieces
        if pieces == 1:
            y, mean, var = self._block(x, residual, relu)
        else:
            residuals = [None] * pieces if residual is None else residual.chunk(pieces)
            parts = [self._block(*part, relu) for part in zip(x.chunk(pieces), residuals, strict=True)]
            y = torch.cat([part[0] for part in parts])
            mean, var = (torch.stack([part[k] for part in parts]).mean(0) for k in (1, 2))
        if self.running_mean is not None and self.scope.mode != "ignore":
            self._record(mean.detach(), var.detach())
        return y

    def buffers_of_statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean and variance, [C], and how many batches they have seen."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        return self.running_mean, self.running_var, self.num_batches_tracked

    def _block(self, x: Tensor, residual: Tensor | None, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        group = self.scope.group
        if x.is_cuda and self.weight is not None and fused_norm.supports(x):
            return fused_norm.batch_norm(x, self.weight, self.bias, self.eps, residual=residual, relu=relu, group=group)
        if group is not None:
            y, mean, var = _OverRanks.apply(x, self.weight, self.bias, self.eps, group)
            return _finished(y, residual, relu), mean, var
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device).unbind()
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        count = x.numel() // x.shape[1]
        return _finished(y, residual, relu), mean, var * ((count - 1) / count)

    @torch.no_grad()
    def _record(self, mean: Tensor, var: Tensor) -> None:
        if self.scope.mode == "keep" and self.momentum is not None:
            self.scope.kept.append((self, mean, var))
            return
        running_mean, running_var, count = self.buffers_of_statistics()
        count += 1
        momentum = 1 / float(count) if self.momentum is None else self.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(var.to(running_var.dtype), momentum)


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """BatchNorm of [B, C]."""


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """BatchNorm of [B, C, H, W]."""


class _OverRanks(torch.autograd.Function):
    """Batch normalisation over the rows of all ranks of a group, with torch's own passes over the data."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        mean, var = mean.double(), var.double()  # the square of the mean is added here and taken away again below
        moments = torch.stack([mean, var + mean**2])
        dist.all_reduce(moments, group=group)
        mean, square = (moments / dist.get_world_size(group)).unbind()
        var = (square - mean**2).clamp(min=0)
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group, ctx.has_bias = eps, group, bias is not None
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mean, var = ctx.saved_tensors
        scale, inverse = torch.ones_like(mean) if weight is None else weight, torch.rsqrt(var + ctx.eps)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, var, mean, inverse, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([dweight, dbias]).double()
        dist.all_reduce(sums, group=ctx.group)
        count = x.numel() // x.shape[1] * dist.get_world_size(ctx.group)
        radial, shift = (sums / count).to(mean.dtype).unbind()
        # dx of fixed statistics, less what they change: (shift + xhat radial) scale / std
        slope = radial * inverse * inverse * scale
        level = shift * inverse * scale - slope * mean
        shape = (1, -1, *(1 for _ in range(2, x.ndim)))
        dx = (dx - (x * slope.view(shape) + level.view(shape))).to(x.dtype)
        return dx, None if weight is None else dweight, dbias if ctx.has_bias else None, None, None


def _finished(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = y if residual is None else y.add_(residual)
    return torch.relu_(y) if relu else y


class _WithActivation(BatchNorm2d):
    """For timm's layers that drop and activate after the normalisation."""

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:  # type: ignore[override]
        drop, act = self.get_submodule("drop"), self.get_submodule("act")
        return act(drop(super().forward(x, residual, relu)))


def share_scope(model: nn.Module) -> Scope:
    """Put all BatchNorm layers of a network under one new `Scope`; torch's and timm's become ours."""
    scope = Scope()
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = BatchNorm1d if isinstance(module, nn.BatchNorm1d) else BatchNorm2d
        elif type(module).__name__ == "BatchNormAct2d":
            module.__class__ = _WithActivation
        if isinstance(module, BatchNorm):
            module.scope = scope
    return scope


def blocks(batch: int, world: int, chunks: int, images: int) -> tuple[int, int] | None:
    """How ranks share blocks of `images` images of the global batch: (blocks in a rank's chunk, ranks to a block).

    One of the two is 1. None where the blocks do not fit: a chunk of a rank must be made of whole blocks, or a block of
    the chunks of whole ranks.
    """
    own = batch // (world * chunks)
    if images <= own:
        return (own // images, 1) if own % images == 0 else None
    return (1, images // own) if images % own == 0 and world % (images // own) == 0 else None


def groups_of(size: int, world: int, timeout: float) -> dist.ProcessGroup | None:
    """This rank's group of `size` consecutive ranks, which wait `timeout` seconds; None for 1. Every rank calls it."""
    if size == 1:
        return None
    if size == world:
        return dist.group.WORLD
    return dist.new_subgroups(size, timeout=timedelta(seconds=timeout))[0]
