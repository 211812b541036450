"""Contrastive losses."""

from simclr_fast.losses.nt_xent import nt_xent as nt_xent
