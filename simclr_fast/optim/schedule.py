"""The official learning-rate schedule: linear warm-up from 0, then half a cosine down to 0.

Source: google-research/simclr, `model_util.learning_rate_schedule` and `get_train_steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCALINGS = ("linear", "sqrt")


def scaled_lr(base_lr: float, batch: int, scaling: str = "linear") -> float:
    """Peak rate for a global batch: base_lr * batch / 256 (linear) or base_lr * sqrt(batch) (sqrt)."""
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    return base_lr * batch / 256 if scaling == "linear" else base_lr * math.sqrt(batch)


def describe_lr(base_lr: float, batch: int, scaling: str = "linear") -> str:
    """`scaled_lr` in words: "lr 4.8 = 0.3 x 4096/256"."""
    factor = f"{batch}/256" if scaling == "linear" else f"sqrt({batch})"
    return f"lr {scaled_lr(base_lr, batch, scaling):.4g} = {base_lr:g} x {factor}"


def warmup_steps(n: int, warmup_epochs: float, batch: int) -> int:
    """Steps of warm-up for `warmup_epochs` passes over n images."""
    return round(warmup_epochs * n // batch)


def total_steps(n: int, epochs: int, batch: int) -> int:
    """Steps of `epochs` passes over n images: batches straddle the epochs, the last one is filled up."""
    return n * epochs // batch + 1


@dataclass(frozen=True)
class Schedule:
    """Rate at a 0-based step: 0 at step 0, `peak` at step `warmup_steps`, 0 at step `total_steps`."""

    peak: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        decay_steps = max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / decay_steps, 1.0)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
