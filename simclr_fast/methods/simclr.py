"""SimCLR (Chen et al. 2020, arXiv:2002.05709): agreement of two views of an image against all other images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_fast import config
from simclr_fast.losses import nt_xent
from simclr_fast.models import check_arch, encoder, projection_head


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Pretrain with SimCLR: pull two views of an image together, push all others apart."""

    head: Literal["none", "linear", "nonlinear"] = "nonlinear"
    """Projection head between the encoder and the loss."""

    head_layers: int = 2
    """Layers of the nonlinear head: 2 in the paper, 3 in SimCLR v2."""

    head_features: int = 128
    """Features of an embedding, the head's output."""

    base_lr: float = 0.3
    """Learning rate for a batch of 256 (linear scaling) or of 1 (sqrt scaling)."""

    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How the learning rate grows with the batch: base x batch / 256, or base x sqrt(batch)."""

    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Without it: 10, or a tenth of the run if that is less."""

    weight_decay: float = 1e-6
    """Weight decay; BatchNorm and biases are left out."""

    trust_coefficient: float = 1e-3
    """LARS moves a weight tensor by about this x learning rate x its norm."""

    loss_scale: Literal["paper", "simclr_tf"] = "paper"
    """`simclr_tf` doubles the gradient, as the original's code does; the loss shown is the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arch(self.arch, self.width)
        self._require("head_features", self.head_features >= 1, "at least 1")
        self._require("head_layers", self.head_layers >= 2, "at least 2, for `nonlinear`; `linear` has 1")
        self._require("base_lr", self.base_lr > 0, "positive")
        self._require("trust_coefficient", self.trust_coefficient > 0, "positive")
        self._require("weight_decay", self.weight_decay >= 0, "0 or more")
        self._require("warmup_epochs", self.warmup_epochs is None or self.warmup_epochs >= 0, "0 or more")


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # The paper's main results (section 2.3, appendix B.9): lr 0.3 x N/256, decay 1e-6, tau 0.1, a head of 2 layers.
    "imagenet": {
        "arch": "resnet50", "image_size": 224, "batch": 4096, "epochs": 100, "temperature": 0.1,
        "base_lr": 0.3, "lr_scaling": "linear", "warmup_epochs": 10.0, "weight_decay": 1e-6, "head_layers": 2,
        "dialect": "tf", "jitter": 1.0, "blur": 0.5, "loss_scale": "simclr_tf",
    },
    # google-research/simclr@383d414: the README's CIFAR-10 command and the defaults of the flags that it leaves out.
    "cifar10": {
        "arch": "resnet18", "image_size": 32, "batch": 512, "epochs": 1000, "temperature": 0.5,
        "base_lr": 1.0, "lr_scaling": "linear", "warmup_epochs": 10.0, "weight_decay": 1e-4, "head_layers": 3,
        "dialect": "tf", "jitter": 0.5, "blur": 0.0, "loss_scale": "simclr_tf",
    },
    # Ours, found by measurement on two CPU cores: bench/shapes_bench.py.
    "shapes": {
        "arch": "resnet8", "width": 0.5, "image_size": 32, "batch": 128, "epochs": 10, "temperature": 0.1,
        "base_lr": 0.2, "trust_coefficient": 0.1, "weight_decay": 1e-4, "head_features": 64,
        "min_area": 0.3, "jitter": 0.5, "blur": 0.0,
    },
}  # fmt: skip


class Method(nn.Module):
    """Encoder, projection head and loss."""

    loss_parameters: tuple[nn.Parameter, ...] = ()
    """Those that the loss uses itself, outside `forward`."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.temperature, self.loss_scale = cfg.temperature, cfg.loss_scale
        self.encoder = encoder(cfg.arch, width=cfg.width, image_size=cfg.image_size)
        features = cast(int, self.encoder.num_features)
        self.head = projection_head(cfg.head, features, out_features=cfg.head_features, layers=cfg.head_layers)

    def forward(self, views: Tensor) -> Tensor:
        """Embeddings [B, D] of views [B, 3, S, S]."""
        return self.head(self.encoder(views))

    def loss(self, z1: Tensor, z2: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this rank's rows against the views of all ranks of `group`.

        Args:
            z1, z2: [b, D], the embeddings of both views of the rank's b images.
        Returns:
            The scalar to differentiate, and detached 0-dim statistics of the rank's rows: `loss` (the paper's, in
            nats), `contrastive_top1` (a fraction) and `embedding_spread` (1 - |mean unit embedding|^2: 0 if all are
            alike, near 1 if they point everywhere).
        """
        loss, stats = nt_xent(z1, z2, self.temperature, group=group, scale=self.loss_scale, return_stats=True)
        shown = loss.detach() / (2 if self.loss_scale == "simclr_tf" else 1)
        mean = F.normalize(torch.cat([z1, z2]).detach().float()).mean(0)
        return loss, {
            "loss": shown,
            "contrastive_top1": stats["contrastive_top1"],
            "embedding_spread": 1 - mean.square().sum(),
        }
