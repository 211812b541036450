"""Pictures of features: t-SNE and PCA of h beside z = g(h), and the nearest neighbours by each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_fast import knn
from simclr_fast.data import Dataset, Split, eval_images
from simclr_fast.evaluation.job import Job
from simclr_fast.evaluation.results import Result
from simclr_fast.pages.parts import data_uri
from simclr_fast.probe import SHOWN_NEIGHBOURS, SHOWN_QUERIES, to_uint8

SCATTERED = 2000  # images at most
THUMBNAIL = 96  # pixels, the longest side of a picture of an image
ABSENT = "No t-SNE: scikit-learn is not installed; install it with: pip install 'simclr_fast[evaluate]'"
Images = tuple[Split, np.ndarray]  # and the indices int64 [n] of those that are meant


def add(result: Result, job: Job, train: Images, test: Images, h_train: Tensor, h_test: Tensor) -> None:
    """Put scatters of the test images into a result, and some of them beside their nearest training images.

    Args:
        h_train, h_test: features [n, d] of the images.
    """
    scatters, sheets, note = job.ranks.from_main(lambda: _made(job, train, test, h_train, h_test))
    result.scatters += scatters
    result.pictures += sheets
    result.notes += [note] if note else []


def _made(
    job: Job, train: Images, test: Images, h_train: Tensor, h_test: Tensor
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    split, indices = test
    rows = np.unique(np.linspace(0, len(indices) - 1, min(SCATTERED, len(indices))).astype(np.int64))
    owners = [_label(split, index) for index in indices[rows]]
    layers = {"h": h_test, "z": job.embeddings(h_test)}
    scatters, note = [], ""
    job.say(f"pictures of {len(rows):,} test images")
    for kind, place in (("t-SNE", tsne), ("PCA", pca)):
        for layer, features in layers.items():
            try:
                points, more = place(features[rows], job.settings.seed)
            except ImportError:
                note = ABSENT
                continue
            title = f"{kind} of {layer}{f', {more}' if more else ''}"
            scatters.append({"title": title, "points": points, "labels": owners})
    banks = {"h": h_train, "z": job.embeddings(h_train)}
    sheets = [
        {"title": f"Nearest training images by {layer}", "rows": neighbours(job, train, test, banks[layer], features)}
        for layer, features in layers.items()
    ]
    return scatters, sheets, note


def pca(features: Tensor, seed: int) -> tuple[list[list[float]], str]:
    """The two principal coordinates of features [n, d] of unit length, and how much they have of the variance."""
    x = F.normalize(features.double())
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    total = s.square().sum()
    share = (s[:2].square().sum() / total).item() if total > 0 else 0.0
    points = F.pad(u[:, :2] * s[:2], (0, max(0, 2 - u.shape[1])))
    return _rounded(points.numpy()), f"{share:.0%} of the variance"


def tsne(features: Tensor, seed: int) -> tuple[list[list[float]], str]:
    """t-SNE of features [n, d] by cosine similarity.

    Raises:
        ImportError: there is no scikit-learn.
    """
    from sklearn.manifold import TSNE

    x = F.normalize(features.float()).numpy()
    spread = min(30.0, (len(x) - 1) / 3)
    start: Any = "pca" if min(x.shape) >= 2 and np.ptp(x, 0).any() else "random"
    points = TSNE(init=start, perplexity=spread, random_state=seed % 2**32).fit_transform(x)
    return _rounded(points), ""


def neighbours(job: Job, train: Images, test: Images, bank: Tensor, queries: Tensor) -> list[list[dict[str, Any]]]:
    """Some test images, each with the training images that are nearest by these features [n, d]."""
    split, indices = test
    rows = np.unique(np.linspace(0, len(indices) - 1, min(SHOWN_QUERIES, len(indices))).astype(np.int64))
    similarities, found = knn.nearest(bank, queries[rows], SHOWN_NEIGHBOURS)
    sheet = []
    shown = _thumbnails(job, split, indices[rows])
    for index, image, similar, near in zip(indices[rows], shown, similarities.tolist(), found.numpy(), strict=True):
        own, (bank_split, bank_indices) = _name(job.dataset, split, index), train
        row: list[dict[str, Any]] = [{"image": image, "text": own or "test image"}]
        thumbnails = _thumbnails(job, bank_split, bank_indices[near])
        for other, picture, value in zip(bank_indices[near], thumbnails, similar, strict=True):
            name = _name(job.dataset, bank_split, other)
            right = None if own is None or name is None else own == name
            row.append({"image": picture, "text": f"{name or ''}\n{value:.2f}".strip(), "right": right})
        sheet.append(row)
    return sheet


def _thumbnails(job: Job, split: Split, indices: np.ndarray) -> list[str]:
    """Images as text, smaller where they are large."""
    policy, settings = job.encoder.policy, job.extractor.settings
    batches = eval_images(split, policy, batch=len(indices), indices=indices, settings=settings)
    images = torch.cat([images for images, _ in batches]).contiguous()
    if policy.size > THUMBNAIL:
        images = F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    return [data_uri(image) for image in to_uint8(images, policy)]


def _label(split: Split, index: int) -> int:
    return -1 if split.labels is None else int(split.labels[index])


def _name(data: Dataset, split: Split, index: int) -> str | None:
    label = _label(split, index)
    return data.classes[label] if label >= 0 else None


def _rounded(points: np.ndarray) -> list[list[float]]:
    """Four digits of the largest, which is finer than a picture shows."""
    largest = float(np.abs(points).max(initial=0)) or 1.0
    return (points / largest).round(4).tolist()
