"""Encoders to export, the command, and how features are compared, for tests of the formats."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from simclr_fast import export, load
from simclr_fast.pretrained import Encoder, Recipe
from tests.encoder_common import saved

TINY = dict(arch="resnet8", width=0.125, image_size=16)
OFFICIAL = dict(arch="resnet50", variant="official", dialect="tf")


def trained(**recipe) -> Encoder:
    """None of whose tensors is that of a new network."""
    torch.manual_seed(1)
    own = not recipe["arch"].startswith("timm:")
    with torch.device("meta" if own else "cpu"):
        encoder = Encoder(Recipe(**recipe), "somewhere", 7, "birds").eval().requires_grad_(False)
    if own:
        encoder.to_empty(device="cpu")
        for tensor in encoder.state_dict().values():
            tensor.zero_()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and own:
            bound = (6 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return encoder


def images(encoder: Encoder, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(5))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance * float(ours.abs().max()))


def result(encoder: Encoder, **changes) -> dict:
    return {
        "protocol": "knn", "data": "birds", "figures": {"top-1": 0.625}, "weights": encoder.digest(),
        "settings": {"k": None, "temperature": 0.1}, "counts": {"neighbours": 20},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder, as the trainer leaves it, with the result of an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    saved(folder, data="/home/somebody/birds")
    (folder / "evaluations").mkdir()
    known = result(load(folder), when="now", name="knn-birds")
    (folder / "evaluations" / "knn-birds.json").write_text(json.dumps(known))
    return folder


def command(run: Path, form: str, out: Path, *flags: str) -> int:
    return export.main(["--checkpoint", str(run), "--format", form, str(out), *flags])
