"""Images to two augmented views: what is where (sources), what a view is (policy), and engines that make it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.augment import augment
from simclr_fast.data.engines import choose, engine_name, run
from simclr_fast.data.engines.feed import Batch, Meter, Settings, replaced
from simclr_fast.data.policy import Params, Policy, stream
from simclr_fast.data.sources import KNOWN, DataError, Dataset, Split, open_dataset, write_skipped

__all__ = [
    "KNOWN",
    "DataError",
    "Dataset",
    "Meter",
    "Params",
    "Policy",
    "Settings",
    "Split",
    "augment",
    "choose",
    "engine_name",
    "eval_images",
    "fingerprint",
    "open_dataset",
    "train_views",
    "write_skipped",
]


def train_views(
    split: Split,
    policy: Policy,
    *,
    batch: int,
    seed: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    device: str | torch.device = "cpu",
    engine: str = "auto",
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """The two views of each batch of the stream, from `start_step` on.

    Args:
        batch: images in a global batch; this rank's rows are [rank * b, (rank + 1) * b), b = batch // world.
        workers: threads (processes for torchvision; 0 is none) that prepare batches ahead.
        engine: `dali`, `torchvision`, `resident` (all pixels on the device), or `auto`: resident for small images that
            fit, else DALI where it can be had.
        settings: in place of `workers`, with what else an engine can be told.
    Yields:
        (view1, view2, indices): [b, 3, S, S] of `dtype` on the device, channels_last, normalised by the policy's mean
        and std; int64 [b], the images in the split. An image that became unreadable is replaced by another.
    Raises:
        ValueError: batch is not divisible by world, or larger than the split; the engine is unknown or absent.
        DataError: over 5 % of the images became unreadable.
    """
    if batch % world or not 0 < batch <= len(split):
        raise ValueError(
            f"batch must be divisible by world and at most the {len(split)} images, got batch={batch}, world={world}"
        )
    plan = partial(_train_batch, split, policy, batch, seed, rank, world)
    made = range(start_step, start_step + steps)
    settings = settings or Settings(workers)
    for (view1, view2), indices in run(engine, split, policy, made, plan, torch.device(device), dtype, settings):
        yield view1, view2, indices


def eval_images(
    split: Split,
    policy: Policy,
    *,
    batch: int,
    workers: int = 2,
    device: str | torch.device = "cpu",
    engine: str = "auto",
    indices: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(images, indices), as `train_views`, of the central crops in order; the last batch may be smaller."""
    chosen = np.arange(len(split)) if indices is None else np.asarray(indices, np.int64)
    plan = partial(_eval_batch, split, policy, batch, chosen)
    made = range(-(-len(chosen) // batch))
    settings = settings or Settings(workers)
    for (images,), rows in run(engine, split, policy, made, plan, torch.device(device), dtype, settings):
        yield images, rows


def fingerprint(dataset: Dataset) -> str:
    """The number of images, and a digest of what the order of a run and its labels depend on."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        if split is not None:
            digest.update("\n".join(split.names).encode("utf-8", "surrogatepass"))
            for column in (split.lengths, split.sizes, split.labels):
                digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
    return f"{len(dataset.train)} images ({digest.hexdigest()[:12]})"


def _train_batch(
    split: Split, policy: Policy, batch: int, seed: int, rank: int, world: int, step: int, places: Mapping[int, int]
) -> Batch:
    rows = slice(rank * batch // world, (rank + 1) * batch // world)
    planned, epochs = (words[rows] for words in stream(len(split), batch, seed, step))
    indices = replaced(planned, places)
    return indices, tuple(policy.draw(seed, epochs, planned, view, split.sizes[indices]) for view in (0, 1))


def _eval_batch(
    split: Split, policy: Policy, batch: int, chosen: np.ndarray, step: int, places: Mapping[int, int]
) -> Batch:
    indices = replaced(chosen[step * batch : (step + 1) * batch], places)
    return indices, (policy.center(split.sizes[indices]),)
