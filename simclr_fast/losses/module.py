"""NT-Xent as a module, called like lightly's class of the same name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast.losses.backends import CHOICES, SCALES, all_gathered, require
from simclr_fast.losses.info_nce import info_nce
from simclr_fast.losses.nt_xent import nt_xent


class NTXentLoss(nn.Module):
    """NT-Xent between two views, or, with a memory bank, InfoNCE against the bank (MoCo).

    Args:
        temperature: tau > 0.
        memory_bank_size: 0, or (rows, D) of a bank of past rows of `out1`, which are then the only negatives. It is
            filled with random directions, and updated where `out0` requires a gradient.
        gather_distributed: take negatives from all ranks of the default process group, if there is one; with a
            bank, fill it from all ranks.
        scale, backend, precision: as in `nt_xent`; `scale` applies without a bank.

    Raises:
        ValueError: an argument breaks its rule.
    Source: arXiv:2002.05709, equation 1, and arXiv:1911.05722, equation 1.
    """

    bank: Tensor
    oldest: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        scale: str = "paper",
        backend: str = "auto",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        options = {"backend": backend, "precision": precision}
        require(
            (
                isinstance(temperature, (int, float)) and 0 < temperature < math.inf,
                "temperature must be a finite number > 0",
                temperature,
            ),
            (scale in SCALES, f"scale must be one of {SCALES}", scale),
            *((x in CHOICES[name], f"{name} must be one of {CHOICES[name]}", x) for name, x in options.items()),
            (
                size == (0,) or (len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size)),
                "memory_bank_size must be 0 or (rows, D), both whole and positive",
                memory_bank_size,
            ),
            (scale == "paper" or size == (0,), "scale must be 'paper' with a memory bank", scale),
        )
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.scale = scale
        self.options: dict[str, Any] = {"backend": backend, "precision": precision}
        # The last row takes what finds no place, so that where a batch goes need not be known to the host.
        rows = F.normalize(torch.randn(size[0] + 1, size[1]), dim=1) if len(size) == 2 else None
        self.register_buffer("bank", rows, persistent=False)
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        bank = 0 if self.bank is None else (len(self.bank) - 1, self.bank.shape[1])
        return f"temperature={self.temperature}, memory_bank_size={bank}, gather_distributed={self.gather_distributed}"

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views of the same images, [N, D] each, not normalised; in nats.

        Over several ranks it is the mean of this rank's rows; gradients averaged as DDP does are those of the
        global batch.
        """
        group = dist.group.WORLD if self.gather_distributed and dist.is_initialized() else None
        if self.bank is None:
            return nt_xent(out0, out1, self.temperature, group=group, scale=self.scale, **self.options)
        # A copy, because the bank changes before the backward pass.
        loss = info_nce(out0, out1, self.temperature, negatives=self.bank[:-1].clone(), in_batch=False, **self.options)
        if out0.requires_grad:
            self._remember(out1.detach(), group)
        return loss

    @torch.no_grad()
    def _remember(self, rows: Tensor, group: dist.ProcessGroup | None) -> None:
        """Puts rows in the place of the oldest; those that do not fit before the end of the bank are left out."""
        rows = F.normalize(rows.to(self.bank.dtype), dim=1)
        if group is not None and dist.get_world_size(group) > 1:
            rows = all_gathered(rows, dist.get_world_size(group), group)
        size = len(self.bank) - 1
        places = self.oldest + torch.arange(len(rows), device=self.bank.device)
        self.bank.index_copy_(0, places.clamp_(max=size), rows)
        end = self.oldest + len(rows)
        self.oldest.copy_(torch.where(end >= size, 0, end))
