"""One update of the weights: views of this rank -> encoder, head, loss over all ranks, gradient, LARS.

A batch that is too large for the memory goes through the encoder in K chunks (Gao et al. 2021, arXiv:2101.06983): the
embeddings of all chunks first, without graphs; then the loss of the whole batch and its gradient for each embedding;
then chunk by chunk the encoder again, with that gradient. Loss and negatives are those of the whole batch.

The host waits for nothing in a step. Where the loss of a rank or a gradient is not finite, the step changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_fast.config import ConfigError
from simclr_fast.distributed import data_parallel
from simclr_fast.models.batchnorm import blocks, groups_of, share_scope
from simclr_fast.optim import LARS, Schedule

METRICS = ("loss", "contrastive_top1", "embedding_spread", "skipped")


class Step:
    """The trainer's step, for one rank.

    Args:
        method: embeddings of views, and `loss` of embeddings; `optimizer` holds its parameters.
        batch: images of the global batch.
        group: the ranks; None alone.
        accumulate: chunks of the batch, K.
        bn_images: images of the global batch, one after the other, that share BatchNorm statistics; without it those of
            a chunk, on all ranks.
        seed: of what a network draws at random, by step, chunk and rank; a chunk draws the same both times.
        compiled: a mode of torch.compile for the encoder and head, or `off`.
        timeout: seconds that ranks wait for each other within a BatchNorm block.
    Raises:
        ConfigError: chunks or blocks do not come out even; or `compiled` replays CUDA graphs over several chunks, whose
            outputs they would overwrite.
    """

    def __init__(
        self,
        method: Any,
        optimizer: LARS,
        schedule: Schedule,
        *,
        batch: int,
        group: dist.ProcessGroup | None = None,
        autocast: AbstractContextManager[Any] | None = None,
        accumulate: int = 1,
        bn_images: int | None = None,
        seed: int = 0,
        compiled: str = "off",
        timeout: float = 600.0,
    ) -> None:
        if accumulate > 1 and compiled not in ("off", "default"):
            raise ConfigError(f"compile must be off or default for accumulate={accumulate}, got compile={compiled}")
        self.method, self.optimizer, self.schedule = method, optimizer, schedule
        self.group, self.chunks, self.seed = group, accumulate, seed
        self.autocast = autocast or nullcontext()
        self.rank, self.world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.bn_images = bn_images or batch // accumulate
        self.pieces, size = even(batch, self.world, accumulate, self.bn_images)
        self.scope = share_scope(method)
        self.scope.pieces, self.scope.group = self.pieces, groups_of(size, self.world, timeout)
        self.scope.everyone = group if size < self.world else None
        self.model: nn.Module = method if group is None else data_parallel(method)
        self._embed = self.model if compiled == "off" else torch.compile(self.model, mode=compiled)

    def __call__(self, number: int, parts: Iterable[Tensor]) -> Tensor:
        """Step number `number`, from 0.

        Args:
            parts: K tensors [2m, 3, S, S]: the first views of this rank's m images of a chunk, then the second ones.
        Returns:
            [4], float32 on the device, as in METRICS: of this rank's rows, and whether the step was skipped (1 or 0).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(number)
        self.optimizer.zero_grad()
        with self.scope.set_to("keep"):
            loss, stats = (self._whole if self.chunks == 1 else self._chunked)(number, iter(parts))
        found = self._not_finite()
        self.optimizer.found_inf = found  # as a GradScaler would; the step itself looks at it
        self.optimizer.step()
        self.scope.commit(found)
        return torch.stack([*(stats[name].float() for name in METRICS[:-1]), found])

    def _whole(self, number: int, parts: Iterator[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = self._embeddings(next(parts), number, 0).chunk(2)
        loss, stats = self.method.loss(z1, z2, self.group)
        loss.backward(_seed_of(loss))
        return loss, stats

    def _chunked(self, number: int, parts: Iterator[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        views, embeddings = [], []
        for k in range(self.chunks - 1):
            views.append(next(parts))
            with torch.no_grad():
                embeddings.append(self._embeddings(views[-1], number, k))
        with self._unsynchronised():  # the last chunk keeps its graph, and so runs once
            last = self._embeddings(next(parts), number, self.chunks - 1)
        leaves = [z.detach().requires_grad_() for z in (*embeddings, last)]
        z1, z2 = (torch.cat(rows) for rows in zip(*(z.chunk(2) for z in leaves), strict=True))
        loss, stats = self.method.loss(z1, z2, self.group)
        learnt = list(self.method.loss_parameters)
        grads = list(torch.autograd.grad(loss, [*leaves, *learnt], _seed_of(loss)))
        with self._unsynchronised():
            last.backward(grads[self.chunks - 1])
        with self.scope.set_to("ignore"):
            for k in range(self.chunks - 1):
                final = k == self.chunks - 2
                others = (learnt, grads[self.chunks :]) if final else ([], [])
                with nullcontext() if final else self._unsynchronised():
                    z = self._embeddings(views[k], number, k)
                    torch.autograd.backward([z, *others[0]], [grads[k], *others[1]])
        return loss, stats

    def _embeddings(self, views: Tensor, number: int, chunk: int) -> Tensor:
        """[2m, D], the rows as in `views`."""
        torch.manual_seed(hash((self.seed, number, chunk, self.rank)) % 2**63)
        with self.autocast:
            if self.pieces == 1:
                z = self._embed(views)
            else:  # BatchNorm's blocks have to be consecutive rows
                rows = torch.arange(len(views), device=views.device).view(2, self.pieces, -1).transpose(0, 1).flatten()
                z = self._embed(views[rows].contiguous(memory_format=torch.channels_last))[rows.argsort()]
        self.scope.end_pass()
        return z

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        """Within: gradients are added up on this rank alone."""
        return self.model.no_sync() if isinstance(self.model, nn.parallel.DistributedDataParallel) else nullcontext()

    def _not_finite(self) -> Tensor:
        """1.0 where a gradient, and so perhaps the loss of a rank, is not finite; equal on all ranks."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([norm.float() for norm in torch._foreach_norm(grads)]).sum()
        return (~total.isfinite()).float()


def _seed_of(loss: Tensor) -> Tensor:
    """The gradient of a loss for itself: NaN where it is not finite, which the mean over the ranks shows to all."""
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


def even(batch: int, world: int, chunks: int, bn_images: int) -> tuple[int, int]:
    """BatchNorm's blocks in a rank's chunk, and the ranks that share a block.

    Raises:
        ConfigError: the batch is not divisible by chunks and ranks, or the blocks do not fit.
    """
    if batch % (world * chunks):
        raise ConfigError(
            f"batch must be divisible by processes x accumulate, got batch={batch}, processes={world}, "
            f"accumulate={chunks}"
        )
    found = blocks(batch, world, chunks, bn_images)
    if found is None:
        own = batch // (world * chunks)
        fits = [n for n in range(1, batch // chunks + 1) if blocks(batch, world, chunks, n)]
        near = sorted(sorted(fits, key=lambda n: abs(n - bn_images))[:4])
        raise ConfigError(
            f"bn_chunk must divide the {own} images that a process takes at a time, or be a multiple of them that "
            f"divides those of all, {batch // chunks}, got {bn_images}; near it: {', '.join(map(str, near))}"
        )
    return found
