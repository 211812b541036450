"""The fused losses on a GPU at full size: accuracy, graphs, no waiting for the device, memory, several devices."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simclr_fast.kernels import nt_xent as kernels
from simclr_fast.losses import info_nce, nt_xent
from tests.losses_common import F64, check, errors, rows, truth_info_nce

pytestmark = pytest.mark.gpu
DTYPES = {"auto": torch.float16, **kernels.DTYPES}
ROOM = {"auto": 3e-4, "fp16": 3e-4, "bf16": 3e-3, "tf32": 2e-3, "fp32": 4e-6}
MIB = 1 << 20


def views(n, d, seed=0, device="cuda", dtype=torch.float32):
    z1, other = torch.randn(2, n, d, generator=torch.Generator(device).manual_seed(seed), device=device)
    return z1.to(dtype), (z1 + other).to(dtype)


def truth(z1, z2, tau, dtype=F64):
    """Masked cross-entropy, its backward pass taken for some anchors at a time: loss and gradients, on the CPU."""
    leaves = [x.detach().to(F64).requires_grad_() for x in (z1, z2, torch.tensor(tau, device=z1.device))]
    unit = torch.cat([F.normalize(z) for z in leaves[:2]])
    z = unit.detach().requires_grad_()
    total, wide = 0.0, torch.promote_types(dtype, torch.float32)
    scale = 64.0 * len(z)  # so that a gradient in float16 loses no digits to its range
    for own in torch.arange(len(z), device=z.device).split(max(1, (1 << 27) // len(z))):
        s = (z[own].to(dtype) @ z.to(dtype).T).to(wide) / leaves[2].to(wide)
        s = s.scatter(1, own[:, None], -math.inf)
        loss = F.cross_entropy(s, (own + len(z1)) % len(z), reduction="sum") / len(z)
        (loss * scale).backward()
        total += loss.item()
    unit.backward(z.grad)
    return [torch.tensor(total, dtype=F64), *(leaf.grad.cpu() / scale for leaf in leaves)]


def run(z1, z2, tau, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (z1, z2, torch.tensor(tau, device=z1.device))]
    loss = nt_xent(*leaves, backend="triton", **options)
    loss.backward()
    return [loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


def close_to_truth(n, d, tau, precision, dtype=torch.float32):
    z = views(n, d, dtype=dtype)
    check(run(*z, tau, precision=precision), truth(*z, tau), ROOM[precision], truth(*z, tau, DTYPES[precision]), tau)


@pytest.mark.parametrize(
    ("n", "d"),
    [
        (1, 128), (31, 128), (128, 128), (511, 128), (513, 64), (2049, 128), (4096, 256), (32768, 128), (32769, 33),
        (131072, 128), (2049, 257), (1025, 384), (4096, 1000), (8192, 1024), (2051, 2048), (129, 4096),
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_sizes(n, d, precision):
    if precision == "fp32" and n * n * d > 1 << 38:
        pytest.skip("minutes")
    close_to_truth(n, d, 0.1, precision)


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.0199, 0.02, 0.0201, 0.07, 0.5, 10.0])
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_temperatures(tau, precision):
    close_to_truth(1500, 128, tau, precision)


@pytest.mark.parametrize(
    ("width", "precision", "shared"),
    [(*key, 1 << 18) for key in kernels.LAUNCH] + [(*key, 1 << 16) for key in kernels.LOW_SHARED],
)
def test_every_launch_at_full_size(monkeypatch, width, precision, shared):
    chip = kernels._chip(torch.device("cuda", torch.cuda.current_device()))
    monkeypatch.setattr(kernels, "_chip", lambda device: chip._replace(shared=shared))
    close_to_truth(2051, width - 1, 0.1, precision)


@pytest.mark.parametrize(("n", "m", "d"), [(1000, 20000, 128), (1, 1000, 64), (777, 1, 256), (1025, 3001, 1000)])
@pytest.mark.parametrize("mode", [{}, {"symmetric": True}, {"in_batch": False}])
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_info_nce(n, m, d, mode, precision):
    q, k = views(n, d)
    negatives = views(m, d, seed=1)[0]
    leaves = [x.requires_grad_() for x in (q, k, torch.tensor(0.1, device="cuda"), negatives)]
    loss = info_nce(*leaves[:3], negatives=negatives, backend="triton", precision=precision, **mode)
    loss.backward()
    inputs = [x.detach().cpu() for x in (q, k, negatives)]
    exact, plain = (truth_info_nce(*inputs[:2], 0.1, inputs[2], dtype=t, **mode) for t in (F64, DTYPES[precision]))
    check([loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)], exact, ROOM[precision], plain, 0.1)


def test_strides_beyond_32_bits():
    wide = torch.zeros(2200, 1 << 20, dtype=torch.float16, device="cuda")  # 4.3 GiB, of which 64 columns are used
    z = views(1100, 64, dtype=torch.float16)
    wide[:1100, :64], wide[1100:, :64] = z
    assert wide[1100:].storage_offset() + 1099 * wide.stride(0) > 2**31
    wanted = run(*z, 0.1)
    a, b = (x.detach().requires_grad_() for x in (wide[:1100, :64], wide[1100:, :64]))
    loss = nt_xent(a, b, 0.1, backend="triton")
    loss.backward()
    assert torch.equal(loss.detach().cpu(), wanted[0])
    assert torch.equal(a.grad.cpu(), wanted[1])
    assert torch.equal(b.grad.cpu(), wanted[2])


@pytest.mark.parametrize(("n", "d"), [(64, 128), (700, 128), (5000, 64), (500, 1024)])
def test_same_bits_again_and_on_another_stream(n, d):
    z = views(n, d)
    once = run(*z, 0.1)
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(once, run(*z, 0.1), strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = run(*z, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))


def losses(z1, z2, tau, bank):
    yield nt_xent(z1, z2, tau)
    yield nt_xent(z1, z2, tau, reduction="none").square().mean()
    yield nt_xent(z1, z2, 0.1, return_stats="all")[0]
    yield info_nce(z1, z2, tau, negatives=bank, symmetric=True, return_stats=True)[0]


@pytest.mark.parametrize("d", [128, 384])
def test_captured_in_a_graph_and_replayed_with_new_data(d):
    held = [*(z.requires_grad_() for z in views(300, d)), torch.tensor(0.1, device="cuda", requires_grad=True)]
    bank = rows(500, d).cuda()

    def step():
        for leaf in held:
            leaf.grad = None
        loss = sum(losses(*held, bank))
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = [leaf.grad for leaf in held]
    for seed, tau in ((1, 0.1), (2, 0.01), (3, 0.5)):  # on both sides of the temperature where the shift sets in
        with torch.no_grad():
            for leaf, value in zip(held, (*views(300, d, seed), torch.tensor(tau)), strict=True):
                leaf.copy_(value)
        graph.replay()
        got = [x.clone() for x in (loss, *captured)]
        wanted = step()
        assert all(torch.equal(a, b) for a, b in zip(got, (wanted, *(leaf.grad for leaf in held)), strict=True))


@pytest.mark.parametrize("d", [128, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_never_waits_for_the_device(d, dtype):
    tau = nn.Parameter(torch.tensor(0.1, device="cuda"))
    z1, z2 = (z.requires_grad_() for z in views(300, d, dtype=dtype))
    bank = rows(500, d).cuda()
    for mode in ("default", "error"):  # the first time kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for loss in losses(z1, z2, tau, bank):
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(tau.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(dtype):
    """Over forward and backward, less inputs and returned gradients; the matrix would take 16 GiB."""
    n, d = 65536, 128
    run(*views(64, d, dtype=dtype), 0.1)
    z1, z2 = (z.requires_grad_() for z in views(n // 2, d, dtype=dtype))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nt_xent(z1, z2, 0.1).backward()
    extra = torch.cuda.max_memory_allocated() - before - z1.grad.nbytes - z2.grad.nbytes
    assert extra < 8 * n * d + 16 * n + 2 * MIB


def test_autocast_and_gradient_scaler():
    """One step of mixed precision is that of float32, but for the rounding of the encoder."""
    views_in = [rows(256, 32, seed=seed).cuda() for seed in (0, 1)]

    def step(mixed):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 128)).cuda()
        tau = nn.Parameter(torch.tensor(0.1, device="cuda"))
        optimizer = torch.optim.SGD([*encoder.parameters(), tau], lr=1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=mixed)
        with torch.autocast("cuda", torch.float16, enabled=mixed):
            loss = nt_xent(*(encoder(view) for view in views_in), tau)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found = [loss.detach().cpu(), *(p.grad.cpu() for p in (*encoder.parameters(), tau))]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (65536 if mixed else 1)  # no infinity was met
        return found

    wanted, got = step(False), step(True)
    assert got[0].dtype == torch.float32
    assert max(errors(got, [x.double() for x in wanted])) < 2e-2


def test_compiled_by_inductor():
    weight = rows(32, 128).cuda().requires_grad_()
    loss_of = torch.compile(lambda a, b, t: nt_xent(a @ weight, b @ weight, t.exp(), return_stats=True), fullgraph=True)
    for n in (100, 101, 230):
        a, b = (rows(n, 32, seed=seed).cuda() for seed in (0, 1))
        tau = torch.tensor(-2.0, device="cuda", requires_grad=True)
        got = torch.autograd.grad(loss_of(a, b, tau)[0], (weight, tau))
        wanted = torch.autograd.grad(nt_xent(a @ weight, b @ weight, tau.exp()), (weight, tau))
        torch.testing.assert_close(got, wanted, rtol=5e-3, atol=1e-5)


def test_devices():
    z1, z2 = views(50, 128)
    with pytest.raises(ValueError, match="device"):
        nt_xent(z1, z2.cpu())
    wanted = run(z1, z2, 0.1)
    assert nt_xent(z1, z2, torch.tensor(0.1)).cpu() == wanted[0]  # a temperature on the CPU
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    there = run(z1.to("cuda:1"), z2.to("cuda:1"), 0.1)  # while device 0 is the current one
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(wanted, there, strict=True))
