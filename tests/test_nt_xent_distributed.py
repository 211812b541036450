"""Exact negatives over all ranks: real DDP over Gloo against one process with the global batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_fast.losses import nt_xent

N, D_IN = 6, 5
VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "ntxent_dist.npz"
OPTIONS = [{}, {"reduction": "sum"}, {"scale": "simclr_tf"}]


class Model(nn.Module):
    """Encoder and learnable temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(D_IN, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        self.tau = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, views, **options):
        return nt_xent(*(self.encoder(view) for view in views), self.tau, **options)


def batch(world):
    return torch.randn(2, N * world, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.encoder.parameters()]), model.tau.grad


def results_of(rank, group):
    """What this rank finds in a group of the first ranks."""
    world, found = dist.get_world_size(group), {}
    views = batch(world)[:, N * rank : N * rank + N]
    for options in OPTIONS:
        model = DistributedDataParallel(Model(), process_group=group)
        loss, stats = model(views, group=group, return_stats=True, **options)
        loss.backward()
        found[str(options)] = (loss.item(), *gradients(model.module), {k: v.item() for k, v in stats.items()})

    model = Model()  # no DDP: a reducer that sums
    model(views, group=group, grad_average=False).backward()
    found["summed"] = gradients(model)
    for grad in found["summed"]:
        dist.all_reduce(grad, group=group)

    with torch.set_grad_enabled(rank == 0):  # the others want no gradient, and do not keep rank 0 waiting
        model = Model()
        loss = model(views, group=group)
    if rank == 0:
        loss.backward()

    for backend in ("triton", "native"):
        found[backend] = nt_xent(*views.float(), 0.3, group=group, backend=backend).item()
    for options in ({"reduction": "none"}, {"backend": "reference"}):
        with pytest.raises(ValueError, match="several ranks"):
            nt_xent(*views, group=group, **options)
    return found


def official(rank, group):
    """Loss and gradient of this replica, beside the original's (which divides the loss by the replicas)."""
    with np.load(VECTORS) as arrays:
        h, tau = torch.tensor(arrays["R2/h_local"][rank]).requires_grad_(), float(arrays["tau"])
        loss = nt_xent(*h.chunk(2), tau, group=group, scale="simclr_tf", eps=1e-6)
        loss.backward()
        return loss.item(), h.grad / 2, float(arrays["R2/loss_local"][rank]), arrays["R2/grad_local"][rank]


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([other]) for other in range(3)][rank]
    found = {3: results_of(rank, dist.group.WORLD)}
    if rank < 2:
        found[2] = results_of(rank, pair)
        found["official"] = official(rank, pair) if VECTORS.is_file() else None
    views = batch(1)
    found["alone"] = (Model()(views, group=alone).item(), Model()(views).item())
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(one_rank, (folder,), 3)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_update_is_that_of_one_process(found, world, options):
    model = Model()
    loss, stats = model(batch(world), return_stats=True, **options)
    loss.backward()
    weights, tau = gradients(model)
    ranks = [found[rank][world][str(options)] for rank in range(world)]
    parts = sum(rank[0] for rank in ranks) / (1 if options.get("reduction") == "sum" else world)
    assert parts == pytest.approx(loss.item(), rel=1e-12)
    for _, weights_found, tau_found, _ in ranks:
        assert torch.dot(weights_found, weights) / torch.dot(weights, weights) == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(weights_found, weights, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(tau_found, tau, rtol=1e-11, atol=1e-14)
    for key, value in stats.items():
        assert sum(rank[3][key] for rank in ranks) / world == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_reducer_that_sums(found, world):
    model = Model()
    model(batch(world)).backward()
    for summed, expected in zip(found[0][world]["summed"], gradients(model), strict=True):
        torch.testing.assert_close(summed, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("world", [2, 3])
def test_triton_sees_the_same_negatives(found, world):
    for rank in range(world):
        assert found[rank][world]["triton"] == pytest.approx(found[rank][world]["native"], rel=1e-3)


def test_group_of_one(found):
    assert all(grouped == single for grouped, single in (rank["alone"] for rank in found))


@pytest.mark.skipif(not VECTORS.is_file(), reason="reference material not found beside the repository")
def test_official_replicas(found):
    for rank in found[:2]:
        loss, grad, expected_loss, expected_grad = rank["official"]
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        torch.testing.assert_close(grad, torch.tensor(expected_grad), rtol=1e-11, atol=1e-13)
