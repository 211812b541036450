"""The k-nearest-neighbour classifier: what an encoder's features know of labels that it never saw.

Cosine similarity, k = 20 neighbours, votes weighted by exp(similarity / 0.1), as in InstDisc (Wu et al. 2018) with the
temperature that MoCo's demonstration and lightly use.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from simclr_fast.nearest import nearest

NEIGHBOURS = 20
VOTE_TEMPERATURE = 0.1


def votes(
    bank: Tensor, labels: Tensor, queries: Tensor, *, classes: int, k: int = NEIGHBOURS,
    temperature: float = VOTE_TEMPERATURE,
) -> Tensor:  # fmt: skip
    """Votes [m, classes] for `queries` [m, d] among `bank` [n, d], whose `labels` are int64 [n]."""
    return voted(*nearest(bank, queries, k), labels, classes, temperature)


def voted(similarities: Tensor, indices: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Votes [m, classes] of neighbours, as `nearest` gives them, whose labels are `labels[indices]`."""
    # Of one query all weights are scaled alike, so that none overflows at a small temperature.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels[indices], weights)


def accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = NEIGHBOURS) -> float:
    """Fraction of `queries` [m, d] whose weighted vote among `bank` [n, d] is their label (int64, [m] and [n])."""
    found = votes(bank, bank_labels, queries, classes=int(bank_labels.max()) + 1, k=k)
    return (found.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def features(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Features [n, d], fp32, of the images in (images, indices) batches, by the encoder in eval mode."""
    training = encoder.training
    encoder.eval()
    rows = [encoder(images).float() for images, _ in batches]
    encoder.train(training)
    return torch.cat(rows)


@torch.no_grad()
def calibrated(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy of an encoder whose BatchNorm statistics are the mean over the images of `batches`; its weights are
    unchanged.

    An untrained network in eval mode would otherwise see the statistics 0 and 1 that it was made with.
    """
    encoder, seen = copy.deepcopy(encoder).train(), 0
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for images, _ in batches:
        seen += len(images)
        for norm in norms:
            norm.momentum = len(images) / seen
        encoder(images)
    return encoder
