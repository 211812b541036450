"""The engine for files: NVIDIA DALI decodes each image once, and views are made of it, ahead of the consumer.

On a GPU, DALI also crops and resizes, and `augment` does the rest there. On a CPU its bicubic resize is slower than
`render`'s and its colour operator is not ColorJitter; so there the graph ends with the decoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIInterpType
from torch import Tensor

from simclr_fast.data.augment import augment
from simclr_fast.data.engines.feed import Feed, Loaded, Plan, Settings, chunks
from simclr_fast.data.engines.render_ahead import Rendering
from simclr_fast.data.policy import Policy
from simclr_fast.data.sources import DataError, Split

AHEAD = 2  # chunks decoded, and as many steps rendered, before they are asked for
HELD = AHEAD + 2  # chunks whose pixels exist at a time
MOST_HELD = 8  # chunks of crops that kernels may still have to read


class Chunk(NamedTuple):
    """Rows of a batch that are decoded together."""

    batch: Loaded
    rows: slice
    last: bool


def run(
    split: Split, policy: Policy, steps: range, plan: Plan, device: torch.device, dtype: torch.dtype,
    settings: Settings, crops: bool | None = None,
) -> Iterator[tuple[list[Tensor], np.ndarray]]:  # fmt: skip
    """Make what is planned for each step: (views, indices), as `train_views` gives them.

    `crops` says whether DALI crops and resizes; without it, it does on a GPU.
    """
    crops = device.type == "cuda" if crops is None else crops
    feed = Feed(split, plan, settings.meter)
    with ThreadPoolExecutor(max(1, settings.workers)) as pool:
        graph = _Graph(feed, policy, steps, device, settings, pool, crops)
        try:
            yield from graph.cropped(dtype) if crops else graph.rendered(dtype)
        finally:
            graph.close()


class _Graph:
    """A DALI pipeline over the chunks of some steps, and what is made of its output."""

    def __init__(
        self, feed: Feed, policy: Policy, steps: Sequence[int], device: torch.device, settings: Settings,
        pool: ThreadPoolExecutor, crops: bool,
    ) -> None:  # fmt: skip
        self.feed, self.policy, self.device, self.pool, self.settings = feed, policy, device, pool, settings
        self._steps, self._crops = steps, crops
        self._decoding: deque[Chunk] = deque()
        indices, params = feed.planned(steps[0])
        self._views = len(params)
        on_gpu = device.type == "cuda"
        self._pipe: Any = _pipeline(
            self._source(), self._views if crops else 0, policy.size, not policy.constants[0], settings.hardware,
            on_gpu, batch_size=len(indices),
            num_threads=max(1, settings.workers),
            device_id=torch.cuda.current_device() if on_gpu and device.index is None else device.index,
            prefetch_queue_depth=AHEAD,
            exec_dynamic=True,  # whose outputs live as long as they are referred to
        )  # fmt: skip

    def _source(self) -> Iterator[tuple[list[np.ndarray], ...]]:
        """What the graph is fed: the files of a chunk, and for each view where it is cropped."""
        limit = self.settings.memory_mib * 2**20 // HELD
        for batch in self.feed.ahead(self.pool, self._steps, self.settings):
            parts = chunks(self.feed.split, batch.indices, limit)
            for k, rows in enumerate(parts):
                self._decoding.append(Chunk(batch, rows, k == len(parts) - 1))
                windows = [one.window[rows].astype(np.int32) for one in batch.params] if self._crops else []
                yield (batch.encoded[rows], *(part for w in windows for part in (list(w[:, :2]), list(w[:, 2:]))))

    def close(self) -> None:
        """Let go of the pipeline, which holds its source, which holds this."""
        self._pipe = None
        self._decoding.clear()

    def _decoded(self) -> Iterator[tuple[Chunk, Any]]:
        while True:
            try:
                out = self._pipe.run()
            except StopIteration:
                return
            except RuntimeError as error:
                if "memory" in str(error) or "alloc" in str(error):
                    raise
                step = self._decoding[0].batch.step if self._decoding else self._steps[0]
                raise DataError(
                    f"data must be images that DALI can decode, got one that it cannot in step {step}: --loader "
                    f"torchvision does without it ({str(error).splitlines()[0]})"
                ) from error
            yield self._decoding.popleft(), out

    def rendered(self, dtype: torch.dtype) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        """Views made by compiled code from whole images."""
        waiting: deque[Rendering] = deque()
        holding: deque[list[Future[None]]] = deque()  # jobs, and with them the pixels of a chunk
        for chunk, (images,) in self._decoded():
            if chunk.rows.start == 0:
                batch = chunk.batch
                waiting.append(Rendering(self.policy, batch.indices, batch.params, self.pool, self.settings))
            jobs = waiting[-1].add(
                range(chunk.rows.start, chunk.rows.stop), [np.asarray(images[k]) for k in range(len(images))]
            )
            del images
            holding.append(jobs)
            if len(holding) == HELD - AHEAD:
                wait(holding.popleft())
            if chunk.last and len(waiting) > AHEAD:
                yield waiting.popleft().finished(self.device, dtype)
        while waiting:
            yield waiting.popleft().finished(self.device, dtype)

    def cropped(self, dtype: torch.dtype) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        """Views made by `augment` from crops of the right size."""
        held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()  # DALI must not write over what kernels still read
        try:
            yield from self._cropped(dtype, held)
        finally:
            for event, _ in held:
                event.synchronize()

    def _cropped(
        self, dtype: torch.dtype, held: deque[tuple[torch.cuda.Event, list[Tensor]]]
    ) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        tf, mean, std, radius = self.policy.constants
        look: dict[str, Any] = {"dialect": self.policy.dialect, "mean": mean, "std": std, "blur_radius": radius}
        parts: list[list[Tensor]] = [[] for _ in range(self._views)]
        for chunk, outputs in self._decoded():
            crops = [torch.from_dlpack(images.as_tensor()) for images in outputs]
            for part, images, params in zip(parts, crops, chunk.batch.params, strict=True):
                rows = torch.from_numpy(params.packed()[chunk.rows])
                rows = rows.pin_memory() if self.device.type == "cuda" else rows
                part.append(augment(images, rows, dtype=dtype, **look))
            if self.device.type == "cuda":
                held.append((torch.cuda.current_stream(self.device).record_event(), crops))
                while held and (len(held) > MOST_HELD or held[0][0].query()):
                    held[0][0].synchronize()
                    held.popleft()
            if chunk.last:
                yield [part[0] if len(part) == 1 else _joined(part) for part in parts], chunk.batch.indices
                parts = [[] for _ in range(self._views)]


def decode_into(out: np.ndarray, feed: Feed, steps: range, settings: Settings) -> Iterator[int]:
    """Decode the images of steps one after the other into the corners of `out`, uint8 [n, H, W, 3].

    Yields:
        The number of images that are done.
    Raises:
        RuntimeError: DALI cannot decode one of them.
    """

    def source() -> Iterator[tuple[list[np.ndarray]]]:
        for batch in feed.ahead(pool, steps, settings):
            yield (batch.encoded,)

    done, workers = 0, max(1, settings.workers)
    with ThreadPoolExecutor(workers) as pool:
        pipe = _pipeline(
            source(), 0, 0, False, settings.hardware, False, batch_size=len(feed.planned(steps[0])[0]),
            num_threads=workers, device_id=None, prefetch_queue_depth=AHEAD, exec_dynamic=True,
        )  # fmt: skip
        while done < len(out):
            (images,) = pipe.run()
            for k in range(len(images)):
                into_corner(out[done], np.asarray(images[k]))
                done += 1
            yield done


def into_corner(out: np.ndarray, pixels: np.ndarray) -> None:
    """Copy an image into a box that is at least as large."""
    out[: pixels.shape[0], : pixels.shape[1]] = pixels


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.permute(0, 2, 3, 1) for part in parts]).permute(0, 3, 1, 2)


@pipeline_def
def _pipeline(source: Iterator, views: int, size: int, antialias: bool, hardware: float, on_gpu: bool) -> Any:
    """Encoded bytes -> uint8 [H, W, 3], not rotated by EXIF, as in Pillow; or -> [S, S, 3] for each view."""
    encoded, *windows = fn.external_source(source, num_outputs=1 + 2 * views, batch=True)
    options: dict[str, Any] = {"hw_decoder_load": hardware, "jpeg_fancy_upsampling": True} if on_gpu else {}
    image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", adjust_orientation=False, **options)
    if not views:
        return (image,)
    crops = []
    for corner, shape in zip(windows[::2], windows[1::2], strict=True):
        crop = fn.slice(image, corner, shape, axes=[0, 1], normalized_anchor=False, normalized_shape=False)
        crops.append(fn.resize(crop, size=[size, size], interp_type=DALIInterpType.INTERP_CUBIC, antialias=antialias))
    return tuple(crops)
