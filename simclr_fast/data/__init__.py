"""Images to two augmented views: what is where (sources), what a view is (policy), and engines that make it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.augment import augment
from simclr_fast.data.engines import choose, engine_name, run
from simclr_fast.data.engines.feed import Batch, Meter, Settings, replaced
from simclr_fast.data.listing import LISTED, changes, write_images
from simclr_fast.data.policy import Params, Policy, stream
from simclr_fast.data.sources import KNOWN, DataError, Dataset, Split, open_dataset, write_skipped

__all__ = [
    "KNOWN",
    "LISTED",
    "DataError",
    "Dataset",
    "Meter",
    "Params",
    "Policy",
    "Settings",
    "Split",
    "augment",
    "changes",
    "choose",
    "engine_name",
    "eval_images",
    "fingerprint",
    "open_dataset",
    "train_crops",
    "train_views",
    "write_images",
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
    parts: int = 1,
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
        batch: images in a global batch.
        parts: into which each batch is cut, one yielded after the other. Of those rows of a part, this rank takes
            [rank * b, (rank + 1) * b), b = batch // (parts * world).
        workers: threads (processes for torchvision; 0 is none) that prepare batches ahead.
        engine: `dali`, `torchvision`, `resident` (all pixels on the device), or `auto`: resident for small images that
            fit, else DALI where it can be had.
        settings: in place of `workers`, with what else an engine can be told.
    Yields:
        (view1, view2, indices): [b, 3, S, S] of `dtype` on the device, channels_last, normalised by the policy's mean
        and std; int64 [b], the images in the split. An image that became unreadable is replaced by another.
    Raises:
        ValueError: batch is not divisible by parts * world, or larger than the split; the engine is unknown or absent.
        DataError: over 5 % of the images became unreadable.
    """
    if batch % (world * parts) or not 0 < batch <= len(split):
        raise ValueError(
            f"batch must be divisible by parts * world and at most the {len(split)} images, got batch={batch}, "
            f"parts={parts}, world={world}"
        )
    plan = partial(_train_batch, split, policy, batch, seed, parts, rank, world)
    made = range(start_step * parts, (start_step + steps) * parts)
    settings = settings or Settings(workers)
    for (view1, view2), indices in run(engine, split, policy, made, plan, torch.device(device), dtype, settings):
        yield view1, view2, indices


def train_crops(
    split: Split,
    policy: Policy,
    indices: np.ndarray,
    *,
    batch: int,
    seed: int,
    start_step: int = 0,
    steps: int,
    rank: int = 0,
    world: int = 1,
    device: str | torch.device = "cpu",
    engine: str = "auto",
    dtype: torch.dtype = torch.float32,
    settings: Settings,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(images, rows): one view of each image of a batch, as `train_views`, of the images `indices` [n] alone.

    The stream runs on over epoch borders, and a batch may be larger than n. `rows` are places in `indices`.

    Raises:
        ValueError: batch is not divisible by world; there are no images.
        DataError: an image became unreadable: another must not stand under its label.
    """
    if batch % world or batch < 1 or not len(indices):
        raise ValueError(
            f"batch must be divisible by the number of processes, with images to take, got batch={batch}, "
            f"processes={world}, images={len(indices)}"
        )

    planned = partial(_crop_rows, len(indices), batch, seed, rank, world)
    plan, made = partial(_crop_batch, split, policy, seed, indices, planned), range(start_step, start_step + steps)
    views = run(engine, split, policy, made, plan, torch.device(device), dtype, settings)
    for step, ((images,), taken) in zip(made, views, strict=True):
        rows = planned(step)[0]
        lost = indices[rows][indices[rows] != taken]
        if len(lost):
            raise DataError(f"data must stay readable while they are used, and {split.names[lost[0]]} did not")
        yield images, rows


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
    split: Split,
    policy: Policy,
    batch: int,
    seed: int,
    parts: int,
    rank: int,
    world: int,
    number: int,
    places: Mapping[int, int],
) -> Batch:
    (step, part), own = divmod(number, parts), batch // (parts * world)
    first = (part * world + rank) * own
    planned, epochs = (words[first : first + own] for words in stream(len(split), batch, seed, step))
    indices = replaced(planned, places)
    return indices, tuple(policy.draw(seed, epochs, planned, view, split.sizes[indices]) for view in (0, 1))


def _crop_rows(n: int, batch: int, seed: int, rank: int, world: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    own = batch // world
    rows, epochs = (words[rank * own : (rank + 1) * own] for words in stream(n, batch, seed, step))
    return rows, epochs


def _crop_batch(
    split: Split,
    policy: Policy,
    seed: int,
    chosen: np.ndarray,
    planned: Callable[[int], tuple[np.ndarray, np.ndarray]],
    step: int,
    places: Mapping[int, int],
) -> Batch:
    rows, epochs = planned(step)
    indices = replaced(chosen[rows], places)
    return indices, (policy.draw(seed, epochs, chosen[rows], 0, split.sizes[indices]),)


def _eval_batch(
    split: Split, policy: Policy, batch: int, chosen: np.ndarray, step: int, places: Mapping[int, int]
) -> Batch:
    indices = replaced(chosen[step * batch : (step + 1) * batch], places)
    return indices, (policy.center(split.sizes[indices]),)
