"""Global BatchNorm, sharded evaluation and shared decisions, over real Gloo processes."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from simclr_fast.config import ConfigError
from simclr_fast.distributed import Ranks, unreachable
from simclr_fast.models.batchnorm import share_scope

WORLD = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    )


def batch():
    return torch.randn(4 * WORLD, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 50


def weighting():
    return torch.randn(4 * WORLD, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def one_rank(rank, world, port, results):
    import os

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    ranks = Ranks(use_gpu=False)
    model = network().double()
    share_scope(model).group = ranks.group
    model = nn.parallel.DistributedDataParallel(model)
    mine = slice(4 * rank, 4 * rank + 4)
    out = model(batch()[mine])
    (out * weighting()[mine]).sum().backward()
    found = {
        "out": out.detach(),
        "grads": [parameter.grad for parameter in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "rows": {n: ranks.sharded(n, lambda rows: torch.arange(100.0).view(50, 2)[rows]) for n in (1, 2, 3, 4, 7, 50)},
        "mean": ranks.mean(torch.tensor([float(rank)])),
        "shared": ranks.from_main(lambda: f"from {rank}"),
    }
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), ranks.group)
    found["waited for"] = ranks.from_main(lambda: time.sleep(4) or "long work", patient=True)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=600), ranks.group)
    found["alike"] = ranks.ends_alike(["red", "red", "blue"][rank])
    try:
        ranks.from_main(lambda: (_ for _ in ()).throw(ConfigError("seen by all")))
    except ConfigError as error:
        found["error"] = str(error)
    results[rank] = found
    dist.barrier()
    ranks.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        shared = manager.dict()
        torch.multiprocessing.spawn(one_rank, (WORLD, port, shared), WORLD)
        return dict(shared)


def test_batchnorm_over_the_global_batch(results):
    model = network().double()
    share_scope(model)
    out = model(batch())
    (out * weighting()).sum().backward()
    torch.testing.assert_close(torch.cat([results[rank]["out"] for rank in range(WORLD)]), out, rtol=1e-10, atol=1e-10)
    for grad, parameter in zip(results[0]["grads"], model.parameters(), strict=True):
        torch.testing.assert_close(grad * WORLD, parameter.grad, rtol=1e-9, atol=1e-9)
    for rank in range(WORLD):
        for found, buffer in zip(results[rank]["buffers"], model.buffers(), strict=True):
            torch.testing.assert_close(found, buffer, rtol=1e-10, atol=1e-10)


def test_sharded_rows_come_in_order_on_every_rank(results):
    for rank in range(WORLD):
        for count, rows in results[rank]["rows"].items():
            assert torch.equal(rows, torch.arange(100.0).view(50, 2)[:count])


def test_decisions_and_errors_of_the_main_rank(results):
    for rank in range(WORLD):
        assert results[rank]["shared"] == "from 0"
        assert results[rank]["error"] == "seen by all"
        assert results[rank]["mean"].item() == 1.0


def test_the_others_wait_for_long_work_beyond_the_group_s_limit(results):
    assert [results[rank]["waited for"] for rank in range(WORLD)] == ["long work"] * WORLD


def test_a_rank_knows_whether_the_main_one_tells_its_error(results):
    assert [results[rank]["alike"] for rank in range(WORLD)] == [True, True, False]


def test_what_is_no_error_of_lost_ranks_is_not_called_so(monkeypatch):
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9. This may indicate")
    assert unreachable(lost) == ""  # alone
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert unreachable(lost) == "rank 1: the other ranks cannot be reached (Connection closed by peer [::1]:9)"
    assert unreachable(RuntimeError("CUDA out of memory")) == ""


def test_alone_there_are_no_collectives():
    threads = torch.get_num_threads()
    ranks = Ranks(use_gpu=False)
    torch.set_num_threads(threads)
    assert ranks.main
    assert ranks.group is None
    assert torch.equal(ranks.sharded(5, lambda rows: torch.arange(5)[rows]), torch.arange(5))
    assert ranks.from_main(lambda: 3, patient=True) == 3
    assert ranks.ends_alike("red")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="processes on a host must be at most its visible GPUs, 2, got 4"):
        Ranks(use_gpu=True)


@pytest.mark.parametrize(
    ("asked", "torchrun", "threads"),
    [("1", False, 1), ("9", False, 2), ("1,4", False, 1), ("", False, 2), ("1", True, 2)],
)
def test_omp_num_threads_counts_unless_torchrun_has_set_it(monkeypatch, asked, torchrun, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    try:
        assert Ranks(use_gpu=False).threads == 2  # for the input
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
