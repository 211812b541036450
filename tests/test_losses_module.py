"""NTXentLoss: the loss as a module, and its memory bank."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import simclr_fast
from simclr_fast.losses import NTXentLoss, nt_xent
from tests.losses_common import DEVICE, EVERY, differentiate, pairs


@EVERY
def test_value_is_that_of_nt_xent(backend):
    z1, z2 = (z.to(DEVICE[backend]) for z in pairs(6, 5))
    loss_of = NTXentLoss(temperature=0.2, backend=backend, precision="fp32", scale="simclr_tf")
    assert loss_of(z1, z2) == nt_xent(z1, z2, 0.2, backend=backend, precision="fp32", scale="simclr_tf")


def test_defaults_are_those_of_the_class_it_stands_in_for():
    z1, z2 = pairs(6, 5)
    assert NTXentLoss()(z1, z2) == nt_xent(z1, z2, 0.5)
    assert NTXentLoss(0.3, 0, False)(out0=z1, out1=z2) == nt_xent(z1, z2, 0.3)
    assert simclr_fast.NTXentLoss is NTXentLoss


def step(loss_of, seed, n=4):
    """A batch, of which both views want gradients, through the loss and back."""
    return differentiate(loss_of, pairs(n, 5, seed))


def beside(bank, tau):
    """Queries against their keys and the rows of a bank, in float64."""

    def loss(z1, z2):
        a, b = F.normalize(z1), F.normalize(z2)
        s = torch.cat([(a * b).sum(1, keepdim=True), a @ bank.double().T], 1) / tau
        return F.cross_entropy(s, torch.zeros(len(z1), dtype=torch.long))

    return loss


def keys(seed, n=4):
    return F.normalize(pairs(n, 5, seed)[1])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bank_of_the_last_two_batches(backend):
    """Their keys are the only negatives; both views get a gradient, as the bank does not."""
    loss_of = NTXentLoss(0.2, (8, 5), backend=backend)
    for seed in range(6):
        got = step(loss_of, seed)
        if seed >= 2:
            bank = torch.cat([keys(seed - 2), keys(seed - 1)])
            wanted = differentiate(beside(bank, 0.2), [z.double() for z in pairs(4, 5, seed)])
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 6, 9])
def test_what_does_not_fit_before_the_end_of_the_bank_is_left_out(size):
    loss_of, held, oldest = NTXentLoss(0.2, (size, 5)), [None] * size, 0
    for seed in range(7):
        if None not in held:
            exact = beside(torch.stack(held), 0.2)(*(z.double() for z in pairs(4, 5, seed)))
            assert loss_of(*pairs(4, 5, seed)).item() == pytest.approx(exact.item(), rel=1e-5)
        step(loss_of, seed)
        fit = keys(seed)[: size - oldest]
        held[oldest : oldest + len(fit)] = fit
        oldest = (oldest + len(fit)) % size
    assert None not in held


def test_bank_starts_with_random_directions():
    torch.manual_seed(0)
    one = NTXentLoss(0.2, (50, 5))(*pairs(4, 5))
    torch.manual_seed(0)
    assert NTXentLoss(0.2, (50, 5))(*pairs(4, 5)) == one
    assert NTXentLoss(0.2, (50, 5))(*pairs(4, 5)) != one
    assert not list(NTXentLoss(0.2, (50, 5)).parameters())
    assert not NTXentLoss(0.2, (50, 5)).state_dict()


def test_bank_stays_as_it_is_where_nothing_is_learnt():
    loss_of, (z1, z2) = NTXentLoss(0.2, (8, 5)), pairs(4, 5)
    assert loss_of(z1, z2) == loss_of(z1, z2)
    loss_of(z1, z2.requires_grad_())  # as in the class it stands in for, out0 decides
    before = loss_of(z1, z2)
    assert loss_of(z1.requires_grad_(), z2) == before
    assert loss_of(z1.detach(), z2) != before


@pytest.mark.parametrize("size", [0, (8, 5)])
def test_copies_and_pickles(size):
    loss_of, (z1, z2) = NTXentLoss(0.2, size), pairs(4, 5)
    step(loss_of, 1)
    stored = io.BytesIO()
    torch.save(loss_of, stored)
    stored.seek(0)
    twins = pickle.loads(pickle.dumps(loss_of)), copy.deepcopy(loss_of), torch.load(stored, weights_only=False)
    for seed in (2, 3):  # the place in the bank is copied as well
        wanted = step(loss_of, seed)[0]
        assert [step(twin, seed)[0] for twin in twins] == [wanted] * 3
    assert loss_of(z1, z2) == twins[0](z1, z2)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0.0,), {}, "temperature must be .*got 0.0"),
        ((-1.0,), {}, "temperature"),
        ((float("nan"),), {}, "temperature"),
        ((0.5, -1), {}, "memory_bank_size must be .*got -1"),
        ((0.5, 8), {}, "memory_bank_size must be .*got 8"),
        ((0.5, (8,)), {}, "memory_bank_size must be"),
        ((0.5, (8, 0)), {}, "memory_bank_size must be"),
        ((0.5, (8, 5)), {"scale": "simclr_tf"}, "scale must be 'paper'"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        NTXentLoss(*args, **options)


@pytest.mark.parametrize("options", [{"scale": "tf"}, {"backend": "tritn"}, {"precision": "fp8"}])
def test_bad_settings_are_named_by_the_first_batch(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be one of"):
        NTXentLoss(**options)(*pairs(4, 5))
