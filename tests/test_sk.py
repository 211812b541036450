"""Selective kernels: the official sizes, TensorFlow's average pool at the border, the gate; training; errors."""

import json
from pathlib import Path

import pytest
import torch

from simclr_fast.models import resnet
from simclr_fast.models.sk import Select, ShortcutPool, gate_channels

SIZES = [(50, 1), (50, 2), (50, 3), (101, 1), (101, 2), (152, 1), (152, 3)]


@pytest.mark.parametrize(("depth", "width"), SIZES)
def test_parameter_counts_are_the_official_ones(vectors: Path, depth, width):
    with torch.device("meta"):
        encoder = resnet(f"resnet{depth}", width=width, variant="official", sk_ratio=0.0625)
    counts = json.loads((vectors / "param_counts.json").read_text())[f"r{depth}_{width}x_sk1_proj3"]
    assert sum(p.numel() for p in encoder.parameters()) == counts["base"]


def test_pool_at_stride_1_leaves_out_what_lies_outside():
    x = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    expected = torch.tensor([[[[15 / 4, 10 / 2], [12 / 2, 8.0]]]])
    assert torch.equal(ShortcutPool(1)(x), expected)


def test_pool_at_stride_2_counts_zeros_after_odd_sizes():
    x = torch.arange(1.0, 10).view(1, 1, 3, 3)
    expected = torch.tensor([[[[(1 + 2 + 4 + 5) / 4, (3 + 6) / 4], [(7 + 8) / 4, 9 / 4]]]])
    assert torch.equal(ShortcutPool(2)(x), expected)
    even = torch.randn(1, 2, 6, 4)
    assert torch.equal(ShortcutPool(2)(even), torch.nn.functional.avg_pool2d(even, 2))


def test_gate_is_a_softmax_over_the_streams():
    torch.manual_seed(0)
    select = Select(torch.nn.Conv2d(3, 32, 1, bias=False), torch.nn.Conv2d(32, 6, 1, bias=False)).eval()
    x = torch.randn(2, 6, 4, 5)
    streams = torch.stack(x.split(3, 1))
    hidden = torch.relu(select.bn(select.reduce(streams.sum(0).mean((2, 3), keepdim=True))))
    shares = torch.stack(select.expand(hidden).split(3, 1)).softmax(0)
    torch.testing.assert_close(select(x), (streams * shares).sum(0), rtol=1e-5, atol=1e-6)


def test_gates_have_at_least_32_channels():
    assert [gate_channels(channels, 0.0625) for channels in (64, 512, 1024)] == [32, 32, 64]


def test_all_of_it_trains():
    torch.manual_seed(0)
    encoder = resnet("resnet50", width=1 / 16, variant="official", sk_ratio=0.0625)
    for block in encoder.modules():  # else the last scales, which are 0, keep gradients from the branches
        if hasattr(block, "bn3"):
            torch.nn.init.ones_(block.bn3.weight)
    encoder(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sk_ratio=0.0625), "sk_ratio must be in .*variant='torchvision'"),
        (dict(arch="resnet18", sk_ratio=0.0625, variant="official"), "arch='resnet18'"),
        (dict(sk_ratio=-1.0, variant="official"), "got sk_ratio=-1.0"),
        (dict(sk_ratio=float("nan"), variant="official"), "got sk_ratio=nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet(**{"arch": "resnet50", **arguments})
