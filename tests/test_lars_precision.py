"""LARS with gradients and parameters in half precision, and with scaled losses."""

import copy

import pytest
import torch
from torch import nn

from simclr_fast.optim import LARS
from tests.lars_common import DEVICES, HALVES, half_gradients, parameters


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_grad_scaler_leaves_its_work_to_the_step(
    lars_step: str, dtype: torch.dtype, max_norm: float | None, device: str
) -> None:
    """Scaled gradients step as unscaled ones; infinities change nothing, not even the averages."""
    params, wanted = (parameters((5, 5), (70,), device=device) for _ in range(2))
    if dtype != torch.float32:
        half_gradients(params, dtype), half_gradients(wanted, dtype)
    optimizer, plain = (LARS(ps, lr=0.1, ema=0.9, max_norm=max_norm, weight_decay=0.1) for ps in (params, wanted))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**7, growth_interval=1)
    scaler.scale(torch.zeros((), device=device))  # makes its tensors
    for p in params:
        p.grad *= 2.0**7
    scaled = [p.grad.clone() for p in params]
    scaler.step(optimizer), scaler.update()
    plain.step()
    torch.testing.assert_close(params, wanted, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, scaled, strict=True))
    assert scaler.get_scale() == 2.0**8

    params[1].grad[3] = torch.inf
    before = [p.detach().clone() for p in params], copy.deepcopy([*optimizer.state.values()])
    scaler.step(optimizer), scaler.update()
    after = [p.detach() for p in params], [*optimizer.state.values()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert scaler.get_scale() == 2.0**7


def test_unscaling_before_is_respected(lars_step: str) -> None:
    params, wanted = parameters((5, 5)), parameters((5, 5))
    optimizer = LARS(params, lr=0.1, adapt=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    params[0].grad *= 8
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    LARS(wanted, lr=0.1, adapt=False).step()
    torch.testing.assert_close(params, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_has_masters(lars_step: str, dtype: torch.dtype, device: str) -> None:
    """Steps too small for the dtype add up; half and single precision may be mixed."""
    half = parameters((40, 30), (3,), dtype=dtype, device=device)
    single = parameters((7,), device=device)
    wanted = [nn.Parameter(p.detach().float()) for p in half]
    optimizer = LARS([*half, *single], lr=1.0, momentum=0.0, trust_coefficient=1e-5)
    plain = LARS([*wanted, *parameters((7,), device=device)], lr=1.0, momentum=0.0, trust_coefficient=1e-5)
    for p, q in zip(half, wanted, strict=True):
        q.grad = p.grad.float()
    for _ in range(200):
        optimizer.step(), plain.step()
    for p, q in zip(half, wanted, strict=True):
        master = optimizer.state[p]["master"]
        torch.testing.assert_close(master, q.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(p.detach(), master.to(dtype))
        assert p._version >= 200


def test_what_is_written_to_half_precision_weights_counts(lars_step: str) -> None:
    """Weights loaded or normalised between steps, also while other sets of parameters are stepped."""
    params = parameters((4, 3), (5,), dtype=torch.bfloat16)
    optimizer = LARS(params, lr=0.0, momentum=0.0)
    optimizer.step()
    with torch.no_grad():
        params[0].fill_(2.0)
    grad, params[1].grad = params[1].grad, None
    optimizer.step()
    master = optimizer.state[params[0]]["master"].add_(1e-4)  # finer than bf16
    params[1].grad = grad
    optimizer.step()
    assert (params[0] == 2.0).all()
    assert (master == 2.0 + torch.tensor(1e-4)).all()
    assert optimizer.state[params[0]]["master"] is master


def test_models_may_change_their_dtype(lars_step: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = LARS(model.parameters(), lr=0.1, trust_coefficient=0.5, ema=0.9)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
        before = model.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model.weight, before)
        (state, _) = optimizer.state.values()
        assert ("master" in state) == (dtype in HALVES)
