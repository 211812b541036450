"""The engine for small images: all of a split lies on the device as pixels, and views are made there.

No file is opened and nothing is decoded while the run goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.augment import HAS_NUMBA, augment
from simclr_fast.data.engines.feed import Feed, Plan, Settings, replaced
from simclr_fast.data.engines.torchvision_engine import decode
from simclr_fast.data.policy import Policy
from simclr_fast.data.sources import Split
from simclr_fast.data.sources.samples import Ticker

AHEAD = 2  # batches that are being made before they are asked for, on a CPU
MAX_SIDE = 128  # up to which images count as small
GPU_SHARE, CPU_SHARE = 1 / 8, 1 / 4  # of the memory, that the pixels may take

_loaded: WeakKeyDictionary[Split, dict[torch.device, Tensor]] = WeakKeyDictionary()


def size_of(split: Split) -> int:
    """Bytes of the pixels, every image in a box of the largest height and width."""
    return len(split) * int(np.prod(split.sizes.max(0))) * 3


def room_on(device: torch.device, ranks: int = 1) -> int:
    """Bytes that a rank's pixels may take, `ranks` of them sharing a host's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**33)
    return int(free * CPU_SHARE / ranks)


def run(
    split: Split, policy: Policy, steps: range, plan: Plan, device: torch.device, dtype: torch.dtype, settings: Settings
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Make what is planned for each step: (views, indices), as `train_views` gives them."""
    pixels = load(split, device, settings)
    if device.type == "cpu" and HAS_NUMBA:
        yield from _threaded(pixels.numpy(), policy, steps, plan, dtype, settings)
        return
    tf, mean, std, radius = policy.constants
    for step in steps:
        indices, params = plan(step, {})
        index, *rows = (torch.from_numpy(x) for x in (indices, *(one.packed() for one in params)))
        if device.type == "cuda":
            index, *rows = (x.pin_memory().to(device, non_blocking=True) for x in (index, *rows))
        yield [
            augment(
                pixels, row, size=policy.size, index=index, dialect=policy.dialect, mean=mean, std=std,
                blur_radius=radius, dtype=dtype,
            )
            for row in rows
        ], indices  # fmt: skip


def _threaded(
    pixels: np.ndarray, policy: Policy, steps: range, plan: Plan, dtype: torch.dtype, settings: Settings
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Compiled code on the CPU, ahead of the consumer."""
    from simclr_fast.data.engines.render_ahead import Rendering

    waiting: deque[Rendering] = deque()
    with ThreadPoolExecutor(max(1, settings.workers)) as pool:
        for step in steps:
            indices, params = plan(step, {})
            waiting.append(Rendering(policy, indices, params, pool, settings))
            waiting[-1].add(range(len(indices)), [pixels[index] for index in indices])
            if len(waiting) > AHEAD:
                yield waiting.popleft().finished(torch.device("cpu"), dtype)
        while waiting:
            yield waiting.popleft().finished(torch.device("cpu"), dtype)


def load(split: Split, device: torch.device, settings: Settings) -> Tensor:
    """The pixels of a split, uint8 [n, H, W, 3], each image in the corner of its box; decoded once for each device."""
    on_devices = _loaded.setdefault(split, {})
    if device not in on_devices:
        here = split.pixels if split.pixels is not None else _decoded(split, settings)
        on_devices[device] = torch.from_numpy(np.ascontiguousarray(here)).to(device)
    return on_devices[device]


def _decoded(split: Split, settings: Settings) -> np.ndarray:
    out = np.zeros((len(split), *split.sizes.max(0), 3), np.uint8)
    ticker = Ticker()
    for done in _decoding(out, split, settings):
        if ticker.due():
            rate = done / (time.monotonic() - ticker.start)
            left = (len(split) - done) / rate
            ticker.show(f"decoding: {done:,} of {len(split):,}, {rate:,.0f} images/s, {left:.0f} s left")
    ticker.close()
    return out


def _decoding(out: np.ndarray, split: Split, settings: Settings) -> Iterator[int]:
    try:
        from simclr_fast.data.engines.dali import decode_into

        yield from decode_into(out, split, settings)
    except (ImportError, RuntimeError):  # there is no DALI, or it meets an image that it refuses
        feed = Feed(split, lambda step, places: (replaced(np.array([step]), places), ()), settings.meter)
        for index in range(len(split)):
            pixels = feed.decoded(index, decode)[0][0].permute(1, 2, 0)[: out.shape[1], : out.shape[2]].numpy()
            out[index, : pixels.shape[0], : pixels.shape[1]] = pixels
            yield index + 1
