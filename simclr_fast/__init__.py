"""Pretrain image encoders with SimCLR, fast: the fused NT-Xent loss and LARS optimiser, and the trainer around them."""

from typing import Any

from simclr_fast.losses import NTXentLoss, info_nce, nt_xent
from simclr_fast.optim import LARS, lars_param_groups

__all__ = ["LARS", "NTXentLoss", "__version__", "augment", "info_nce", "lars_param_groups", "load", "nt_xent"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`augment` and `load`, whose modules know images, are imported when they are asked for."""
    if name == "augment":
        from simclr_fast.data.augment import augment

        return augment
    if name == "load":
        from simclr_fast.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
