"""Projection heads: the layers between an encoder and the contrastive loss, thrown away afterwards.

Sources: Chen et al. 2020, arXiv:2002.05709, section 4.2; github.com/google-research/simclr, whose heads carry
batch normalisations that the paper's formula leaves out.
"""

from typing import Literal

from torch import nn

from simclr_fast.config import choose
from simclr_fast.models.batchnorm import BatchNorm1d

Kind = Literal["none", "linear", "nonlinear"]


def _dense(c_in: int, c_out: int) -> tuple[nn.Linear, BatchNorm1d]:
    linear = nn.Linear(c_in, c_out, bias=False)
    nn.init.normal_(linear.weight, std=0.01)
    return linear, BatchNorm1d(c_out)


def projection_head(kind: Kind, in_features: int, *, out_features: int = 128, layers: int = 2) -> nn.Sequential:
    """Build a head with new weights: features [B, in_features] to embeddings [B, out_features], unnormalised.

    Args:
        kind: "nonlinear": linear layers without bias, the hidden ones as wide as the features and with BN and
            ReLU, the last one with a BN that scales but does not shift; "linear": the last one alone;
            "none": the identity.
        in_features: the encoder's `num_features`.
        out_features: width of the embeddings; without effect for "none".
        layers: linear layers of a nonlinear head: 2 in SimCLR, 3 in SimCLR v2.
    Raises:
        ValueError: an unknown kind; in_features or out_features below 1; layers below 2.
    """
    choose("kind", kind, ("none", "linear", "nonlinear"))
    if in_features < 1 or out_features < 1:
        raise ValueError(f"widths must be at least 1, got {in_features=}, {out_features=}")
    if layers < 2:
        raise ValueError(f"layers must be at least 2 (the linear head has 1), got {layers=}")
    head = nn.Sequential()
    for _ in range(layers - 1 if kind == "nonlinear" else 0):
        head.extend([*_dense(in_features, in_features), nn.ReLU(inplace=True)])
    if kind != "none":
        linear, norm = _dense(in_features, out_features)
        norm.register_parameter("bias", None)
        head.extend([linear, norm])
    return head
