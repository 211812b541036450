"""Which parameters LARS adapts and decays."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from simclr_fast.optim import LARS, lars_param_groups


def model_of(variables: list[dict]) -> nn.Module:
    """Modules (without memory) that hold the original's variables under the original's names."""
    root = nn.Module()
    for variable in variables:
        *path, leaf = variable["name"].split("/")
        shape = variable["shape"]
        parent = root
        for part in path[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if path[-1] not in parent._modules:
            norm = leaf in ("gamma", "beta")
            shell = nn.BatchNorm2d(shape[0], device="meta") if norm else nn.Linear(1, 1, bias=False, device="meta")
            shell._parameters.clear()
            parent.add_module(path[-1], shell)
        torch_name = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}[leaf]
        weight = nn.Parameter(torch.empty(shape, device="meta"))
        parent.get_submodule(path[-1]).register_parameter(torch_name, weight)
    return root


def test_groups_match_the_original(vectors: Path) -> None:
    nets = json.loads((vectors / "net_vars.json").read_text())
    supervised = [
        {"name": "head_supervised/linear_layer/dense/kernel", "shape": [512, 10], "lars_excluded": True},
        {"name": "head_supervised/linear_layer/dense/bias", "shape": [10], "lars_excluded": True},
    ]
    for net in nets.values():
        variables = net["trainable"] + supervised
        adapted, plain = lars_param_groups(model_of(variables), 1e-6)
        assert (adapted["weight_decay"], adapted["adapt"]) == (1e-6, True)
        assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)
        for group, excluded in ((adapted, False), (plain, True)):
            want = {v["name"].rpartition("/")[0] for v in variables if v["lars_excluded"] == excluded}
            assert {name.rpartition(".")[0].replace(".", "/") for name, _ in group["params"]} == want
            assert len(group["params"]) == sum(v["lars_excluded"] == excluded for v in variables)


def test_frozen_parameters_are_stepped_once_they_have_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    model[0].weight.requires_grad_(False)
    adapted, plain = lars_param_groups(model, 0.1)
    assert [name for name, _ in adapted["params"]] == ["0.weight"]
    assert [name for name, _ in plain["params"]] == ["0.bias", "1.weight", "1.bias"]
    optimizer, before = LARS([adapted, plain], lr=0.1), model[0].weight.detach().clone()
    model[0](torch.ones(3, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_(True)
    model[0](torch.ones(3, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_a_group_without_members_is_left_out() -> None:
    bare = nn.Linear(2, 2, bias=False)
    optimizer = LARS(lars_param_groups(bare, 0.1), lr=0.1)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"]]
    for group in lars_param_groups(nn.BatchNorm1d(2), 0.1):
        optimizer.add_param_group(group)
    assert [group["adapt"] for group in optimizer.param_groups] == [True, False]


def test_wrong_models_are_named() -> None:
    with pytest.raises(ValueError, match="model must have parameters, got a ReLU"):
        lars_param_groups(nn.ReLU(), 0.1)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got generator"):
        lars_param_groups(nn.Linear(2, 2).parameters(), 0.1)
