"""How a batch is cut: chunks for the memory (`--accumulate`), and blocks for BatchNorm (`--bn-chunk`, `--bn-group`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.config import Config, ConfigError
from simclr_fast.models.batchnorm import blocks, share_scope
from simclr_fast.training.memory import estimate, largest_chunk, room_on, tries


def bn_images(cfg: Config, world: int, chunks: int, saved: int | None = None) -> int:
    """Images of the global batch that share BatchNorm's statistics.

    Args:
        saved: those of the run that is gone on with, which stay.
    Raises:
        ConfigError: `bn_group` does not divide the processes.
    """
    if saved or cfg.bn_chunk:
        return saved or cfg.bn_chunk or 0
    group = cfg.bn_group or world
    if world % group:
        raise ConfigError(f"bn_group must divide the number of processes, {world}, got bn_group={group}")
    return cfg.batch // chunks * group // world


def divide(
    cfg: Config, world: int, saved: int | None, fits: Callable[[int], bool], most: Callable[[int], int]
) -> tuple[int, int]:
    """(chunks of a batch, images of a BatchNorm block).

    Args:
        saved: as for `bn_images`.
        fits: whether so many chunks fit into this rank's memory, for `auto`.
        most: the largest number of all ranks.
    Raises:
        ConfigError: not even single images fit.
    """
    if cfg.accumulate != "auto":
        chunks = int(cfg.accumulate)
        return chunks, bn_images(cfg, world, chunks, saved)
    own = cfg.batch // world
    try:
        least, short = largest_chunk(fits, own), None
    except ConfigError as error:  # of this rank, perhaps; then all of them stop
        least, short = own + 1, error
    least = most(least)
    if least > own:
        raise short or ConfigError("accumulate: on another rank a step does not fit into memory even image by image")
    for chunks in (n for n in range(least, own + 1) if own % n == 0):
        images = bn_images(cfg, world, chunks, saved)
        if blocks(cfg.batch, world, chunks, images):
            return chunks, images
    images = bn_images(cfg, world, 1, saved)
    raise ConfigError(f"bn_chunk must divide the images of a process for accumulate=auto, {own}, got {images}")


def fitting(
    method: nn.Module, images: int, image_size: int, device: torch.device, *, autocast: AbstractContextManager[Any],
    half: bool, dtype: torch.dtype, free: int, world: int,
) -> Callable[[int], bool]:  # fmt: skip
    """Whether a step on `images` images of a rank fits in so many chunks: tried on a GPU, estimated on a CPU.

    Args:
        autocast, half, dtype: of the network's arithmetic, whether that is bf16, and the dtype of the views.
        free: bytes that are free for this rank on its host.
    """
    if device.type != "cuda":
        room, computed = room_on(device, free), torch.bfloat16 if half else None

        def expected(chunks: int) -> bool:
            memory = estimate(method, image_size, images, chunks=chunks, world=world, autocast=computed, dtype=dtype)
            return memory.total <= room

        return expected
    scope = share_scope(method)

    def views(count: int) -> Tensor:
        shape = (2 * count, 3, image_size, image_size)
        return torch.empty(shape, device=device, dtype=dtype, memory_format=torch.channels_last).zero_()

    def rehearsal(chunks: int) -> None:
        held = [views(images - images // chunks), *map(torch.empty_like, method.parameters())]  # and the velocity
        with scope.set_to("ignore"), autocast:
            method(views(images // chunks)).float().square().sum().backward()
        method.zero_grad(set_to_none=True)
        del held

    return tries(rehearsal)
