"""NT-Xent for any N and D: sizes around the tiles of every kernel launch, odd ones, and one of each."""

import pytest
import torch
import torch.nn.functional as F

from simclr_fast.kernels import nt_xent as kernels
from simclr_fast.losses import blocked
from tests.losses_common import DEVICE, EVERY_WAY, F64, OURS, ROOM, check, few, pairs, rows, run, truth

WIDTHS = [1, 2, 3, 5, 16, 31, 33, 64, 96, 127, 128, 129, 192, 255, 256, 257, 384, 768, 1000, 1024, 2048]
COUNTS = [1, 2, 3, 4, 5, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129]
# Around the tiles of 32 and 64 rows and columns.
IN_TILES = few(
    [("fp32", n) for n in (1, 16, 17, 33, 64, 65)] + [("fp16", n) for n in (1, 33, 64, 65)],
    [(precision, n) for precision in ROOM for n in COUNTS],
)


def close_to_truth(z1, z2, tau, backend, precision, **options):
    dtype = kernels.DTYPES[precision] if backend == "triton" else torch.float32
    exact, plain = truth(z1, z2, tau), truth(z1, z2, tau, dtype)
    check(run(z1, z2, tau, backend, precision=precision, **options), exact, ROOM[precision], plain)


@pytest.mark.parametrize("backend", ["native", "fixed", "tiles", "reference"])
@pytest.mark.parametrize("d", WIDTHS)
def test_any_width(backend, d):
    for n in (1, 2, 5):
        close_to_truth(*pairs(n, d), 0.2, backend, "fp32")


@pytest.mark.parametrize("d", few([1, 64, 65, 256, 257, 384, 1000], WIDTHS))
@pytest.mark.parametrize("precision", few(["fp32"], ROOM))
def test_any_width_in_tiles(d, precision):
    n = 40 if d == 257 else 5  # wide rows in several tiles once
    close_to_truth(*pairs(n, d), 0.2, "triton", precision)


@pytest.mark.parametrize(
    ("backend", "n"),
    [("tiles", n) for n in COUNTS if n < 64]
    + [(backend, n) for backend in ("native", "fixed", "reference") for n in [*COUNTS, 255, 256, 257, 1025]],
)
def test_any_count(backend, n):
    close_to_truth(*pairs(n, 24), 0.2, backend, "fp32")


@pytest.mark.parametrize(("precision", "n"), IN_TILES)
def test_any_count_in_tiles(precision, n):
    close_to_truth(*pairs(n, 9), 0.2, "triton", precision)


@pytest.mark.parametrize("precision", ROOM)
@pytest.mark.parametrize(("n", "d", "tau"), few([(3, 16, 0.07)], [(3, 16, 0.5), (33, 70, 0.07), (150, 700, 0.07)]))
def test_triton_errs_no_more_than_pytorch(precision, n, d, tau):
    close_to_truth(*pairs(n, d), tau, "triton", precision)


@EVERY_WAY
def test_one_pair_has_no_loss(backend):
    loss, *grads = run(*pairs(1, 5), 0.1, backend)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


def of_a_rank(z, own, g, dtype=F64):
    """Loss, log-sum-exp and tau dz of some anchors among all, with the weights g of the rows; multiplied in `dtype`."""
    N, every, tau = len(z) // 2, torch.arange(len(z)), 0.2
    positive, unit = every.roll(N), F.normalize(z.double()).to(dtype)
    s = ((unit @ unit.T).double() / tau).fill_diagonal_(-torch.inf)
    lse = s.logsumexp(1)
    losses = lse - s[every, positive]
    weights = g[:, None] * (s - lse[:, None]).exp()
    weights[every, positive] = g * torch.expm1(-losses)
    dz = (weights + weights.T).to(dtype) @ unit
    return [losses[own], lse[own], dz[own].double()], lse, weights


def close_on_a_share_of_the_anchors(module, device, first, n, N, d, precision):
    """What one rank computes: the losses and gradients of images first .. first + n - 1 of N, both views."""
    z, g = rows(2 * N, d), rows(2 * N, seed=1).abs().double() / 4
    own = torch.cat([torch.arange(first, first + n), torch.arange(first, first + n) + N])
    exact, lse, weights = of_a_rank(z, own, g)
    plain = of_a_rank(z, own, g, kernels.DTYPES[precision])[0]
    pull = -(weights + weights.T)[torch.arange(2 * N), torch.arange(2 * N).roll(N)]

    y = module.operand([z.to(device)], torch.float32, precision, 1e-12)
    x, tau, places = y[own.to(device)], torch.tensor(0.2, device=device), ([first, first + N], [first + N, first])
    found = list(module.statistics(x, y, tau, *places, precision))
    vectors = (v.float().to(device) for v in (lse[own], g[own], lse, g, pull[own]))
    found.append(module.gradient(x, y, tau, *vectors, *places, precision)[0].sum(0)[:, :d])
    check([x.cpu() for x in found], exact, ROOM[precision], plain)


@OURS
@pytest.mark.parametrize(("first", "n"), [(0, 37), (33, 67)])
def test_a_share_of_the_anchors(backend, first, n):
    module = kernels if backend == "triton" else blocked
    close_on_a_share_of_the_anchors(module, DEVICE[backend], first, n, 100, 20, "fp32")


def test_more_wide_rows_than_weights_are_held_of():
    """Triton stores the weights of as many rows at a time as these are wide; the last five have positives."""
    R = 2053
    x, y = (F.normalize(rows(n, 257, seed=n)) for n in (R, 5))
    lse_x, g_x, lse_y, g_y, pull = (rows(n, seed=9 + n).abs() for n in (R, R, 5, 5, R))
    s = x.double() @ y.double().T / 0.2
    w = g_x[:, None] * (s - lse_x[:, None]).exp() + g_y * (s - lse_y).exp()
    w[torch.arange(R - 5, R), torch.arange(5)] = -pull[-5:].double()
    tensors = (t.to(DEVICE["triton"]) for t in (torch.tensor(0.2), lse_x, g_x, lse_y, g_y, pull))
    x_there, y_there = (F.pad(t, (0, 320 - 257)).to(DEVICE["triton"]) for t in (x, y))
    got = kernels.gradient(x_there, y_there, *tensors, [kernels.ABSENT], [5 - R], "fp32")[0].sum(0)[:, :257]
    check([got.cpu()], [w @ y.double()], 3e-6)


@pytest.mark.parametrize(
    ("width", "precision", "shared"),
    [(*key, 1 << 18) for key in kernels.LAUNCH] + [(*key, 1 << 16) for key in kernels.LOW_SHARED],
)
def test_every_launch_over_two_tiles_and_a_tail(monkeypatch, width, precision, shared):
    """Of columns, and two blocks of rows; interpreted, the last few rows of each view.

    Blocks of bf16 are those of fp16: one tile will do where products are slow.
    """
    chip = kernels._chip(torch.device(DEVICE["triton"]))
    monkeypatch.setattr(kernels, "_chip", lambda device: chip._replace(shared=shared))
    launches = kernels.launches(width, precision, shared)
    N = max(launch.columns for launch in launches) + 1
    if precision == "bf16" and launches == kernels.launches(width, "fp16", shared):
        N = few(9, N)
    n, d = few(3, N), 257 if width == kernels.WIDE else width - 1
    close_on_a_share_of_the_anchors(kernels, DEVICE["triton"], N - n, n, N, d, precision)
