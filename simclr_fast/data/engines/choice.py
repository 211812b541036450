"""Which engine makes the views: DALI, torchvision where DALI cannot be had, or pixels that lie on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from simclr_fast.data.engines import resident
from simclr_fast.data.engines.feed import Plan, Settings
from simclr_fast.data.policy import Policy
from simclr_fast.data.sources import Split

ENGINES = ("auto", "dali", "torchvision", "resident")
MODULES = {"dali": "dali", "torchvision": "torchvision_engine", "resident": "resident"}


def engine_name(engine: str) -> tuple[str, str]:
    """What decodes files: (`dali` or `torchvision`, why it is not DALI or nothing); or `resident` as it was given.

    Raises:
        ValueError: the engine is unknown, or it is `dali` and DALI cannot be had.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine in ("torchvision", "resident"):
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
        import simclr_fast.data.engines.dali  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    return ""


def choose(engine: str, split: Split, device: torch.device, ranks: int = 1) -> tuple[str, str]:
    """(the engine for a split, a sentence that says how its images come).

    `auto` holds images up to 128 px as pixels where all fit into an eighth of a GPU's memory, or a quarter of the free
    memory of the host, which `ranks` share.

    Raises:
        ValueError: as `engine_name`; or `resident` was asked for and the pixels do not fit.
    """
    bytes_, room, side = resident.size_of(split), resident.room_on(device, ranks), int(split.sizes.max())
    if resident.is_loaded(split, device):  # then it takes no more, and what is free is other than before
        room = max(room, bytes_)
    box = " x ".join(map(str, split.sizes.max(0)))
    held = f"all {len(split):,} images ({bytes_ / 2**20:,.0f} MiB of pixels)"
    if engine == "resident" and bytes_ > room:
        raise ValueError(
            f"engine 'resident' must hold {held}, each in a box of the largest sides, {box}, in "
            f"{room / 2**20:,.0f} MiB on {device}, which is too little"
        )
    if engine == "resident" or (engine == "auto" and side <= resident.MAX_SIDE and bytes_ <= room):
        return "resident", f"{held} are held on {device}: nothing is decoded during training"
    name, reason = engine_name(engine)
    on_gpu = name == "dali" and device.type == "cuda"
    return name, reason or f"{name} decodes files{' and crops on the GPU, one kernel does the rest' if on_gpu else ''}"


def preload(engine: str, split: Split, device: torch.device, settings: Settings) -> None:
    """Do now what the first view would wait for: decode the pixels, where they lie on the device. Shows progress.

    Raises:
        ValueError: as `choose`.
        DataError: over 5 % of the images became unreadable.
    """
    if choose(engine, split, device, settings.ranks)[0] == "resident":
        resident.load(split, device, settings)


def run(
    engine: str, split: Split, policy: Policy, steps: range, plan: Plan, device: torch.device, dtype: torch.dtype,
    settings: Settings,
) -> Iterator[tuple[list[Tensor], np.ndarray]]:  # fmt: skip
    """Make what is planned for each step: (views, indices), as `train_views` gives them."""
    if not steps:
        return iter(())
    module = import_module(f"simclr_fast.data.engines.{MODULES[choose(engine, split, device, settings.ranks)[0]]}")
    return module.run(split, policy, steps, plan, device, dtype, settings)
