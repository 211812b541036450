"""InfoNCE: queries against keys and further negatives, every backend against plain PyTorch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from simclr_fast.losses import info_nce, nt_xent
from tests.losses_common import (
    DEVICE,
    EVERY,
    EVERY_WAY,
    F64,
    OUR_WAYS,
    OURS,
    ROOM,
    check,
    errors,
    few,
    pairs,
    rows,
    run_info_nce,
    trained,
    truth_info_nce,
)

MODES = {
    "in batch": {},
    "symmetric": {"symmetric": True},
    "in batch and negatives": {"negatives": 13},
    "symmetric and negatives": {"negatives": 13, "symmetric": True},
    "negatives alone": {"negatives": 13, "in_batch": False},
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
PLAIN = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def options(mode, d, dtype=torch.float32, m=None):
    given = dict(MODES[mode])
    if "negatives" in given:
        given["negatives"] = rows(m or given["negatives"], d, seed=9, dtype=dtype)
    return given


def close_to_truth(q, k, tau, backend, precision, **given):
    plain = PLAIN[precision] if backend == "triton" else torch.float32
    exact, theirs = truth_info_nce(q, k, tau, **given), truth_info_nce(q, k, tau, dtype=plain, **given)
    check(run_info_nce(q, k, tau, backend, precision=precision, **given), exact, ROOM[precision], theirs, tau)


@EVERY_WAY
@EVERY_MODE
@pytest.mark.parametrize("tau", [0.01, 0.07])
def test_modes(backend, mode, tau):
    if tau == 0.01:
        return check(
            run_info_nce(*pairs(11, 12), tau, backend, precision="fp32", **options(mode, 12)),
            truth_info_nce(*pairs(11, 12), tau, **options(mode, 12)), 3e-5, tau=tau,
        )  # fmt: skip
    close_to_truth(*pairs(11, 12), tau, backend, "fp32", **options(mode, 12))


@EVERY_WAY
@pytest.mark.parametrize("mode", ["symmetric and negatives", "negatives alone"])
@pytest.mark.parametrize("d", few([1, 65, 384], [1, 3, 64, 65, 255, 256, 257, 384, 1000, 2048]))
def test_any_width(backend, mode, d):
    close_to_truth(*pairs(5, d), 0.2, backend, "fp32", **options(mode, d))


@pytest.mark.parametrize("mode", ["symmetric and negatives", "negatives alone"])
@pytest.mark.parametrize(
    ("precision", "n", "m"),
    few(
        [("fp32", 1, 1), ("fp32", 33, 31), ("fp32", 64, 1), ("fp16", 65, 63)],
        [(p, n, m) for p in ROOM for n in (1, 2, 63, 64, 65, 127, 129) for m in (1, 31, 32, 127, 128, 2000)],
    ),
)
def test_any_count_in_tiles(mode, precision, n, m):
    close_to_truth(*pairs(n, 9), 0.2, "triton", precision, **options(mode, 9, m=m))


@pytest.mark.parametrize(
    ("backend", "n", "m"),
    [("tiles", n, m) for n, m in ((1, 1), (2, 33), (8, 8), (13, 1), (19, 7))]
    + [(backend, n, m) for backend in ("native", "reference") for n, m in ((1, 1), (2, 3000), (300, 1), (513, 700))],
)
@EVERY_MODE
def test_any_count(backend, mode, n, m):
    close_to_truth(*pairs(n, 16), 0.2, backend, "fp32", **options(mode, 16, m=m))


@EVERY_WAY
@EVERY_MODE
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(backend, mode, reduction):
    given = {**options(mode, 12), "reduction": reduction, "upstream": -2.0 if reduction == "sum" else rows(11)}
    got = run_info_nce(*pairs(11, 12), 0.2, backend, precision="fp32", **given)
    assert got[0].shape == (() if reduction == "sum" else (11,))
    check(got, truth_info_nce(*pairs(11, 12), 0.2, **given), 3e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@EVERY_MODE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, mode, reduction):
    given = options(mode, 3, F64, m=4)
    extra = [given.pop("negatives")] if "negatives" in given else []
    leaves = [x.requires_grad_() for x in (*pairs(4, 3, dtype=F64), torch.tensor(0.4, dtype=F64), *extra)]

    def loss(q, k, t, negatives=None):
        return info_nce(q, k, t, negatives=negatives, reduction=reduction, backend=backend, **given)

    assert torch.autograd.gradcheck(loss, leaves)


@EVERY_WAY
def test_float64(backend):
    q, k = pairs(11, 12, dtype=F64)
    if backend == "triton":
        with pytest.raises(ValueError, match="float64"):
            run_info_nce(q, k, 0.2, backend)
        return
    for mode in MODES:
        given = options(mode, 12, F64)
        check(run_info_nce(q, k, 0.2, backend, **given), truth_info_nce(q, k, 0.2, **given), 1e-13)


@EVERY
def test_mixed_dtypes(backend):
    q, k, negatives = pairs(9, 12)[0].half(), pairs(9, 12)[1].bfloat16(), rows(5, 12)
    got = run_info_nce(q, k, 0.2, backend, negatives, symmetric=True)
    assert [x.dtype for x in got] == [torch.float32, torch.float16, torch.bfloat16, F64, torch.float32]
    check(got, truth_info_nce(q, k, 0.2, negatives, symmetric=True), 2e-3 + 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("backend", "wants"),
    [("native", wants) for wants in [(0,), (1,), (2,), (3,), (1, 2), (0, 3)]] + [("triton", (0,)), ("triton", (1, 3))],
)
def test_any_subset_wants_a_gradient(backend, wants):
    inputs = (*pairs(6, 5), torch.tensor(0.2), rows(7, 5, seed=9))
    wanted = run_info_nce(*inputs[:3], backend, inputs[3], symmetric=True)[1:]
    leaves = [x.to(DEVICE[backend]).requires_grad_(k in wants) for k, x in enumerate(inputs)]
    info_nce(*leaves[:3], negatives=leaves[3], symmetric=True, backend=backend).backward()
    for k, (leaf, gradient) in enumerate(zip(leaves, wanted, strict=True)):
        assert (leaf.grad is not None) == (k in wants)
        if k in wants:
            torch.testing.assert_close(leaf.grad.cpu(), gradient, check_dtype=False, rtol=1e-5, atol=1e-7)


@EVERY_WAY
@EVERY_MODE
def test_awkward_rows(backend, mode):
    """A zero query, a zero key, equal rows, opposed ones, and sizes from 1e-10 to 1e20."""
    q, k = pairs(9, 12)
    q[1], k[2], k[4], k[5] = 0, 0, q[4], -q[5]
    sizes = torch.tensor([1e-10, 1, 1e-5, 1, 1, 1e20, 1e10, 1, 1])[:, None]
    given = options(mode, 12)
    if "negatives" in given:
        given["negatives"][0], given["negatives"][1], given["negatives"][2] = 0, q[3] * 1e18, k[3]
    exact = truth_info_nce(q * sizes, k, 0.2, **given)
    got = run_info_nce(q * sizes, k, 0.2, backend, precision="fp32", **given)
    for results in (got, exact):  # each row of a gradient counts alike
        results[1] = results[1].double() * (q * sizes).double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        results[2] = results[2].double() * k.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        if len(results) > 4:
            results[4] = results[4].double() * given["negatives"].double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    check(got, exact, 5e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets the kernels
@EVERY_WAY
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_seen(backend, bad):
    q, k, negatives = *pairs(5, 6), rows(7, 6)
    for tensor in (q, k, negatives):
        kept = tensor[2, 3].item()
        tensor[2, 3] = bad
        assert all(torch.isnan(x).any() for x in run_info_nce(q, k, 0.2, backend, negatives))
        tensor[2, 3] = kept


@OUR_WAYS
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_tiny_loss_keeps_its_digits(backend, symmetric):
    q, k = trained(16, 64, 0.97)
    negatives = rows(30, 64, seed=1)

    def loss(a, b, t, extra):
        a, b, extra = (F.normalize(x) for x in (a, b, extra))
        s, own = a @ b.T / t, torch.eye(16, dtype=torch.bool)
        among = torch.cat([s.masked_fill(own, -math.inf), a @ extra.T / t], 1)
        forward = F.softplus(among.logsumexp(1) - s.diagonal()).mean()
        backward = F.softplus(s.T.masked_fill(own, -math.inf).logsumexp(1) - s.diagonal()).mean()
        return (forward + backward) / 2 if symmetric else forward

    tau = torch.tensor(0.035, dtype=F64, requires_grad=True)
    leaves = [x.double().requires_grad_() for x in (q, k, negatives)]
    exact = loss(*leaves[:2], tau, leaves[2])
    exact.backward()
    assert 1e-10 < exact < 1e-4
    got = run_info_nce(q, k, 0.035, backend, negatives, precision="fp32", symmetric=symmetric)
    for a, b in zip(got, [exact.detach(), leaves[0].grad, leaves[1].grad, tau.grad, leaves[2].grad], strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


@EVERY_WAY
def test_one_pair_alone_has_no_loss(backend):
    loss, *grads = run_info_nce(*pairs(1, 5), 0.1, backend, symmetric=True)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@OURS
def test_nt_xent_of_one_anchor_is_info_nce_with_the_view_as_negatives(backend):
    """Row i of NT-Xent sees the other view, and its own view but for itself."""
    z1, z2 = (z.to(DEVICE[backend]) for z in pairs(7, 12))
    whole = nt_xent(z1, z2, 0.2, reduction="none", backend=backend, precision="fp32")
    for i in range(7):
        others = torch.cat([z1[:i], z1[i + 1 :], z2[:i], z2[i + 1 :]])
        given = {"negatives": others, "in_batch": False, "backend": backend, "precision": "fp32"}
        assert info_nce(z1[i : i + 1], z2[i : i + 1], 0.2, **given).item() == pytest.approx(whole[i].item(), rel=1e-5)


@OURS
@EVERY_MODE
def test_stats(backend, mode):
    q, k = pairs(30, 8)
    given = options(mode, 8)
    device = {name: x.to(DEVICE[backend]) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    settings = {"backend": backend, "precision": "fp32", **device}
    q_there, k_there = q.to(DEVICE[backend]), k.to(DEVICE[backend])
    loss, stats = info_nce(q_there, k_there, 0.2, return_stats=True, **settings)
    assert loss == info_nce(q_there, k_there, 0.2, **settings)
    assert set(stats) == {"contrastive_top1", "contrastive_entropy", "alignment"}
    assert all(value.ndim == 0 and not value.requires_grad for value in stats.values())
    a, b = F.normalize(q.double()), F.normalize(k.double())
    assert stats["alignment"].item() == pytest.approx((a - b).square().sum(1).mean().item(), rel=1e-5)
    if mode in ("in batch", "symmetric"):
        p = (a @ b.T / 0.2).softmax(1)
        assert stats["contrastive_top1"].item() == pytest.approx((p.argmax(1) == torch.arange(30)).double().mean())
        assert stats["contrastive_entropy"].item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)


def test_default_precision_errs_no_more_than_pytorch():
    q, k = pairs(12, 70)
    for mode in few(["symmetric and negatives"], MODES):
        given = options(mode, 70)
        exact, plain = truth_info_nce(q, k, 0.07, **given), truth_info_nce(q, k, 0.07, dtype=torch.float16, **given)
        got = run_info_nce(q, k, 0.07, "triton", **given)
        check(got, exact, 3e-4, plain, 0.07)
        assert max(errors(got, exact)) > 1e-5  # it is not float32


Q = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Q, Q[:3]), {}, "query and key must .*got"),
        ((Q[0], Q[0]), {}, r"query must be \[N, D\].*got \[8\]"),
        ((Q[:0], Q[:0]), {}, "N >= 1"),
        ((Q, Q), {"negatives": Q[:0]}, "M >= 1"),
        ((Q, Q.int()), {}, "key must be float16, .*got torch.int32"),
        ((Q, Q, 0.0), {}, "temperature must be .*got 0.0"),
        ((Q, Q, torch.ones(1)), {}, "0-dim"),
        ((Q, Q), {"negatives": Q[:, 1:]}, "negatives must be .* of one D"),
        ((Q, Q), {"negatives": Q[0]}, r"negatives must be \[N, D\]"),
        ((Q, Q), {"negatives": Q.int()}, "negatives must be float16"),
        ((Q, Q), {"negatives": Q.to("meta")}, "negatives must be on one device"),
        ((Q, Q), {"in_batch": False}, "negatives must be given"),
        ((Q, Q), {"in_batch": False, "negatives": Q, "symmetric": True}, "symmetric must be False"),
        ((Q, Q), {"reduction": "avg"}, "reduction must be one of .*got 'avg'"),
        ((Q, Q), {"backend": "tritn"}, "backend must be one of"),
        ((Q, Q), {"precision": "fp8"}, "precision must be one of"),
        ((Q, Q), {"return_stats": "all"}, "return_stats must be False or True"),
        ((Q, Q), {"eps": 0.0}, "eps"),
        ((Q.double(), Q.double()), {"backend": "triton"}, "float64"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        info_nce(*args, **options)
