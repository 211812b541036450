"""Contrastive losses."""

from simclr_fast.losses.info_nce import info_nce as info_nce
from simclr_fast.losses.module import NTXentLoss as NTXentLoss
from simclr_fast.losses.nt_xent import nt_xent as nt_xent
