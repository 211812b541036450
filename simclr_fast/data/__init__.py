"""Images to two augmented views: what is where (sources), what a view is (policy), and two engines that make it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.policy import Batch, Params, Policy, stream
from simclr_fast.data.sources import KNOWN, DataError, Dataset, Split, open_dataset

__all__ = [
    "KNOWN",
    "DataError",
    "Dataset",
    "Params",
    "Policy",
    "Split",
    "engine_name",
    "eval_images",
    "open_dataset",
    "train_views",
]

ENGINES = ("auto", "dali", "torchvision")


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
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """The two views of each batch of the stream, from `start_step` on.

    Args:
        batch: images in a global batch; this rank's rows are [rank * b, (rank + 1) * b), b = batch // world.
        workers: threads (DALI) or processes (torchvision; 0 is none) that prepare batches ahead.
        engine: `dali`, `torchvision`, or `auto`, which is DALI where it can be had.
    Yields:
        (view1, view2, indices): float32 [b, 3, S, S] on the device, channels_last, normalised by the policy's mean
        and std; int64 [b], the images in the split.
    Raises:
        ValueError: batch is not divisible by world, or larger than the split; the engine is unknown or absent.
    """
    if batch % world or not 0 < batch <= len(split):
        raise ValueError(
            f"batch must be divisible by world and at most the {len(split)} images, got batch={batch}, world={world}"
        )
    plan = partial(_train_batch, split, policy, batch, seed, rank, world)
    for (view1, view2), indices in _run(
        engine, split, policy, range(start_step, start_step + steps), plan, workers, device
    ):
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
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(images, indices), as `train_views`, of the central crops in order; the last batch may be smaller."""
    chosen = np.arange(len(split)) if indices is None else np.asarray(indices, np.int64)
    plan = partial(_eval_batch, split, policy, batch, chosen)
    for (images,), rows in _run(engine, split, policy, range(-(-len(chosen) // batch)), plan, workers, device):
        yield images, rows


def engine_name(engine: str) -> tuple[str, str]:
    """(`dali` or `torchvision`, why it is not DALI or nothing).

    Raises:
        ValueError: the engine is unknown, or it is `dali` and DALI cannot be had.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "torchvision":
        return engine, ""
    reason = _dali_fault()
    if not reason:
        return "dali", ""
    if engine == "dali":
        raise ValueError(f"engine 'dali' needs NVIDIA DALI and numba, which cannot be imported here ({reason})")
    return "torchvision", f"images come through torchvision, which is slower, for DALI cannot be imported ({reason})"


@lru_cache
def _dali_fault() -> str:
    try:
        import simclr_fast.data.dali  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    return ""


def _run(engine, split, policy, steps, plan, workers, device):
    if not steps:
        return iter(())
    if engine_name(engine)[0] == "dali":
        from simclr_fast.data.dali import run
    else:
        from simclr_fast.data.torchvision_engine import run
    return run(split, policy, steps, plan, workers, torch.device(device))


def _train_batch(split: Split, policy: Policy, batch: int, seed: int, rank: int, world: int, step: int) -> Batch:
    rows = slice(rank * batch // world, (rank + 1) * batch // world)
    indices, epochs = (words[rows] for words in stream(len(split), batch, seed, step))
    return indices, tuple(policy.draw(seed, epochs, indices, view, split.sizes[indices]) for view in (0, 1))


def _eval_batch(split: Split, policy: Policy, batch: int, chosen: np.ndarray, step: int) -> Batch:
    indices = chosen[step * batch : (step + 1) * batch]
    return indices, (policy.center(split.sizes[indices]),)
