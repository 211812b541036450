"""What the settings come to on a machine and a data set: arithmetic, network, schedule."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from simclr_fast import methods
from simclr_fast.environment import cpu_has_bf16
from simclr_fast.optim import Schedule, scaled_lr, total_steps, warmup_steps

PAPER_WARMUP_EPOCHS = 10.0


class Arithmetic(NamedTuple):
    """In what precision a network computes."""

    name: str  # fp32 or bf16
    autocast: AbstractContextManager[Any]
    views: torch.dtype  # of the images, as the first convolution takes them


def arithmetic(precision: str, device: torch.device) -> Arithmetic:
    """Of `fp32`, `bf16`, or `auto`: bf16 where the device multiplies it in hardware."""
    on_gpu = device.type == "cuda"
    if precision == "auto":
        precision = "bf16" if on_gpu or cpu_has_bf16() else "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    return Arithmetic(precision, autocast, torch.bfloat16 if on_gpu and precision == "bf16" else torch.float32)


def schedule(cfg: Any, images: int) -> Schedule:
    """The learning rate of each step, for so many training images."""
    epochs = min(PAPER_WARMUP_EPOCHS, cfg.epochs / 10) if cfg.warmup_epochs is None else cfg.warmup_epochs
    peak = scaled_lr(cfg.base_lr, cfg.batch, cfg.lr_scaling)
    return Schedule(peak, warmup_steps(images, epochs, cfg.batch), total_steps(images, cfg.epochs, cfg.batch))


def new_method(cfg: Any, device: torch.device) -> Any:
    """The method with new weights, which the seed fixes, on the device."""
    torch.manual_seed(cfg.seed)
    method = methods.load(cfg.method).Method(cfg)
    return method.to(device, memory_format=torch.channels_last)
