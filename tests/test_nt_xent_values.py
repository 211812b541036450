"""NT-Xent where the numbers are awkward: degenerate rows, rows of any size, any temperature, tiny losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from simclr_fast.losses import nt_xent
from tests.losses_common import (
    DEVICE,
    EVERY,
    EVERY_WAY,
    F64,
    OUR_WAYS,
    check,
    differentiate,
    few,
    pairs,
    rows,
    run,
    trained,
    truth,
)

# Of NumPy, which interprets the kernels: NaN, and what a row's similarity to itself, left out afterwards, may be.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TAUS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.5, 1.0, 10.0]


def room(tau):
    """Of float32: P = exp(S - lse) carries the rounding of lse, which is of the size of 1 / tau."""
    return 3e-6 + 4e-7 / tau


def with_rows(z1, z2, *changes):
    """Copies in which view `v`, row `i` is `value`."""
    z = [z1.clone(), z2.clone()]
    for v, i, value in changes:
        z[v][i] = value
    return z


def sized(*sizes):
    z1, z2 = pairs(9, 12)
    return z1 * torch.tensor(sizes)[:, None], z2


Z1, Z2 = pairs(9, 12)
VALUES = {
    "identical": (torch.ones(9, 12), torch.ones(9, 12)),
    "identical within a view": (torch.ones(9, 12), -torch.ones(9, 12)),
    "duplicate pairs": with_rows(Z1, Z2, (0, 3, Z1[5]), (1, 3, Z2[5])),
    "duplicate across pairs": with_rows(Z1, Z2, (0, 3, Z1[5]), (1, 8, Z1[0])),
    "equal views": (Z1, Z1),
    "opposed views": (Z1, -Z1),
    "orthogonal": tuple(torch.eye(18, 20).chunk(2)),
    "one direction": (torch.linspace(-2, 3, 9)[:, None], torch.linspace(1, -4, 9)[:, None]),
    "a zero row": with_rows(Z1, Z2, (0, 1, 0.0)),
    "zero rows in both views": with_rows(Z1, Z2, (0, 1, 0.0), (1, 1, 0.0), (1, 3, 0.0)),
    "a view of zeros": (Z1 * 0, Z2),
    "zeros": (Z1 * 0, Z2 * 0),
    "negative zeros": (Z1 * 0, -Z2.abs() * 0),
    "small": sized(*[1e-10] * 9),
    "large": sized(*[1e20] * 9),
    "of all sizes": sized(1e-11, 1e-8, 1e-5, 1e-2, 1, 1e3, 1e8, 1e15, 1e20),
    "a little smaller than eps": sized(1e-13, 1e-14, 2e-13, 1e-12, 1e-11, 1, 1, 1e-13, 1e3),
    "smaller than eps": sized(1e-20, 1e-18, 1e-16, 1e-14, 1e-13, 1e-12, 1, 1e-20, 1),
    "elements of all sizes": (rows(9, 12) * torch.logspace(-15, 18, 12), Z2),
    "trained": trained(20, 32, 0.9),
    "collapsed": tuple(1 + 0.03 * z for z in pairs(20, 32)),
}


@EVERY_WAY
@pytest.mark.parametrize("name", VALUES)
def test_values(backend, name):
    (z1, z2), tau = VALUES[name], 0.1
    sizes = [z.double().norm(dim=1, keepdim=True).clamp_min(1e-12) for z in (z1, z2)]

    def per_unit(results):  # so that each row counts alike
        return [results[0], *(grad.double() * size for grad, size in zip(results[1:3], sizes, strict=True)), results[3]]

    exact, plain = (per_unit(truth(z1, z2, tau, dtype)) for dtype in (F64, torch.float32))
    check(per_unit(run(z1, z2, tau, backend, precision="fp32")), exact, room(tau), plain, tau)


@EVERY_WAY
def test_all_rows_alike_tell_nothing(backend):
    z = torch.full((20, 7), -3.0)
    loss, *grads = run(z, z, 0.01, backend)
    assert loss.item() == pytest.approx(math.log(39), abs=1e-5)  # the similarities are 100
    assert all(grad.abs().max() < 1e-4 for grad in grads[:2])
    assert abs(grads[2]) < 1e-5 * 100**2  # a difference of terms of 1 / tau^2


@EVERY
@pytest.mark.parametrize(
    ("eps", "sizes"),
    [
        *((eps, (1e-8, 1e-7, 3e-6, 1e-5, 1, 30, 1e-20, 1e-30, 1e4)) for eps in (1e-37, 1e-6, 10.0)),
        (1e-37, (1e-21,) * 9),
        (1e-3, (1e-4, 2e-3, 1, 1, 1, 1, 1, 1, 1)),
    ],
)
def test_eps_is_the_floor_of_the_norm(backend, eps, sizes):
    sizes = torch.tensor(sizes)[:, None]
    z1, z2 = F.normalize(Z1) * sizes, Z2
    exact = differentiate(
        lambda a, b, t: nt_xent(F.normalize(a, eps=eps), F.normalize(b, eps=eps), t, backend="reference", eps=11.0),
        (z1.double(), z2.double(), torch.tensor(0.2 / 121, dtype=F64)),  # 11 divides each row alike
    )
    got = run(z1, z2, 0.2, backend, precision="fp32", eps=eps)
    size = sizes.clamp_min(eps)
    for results in (got, exact):
        results[1] = results[1].double() * size
    check(got[:3], exact[:3], 5e-6)


@EVERY_WAY
def test_float16_rows_beyond_its_range(backend):
    half = torch.full((3, 200), 6e4, dtype=torch.float16)  # its norm is 8.5e5, past float16
    half[1, ::2], half[2, ::3] = -6e4, 1
    check(run(half, half, 0.2, backend)[:1], truth(half, half, 0.2)[:1], 1e-3)
    assert all(torch.isfinite(x).all() for x in run(half, half, 0.2, backend))
    z1, z2 = (z.half() * 2.0**-23 for z in pairs(5, 12))  # subnormal: three bits at most are left
    got, exact = (f(z1, z2, 0.2, upstream=1e-4, **o) for f, o in ((run, {"backend": backend}), (truth, {})))
    check(got, exact, 2e-3)


@EVERY_WAY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_seen(backend, bad):
    """In the loss of every anchor and in the gradient of every row, since all have met the bad one."""
    z1, z2 = with_rows(*pairs(40, 6), (0, 17, torch.tensor([1.0, 2, bad, 4, 5, 6])))
    assert all(torch.isnan(x).all() for x in truth(z1, z2, 0.2, reduction="none"))
    assert all(torch.isnan(x).all() for x in run(z1, z2, 0.2, backend, reduction="none"))
    assert all(torch.isnan(x).all() for x in run(z1, z2, 0.2, backend))


@EVERY_WAY
@pytest.mark.parametrize("tau", TAUS)
def test_any_temperature(backend, tau):
    for z1, z2 in ((Z1, Z2), trained(12, 32, 0.9), (Z1, -Z1))[: few(2, 3) if backend == "triton" and tau > 0.02 else 3]:
        exact, plain = truth(z1, z2, tau), truth(z1, z2, tau, torch.float32)
        check(run(z1, z2, tau, backend, precision="fp32"), exact, room(tau), plain, tau)


@EVERY
def test_default_precision_at_any_temperature(backend):
    for tau in few(TAUS[::3], TAUS):
        exact, plain = truth(Z1, Z2, tau), truth(Z1, Z2, tau, torch.float16)
        check(run(Z1, Z2, tau, backend), exact, 5e-4, plain, tau)


@EVERY
def test_a_temperature_may_be_many_things(backend):
    z1, z2 = (z.to(DEVICE[backend]) for z in pairs(9, 12))
    wanted, _, _, gradient = run(z1.cpu(), z2.cpu(), 0.25, backend)
    parameter = torch.nn.Parameter(torch.tensor(0.25))
    forms = [0.25, torch.tensor(0.25), parameter, torch.tensor(0.25, dtype=F64), torch.tensor(0.25).bfloat16()]
    assert all(nt_xent(z1, z2, tau, backend=backend).cpu() == wanted for tau in forms)
    assert nt_xent(z1, z2, 1, backend=backend) == nt_xent(z1, z2, 1.0, backend=backend)
    nt_xent(z1, z2, parameter, backend=backend).backward()
    assert parameter.grad.dtype == torch.float32
    assert parameter.grad.item() == pytest.approx(gradient.item(), rel=1e-6)
    log_scale = torch.tensor(0.25).log().neg().requires_grad_()  # CLIP's form: tau = exp(-s)
    nt_xent(z1, z2, (-log_scale).exp(), backend=backend).backward()
    assert log_scale.grad.item() == pytest.approx(-0.25 * gradient.item(), rel=1e-5)


@OUR_WAYS
@pytest.mark.parametrize(("tau", "cosine"), [(0.05, 1.0), (0.05, 0.95), (0.07, 0.99), (0.04, 1.0)])
def test_a_tiny_loss_keeps_its_digits(backend, tau, cosine):
    """Losses of 1e-5 to 1e-10, of which lse - s has no digit in float32; the yardstick has them in float64."""
    other = torch.eye(8).roll(1, 1) + torch.eye(8).roll(3, 1)
    z1, z2 = torch.eye(8), cosine * torch.eye(8) + math.sqrt((1 - cosine**2) / 2) * other

    def loss(a, b, t):
        z = F.normalize(torch.cat([a, b]))
        s, index = z @ z.T / t, torch.arange(16)
        negatives = s.masked_fill((index[:, None] - index) % 8 == 0, -math.inf)
        return F.softplus(negatives.logsumexp(1) - s[index, index.roll(8)]).mean()

    exact = differentiate(loss, (z1.double(), z2.double(), torch.tensor(tau, dtype=F64)))
    assert 1e-10 < exact[0] < 1e-4
    for a, b in zip(run(z1, z2, tau, backend, precision="fp32"), exact, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
