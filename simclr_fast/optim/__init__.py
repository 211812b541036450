"""The optimiser and its learning-rate schedule."""

from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.optim.schedule import Schedule, describe_lr, scaled_lr, total_steps, warmup_steps

__all__ = ["LARS", "Schedule", "describe_lr", "lars_param_groups", "scaled_lr", "total_steps", "warmup_steps"]
