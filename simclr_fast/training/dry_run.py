"""`--dry-run`: a run's plan from its settings; on a GPU one step is run to measure the memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from simclr_fast.config import ConfigError
from simclr_fast.environment import device_name
from simclr_fast.optim import LARS, Schedule, lars_param_groups
from simclr_fast.training.chunks import divide, fitting
from simclr_fast.training.costs import bench_speed, network, run_speed
from simclr_fast.training.memory import Memory, estimate, measured_peak, room_on
from simclr_fast.training.plan import Plan
from simclr_fast.training.setup import Arithmetic, arithmetic, new_method, schedule
from simclr_fast.training.step import Step, even


def plan(
    cfg: Any, data: str, images: int, device: torch.device, *, world: int, per_host: int, free: int, absent: bool,
    state: dict[str, Any] | None = None, records: Sequence[dict[str, Any]] = (),
) -> Plan:  # fmt: skip
    """What is going to be trained.

    Args:
        data: a line about the images; `images` are those that are trained on.
        device: that of a rank; `world` ranks, `per_host` of them on a host, whose free memory is `free` bytes.
        absent: the plan is for GPUs that are not here, of whose memory nothing is known.
        state, records: the checkpoint that the run goes on from, if there is one, and its metrics.
    Raises:
        ConfigError: the batch cannot be divided as asked.
    """
    how, method, own = arithmetic(cfg.precision, device), new_method(cfg, device), cfg.batch // world
    on_gpu, name = absent or device.type == "cuda", "GPUs that are not here" if absent else device_name()
    if absent and cfg.accumulate == "auto":
        raise ConfigError("accumulate must be a number where the GPUs are not here, got accumulate=auto")
    if absent and cfg.precision != "fp32":
        how = how._replace(name="bf16", views=torch.bfloat16)
    half = how.name == "bf16"
    fits = fitting(
        method, own, cfg.image_size, device, autocast=how.autocast, half=half, dtype=how.views,
        free=free // per_host, world=world,
    )  # fmt: skip
    chunks, bn_images = divide(cfg, world, state["bn_images"] if state else None, fits, most=lambda value: value)
    pieces, norm_ranks = even(cfg.batch, world, chunks, bn_images)
    memory = estimate(
        method, cfg.image_size, own, chunks=chunks, world=world, pieces=pieces,
        autocast=torch.bfloat16 if half else None, dtype=how.views,
    )  # fmt: skip
    room = None if absent else room_on(device, free, per_host)
    of = network(method, cfg.image_size)
    if device.type == "cuda":
        memory = _measured(cfg, method, how, memory, own, chunks)
    return Plan(
        cfg=cfg, network=of, data=data, images=images, schedule=schedule(cfg, images), device=name,
        on_gpu=on_gpu, precision=how.name, memory=memory, room=room, bn_images=bn_images,
        norm_ranks=norm_ranks, world=world, hosts=world // per_host, chunks=chunks, link=cfg.link,
        step=state["step"] if state else 0,
        speed=(None if absent else run_speed(records))
        or bench_speed(
            device=name, arch=cfg.arch, width=cfg.width, image_size=cfg.image_size, precision=how.name, images=own
        ),
    )  # fmt: skip


def _measured(cfg: Any, method: Any, how: Arithmetic, memory: Memory, own: int, chunks: int) -> Memory:
    """With the peak of two steps of one rank alone; where that is out of memory, as it was estimated."""
    optimizer = LARS(lars_param_groups(method, cfg.weight_decay), lr=0.0)
    step = Step(method, optimizer, Schedule(0.0, 0, 1), batch=own, autocast=how.autocast, accumulate=chunks)
    shape, device = (2 * own // chunks, 3, cfg.image_size, cfg.image_size), next(method.parameters()).device

    def steps() -> None:
        for number in range(2):
            parts = (torch.rand(shape, device=device, dtype=how.views) for _ in range(chunks))
            step(number, (part.contiguous(memory_format=torch.channels_last) for part in parts))

    try:
        return memory.with_peak(measured_peak(steps, device))
    except torch.OutOfMemoryError:
        return memory


def hosts_of(world: int) -> int:
    """Ranks on a host, as torchrun says, else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))
