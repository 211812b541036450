"""Exact negatives over all ranks: real DDP over Gloo against one process with the global batch."""

import pytest
import torch
import torch.nn.functional as F

from simclr_fast.losses import info_nce, nt_xent
from tests.losses_common import F64, check
from tests.losses_ranks import (
    COUNTS,
    GROUPS,
    LEAF_LOSSES,
    LEAF_WORLD,
    LEAVES,
    LOSSES,
    Model,
    batch,
    embeddings,
    expected,
    found,
    of_group,
    parameters,
    queue,
)

WORLDS = pytest.mark.parametrize("world", GROUPS)


def of_one_process(name, counts):
    """The loss of each rank and the gradients of the model, from the global batch."""
    model = Model()
    losses, objective = expected(name, *model.embed(batch(counts)), model.tau, counts, [queue(r) for r in range(4)])
    objective.backward()
    return losses, parameters(model)


def assert_exact(got, wanted):
    """The ratio to the exact gradient is 1.0000, and no element is off."""
    a, b = (torch.cat([x.flatten() for x in gradients]) for gradients in (got, wanted))
    assert torch.dot(a, b) / torch.dot(b, b) == pytest.approx(1, abs=1e-12)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-14)


@WORLDS
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_update_is_that_of_one_process(world, name, uneven):
    losses, gradients = of_one_process(name, COUNTS[uneven][world])
    for rank, wanted in zip(of_group(world), losses, strict=True):
        loss, got = rank[name, uneven]
        assert loss.dtype == F64
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert_exact(got, gradients)


@WORLDS
@pytest.mark.parametrize("kind", ["uneven, though even", "static_graph", "unused"])
def test_other_ways_to_the_same_update(world, kind):
    _, gradients = of_one_process("nt_xent", COUNTS[False][world])
    for rank in of_group(world):
        assert_exact(rank[kind][1], gradients)


@WORLDS
@pytest.mark.parametrize("name", ["nt_xent", "nt_xent none", "info_nce symmetric"])
def test_reducer_that_sums(world, name):
    _, gradients = of_one_process(name, COUNTS[False][world])
    for rank in of_group(world):
        assert_exact(rank[name, "summed"], gradients)


@pytest.mark.parametrize("name", LEAF_LOSSES)
@pytest.mark.parametrize(("backend", "dtype", "precision"), LEAVES)
def test_every_backend_and_dtype(name, backend, dtype, precision):
    counts = COUNTS[False][LEAF_WORLD]
    queues = [queue(rank).to(dtype).double().requires_grad_() for rank in range(LEAF_WORLD)]
    leaves = [x.to(dtype).double().requires_grad_() for x in embeddings(counts)]
    tau = torch.tensor(0.3, dtype=F64, requires_grad=True)
    losses, objective = expected(name, *leaves, tau, counts, queues)
    objective.backward()
    room = 2 * torch.finfo(dtype).eps + (1e-3 if precision == "auto" and backend == "triton" else 3e-6)
    ranks = [rank[name, backend, dtype] for rank in of_group(LEAF_WORLD)]
    got = [torch.cat([rank[view] for rank in ranks]) for view in (1, 2)]
    assert all(grad.dtype == dtype for grad in got)
    check(got, [leaf.grad for leaf in leaves], room)
    check([sum(rank[4] for rank in ranks)], [tau.grad], room)
    check([rank[0] for rank in ranks], losses, room)
    if "negatives" in name:
        check([rank[3] for rank in ranks], [x.grad for x in queues], room)


@WORLDS
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_stats_are_of_the_rows_of_a_rank_among_those_of_all(world, loss, uneven):
    counts = COUNTS[uneven][world]
    views, first = embeddings(counts), 0
    whole = loss(*views, 0.3, return_stats=True)[1]
    ranks = [(n, rank["stats", loss.__name__, uneven]) for n, rank in zip(counts, of_group(world), strict=True) if n]
    for name, wanted in whole.items():
        mean = sum(n * stats[name].item() for n, stats in ranks) / sum(counts)
        assert mean == pytest.approx(wanted.item(), rel=1e-12), name
    for n, stats in ranks if loss is nt_xent else []:
        near = [(-2 * torch.cdist(x[first : first + n], x) ** 2).exp() for x in map(F.normalize, views)]
        means = [(x.sum() - n) / (n * (sum(counts) - 1)) for x in near]  # without the rows themselves
        assert stats["uniformity"].item() == pytest.approx((means[0] * means[1]).sqrt().log().item(), rel=1e-12)
        first += n
    assert all(value.ndim == 0 and not value.requires_grad for _, stats in ranks for value in stats.values())


def test_bad_arguments_are_refused_before_the_others_are_met():
    counts = COUNTS[False][4]
    for k, name in enumerate(("nt_xent", "info_nce")):
        losses, _ = expected(name, *embeddings(counts), 0.3, counts, [])
        assert [rank["refused"][k].item() for rank in found()] == pytest.approx([loss.item() for loss in losses])


def test_module_gathers_negatives_and_keys():
    counts = COUNTS[False][4]
    z1, z2 = embeddings(counts)
    in_batch, _ = expected("nt_xent", z1, z2, 0.3, counts, [])
    beside_bank, _ = expected("info_nce negatives alone", z1, z2, 0.3, counts, [z2] * 4)
    for k, (losses, room) in enumerate(((in_batch, 1e-12), (beside_bank, 1e-6))):
        wanted = [loss.item() for loss in losses]
        assert [rank["module"][k].item() for rank in found()] == pytest.approx(wanted, rel=room)


def test_a_group_of_one_is_one_process():
    losses, gradients = of_one_process("nt_xent", [3])
    for rank in found():
        for loss, got in rank["alone"]:
            assert loss.item() == pytest.approx(losses[0].item(), rel=1e-12)
            assert_exact(got, gradients)
