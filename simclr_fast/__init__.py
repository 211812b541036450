"""Pretrain image encoders with SimCLR, fast: the fused NT-Xent loss and LARS optimiser, and the trainer around them."""

from simclr_fast.losses import NTXentLoss, info_nce, nt_xent
from simclr_fast.optim import LARS, lars_param_groups

__all__ = ["LARS", "NTXentLoss", "__version__", "info_nce", "lars_param_groups", "nt_xent"]
__version__ = "0.1.0"
