"""Pretrain image encoders with SimCLR, fast: the fused NT-Xent loss and LARS optimiser, and the trainer around them."""

__version__ = "0.1.0"
