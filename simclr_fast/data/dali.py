"""The fast engine: NVIDIA DALI decodes each image once, compiled code makes its views, both ahead of the consumer.

On a CPU, DALI's bicubic resize is slower than `render`'s, and its colour operator is not
ColorJitter; so the graph ends with the decoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from simclr_fast.data.render import render
from simclr_fast.data.policy import Batch, Policy
from simclr_fast.data.sources import Split

AHEAD = 2  # batches decoded, and as many rendered, before they are asked for


def run(
    split: Split, policy: Policy, steps: range, plan: Callable[[int], Batch], workers: int, device: torch.device
) -> Iterator[tuple[list[torch.Tensor], np.ndarray]]:
    """Make what is planned for each step: (views, indices), as `train_views` gives them."""
    workers = max(1, workers)
    tf, mean, std, radius = policy.constants
    constants = tf, np.float32(mean), np.float32(std), radius
    planned: deque[Batch] = deque()
    waiting: deque[tuple[list[torch.Tensor], np.ndarray, list[Future]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        source = _encoded(pool, split, plan, steps, workers + 1, planned)
        pipe = _decoder(
            source,
            batch_size=len(plan(steps[0])[0]),
            num_threads=workers,
            device_id=None,
            prefetch_queue_depth=AHEAD,
            exec_dynamic=True,  # whose outputs live as long as they are referred to
        )
        for _ in steps:
            (images,) = pipe.run()
            indices, params = planned.popleft()
            views = [torch.empty(len(indices), policy.size, policy.size, 3) for _ in params]
            arrays, rows = [view.numpy() for view in views], [view.packed() for view in params]
            shares = [range(k, len(indices), workers) for k in range(workers)]
            jobs = [pool.submit(_render, arrays, images, rows, share, constants) for share in shares]
            waiting.append((views, indices, jobs))
            if len(waiting) == AHEAD:
                yield _finished(*waiting.popleft(), device)
        while waiting:
            yield _finished(*waiting.popleft(), device)


@pipeline_def
def _decoder(source: Iterator[list[np.ndarray]]) -> Any:
    """Encoded bytes -> uint8 [H, W, 3], not rotated by EXIF, as in Pillow and torchvision."""
    return fn.decoders.image(fn.external_source(source), adjust_orientation=False)


def _encoded(
    pool: ThreadPoolExecutor,
    split: Split,
    plan: Callable[[int], Batch],
    steps: range,
    depth: int,
    planned: deque[Batch],
) -> Iterator[list[np.ndarray]]:
    """The files of each batch, read by threads up to `depth` batches ahead; what was planned goes to `planned`."""

    def load(step: int) -> tuple[Batch, list[np.ndarray]]:
        batch = plan(step)
        return batch, [split.read(index) for index in batch[0]]

    loading: deque[Future] = deque()
    for k in range(len(steps) + depth):
        if k < len(steps):
            loading.append(pool.submit(load, steps[k]))
        if k >= depth and loading:
            batch, encoded = loading.popleft().result()
            planned.append(batch)
            yield encoded


def _render(views: list[np.ndarray], images: Any, packed: list[np.ndarray], rows: range, constants: tuple) -> None:
    for row in rows:
        image = np.asarray(images[row])
        for view, params in zip(views, packed, strict=True):
            render(view[row], image, params[row], *constants)


def _finished(
    views: list[torch.Tensor], indices: np.ndarray, jobs: list[Future], device: torch.device
) -> tuple[list[torch.Tensor], np.ndarray]:
    for job in jobs:
        job.result()
    if device.type == "cuda":
        views = [view.pin_memory() for view in views]
    return [view.permute(0, 3, 1, 2).to(device, non_blocking=True) for view in views], indices
