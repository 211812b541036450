"""The k-nearest-neighbour classifier: what an encoder's features know of labels that it never saw.

Cosine similarity, k = 20 neighbours, votes weighted by exp(similarity / 0.1), as in InstDisc (Wu et al. 2018) with the
temperature that MoCo's demonstration and lightly use.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEIGHBOURS = 20
VOTE_TEMPERATURE = 0.1


def nearest(bank: Tensor, queries: Tensor, k: int = NEIGHBOURS, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Similarities and indices [m, k] of the k rows of `bank` [n, d] nearest to each row of `queries` [m, d]."""
    bank, k = F.normalize(bank.float()), min(k, len(bank))
    found = [(F.normalize(part.float()) @ bank.T).topk(k) for part in queries.split(block)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = NEIGHBOURS) -> float:
    """Fraction of `queries` [m, d] whose weighted vote among `bank` [n, d] is their label (int64, [m] and [n])."""
    similarities, indices = nearest(bank, queries, k)
    votes = similarities.new_zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[indices], (similarities / VOTE_TEMPERATURE).exp())
    return (votes.argmax(1) == labels).float().mean().item()


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
    """A copy of an encoder whose BatchNorm statistics are the average over `batches`; its weights are unchanged.

    An untrained network in eval mode would otherwise see the statistics 0 and 1 that it was made with.
    """
    encoder = copy.deepcopy(encoder).train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    for images, _ in batches:
        encoder(images)
    return encoder
