"""A linear classifier that learns beside pretraining, on features h that know nothing of it.

It sees the features of both views of each batch as they leave the encoder in train mode, detached. They are
standardised by running means and variances, and the classifier has zeros for its first weights and momentum 0.9.

Its learning rate is 4 / d for d features, whatever the encoder, the batch and the scale of h: d standardised features
have second moments of trace d, and softmax's curvature is at most 1/2, so that no direction is curved by more than
d / 2, and momentum 0.9 is stable below 2 (1 + 0.9) / (d / 2) = 7.6 / d. (The original's code moves this classifier at
the rate of pretraining, 4.8 for a batch of 4096.)
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

RATE = 4.0  # divided by the number of features
MOMENTUM = 0.9  # also of the running means and variances
EPS, TINY = 1e-4, 1e-12  # of the mean variance, below which a feature counts as constant


class OnlineLinear:
    """Labels go in with `expect` as the views of each part of a batch do; `update` then learns from the batch."""

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        classes: int,
        *,
        pieces: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            features: of the encoder, d.
            pieces: in which the step hands a part's rows to the encoder, as `Step.pieces`.
            group: the ranks, whose features are learnt from together.
        """
        self.pieces, self.group = pieces, group
        device = next(encoder.parameters()).device
        self.weight = torch.zeros(classes, features + 1, device=device)  # its last column is the bias
        self.velocity = torch.zeros_like(self.weight)
        self.moments = torch.zeros(2, features, device=device)  # running sums of h and h^2, of weight `seen`
        self.seen = torch.zeros((), device=device)
        self.hits = torch.zeros(2, device=device, dtype=torch.float64)  # since `accuracy`: right, all
        self._labels: list[Tensor] = []
        self._features: list[Tensor] = []
        encoder.register_forward_hook(self._keep)

    def expect(self, labels: Tensor) -> None:
        """Labels int64 [m] of the images whose views, [2m, ...], come next; -1 for an image without one."""
        rows = torch.arange(2 * len(labels)).view(2, self.pieces, -1).transpose(0, 1).flatten()
        self._labels.append(labels.repeat(2)[rows].to(self.weight.device, non_blocking=True))

    def _keep(self, encoder: nn.Module, _: object, h: Tensor) -> None:
        if encoder.training and len(self._features) < len(self._labels):  # else an evaluation, or seen already
            self._features.append(h.detach())

    @torch.no_grad()
    def update(self) -> None:
        """Learn from the features kept since the last update, after saying what their classes are."""
        h, labels = torch.cat(self._features).float(), torch.cat(self._labels)
        self._features, self._labels = [], []
        mean, square = self.moments / self.seen.clamp(min=TINY)
        variance = (square - mean.square()).clamp(min=0)
        x = (h - mean) * (variance + EPS * variance.mean() + TINY).rsqrt()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        logits, known = x @ self.weight.T, labels >= 0
        hits = ((logits.argmax(1) == labels) & known).sum()
        residual = logits.softmax(1)
        residual.scatter_add_(1, labels.clamp(min=0)[:, None], -residual.new_ones(len(x), 1))
        residual *= known[:, None]
        own = (residual.T @ x, torch.stack([h.sum(0), h.square().sum(0)]), torch.stack([hits, known.sum()]).to(h))
        flat = torch.cat([part.flatten() for part in (*own, h.new_full((1,), len(h)))])
        if self.group is not None:
            dist.all_reduce(flat, group=self.group)
        sound = flat.isfinite().all()  # as with a step that is skipped: nothing changes
        flat = torch.where(sound, flat, 0.0)
        gradient, moments, counted, rows = flat.split([self.weight.numel(), self.moments.numel(), 2, 1])
        learns = sound & (self.seen > 0)  # the first batch is there to be measured
        moved = MOMENTUM * self.velocity + gradient.view_as(self.weight) / counted[1].clamp(min=1)
        self.velocity = torch.where(learns, moved, self.velocity)
        self.weight = torch.where(learns, self.weight - RATE / len(mean) * moved, self.weight)
        fresh = MOMENTUM * self.moments + (1 - MOMENTUM) * moments.view_as(self.moments) / rows.clamp(min=1)
        self.moments = torch.where(sound, fresh, self.moments)
        self.seen = torch.where(sound, MOMENTUM * self.seen + 1 - MOMENTUM, self.seen)
        self.hits += counted

    def accuracy(self) -> float:
        """Share of the labelled views since the last call that were classified rightly before they were learnt from."""
        right, every = self.hits.tolist()
        self.hits.zero_()
        return right / every if every else math.nan

    def state_dict(self) -> dict[str, Tensor]:
        """What has to outlive a restart; equal on all ranks."""
        return {name: getattr(self, name) for name in ("weight", "velocity", "moments", "seen", "hits")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for name, tensor in state.items():
            setattr(self, name, tensor.to(self.weight.device))
