"""What predictions are worth: top-k and per-class accuracy, confusion, average precision."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


def top_k(scores: Tensor, truth: Tensor, k: int) -> float:
    """Fraction of rows of `scores` [n, classes] whose `truth` [n] is among the k highest.

    Of equal scores those of lower classes come first; a class whose score is -inf is never among them.
    """
    own = scores.gather(1, truth[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < truth[:, None]
    rank = ((scores > own) | ((scores == own) & lower)).sum(1)
    return ((rank < k) & (own[:, 0] > -torch.inf)).double().mean().item()


def confusion(truth: Tensor, said: Tensor, classes: int) -> list[list[int]]:
    """[true class, class that was said, how often] of each pair that there is, in order."""
    pairs, counts = (truth * classes + said).unique(return_counts=True)
    return torch.stack([pairs // classes, pairs % classes, counts], 1).tolist()


def per_class(counts: list[list[int]]) -> dict[int, float]:
    """Accuracy, by class, of what `confusion` counted; of the classes that have images, in order."""
    total, right = Counter[int](), Counter[int]()
    for true, said, number in counts:
        total[true] += number
        right[true] += number * (true == said)
    return {label: right[label] / total[label] for label in sorted(total)}


def mean_per_class(counts: list[list[int]]) -> float:
    """Mean of the classes' accuracies, of those that have images."""
    known = per_class(counts)
    return sum(known.values()) / len(known)


def average_precision_11point(scores: Tensor, truth: Tensor) -> float | None:
    """Average precision of one class by the rule of PASCAL VOC 2007 (Everingham et al. 2010, section 4.2).

    The mean over the recalls 0, .1, ..., 1 of the highest precision at that recall or a higher one.

    Args:
        scores: [n], the higher the surer.
        truth: [n]: 1 has the class, 0 has not, -1 does not count.
    Returns:
        None where no image has the class.
    """
    counted = truth >= 0
    order = scores[counted].argsort(descending=True, stable=True)
    has = truth[counted][order] == 1
    found, total = has.cumsum(0), int(has.sum())
    if not total:
        return None
    precision = found.double() / torch.arange(1, len(found) + 1)
    at = [precision[10 * found >= tenth * total] for tenth in range(11)]  # in integers, for .3 is no binary fraction
    return sum(values.max().item() for values in at) / 11


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean of `average_precision_11point` over the columns of `scores` and `truth` [n, classes] that have one."""
    each = [average_precision_11point(scores[:, k], truth[:, k]) for k in range(scores.shape[1])]
    known = [value for value in each if value is not None]
    return sum(known) / len(known)
