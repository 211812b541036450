"""Training with labels: crops and flips, cross-entropy, Nesterov momentum, half a cosine. One rank equals several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast.config import ConfigError
from simclr_fast.data import Policy, Settings, Split, train_crops
from simclr_fast.data.engines.choice import preload
from simclr_fast.data.sources.samples import Ticker
from simclr_fast.distributed import data_parallel
from simclr_fast.evaluation.job import Job, Labelled
from simclr_fast.models.batchnorm import BatchNorm, share_scope
from simclr_fast.optim import Schedule, total_steps
from simclr_fast.record import RunError
from simclr_fast.training.setup import arithmetic
from simclr_fast.training.stall import watched

MOMENTUM = 0.9
DEFAULT_BATCH = 256
LOOKS = 50  # steps between looks at the loss, for each of which the host waits

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train."""

    batch: int
    """Images of a global batch; a multiple of the ranks. It may be larger than the images are many."""
    steps: int
    lr: float
    """At the first step; the cosine ends at 0."""
    weight_decay: float = 0.0
    """In the gradient, of all but BatchNorm's parameters."""

    @classmethod
    def of_epochs(cls, batch: int, images: int, epochs: int, base_lr: float, weight_decay: float) -> Recipe:
        """The official number of steps for so many passes; the rate is base_lr x batch / 256."""
        return cls(
            batch=batch, steps=total_steps(images, epochs, batch), lr=base_lr * batch / 256, weight_decay=weight_decay
        )

    def __str__(self) -> str:
        return f"{self.steps:,} steps of {self.batch:,} images, lr {self.lr:.4g}"


def batch_for(given: int | None, images: int, world: int) -> int:
    """The batch that was asked for, else 256, or all images where they are fewer.

    Raises:
        ConfigError: the processes do not divide it.
    """
    if given is None:
        return max(min(DEFAULT_BATCH, images) // world, 1) * world
    if given % world:
        raise ConfigError(f"batch must be divisible by the number of processes, got batch={given}, processes={world}")
    return given


def crops(policy: Policy) -> Policy:
    """The augmentation for training with labels: a random crop and a flip, prepared as for this policy."""
    return Policy(policy.size, dialect=policy.dialect, jitter_strength=0, gray_p=0, blur_p=0)


class Frozen(nn.Module):
    """A classifier on an encoder that stays as it is, in eval mode whatever mode it is put in."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder.requires_grad_(False), head

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.encoder(images)
        with full_precision(h):
            return self.head(h.float())


def full_precision(h: Tensor) -> torch.autocast:
    """Where the precision for the encoder does not reach: a classifier is trained in float32, as it is tested."""
    return torch.autocast(h.device.type, enabled=False)


def classifier(features: int, classes: int) -> nn.Linear:
    """A linear layer of zeros, as the original starts it."""
    layer = nn.Linear(features, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def fit(
    model: nn.Module, images: Labelled, recipe: Recipe, job: Job, *, name: str = "training",
    targets: Tensor | None = None, loss: Loss = F.cross_entropy,
) -> None:  # fmt: skip
    """Train what wants a gradient, in place, on the rank's device; BatchNorm in train mode is over the global batch.

    Args:
        model: prepared images [B, 3, S, S] to logits [B, K].
        name: what it is called while it goes on.
        targets: for the loss, [n, ...]; without it the images' classes.
        loss: (logits [B, K] float32, targets [B, ...]) to their mean.
    Raises:
        RunError: the loss is not finite; on every rank.
        DataError: images became unreadable.
    """
    ranks, settings = job.ranks, job.settings
    wanted = torch.from_numpy(images.labels) if targets is None else targets
    precision = arithmetic(settings.precision, ranks.device)
    model.to(ranks.device).to(memory_format=torch.channels_last).train()
    scope = share_scope(model)
    scope.group = ranks.group
    module = model if ranks.group is None else data_parallel(model)
    optimizer = torch.optim.SGD(_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=MOMENTUM, nesterov=True)
    schedule = Schedule(recipe.lr, 0, recipe.steps)
    torch.manual_seed(hash((settings.seed, ranks.rank)) % 2**63)
    threads = ranks.threads if settings.workers is None else settings.workers
    split, how = only(images), Settings(threads, ranks=ranks.per_host)
    preload("auto", split, ranks.device, how)  # a long time, in which no reader hangs
    batches = train_crops(
        split, crops(job.encoder.policy), np.arange(len(split)), batch=recipe.batch, seed=settings.seed,
        steps=recipe.steps, rank=ranks.rank, world=ranks.world, device=ranks.device, dtype=precision.views,
        settings=how,
    )  # fmt: skip
    progress = _Progress(job, name, recipe)
    source: Any = watched(batches, settings.timeout)
    try:
        for step in range(recipe.steps):
            views, rows = progress.waited(source)
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            with precision.autocast:
                logits = module(views)
            value = loss(logits.float(), wanted[torch.from_numpy(rows)].to(ranks.device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            progress.look(step, value.detach())
    finally:
        source.close()
        progress.close()
    model.eval()


def only(images: Labelled) -> Split:
    """A split of these images alone: of the others nothing is decoded, and none takes the place of one."""
    split, rows = images.split, images.indices
    if len(rows) == len(split):
        return split
    columns: dict[str, Any] = {
        name: None if column is None else column[rows]
        for name in ("offsets", "lengths", "sizes", "labels", "pixels", "stamps")
        for column in (getattr(split, name),)
    }
    return Split(names=[split.names[row] for row in rows], paths=[split.paths[row] for row in rows], **columns)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    norms = {id(p) for module in model.modules() if isinstance(module, BatchNorm) for p in module.parameters()}
    wanting = [p for p in model.parameters() if p.requires_grad]
    decayed = {"params": [p for p in wanting if id(p) not in norms], "weight_decay": weight_decay}
    others = {"params": [p for p in wanting if id(p) in norms], "weight_decay": 0.0}
    return [group for group in (decayed, others) if group["params"]]


class _Progress:
    """Speed, time left and the share of the time spent waiting; and whether the loss is finite."""

    def __init__(self, job: Job, name: str, recipe: Recipe) -> None:
        self.job, self.name, self.recipe = job, name, recipe
        self.ticker, self.began, self.wait = Ticker(), time.monotonic(), 0.0

    def waited(self, batches: Any) -> Any:
        """The next batch."""
        asked = time.monotonic()
        batch = next(batches)
        self.wait += time.monotonic() - asked
        return batch

    def look(self, step: int, loss: Tensor) -> None:
        """After a step."""
        last = step + 1 == self.recipe.steps
        if (step + 1) % LOOKS and not last:
            return
        value = self.job.ranks.mean(loss.double().clone()).item()
        if not math.isfinite(value):
            raise RunError(
                f"lr must be lower: the loss of {self.name} is {value} by step {step + 1:,}, with rates "
                f"from {self.recipe.lr:g} down"
            )
        passed = time.monotonic() - self.began
        shown = (
            f"{self.name}: step {step + 1:,} of {self.recipe.steps:,}, loss {value:.3f}, "
            f"{(step + 1) * self.recipe.batch / passed:,.0f} images/s, waiting for data {self.wait / passed:.0%}"
        )
        if last:
            self.job.say(shown)
        elif self.job.ranks.main and self.ticker.due():
            self.ticker.show(f"{shown}, {passed / (step + 1) * (self.recipe.steps - step - 1):.0f} s left")

    def close(self) -> None:
        self.ticker.close()
