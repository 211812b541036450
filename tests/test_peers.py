"""Value and gradient beside those of libraries in use: lightly, pytorch-metric-learning, open_clip."""

import pytest
import torch
import torch.nn.functional as F

from simclr_fast.losses import NTXentLoss, nt_xent
from tests.losses_common import EVERY, F64, differentiate, pairs, run, run_info_nce

REASON = "needs the extra peers"
SHAPES = pytest.mark.parametrize(("n", "d", "tau"), [(1, 4, 0.5), (2, 3, 0.1), (33, 20, 0.07), (64, 128, 0.5)])


@pytest.fixture(scope="module")
def lightly():
    return pytest.importorskip("lightly.loss", reason=REASON)


@pytest.fixture(scope="module")
def metric_learning():
    return pytest.importorskip("pytorch_metric_learning.losses", reason=REASON)


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason=REASON)


def same(got, wanted, room=5e-6):
    """Losses and gradients of both views agree to float32."""
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).abs().max() <= room * max(b.abs().max(), 1e-3)


@EVERY
@SHAPES
def test_lightly(lightly, backend, n, d, tau):
    theirs = lightly.NTXentLoss(tau).double()
    wanted = differentiate(theirs, [z.double() for z in pairs(n, d)])
    ours = NTXentLoss(tau, backend=backend, precision="fp32")
    same(differentiate(ours, pairs(n, d)), wanted)
    same(run(*pairs(n, d), tau, backend, precision="fp32")[:3], wanted)


@pytest.mark.parametrize("size", [8, 6, 4, 3, 5])
def test_memory_bank_of_lightly(lightly, size):
    """A bank that is filled after 5 steps, through batches that fill, overrun and just meet its end."""
    theirs, ours = (loss(0.2, (size, 12)) for loss in (lightly.NTXentLoss, NTXentLoss))
    for step in range(9):
        batch = [F.normalize(z) for z in pairs(4, 12, seed=step)]
        if step == 7:  # without a gradient, the bank stays as it is
            theirs(*batch), ours(*batch)
            continue
        wanted, got = differentiate(theirs, batch), differentiate(ours, batch)
        if step >= 5:
            same(got, wanted)


def test_class_of_lightly_can_be_exchanged(lightly):
    """The same arguments, by position and by name, and the same refusals."""
    for make in (lightly.NTXentLoss, NTXentLoss):
        make()
        make(0.3, 0, False)
        make(temperature=0.3, memory_bank_size=(8, 4), gather_distributed=False)
        for bad in (
            {"temperature": 0.0},
            {"memory_bank_size": -1},
            {"memory_bank_size": 8},
            {"memory_bank_size": (8,)},
        ):
            with pytest.raises(ValueError, match="(?i)temperature|memory"):
                make(**bad)
    assert NTXentLoss()(*pairs(6, 5)).item() == pytest.approx(lightly.NTXentLoss()(*pairs(6, 5)).item(), rel=1e-6)


@EVERY
@SHAPES
def test_metric_learning(metric_learning, backend, n, d, tau):
    if n == 1:
        pytest.skip("a pair without negatives is nothing to it")
    theirs = metric_learning.SelfSupervisedLoss(metric_learning.NTXentLoss(tau))
    wanted = differentiate(theirs, [z.double() for z in pairs(n, d)])
    same(run(*pairs(n, d), tau, backend, precision="fp32")[:3], wanted)
    labels = torch.arange(n).repeat(2)
    together = metric_learning.NTXentLoss(tau)(torch.cat(pairs(n, d)).double(), labels)
    assert nt_xent(*pairs(n, d), tau).item() == pytest.approx(together.item(), rel=1e-5)


@EVERY
@SHAPES
def test_metric_learning_one_direction(metric_learning, backend, n, d, tau):
    if n == 1:
        pytest.skip("a pair without negatives is nothing to it")
    theirs = metric_learning.SelfSupervisedLoss(metric_learning.NTXentLoss(tau), symmetric=False)
    wanted = differentiate(theirs, [z.double() for z in pairs(n, d)])
    same(run_info_nce(*pairs(n, d), tau, backend, precision="fp32")[:3], wanted)


@EVERY
@SHAPES
def test_open_clip(open_clip, backend, n, d, tau):
    scale = torch.tensor(1 / tau, dtype=F64, requires_grad=True)

    def theirs(a, b):
        return open_clip.ClipLoss()(F.normalize(a), F.normalize(b), scale)

    wanted = differentiate(theirs, [z.double() for z in pairs(n, d)])
    got = run_info_nce(*pairs(n, d), tau, backend, precision="fp32", symmetric=True)
    same(got[:3], wanted)
    assert got[3].item() == pytest.approx(-scale.grad.item() / tau**2, rel=1e-4, abs=1e-5)
