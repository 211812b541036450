"""The engine for small images: all of a split lies on the device as pixels, and views are made there.

No file is opened and nothing is decoded while the run goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.augment import HAS_NUMBA, augment
from simclr_fast.data.engines.feed import Batch, Feed, Plan, Settings, replaced
from simclr_fast.data.engines.torchvision_engine import decode
from simclr_fast.data.policy import Policy
from simclr_fast.data.sources import Split
from simclr_fast.data.sources.samples import Ticker

AHEAD = 2  # batches that are being made before they are asked for, on a CPU
DECODED = 256  # images at a time
MAX_SIDE = 128  # up to which images count as small
GPU_SHARE, CPU_SHARE = 1 / 8, 1 / 4  # of the memory, that the pixels may take

_loaded: WeakKeyDictionary[Split, dict[torch.device, tuple[Tensor, Mapping[int, int]]]] = WeakKeyDictionary()


def size_of(split: Split) -> int:
    """Bytes of the pixels, every image in a box of the largest height and width."""
    return len(split) * int(np.prod(split.sizes.max(0))) * 3


def is_loaded(split: Split, device: torch.device) -> bool:
    """Whether the pixels are there already."""
    return device in _loaded.get(split, {}) or (split.pixels is not None and device.type == "cpu")


def room_on(device: torch.device, ranks: int = 1) -> int:
    """Bytes that a rank's pixels may take, `ranks` of them sharing a host, through whose memory they pass to a GPU."""
    here = int(free_memory() * CPU_SHARE / ranks)
    if device.type == "cuda":
        return min(here, int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE))
    return here


def free_memory() -> int:
    """Bytes of memory that this process may still take: of the host, and of its control group."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**33)
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


def run(
    split: Split, policy: Policy, steps: range, plan: Plan, device: torch.device, dtype: torch.dtype, settings: Settings
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Make what is planned for each step: (views, indices), as `train_views` gives them."""
    pixels, places = load(split, device, settings)
    planned = partial(_planned, plan, places)
    if device.type == "cpu" and HAS_NUMBA:
        yield from _threaded(pixels.numpy(), policy, steps, planned, dtype, settings)
        return
    tf, mean, std, radius = policy.constants
    for step in steps:
        indices, params = planned(step)
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


def _planned(plan: Plan, places: Mapping[int, int], step: int) -> Batch:
    return plan(step, places)


def _threaded(
    pixels: np.ndarray,
    policy: Policy,
    steps: range,
    plan: Callable[[int], Batch],
    dtype: torch.dtype,
    settings: Settings,
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Compiled code on the CPU, ahead of the consumer."""
    from simclr_fast.data.engines.render_ahead import Rendering

    waiting: deque[Rendering] = deque()
    with ThreadPoolExecutor(max(1, settings.workers)) as pool:
        for step in steps:
            indices, params = plan(step)
            waiting.append(Rendering(policy, indices, params, pool, settings))
            waiting[-1].add(range(len(indices)), [pixels[index] for index in indices])
            if len(waiting) > AHEAD:
                yield waiting.popleft().finished(torch.device("cpu"), dtype)
        while waiting:
            yield waiting.popleft().finished(torch.device("cpu"), dtype)


def load(split: Split, device: torch.device, settings: Settings) -> tuple[Tensor, Mapping[int, int]]:
    """The pixels of a split, uint8 [n, H, W, 3], each image in the corner of its box; and image -> its replacement.

    They are decoded once for each device.
    """
    on_devices = _loaded.setdefault(split, {})
    if device not in on_devices:
        here, places = (split.pixels, {}) if split.pixels is not None else _decoded(split, settings)
        on_devices[device] = torch.from_numpy(np.ascontiguousarray(here)).to(device), places
    return on_devices[device]


def _decoded(split: Split, settings: Settings) -> tuple[np.ndarray, Mapping[int, int]]:
    out, count = np.zeros((len(split), *split.sizes.max(0), 3), np.uint8), len(split)

    def plan(step: int, places: Mapping[int, int]) -> Batch:
        return replaced(np.arange(step * DECODED, min((step + 1) * DECODED, count)), places), ()

    feed, ticker = Feed(split, plan, settings.meter), Ticker()
    for done in _decoding(out, feed, range(-(-count // DECODED)), settings):
        if ticker.due():
            rate = done / (time.monotonic() - ticker.start)
            ticker.show(f"decoding: {done:,} of {count:,}, {rate:,.0f} images/s, {(count - done) / rate:.0f} s left")
    ticker.close()
    return out, feed.places


def _decoding(out: np.ndarray, feed: Feed, steps: range, settings: Settings) -> Iterator[int]:
    try:
        from simclr_fast.data.engines.dali import decode_into

        yield from decode_into(out, feed, steps, settings)
    except (ImportError, RuntimeError):  # there is no DALI, or it meets an image that it refuses
        for step in steps:
            images, _ = feed.decoded(step, decode)
            for k, image in enumerate(images, step * DECODED):
                pixels = image.permute(1, 2, 0).numpy()
                out[k, : pixels.shape[0], : pixels.shape[1]] = pixels
            yield step * DECODED + len(images)
