"""NT-Xent takes its inputs as they come: any dtype, mixed ones, autocast, gradient scaling, any layout."""

import itertools

import pytest
import torch
from torch import nn

from simclr_fast.losses import nt_xent
from tests.losses_common import DEVICE, EVERY, EVERY_WAY, F64, OUR_WAYS, check, pairs, rows, run, truth

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, F64]


@EVERY_WAY
@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_dtypes(backend, first, second):
    (z1, _), (_, z2) = pairs(9, 12, dtype=first), pairs(9, 12, dtype=second)
    if backend == "triton" and F64 in (first, second):
        with pytest.raises(ValueError, match="float64"):
            run(z1, z2, 0.2, backend)
        return
    got = run(z1, z2, 0.2, backend)
    assert got[0].dtype == (F64 if F64 in (first, second) else torch.float32)
    assert [grad.dtype for grad in got[1:3]] == [first, second]
    inside = 1e-3 if backend == "triton" else 1e-14 if got[0].dtype == F64 else 2e-6
    check(got, truth(z1, z2, 0.2), inside + 2 * max(torch.finfo(dtype).eps for dtype in (first, second)))


@EVERY
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_changes_nothing(backend, dtype):
    z1, z2 = (z.to(DEVICE[backend]) for z in pairs(9, 12))
    tau = torch.tensor(0.2, device=DEVICE[backend])

    def results(forward, backward):
        leaves = [x.clone().requires_grad_() for x in (z1, z2, tau)]
        with torch.autocast(DEVICE[backend], dtype, enabled=forward):
            loss = nt_xent(*leaves, backend=backend)
        with torch.autocast(DEVICE[backend], dtype, enabled=backward):
            loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    plain = results(False, False)
    for forward, backward in ((True, False), (True, True), (False, True)):
        if backward and backend == "reference":
            continue  # its gradient is PyTorch's, which autocast reaches
        assert all(torch.equal(a, b) for a, b in zip(plain, results(forward, backward), strict=True))


@EVERY
def test_a_half_precision_encoder_under_autocast(backend):
    """Its outputs are bfloat16 inside autocast, and its float32 weights get the gradient of those outputs."""
    torch.manual_seed(0)
    encoder, views = nn.Linear(6, 12).to(DEVICE[backend]), rows(2, 9, 6).to(DEVICE[backend])
    with torch.autocast(DEVICE[backend], torch.bfloat16):
        z1, z2 = (encoder(view) for view in views)
        loss = nt_xent(z1, z2, 0.2, backend=backend)
    assert (z1.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(loss, (z1, z2), retain_graph=True)
    loss.backward()
    leaves = [z.detach().clone().requires_grad_() for z in (z1, z2)]
    wanted = nt_xent(*leaves, 0.2, backend=backend)
    assert loss == wanted
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(wanted, leaves), strict=True))
    assert encoder.weight.grad.dtype == torch.float32
    assert encoder.weight.grad.any()


@OUR_WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("upstream", [65536.0, 1e-8, 0.0])
def test_upstream_gradient(backend, dtype, upstream):
    """What a GradScaler multiplies the loss by multiplies the gradient, and loses no more digits than its dtype."""
    z1, z2 = (100 * z for z in pairs(9, 12, dtype=dtype))
    wide = run(z1.float(), z2.float(), 0.2, backend, precision="fp32")
    scaled = run(z1, z2, 0.2, backend, upstream=upstream, precision="fp32")
    for a, b in zip(wide[1:], scaled[1:], strict=True):
        assert a.any()
        room = (2 * torch.finfo(b.dtype).eps + 2e-6) * (a * upstream).abs().max() + torch.finfo(b.dtype).smallest_normal
        assert (b - a * upstream).abs().max() <= room


def transposed(x):  # [30, 18]
    return x.T[:9, :12], x.T[9:, :12]


def sliced_columns(x):
    return x[:9, 1:13], x[9:18, 3:15]


def every_second_column(x):
    return x[:9, ::2], x[9:18, 1::2]


def stacked_views(x):
    return x.view(15, 2, 18).unbind(1)


def odd_offsets(x):
    flat = x.reshape(-1)
    return flat[1:].as_strided((9, 7), (7, 1), 1), flat[65:].as_strided((9, 7), (7, 1), 65)


def repeated_row(x):
    return x[:1].expand(9, 18), x[1:10]


def repeated_column(x):
    return x[:9, :1].expand(9, 12), x[9:18, :12]


def overlapping_rows(x):
    return x.reshape(-1).as_strided((9, 12), (5, 1), 3), x[9:18, :12]


@EVERY
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *itertools.product(
            [
                transposed, sliced_columns, every_second_column, stacked_views, repeated_row, repeated_column,
                overlapping_rows,
            ],
            [torch.float32],
        ),
        *itertools.product([odd_offsets], DTYPES[:3]),
    ],
)  # fmt: skip
def test_any_layout(backend, layout, dtype):
    """The bits, and the gradient of the storage, are those of contiguous copies."""
    base = rows(30, 18, dtype=dtype).to(DEVICE[backend]).requires_grad_()
    z1, z2 = layout(base)
    copies = [z.detach().contiguous().clone().requires_grad_() for z in (z1, z2)]
    loss, wanted = (nt_xent(*views, 0.2, backend=backend) for views in ((z1, z2), copies))
    assert torch.equal(loss, wanted)
    (got,) = torch.autograd.grad(loss, base)
    (expected,) = torch.autograd.grad(layout(base), base, torch.autograd.grad(wanted, copies))
    assert torch.equal(got, expected)


@EVERY
def test_one_tensor_as_both_views(backend):
    z = pairs(9, 12)[1].to(DEVICE[backend]).requires_grad_()
    copies = [z.detach().clone().requires_grad_() for _ in range(2)]
    loss, wanted = nt_xent(z, z, 0.2, backend=backend), nt_xent(*copies, 0.2, backend=backend)
    assert loss == wanted
    (got,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(got, sum(torch.autograd.grad(wanted, copies)))
