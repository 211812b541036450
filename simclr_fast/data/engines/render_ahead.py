"""The views of a batch, being made by threads of the CPU while the consumer works on an earlier one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.engines.feed import Settings
from simclr_fast.data.policy import Params, Policy
from simclr_fast.data.render import render
from simclr_fast.data.sources import DataError


class Rendering:
    """One batch: rows are added as their images come, and all are waited for at the end."""

    def __init__(
        self,
        policy: Policy,
        indices: np.ndarray,
        params: tuple[Params, ...],
        pool: ThreadPoolExecutor,
        settings: Settings,
    ) -> None:
        tf, mean, std, radius = policy.constants
        self._constants = tf, np.array(mean, np.float32), np.array(std, np.float32), radius
        self._indices, self._rows = indices, [one.packed() for one in params]
        self._views = [torch.empty(len(indices), policy.size, policy.size, 3) for _ in params]
        self._pool, self._settings = pool, settings
        self._jobs: list[Future[None]] = []

    def add(self, rows: range, images: Sequence[np.ndarray]) -> list[Future[None]]:
        """Start making the views of these rows out of their images, uint8 [H, W, 3] each; the jobs that do so."""
        workers = max(1, self._settings.workers)
        shares = [slice(k, None, workers) for k in range(min(workers, len(rows)))]
        jobs = [self._pool.submit(self._make, rows[share], images[share]) for share in shares]
        self._jobs += jobs
        return jobs

    def _make(self, rows: range, images: Sequence[np.ndarray]) -> None:
        began = time.perf_counter()
        outputs = [view.numpy() for view in self._views]
        for row, pixels in zip(rows, images, strict=True):
            for out, params in zip(outputs, self._rows, strict=True):
                if (params[row, :2] + params[row, 2:4] > pixels.shape[:2]).any():  # compiled code would read beyond it
                    raise DataError(f"data must stay as they are, got image {self._indices[row]} with another size")
                render(out[row], pixels, params[row], *self._constants)
        self._settings.meter.add("rendering", began)

    def finished(self, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], np.ndarray]:
        """(views, indices) once all are made, on the device."""
        for job in self._jobs:
            job.result()
        views = [view.to(dtype) for view in self._views]
        if device.type == "cuda":
            views = [view.pin_memory() for view in views]
        return [view.permute(0, 3, 1, 2).to(device, non_blocking=True) for view in views], self._indices
