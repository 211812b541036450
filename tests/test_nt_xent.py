"""NT-Xent: every backend against the official vectors, float64 autograd, and the properties of the loss."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_fast.kernels import nt_xent as kernels
from simclr_fast.losses import blocked, nt_xent

ops = importlib.import_module("simclr_fast.losses.nt_xent")
CASES = ("n1 n2 n4 n5_odd n8 n16_t1 n64 n256 n8_nonorm_t10 n8_big n8_collapsed n4_zero_row n4_tiny_row").split()
# The Triton kernels run on the GPU if there is one, else in Triton's interpreter.
DEVICE = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "native": "cpu", "reference": "cpu"}
EVERY = pytest.mark.parametrize("backend", ["reference", "native", "triton"])
OURS = pytest.mark.parametrize("backend", ["native", "triton"])


def pairs(n, d, seed=0, dtype=torch.float32):
    z = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (z[0].to(dtype), (z[0] + z[1]).to(dtype))


def run(z1, z2, tau, backend, upstream=1.0, autocast=False, **options):
    """The loss and the gradients of z1, z2 and tau, on the CPU."""
    tau = torch.as_tensor(tau, dtype=torch.float64)
    leaves = [x.detach().to(DEVICE[backend]).requires_grad_() for x in (z1, z2, tau)]
    with torch.autocast(DEVICE[backend], torch.bfloat16, enabled=autocast):
        loss = nt_xent(*leaves, backend=backend, **options)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand_as(loss))
    return [loss.detach().cpu()] + [leaf.grad.cpu() for leaf in leaves]


def masked_cross_entropy(z1, z2, tau, dtype=torch.float64):
    """What everybody writes: the whole matrix, multiplied in `dtype`; the same four results."""
    tau = torch.as_tensor(tau, dtype=torch.float64)
    z1, z2, tau = (x.detach().double().requires_grad_() for x in (z1, z2, tau))
    z = F.normalize(torch.cat([z1, z2])).to(dtype)
    s = (z @ z.T).to(torch.promote_types(dtype, torch.float32)) / tau.to(torch.promote_types(dtype, torch.float32))
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool), -math.inf)
    loss = F.cross_entropy(s, torch.arange(len(s)).roll(len(z1)))
    loss.backward()
    return [loss.detach(), z1.grad, z2.grad, tau.grad]


def errors(got, exact):
    """Largest error of each result over the largest element of the exact one (over 1 where that is 0)."""
    return [
        float((a.double() - b).abs().max() / (b.abs().max() if b.abs().max() > 1e-12 else 1))
        for a, b in zip(got, exact, strict=True)
    ]


@pytest.fixture(scope="module")
def official(shared):
    folder = shared / "vectors"
    cases = {case["name"]: case for case in json.loads((folder / "ntxent_cases.json").read_text())}
    assert set(cases) == set(CASES)
    with np.load(folder / "ntxent.npz") as arrays:
        return cases, dict(arrays)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("backend", "precision", "dtype", "tolerance"),
    [
        ("reference", "auto", torch.float64, 1e-12),
        ("native", "auto", torch.float64, 1e-12),
        ("reference", "fp32", torch.float32, 2e-6),
        ("native", "fp32", torch.float32, 2e-6),
        ("triton", "fp32", torch.float32, 2e-6),
        ("triton", "fp16", torch.float32, 1e-3),
    ],
)
def test_official_vectors(official, name, backend, precision, dtype, tolerance):
    if name == "n256" and (backend, precision) == ("triton", "fp32") and DEVICE["triton"] == "cpu":
        pytest.skip("10 s in the interpreter; n64 and fp16 cover it")
    case, arrays = official[0][name], official[1]
    # Rows that were not normalised: the floor of the norm, put above all of them, divides each alike.
    eps = 1e-6 if case["norm"] else 100.0
    tau = case["tau"] if case["norm"] else case["tau"] / eps**2
    h = torch.tensor(arrays[f"{name}/h"], dtype=dtype, device=DEVICE[backend]).requires_grad_()
    settings = {"backend": backend, "precision": precision, "scale": "simclr_tf", "eps": eps}
    loss, stats = nt_xent(*h.chunk(2), tau, **settings, return_stats=True)
    loss.backward()
    assert abs(loss.item() - case["loss_official"]) <= tolerance * max(1, case["loss_official"])
    expected = torch.tensor(arrays[f"{name}/grad_official"])
    size = 1.0 if name == "n8_collapsed" else expected.abs().max()  # its gradient is 0
    assert (h.grad.cpu() - expected).abs().max() <= tolerance * size
    assert stats["contrastive_top1"].item() == pytest.approx(case["contrast_acc"])
    room = 1.1e-8 * case["N"] + tolerance * 3  # the original takes log(p + 1e-8)
    assert stats["contrastive_entropy"].item() == pytest.approx(case["contrast_entropy"], abs=room)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (3, 16), (33, 70), (65, 128), (40, 129), (17, 256)])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_triton_errs_no_more_than_pytorch(precision, n, d, tau):
    z1, z2 = pairs(n, d)
    exact = masked_cross_entropy(z1, z2, tau)
    plain = errors(masked_cross_entropy(z1, z2, tau, kernels.DTYPES[precision]), exact)
    ours = errors(run(z1, z2, tau, "triton", precision=precision), exact)
    # In absolute terms for a loss near 0, whose relative error in fp16 is that of exp(S).
    room = {"fp32": 2e-6, "tf32": 2e-6 if DEVICE["triton"] == "cpu" else 2e-3, "fp16": 2e-4}[precision]
    assert all(a <= 2 * b + room for a, b in zip(ours, plain, strict=True)), (ours, plain)


@pytest.mark.parametrize(("width", "precision"), kernels.LAUNCH)
def test_every_launch_over_two_tiles_and_a_tail(width, precision):
    if precision == "bf16" and DEVICE["triton"] == "cpu":
        with pytest.raises(ValueError, match="bf16"):
            run(*pairs(2, width), 0.2, "triton", precision=precision)
        return
    rows, columns = (max(launch[k] for launch in kernels.LAUNCH[width, precision]) for k in (0, 1))
    z1, z2 = pairs(max(rows, columns) + 3, width - 1)
    tolerance = {"fp32": 3e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}[precision]
    assert max(errors(run(z1, z2, 0.2, "triton", precision=precision), masked_cross_entropy(z1, z2, 0.2))) < tolerance


@pytest.mark.parametrize("first", [0, 3, 8])
def test_kernels_agree_on_a_share_of_the_anchors(first):
    """What one rank computes: 5 of 13 images, whose anchors are two separate stretches of z."""
    z = ops._unit_rows(*pairs(13, 20), 1e-12)[0]
    tau, n, rows = (
        torch.tensor(0.2),
        5,
        torch.cat([torch.arange(first, first + 5), torch.arange(first, first + 5) + 13]),
    )
    rest, match = blocked.statistics(z, tau, 13, 0, "auto")
    lse, g, pull = torch.logaddexp(rest, match), torch.rand(26), torch.rand(10)
    whole = blocked.gradient(z, tau, lse, g, pull.new_zeros(26).index_copy(0, rows, pull), 0, "auto")
    for module in (blocked, kernels):
        x, device = module.operand(z, "fp32"), DEVICE["triton"] if module is kernels else "cpu"
        x, t, y, w, p = (tensor.to(device) for tensor in (x, tau, lse, g, pull))
        for got, expected in zip(module.statistics(x, t, n, first, "fp32"), (rest, match), strict=True):
            torch.testing.assert_close(got.cpu(), expected[rows], rtol=2e-6, atol=2e-6)
        got = module.gradient(x, t, y, w, p, first, "fp32").cpu()[:, :20]
        torch.testing.assert_close(got, whole[rows], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    inputs = [*pairs(5, 3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: nt_xent(*x, reduction=reduction, backend="native"), inputs)


@OURS
@pytest.mark.parametrize("upstream", [65536.0, 1e-8, 0.0, -1.0])
def test_upstream_gradient(backend, upstream):
    one, scaled = (run(*pairs(9, 12), 0.2, backend, upstream=u, precision="fp32") for u in (1.0, upstream))
    for a, b in zip(one[1:], scaled[1:], strict=True):
        torch.testing.assert_close(a * upstream, b, rtol=1e-5, atol=0)


@OURS
def test_rows_of_different_weight(backend):
    weights = torch.linspace(-1, 2, 14)
    options = {"reduction": "none", "precision": "fp32", "upstream": weights}
    exact = run(*pairs(7, 12, dtype=torch.float64), 0.2, "reference", reduction="none", upstream=weights)
    assert max(errors(run(*pairs(7, 12), 0.2, backend, **options), exact)) < 2e-6


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(backend, dtype):
    z1, z2 = pairs(9, 12, dtype=dtype)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="float64"):
            run(z1, z2, 0.2, backend)
        return
    got = run(z1, z2, 0.2, backend)
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    assert got[1].dtype == got[2].dtype == dtype
    bound = 2 * torch.finfo(dtype).eps + (1e-3 if backend == "triton" else 2e-6 if dtype != torch.float64 else 1e-14)
    assert max(errors(got, masked_cross_entropy(z1, z2, 0.2))) < bound
    mixed = run(z1, z2, 0.2, backend, autocast=True)
    assert all(torch.equal(a, b) for a, b in zip(got, mixed, strict=True))


@EVERY
def test_any_strides(backend):
    z1, z2 = pairs(9, 12)
    wanted = run(z1, z2, 0.2, backend)
    wide = torch.zeros(9, 25)
    wide[:, 1::2] = z1
    for a, b in ((z1.T.contiguous().T, z2), (wide[:, 1::2], z2.T.contiguous().T)):
        leaf = a.to(DEVICE[backend]).requires_grad_()
        loss = nt_xent(leaf, b.to(DEVICE[backend]), 0.2, backend=backend)
        loss.backward()
        assert torch.equal(loss.detach().cpu(), wanted[0])
        assert torch.equal(leaf.grad.cpu(), wanted[1])
    row = torch.ones(1, 12, device=DEVICE[backend]).expand(5, 12)
    assert nt_xent(row, row, 0.2, backend=backend).item() == pytest.approx(math.log(9), rel=1e-6)


@EVERY
def test_rows_of_any_size(backend):
    z1, z2 = pairs(9, 12)
    wanted = run(z1, z2, 0.2, backend, precision="fp32")
    sizes = torch.tensor([1e-10, 1e-5, 1e-3, 1, 1e3, 1e6, 1e10, 1e20, 1e30])[:, None]
    got = run(z1 * sizes, z2, 0.2, backend, precision="fp32")
    assert max(errors([got[0], got[1] * sizes, *got[2:]], wanted)) < 5e-6
    got = run(z1 * 1e-30, z2 * 1e-20, 0.2, backend, precision="fp32", eps=1e-37)
    assert max(errors([got[0], got[1] * 1e-30, got[2] * 1e-20, got[3]], wanted)) < 5e-6
    half = torch.full((3, 200), 6e4, dtype=torch.float16)  # its norm is 8.5e5, past float16
    half[1, ::2], half[2, ::3] = -6e4, 1
    got = run(half, half, 0.2, backend)
    assert max(errors(got[:1], masked_cross_entropy(half, half, 0.2)[:1])) < 1e-3
    assert all(torch.isfinite(x).all() for x in got)


@EVERY
def test_zero_rows_are_those_of_normalize(backend):
    z1, z2 = pairs(4, 6)
    z1[1], z2[3] = 0, 0
    assert max(errors(run(z1, z2, 0.2, backend, precision="fp32"), masked_cross_entropy(z1, z2, 0.2))) < 2e-6


@EVERY
@pytest.mark.parametrize("tau", [0.005, 0.01, 0.02, 0.05, 1.0, 10.0])
def test_any_temperature(backend, tau):
    z1, z2 = pairs(40, 12)
    exact, plain = masked_cross_entropy(z1, z2, tau), masked_cross_entropy(z1, z2, tau, torch.float32)
    ours, theirs = (errors(x, exact) for x in (run(z1, z2, tau, backend, precision="fp32"), plain))
    room = 3e-6 + 1.2e-7 / tau  # P = exp(S - lse) carries the rounding of lse, which is of the size of 1 / tau
    assert all(a <= 2 * b + room for a, b in zip(ours, theirs, strict=True))
    opposed = run(z1, -z1, tau, backend, precision="fp32")
    assert all(torch.isfinite(x).all() for x in opposed)


@OURS
def test_tiny_loss_keeps_its_digits(backend):
    z = torch.eye(8)
    exact = math.log1p(14 * math.exp(-20))
    loss, grad, *_ = run(z, z, 0.05, backend, precision="fp32")
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    expected = run(z.double(), z.double(), 0.05, "native")[1]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-14)


@EVERY
def test_one_pair_has_no_loss(backend):
    loss, *grads = run(*pairs(1, 5), 0.1, backend)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@EVERY
def test_nan_stays_seen(backend):
    z1, z2 = pairs(5, 6)
    z1[2, 3] = math.nan
    assert all(torch.isnan(x).any() for x in run(z1, z2, 0.2, backend))


@EVERY
def test_same_bits_again(backend):
    z1, z2 = pairs(70, 33)
    once = run(z1, z2, 0.1, backend)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(once, run(z1, z2, 0.1, backend), strict=True))


def test_invariances():
    z1, z2 = pairs(12, 7, dtype=torch.float64)
    loss, g1, g2, g_tau = run(z1, z2, 0.3, "native")
    order = torch.randperm(12)
    assert run(z1[order], z2[order], 0.3, "native")[0] == pytest.approx(loss.item(), rel=1e-13)
    assert run(z2, z1, 0.3, "native")[0] == pytest.approx(loss.item(), rel=1e-13)
    assert abs(((z1 * g1).sum(1)).abs().max()) < 1e-15
    stepped = run(z1 - 0.1 * g1, z2 - 0.1 * g2, 0.3 - 1e-3 * g_tau, "native")[0]
    assert stepped < loss


def test_stats():
    z1, z2 = pairs(30, 8, dtype=torch.float64)
    loss, stats = nt_xent(z1, z2, 0.2, return_stats=True)
    a, b = F.normalize(z1), F.normalize(z2)
    p = (a @ b.T / 0.2).softmax(1)
    assert stats["contrastive_top1"].item() == pytest.approx((p.argmax(1) == torch.arange(30)).double().mean().item())
    assert stats["contrastive_entropy"].item() == pytest.approx(-(p * p.log()).sum(1).mean().item())
    assert stats["alignment"].item() == pytest.approx((a - b).square().sum(1).mean().item())
    assert not any(value.requires_grad for value in stats.values())
    assert loss == nt_xent(z1, z2, 0.2)


def test_native_holds_one_block(monkeypatch):
    """No tensor of either pass, nor of the statistics, is as large as the block it may take."""
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 2048)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    z1, z2 = pairs(100, 4, dtype=torch.float64)
    whole = run(z1, z2, 0.2, "reference")
    with Watch():
        blocks = run(z1, z2, 0.2, "native")
    assert max(errors(blocks, whole)) < 1e-13
    assert 0 < max(sizes) <= 2048 < 200**2


@OURS
def test_only_one_input_wants_a_gradient(backend):
    z1, z2 = (z.to(DEVICE[backend]) for z in pairs(6, 5))
    wanted = run(z1, z2, 0.2, backend)
    leaf = z2.clone().requires_grad_()
    loss = nt_xent(z1, leaf, 0.2, backend=backend)
    loss.backward(retain_graph=True)
    loss.backward()  # twice: saved tensors are whole
    torch.testing.assert_close(leaf.grad.cpu(), 2 * wanted[2])
    assert not nt_xent(z1, z2, torch.tensor(0.2), backend=backend).requires_grad
    with torch.no_grad():
        assert not nt_xent(z1, leaf, 0.2, backend=backend).requires_grad


def test_second_derivative():
    leaf, other = (z.requires_grad_() for z in pairs(4, 5))
    (grad,) = torch.autograd.grad(nt_xent(leaf, other, 0.2, backend="native"), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(nt_xent(leaf, other, 0.2, backend="reference"), leaf, create_graph=True)
    grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@OURS
def test_opcheck(backend):
    x = [z.to(DEVICE[backend]).requires_grad_() for z in (*pairs(5, 3), torch.tensor(0.3))]
    settings = (backend, "auto", 1e-12)
    rows, z, lse = ops._forward(*x, *settings, 1.0, "", 0, 1)
    torch.library.opcheck(ops._forward, (*x, *settings, 1.0, "", 0, 1))
    y = [t.detach() for t in x]
    torch.library.opcheck(ops._backward, (torch.rand_like(rows), *y, rows.detach(), z, lse, *settings, 0))
    torch.library.opcheck(ops._stats, (z, y[2], 5, 0))


def test_compiles_without_breaks_and_once_for_all_n():
    loss_of = torch.compile(lambda a, b, t: nt_xent(a, b, t, return_stats=True), fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for n in (5, 6, 8, 13):
        z1, z2 = pairs(n, 4)
        leaf, tau = z1.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        loss, stats = loss_of(leaf, z2, tau)
        loss.backward()
        wanted = run(z1, z2, 0.3, "native")
        for got, expected in zip((loss.detach(), leaf.grad, tau.grad), (wanted[0], wanted[1], wanted[3]), strict=True):
            torch.testing.assert_close(got, expected, check_dtype=False)
        assert set(stats) == {"contrastive_top1", "contrastive_entropy", "alignment"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


Z = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Z, Z[:3]), {}, "z1 and z2 must have one shape"),
        ((Z, Z.double()), {}, "one shape, dtype and device"),
        ((Z[0], Z[0]), {}, r"z1 must be \[N, D\]"),
        ((Z[:0], Z[:0]), {}, "N >= 1"),
        ((Z.int(), Z.int()), {}, "floating"),
        ((Z, Z, 0.0), {}, r"temperature must be .*got 0.0"),
        ((Z, Z, -1.0), {}, "temperature"),
        ((Z, Z, math.nan), {}, "temperature"),
        ((Z, Z, torch.ones(1)), {}, "0-dim"),
        ((Z, Z, torch.tensor(1)), {}, "floating 0-dim"),
        ((Z, Z), {"reduction": "avg"}, "reduction must be one of .*got avg"),
        ((Z, Z), {"backend": "tritn"}, "backend must be one of"),
        ((Z, Z), {"precision": "fp8"}, "precision must be one of"),
        ((Z, Z), {"scale": "tf"}, "scale must be one of"),
        ((Z, Z), {"eps": 0.0}, "eps"),
        ((Z, Z), {"uneven": True}, "uneven must be False"),
        ((Z, Z), {"backend": "native", "precision": "tf32"}, "precision must be in"),
        ((Z.double(), Z.double()), {"backend": "native", "precision": "fp32"}, "precision must be in"),
        ((torch.ones(2, 257), torch.ones(2, 257)), {"backend": "triton"}, "D <= 256"),
    ],
)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(*args, **options)
