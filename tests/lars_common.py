"""What the tests of LARS share."""

import pytest
import torch
from torch import Tensor, nn

from simclr_fast.optim import lars, steps

fused = pytest.mark.skipif(
    not steps.extension(), reason="simclr_fast._C is not built: `python setup.py build_ext --inplace`"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.bfloat16, torch.float16]
VARIANTS = [
    {},
    {"nesterov": True},
    {"classic_momentum": False},
    {"classic_momentum": False, "nesterov": True},
    {"lr_outside": True},
    {"lr_outside": True, "nesterov": True},
    {"adapt": False},
    {"maximize": True},
]


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Random parameters with random gradients, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(t[0].to(device, dtype)) for t in tensors]
    for p, t in zip(params, tensors, strict=True):
        p.grad = t[1].to(device, dtype)
    return params


def half_gradients(params: list[Tensor], dtype: torch.dtype) -> None:
    """Give float32 parameters gradients of another dtype, as gradient compression does."""
    for p in params:
        grad, p.grad = p.grad, None
        p.grad_dtype = dtype
        p.grad = grad.to(dtype)


def truth(optimizer: lars.LARS, params: list[Tensor], **options) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and velocities after one step from here, by the plain step in float64."""
    rows = [row for row, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in members] == [id(p) for p in params]
    weights = [optimizer.state[p].get("master", p).detach().double().cpu().clone() for p in params]
    velocities = [
        optimizer.state[p]["momentum_buffer"].double().cpu().clone() if optimizer.state[p] else torch.zeros_like(w)
        for p, w in zip(params, weights, strict=True)
    ]
    numbers = [[float(group[name]) for name in steps.HYPER] for group in optimizer.param_groups]
    hyper = torch.tensor(numbers, dtype=torch.float64)
    grads = [p.grad.double().cpu() for p in params]
    steps.lars_reference(weights, grads, velocities, rows, hyper, **options)
    return weights, velocities
