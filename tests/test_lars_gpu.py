"""What LARS promises of a GPU: two launches, no waiting, no allocation, CUDA graphs, huge tensors."""

import pytest
import torch
from torch import Tensor, nn

from simclr_fast.optim import LARS
from tests.lars_common import HALVES, parameters

pytestmark = pytest.mark.gpu
SHAPES = [(64, 3, 7, 7), (1000, 333), (5,), (), (0, 4), (300_001,)]


def everything(count: int = 1) -> tuple[LARS, list[Tensor]]:
    """Two groups of float32, bf16 and fp16 parameters, clipped and averaged, lr and decay on the device."""
    params = [p for _ in range(count) for p in parameters(*SHAPES, device="cuda")]
    halves = [p for dtype in HALVES for p in parameters(*SHAPES, device="cuda", dtype=dtype)]
    lr, decay = torch.tensor(0.5, device="cuda"), torch.tensor(1e-3, device="cuda", dtype=torch.float64)
    groups = [{"params": params, "weight_decay": decay}, {"params": halves, "adapt": False}]
    return LARS(groups, lr=lr, max_norm=3.0, ema=0.9), [*params, *halves]


def kernels(optimizer: LARS) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("count", [1, 100, 1000])
def test_two_launches(count: int) -> None:
    """Above some 3,900 tensors their pointers no longer fit into a kernel's arguments and are stored first."""
    optimizer, params = everything(count)
    optimizer.step()
    names = kernels(optimizer)
    stored = [name for name in names if "store_kernel" in name]
    assert len(stored) == (0 if len(params) < 3900 else 2)
    others = [name for name in names if name not in stored]
    assert len(others) == 2, others
    assert "norms_kernel" in others[0]
    assert "update_kernel" in others[1]


def test_many_tensors_step_as_few() -> None:
    many, few = parameters(*[(3, 2)] * 5000, device="cuda"), parameters(*[(3, 2)] * 5000, device="cuda")
    LARS(many, lr=0.5).step()
    for start in range(0, 5000, 500):
        LARS(few[start : start + 500], lr=0.5).step()
    assert all(torch.equal(a, b) for a, b in zip(many, few, strict=True))


def test_no_waiting_and_no_allocation() -> None:
    optimizer, params = everything()
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale(torch.zeros((), device="cuda"))
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        for p in params:
            p.grad = p.grad.clone()  # elsewhere, as after zero_grad
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        optimizer.step()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        scaler.step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph() -> None:
    """Replays read the learning rate and the gradients anew."""
    (captured, params), (eager, wanted) = everything(), everything()
    captured.step(), eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr in (0.5, 0.25, 0.0):
        captured.param_groups[0]["lr"].fill_(lr)
        eager.param_groups[0]["lr"].fill_(lr)
        for p, q in zip(params, wanted, strict=True):
            p.grad.mul_(1.5)
            q.grad.mul_(1.5)
        graph.replay()
        eager.step()
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


def test_graphs_outlive_other_sets_of_parameters() -> None:
    (captured, params), (eager, wanted) = everything(), everything()
    captured.step(), eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    grads = [p.grad for p in params]
    for k in range(1, 12):  # more sets than are kept
        for p, q in zip(params[:k], wanted[:k], strict=True):
            p.grad = q.grad = None
        captured.step(), eager.step()
        for p, q, grad in zip(params, wanted, grads, strict=True):
            p.grad, q.grad = grad, grad.clone()
    graph.replay()
    eager.step()
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


def test_a_group_without_gradients_may_be_added() -> None:
    params = parameters((50, 3), (7,), device="cuda")
    optimizer = LARS(params[:1], lr=0.1)
    optimizer.step()
    params[1].grad = None
    optimizer.add_param_group({"params": params[1:]})
    optimizer.step()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 40e9, reason="needs 40 GB")
def test_more_than_two_to_the_31_elements() -> None:
    numel = 2**31 + 5
    p = nn.Parameter(torch.ones(numel, device="cuda"))
    p.grad_dtype = torch.bfloat16
    p.grad = torch.full((numel,), 0.5, dtype=torch.bfloat16, device="cuda")
    LARS([p], lr=1.0, trust_coefficient=0.25).step()  # |w| / |g| = 2
    for part in p.detach().split(2**28):
        assert part.sub(0.75).abs().max() < 1e-6


def test_devices_are_stepped_apart_and_clipped_together() -> None:
    here, there = parameters((50, 3), (7,)), parameters((50, 3), (7,), device="cuda")
    mixed, alone = [here[0], there[1]], parameters((50, 3), (7,))
    LARS(mixed, lr=0.1, max_norm=0.5, adapt=False).step()
    LARS(alone, lr=0.1, max_norm=0.5, adapt=False).step()
    torch.testing.assert_close([p.cpu() for p in mixed], alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts_move_across_devices(dtype: torch.dtype) -> None:
    here, there = parameters((50, 3), dtype=dtype), parameters((50, 3), dtype=dtype, device="cuda")
    first, second = LARS(here, lr=0.1), LARS(there, lr=0.2)
    first.step()
    there[0].data.copy_(here[0].data)
    second.load_state_dict(first.state_dict())
    first.step(), second.step()
    torch.testing.assert_close(there[0].cpu(), here[0], rtol=1e-5, atol=1e-6)
    first.load_state_dict(second.state_dict())
    assert first.state[here[0]]["momentum_buffer"].device.type == "cpu"
