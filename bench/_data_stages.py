"""CPU time of each stage of the views of an image, one thread: this package's compiled code, and torchvision v2."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _data_contenders import Work, v2_stages
from _harness import progress, quantiles
from PIL import Image

from simclr_fast.data import render as compiled
from simclr_fast.data.engines.torchvision_engine import decode as decode_pil
from simclr_fast.data.policy import Params

STAGES = ("read", "decode", "crop, resize", "jitter", "gray", "blur", "normalise, flip")
BATCH = 32
Times = dict[str, float]  # seconds of all images


def timed(times: Times, stage: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; its time, of all threads of the process, is added."""
    began = time.process_time()
    result = work()
    times[stage] += time.process_time() - began
    return result


def ours(work: Work, rows: np.ndarray, turn: int) -> Times:
    """Two views of images, as the CPU engine makes them, stage by stage.

    Raises:
        RuntimeError: they are not those that the engine's `render` makes.
    """
    times = dict.fromkeys(STAGES, 0.0)
    encoded = timed(times, "read", lambda: [work.split.read(int(row)) for row in rows])
    images = decoded(times, encoded)
    tf, mean, std, radius = work.policy.constants
    look = tf, np.float32(mean), np.float32(std), radius
    for view in (0, 1):
        params: Params = work.policy.draw(turn, np.zeros(len(rows), np.int64), rows, view, work.split.sizes[rows])
        for image, row in zip(images, params.packed(), strict=True):
            out = staged(times, image, row, work.policy.size, *look)
        whole = np.empty_like(out)
        compiled.render(whole, image, row, *look)
        if not np.array_equal(out, whole):
            raise RuntimeError("the stages, one after the other, must give what render gives")
    return times


def decoded(times: Times, encoded: list[np.ndarray]) -> list[np.ndarray]:
    """By DALI's decoder, on one thread, or by Pillow where there is no DALI."""
    try:
        from _data_graphs import decoded_bytes
    except ImportError:
        return timed(
            times, "decode", lambda: [decode_pil(one).permute(1, 2, 0).contiguous().numpy() for one in encoded]
        )
    batches = [encoded[k : k + BATCH] for k in range(0, len(encoded), BATCH)]
    feed = iter([*batches[:1], *batches])  # one more: the first is not counted
    graph = decoded_bytes(
        feed, batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
    )
    graph.run()

    def run() -> list[np.ndarray]:
        found = []
        for _ in batches:
            (images,) = graph.run()
            found += [np.array(images[k]) for k in range(len(images))]
        return found

    return timed(times, "decode", run)


def staged(
    times: Times,
    image: np.ndarray,
    row: np.ndarray,
    size: int,
    tf: bool,
    mean: np.ndarray,
    std: np.ndarray,
    radius: int,
) -> np.ndarray:
    """A view, float32 [S, S, 3]."""
    planes, out = np.empty((3, size * size), np.float32), np.empty((size, size, 3), np.float32)
    window = [int(value) for value in row[:4]]
    timed(times, "crop, resize", lambda: compiled._resize(planes, size, image, *window, tf))
    if row[5]:
        timed(times, "jitter", lambda: compiled._jitter(planes, row, tf))
    if row[6]:
        timed(times, "gray", lambda: compiled._gray(planes))
    timed(times, "normalise, flip", lambda: compiled._brightness(planes, np.float32(1)))
    if row[15] > 0 and radius > 0:
        timed(times, "blur", lambda: compiled._blur(planes, size, row[15], radius, tf))
    timed(times, "normalise, flip", lambda: compiled._store(out, planes, bool(row[4] > 0), mean, std))
    return out


def torchvision(work: Work, rows: np.ndarray, turn: int) -> Times:
    """Two views of images by torchvision v2 on PIL images."""
    times, merged = dict.fromkeys(STAGES, 0.0), {"flip": STAGES[-1], "normalise": STAGES[-1]}
    torch.manual_seed(turn)
    stages = v2_stages(work.policy)
    for row in rows.tolist():
        encoded = timed(times, "read", lambda row=row: work.split.read(row))
        image = timed(times, "decode", lambda encoded=encoded: opened(encoded))
        for _ in (0, 1):
            view = image
            for stage, transforms in stages.items():
                for transform in transforms:
                    view = timed(times, merged.get(stage, stage), lambda view=view, do=transform: do(view))
    return times


def opened(encoded: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


ENGINES = {"simclr_fast, CPU": ours, "torchvision v2, PIL": torchvision}


def stages(work: Work, images: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A line for each engine and stage, and for their sum; in every round both make views of the same images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: dict[str, list[Times]] = {name: [] for name in ENGINES}
        rng = np.random.default_rng(0)
        for turn in range(rounds + 1):  # the first compiles
            progress(f"stages at {work.policy.size} px: round {turn} of {rounds}")
            rows = rng.choice(len(work.split), min(images, len(work.split)), replace=False)
            for name in list(ENGINES)[:: 1 if turn % 2 else -1]:
                times = ENGINES[name](work, rows, turn)
                if turn:
                    found[name].append({stage: 1e3 * value / len(rows) for stage, value in times.items()})
    finally:
        torch.set_num_threads(threads)
    for name, runs in found.items():
        for stage in (*STAGES, "sum"):
            raw = [sum(run.values()) if stage == "sum" else run[stage] for run in runs]
            yield {
                "size": work.policy.size, "contender": name, "stage": stage, "status": "ok", "images": len(rows),
                "cpu_ms": quantiles(raw), "raw_cpu_ms": raw,
            }  # fmt: skip
