"""Projection heads: layers, initial weights, errors; test_resnet.py holds them against the official code."""

import pytest
import torch
from torch import nn

from simclr_fast.models import projection_head
from simclr_fast.models.batchnorm import BatchNorm1d


def kinds(head: nn.Sequential) -> list[type[nn.Module]]:
    return [type(module) for module in head]


def test_nonlinear_layers():
    head = projection_head("nonlinear", 6, out_features=4, layers=3)
    hidden = [nn.Linear, BatchNorm1d, nn.ReLU]
    assert kinds(head) == [*hidden, *hidden, nn.Linear, BatchNorm1d]
    assert [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)] == [(6, 6), (6, 6), (4, 6)]
    assert head(torch.randn(5, 6)).shape == (5, 4)


def test_linear_is_the_last_layer_alone():
    head = projection_head("linear", 6, out_features=4)
    assert kinds(head) == [nn.Linear, BatchNorm1d]
    assert head(torch.randn(5, 6)).shape == (5, 4)


def test_none_is_the_identity():
    h = torch.randn(5, 6)
    head = projection_head("none", 6)
    assert torch.equal(head(h), h)
    assert not list(head.parameters())


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_only_hidden_norms_shift(kind):
    head = projection_head(kind, 6)
    biased = [name for name, _ in head.named_parameters() if name.endswith("bias")]
    assert biased == (["1.bias"] if kind == "nonlinear" else [])
    assert head[-1].weight.requires_grad
    assert (head[-1].weight == 1).all()


def test_last_norm_centres_and_trains():
    torch.manual_seed(0)
    head = projection_head("nonlinear", 16, out_features=8)
    z = head(torch.randn(64, 16))
    torch.testing.assert_close(z.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    z.square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_weights_start_normal_with_std_one_hundredth():
    torch.manual_seed(0)
    for module in projection_head("nonlinear", 256):
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert module.weight.abs().max().item() > 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(kind="nonlinaer"),
            "kind must be one of none, linear, nonlinear, got 'nonlinaer'; did you mean 'nonlinear'",
        ),
        (dict(in_features=0), "at least 1, got in_features=0, out_features=128"),
        (dict(out_features=-1), "at least 1, got in_features=6, out_features=-1"),
        (dict(layers=1), "layers must be at least 2 .*got layers=1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        projection_head(**{"kind": "nonlinear", "in_features": 6, **arguments})
