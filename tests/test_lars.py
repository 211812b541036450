"""LARS against the official code's results, the fused step against the plain one, the optimiser's manners."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simclr_fast.optim import LARS, lars, lars_param_groups

fused = pytest.mark.skipif(
    not lars.extension(), reason="simclr_fast._C is not built: `python setup.py build_ext --inplace`"
)
STEPS = [pytest.param("fused", marks=fused), "reference"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [
    "v1_default",
    "v2_default",
    "const_lr",
    "decay_lr",
    "no_wd",
    "nesterov",
    "popular",
    "popular_nesterov",
]
CASES += ["big_wd", "eta_0.02"]


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with the fused step and with the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(lars, "_step_function", lambda *args: lars.lars_reference)
    return request.param


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Random parameters with random gradients, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(t[0].to(device, dtype)) for t in tensors]
    for p, t in zip(params, tensors, strict=True):
        p.grad = t[1].to(device, dtype)
    return params


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_vectors(vectors: Path, step: str, name: str, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and dtype == torch.float64 and step == "fused":
        pytest.skip("float64 is fused on the CPU only")
    facts, data = json.loads((vectors / "lars_cases.json").read_text()), np.load(vectors / "lars.npz")
    (case,) = (c for c in facts["cases"] if c["name"] == name)
    assert {c["name"] for c in facts["cases"]} == set(CASES)
    names = facts["order"]
    params = {n: nn.Parameter(torch.tensor(data[f"init/{n}"], dtype=dtype, device=device)) for n in names}
    optimizer = LARS(
        [
            {
                "params": [p for n, p in params.items() if not facts["excluded"][n]],
                "weight_decay": case["wd"],
            },
            {"params": [p for n, p in params.items() if facts["excluded"][n]], "adapt": False},
        ],
        lr=0.0,
        momentum=facts["momentum"],
        trust_coefficient=case.get("eta", facts["eta_default"]),
        nesterov=case.get("nesterov", False),
        classic_momentum=case.get("classic", True),
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for t, lr in enumerate(facts["lr_sequences"][case["lr"]]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for n, p in params.items():
            p.grad = torch.tensor(data[f"grads/{n}"][t], dtype=dtype, device=device)
        optimizer.step()
        for n, p in params.items():
            velocity = optimizer.state[p]["momentum_buffer"]
            for key, got in (("w", p.detach()), ("v", velocity)):
                want = data[f"{name}/{key}/{n}"][t]
                error = np.abs(got.double().cpu().numpy() - want).max() / max(np.abs(want).max(), 1e-300)
                assert error <= tolerance, (key, n, t, error)


def test_lr_outside_equals_the_default_at_constant_lr(step: str) -> None:
    inside, outside = parameters((5, 7), dtype=torch.float64), parameters((5, 7), dtype=torch.float64)
    a, b = LARS(inside, lr=0.5), LARS(outside, lr=0.5, lr_outside=True)
    for _ in range(3):
        a.step(), b.step()
        torch.testing.assert_close(inside, outside, rtol=1e-13, atol=0)
    a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 1.0
    a.step(), b.step()
    assert not torch.allclose(inside[0], outside[0], rtol=1e-6)


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [{}, {"nesterov": True}, {"classic_momentum": False}, {"lr_outside": True}])
def test_fused_equals_reference_in_float64(flags: dict[str, bool], device: str) -> None:
    """Sizes around a chunk of 16384, a tensor of several chunks, single elements, none, and no dimension."""
    shapes = [(3, 3), (16383,), (16384,), (16385,), (50, 1000), (1,), (0, 4), ()]
    ours, reference = parameters(*shapes, device=device), parameters(*shapes, dtype=torch.float64)
    optimizer = LARS(ours, lr=0.7, weight_decay=1e-3, **flags)
    velocities = [torch.zeros_like(p) for p in reference]
    hyper = torch.tensor([[optimizer.defaults[name] for name in lars.HYPER]], dtype=torch.float64)
    for _ in range(3):
        optimizer.step()
        with torch.no_grad():
            grads = [p.grad for p in reference]
            lars.lars_reference(reference, grads, velocities, [0] * len(shapes), hyper)
    for p, want, v in zip(ours, reference, velocities, strict=True):
        torch.testing.assert_close(p.double().cpu(), want, rtol=2e-6, atol=2e-6, check_dtype=False)
        got = optimizer.state[p]["momentum_buffer"].double().cpu()
        torch.testing.assert_close(got, v, rtol=2e-6, atol=1e-8, check_dtype=False)


@fused
@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device: str) -> None:
    """Channels_last weights, a transposed gradient, strided and misaligned weights step as dense ones do."""

    def stepped(layouts: bool) -> list[Tensor]:
        conv, matrix, strided, shifted = parameters((8, 6, 3, 3), (40, 30), (9, 5), (77,), device=device)
        if layouts:
            conv.data = conv.data.to(memory_format=torch.channels_last)
            matrix.grad = matrix.grad.t().contiguous().t()
            strided.data = torch.stack([strided.data, strided.data], dim=-1)[..., 0]
            shifted.data = torch.cat([shifted.data[:1], shifted.data])[1:]
            assert not strided.is_contiguous()
            assert shifted.data_ptr() % 16
        params = [conv, matrix, strided, shifted]
        optimizer = LARS(params, lr=1.0, weight_decay=0.1)
        optimizer.step()
        optimizer.step()
        return params + [optimizer.state[p]["momentum_buffer"] for p in params]

    for got, want in zip(stepped(True), stepped(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@fused
def test_same_bits_for_any_number_of_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            params = parameters((300, 1000), (64,), (70_001,))
            optimizer = LARS(params, lr=1.0, weight_decay=1e-4)
            for _ in range(3):
                optimizer.step()
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_spoils_only_its_own_tensor(step: str) -> None:
    params = parameters((4, 4), (4, 4))
    params[0].grad[1, 2] = float("nan")
    LARS(params, lr=1.0).step()
    assert params[0][1, 2].isnan()
    assert params[1].isfinite().all()


def test_state_dict_moves_between_fused_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    params, copies = parameters((6, 5), (5,)), parameters((6, 5), (5,))
    first = LARS(params, lr=0.3, weight_decay=1e-4)
    first.step()
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    second = LARS(copies, lr=9.0)
    second.load_state_dict(saved)
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p.data)
    assert second.param_groups[0]["lr"] == 0.3
    first.step()
    monkeypatch.setattr(lars, "_step_function", lambda *args: lars.lars_reference)
    second.step()
    torch.testing.assert_close(params, copies, rtol=1e-6, atol=1e-7)


def test_works_as_a_torch_optimizer(step: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = LARS(lars_param_groups(model, 1e-4), lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    versions = [p._version for p in model.parameters()]
    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    optimizer.step()  # no gradients: nothing to do
    assert optimizer.param_groups[1]["param_names"] == ["bias"]


def test_max_norm_and_ema(step: str) -> None:
    clipped, scaled = parameters((5, 5), (5,)), parameters((5, 5), (5,))
    start = [p.detach().clone() for p in clipped]
    norm = torch.cat([p.grad.flatten() for p in scaled]).norm()
    for p in scaled:
        p.grad *= 0.5 / norm
    optimizer = LARS(clipped, lr=0.1, adapt=False, max_norm=0.5, ema=0.9)
    optimizer.step()
    LARS(scaled, lr=0.1, adapt=False).step()
    torch.testing.assert_close(clipped, scaled, rtol=1e-5, atol=1e-6)
    for p, w in zip(clipped, start, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], 0.9 * w + 0.1 * p.detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": 1.0, "momentum": -0.5}, "momentum must be >= 0, got -0.5"),
        ({"lr": 1.0, "weight_decay": -1e-4}, "weight_decay must be >= 0, got -0.0001"),
        ({"lr": 1.0, "ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(parameters((2,)), **settings)


def test_sparse_gradients_are_refused_before_anything_changes(step: str) -> None:
    dense, table = parameters((3,), (4, 2))
    table.grad = table.grad.to_sparse()
    before = dense.detach().clone()
    with pytest.raises(ValueError, match=r"sparse one of shape \[4, 2\]"):
        LARS([dense, table], lr=1.0).step()
    assert torch.equal(dense, before)


def test_one_warning_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lars, "_ABSENT", "cannot be loaded (not built)")
    lars._warn_once.cache_clear()
    optimizer = LARS(parameters((2, 2)), lr=1.0)
    with pytest.warns(RuntimeWarning, match="plain PyTorch, more slowly: .*not built.*pip install") as record:
        optimizer.step()
    assert record[0].filename == __file__
    optimizer.step()  # a second warning would be an error
    lars._warn_once.cache_clear()


def test_half_precision_takes_the_plain_step() -> None:
    lars._warn_once.cache_clear()
    params = parameters((8, 8), dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="no fused step for torch.bfloat16 parameters"):
        LARS(params, lr=1.0).step()
    want = parameters((8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LARS(want, lr=1.0).step()
    torch.testing.assert_close(params[0].float(), want[0].detach(), rtol=1e-2, atol=1e-2)


@fused
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [1]}, "groups"),
        ({"groups": []}, "length"),
        ({"grads": [torch.ones(3)]}, "shape"),
        ({"grads": [torch.ones(2, dtype=torch.float64)]}, "dtype"),
        ({"hyper": torch.ones(1, 5, dtype=torch.float64)}, "hyper"),
        ({"params": [torch.ones(2, dtype=torch.int32)]}, "float32"),
    ],
)
def test_the_operator_checks_its_arguments(change: dict[str, list], message: str) -> None:
    ones = [torch.ones(2)]
    hyper = torch.ones(1, 8, dtype=torch.float64)
    arguments = {"params": ones, "grads": ones, "velocities": [torch.zeros(2)], "groups": [0], "hyper": hyper}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.simclr_fast.lars_step(*(arguments | change).values())


def model_of(variables: list[dict]) -> nn.Module:
    """Modules (without memory) that hold the original's variables under the original's names."""
    root = nn.Module()
    for variable in variables:
        *path, leaf = variable["name"].split("/")
        shape = variable["shape"]
        parent = root
        for part in path[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if path[-1] not in parent._modules:
            norm = leaf in ("gamma", "beta")
            shell = nn.BatchNorm2d(shape[0], device="meta") if norm else nn.Linear(1, 1, bias=False, device="meta")
            shell._parameters.clear()
            parent.add_module(path[-1], shell)
        torch_name = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}[leaf]
        weight = nn.Parameter(torch.empty(shape, device="meta"))
        parent.get_submodule(path[-1]).register_parameter(torch_name, weight)
    return root


def test_groups_match_the_original(vectors: Path) -> None:
    nets = json.loads((vectors / "net_vars.json").read_text())
    supervised = [
        {"name": "head_supervised/linear_layer/dense/kernel", "shape": [512, 10], "lars_excluded": True},
        {"name": "head_supervised/linear_layer/dense/bias", "shape": [10], "lars_excluded": True},
    ]
    for net in nets.values():
        variables = net["trainable"] + supervised
        adapted, plain = lars_param_groups(model_of(variables), 1e-6)
        assert (adapted["weight_decay"], adapted["adapt"]) == (1e-6, True)
        assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)
        for group, excluded in ((adapted, False), (plain, True)):
            want = {v["name"].rpartition("/")[0] for v in variables if v["lars_excluded"] == excluded}
            assert {name.rpartition(".")[0].replace(".", "/") for name, _ in group["params"]} == want
            assert len(group["params"]) == sum(v["lars_excluded"] == excluded for v in variables)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    model[0].weight.requires_grad_(False)
    adapted, plain = lars_param_groups(model, 0.1)
    assert [name for name, _ in adapted["params"]] == []
    assert [name for name, _ in plain["params"]] == ["0.bias", "1.weight", "1.bias"]
