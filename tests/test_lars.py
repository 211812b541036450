"""LARS against the original's results and against plain PyTorch in float64; its bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simclr_fast.models.resnet import resnet
from simclr_fast.optim import LARS, lars_param_groups, steps
from tests.lars_common import DEVICES, HALVES, VARIANTS, fused, half_gradients, parameters, truth

CASES = ["v1_default", "v2_default", "const_lr", "decay_lr", "no_wd", "nesterov", "popular", "popular_nesterov"]
CASES += ["big_wd", "eta_0.02"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_vectors(vectors: Path, lars_step: str, name: str, dtype: torch.dtype, device: str) -> None:
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


def test_lr_outside_equals_the_default_at_constant_lr(lars_step: str) -> None:
    inside, outside = parameters((5, 7), dtype=torch.float64), parameters((5, 7), dtype=torch.float64)
    a, b = LARS(inside, lr=0.5), LARS(outside, lr=0.5, lr_outside=True)
    for _ in range(3):
        a.step(), b.step()
        torch.testing.assert_close(inside, outside, rtol=1e-13, atol=0)
    a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 1.0
    a.step(), b.step()
    assert not torch.allclose(inside[0], outside[0], rtol=1e-6)


SHAPES = [(3, 3), (16383,), (16384,), (16385,), (50, 1000), (1,), (0, 4), (), (8, 6, 3, 3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"max_norm": 2.5}, {"max_norm": 1e6}], ids=str)
@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_equals_the_plain_step_in_float64(lars_step: str, flags: dict, options: dict, device: str) -> None:
    """Sizes around a chunk, a tensor of several chunks, single elements, none, and no dimension."""
    params = parameters(*SHAPES, device=device)
    optimizer = LARS(params, lr=0.7, weight_decay=1e-3, **flags, **options)
    for _ in range(3):
        weights, velocities = truth(optimizer, params, **options)
        optimizer.step()
        for p, w, v in zip(params, weights, velocities, strict=True):
            torch.testing.assert_close(p.double().cpu(), w, rtol=2e-6, atol=2e-6, check_dtype=False)
            got = optimizer.state[p]["momentum_buffer"].double().cpu()
            torch.testing.assert_close(got, v, rtol=2e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_clipped_float64_to_rounding(lars_step: str, flags: dict, device: str) -> None:
    """The norm after clipping is put together from parts: as good as the one of the clipped gradient."""
    params = parameters((40, 30), (17,), dtype=torch.float64, device=device)
    optimizer = LARS(params, lr=0.7, weight_decay=0.3, max_norm=1.5, **flags)
    for _ in range(3):
        weights, velocities = truth(optimizer, params, max_norm=1.5)
        optimizer.step()
        torch.testing.assert_close([p.detach().cpu() for p in params], weights, rtol=1e-12, atol=1e-14)
        got = [optimizer.state[p]["momentum_buffer"].cpu() for p in params]
        torch.testing.assert_close(got, velocities, rtol=1e-12, atol=1e-14)


tensors = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
        st.sampled_from(["normal", "zero weight", "zero gradient", "tiny", "huge"]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
)
rules = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.3, 4.8]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "weight_decay": st.sampled_from([0.0, 1e-6, 0.1]),
        "trust_coefficient": st.sampled_from([1e-3, 0.02]),
        **{name: st.booleans() for name in ("adapt", "nesterov", "classic_momentum", "lr_outside", "maximize")},
    }
)


@fused
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    tensors=tensors,
    rules=st.lists(rules, min_size=3, max_size=3),
    dtypes=st.sampled_from([(torch.float32, None), (torch.float64, None), (torch.float32, torch.bfloat16)]
                           + [(half, half) for half in HALVES]),
    max_norm=st.sampled_from([None, None, 0.5]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_model(tensors: list, rules: list, dtypes: tuple, max_norm: float | None, seed: int) -> None:
    """Random shapes, values, groups and dtypes: the fused step errs no more than its dtype explains."""
    dtype, grad_dtype = dtypes
    generator = torch.Generator().manual_seed(seed)
    factors = {"zero weight": (0, 1), "zero gradient": (1, 0), "tiny": (1e-12, 1e-15), "huge": (1e8, 1e3)}
    groups = [{"params": [], **rule} for rule in rules]
    for shape, kind, group in tensors:
        w, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        by_w, by_g = (1, 1) if dtype == torch.float16 else factors.get(kind, (1, 1))
        p = nn.Parameter((w * by_w).to(dtype))
        p.grad = (g * by_g).to(dtype)
        if grad_dtype not in (None, dtype):
            half_gradients([p], grad_dtype)
        groups[group]["params"].append(p)
    optimizer = LARS(groups, lr=0.0, max_norm=max_norm)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    for _ in range(2):
        weights, velocities = truth(optimizer, params, max_norm=max_norm)
        optimizer.step()
        for p, w, v in zip(params, weights, velocities, strict=True):
            state = optimizer.state[p]
            for got, want in ((state.get("master", p), w), (state["momentum_buffer"], v)):
                assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                scale = want.abs().max().item() if want.numel() else 0
                torch.testing.assert_close(got.detach().double(), want, rtol=0, atol=tolerance * scale + 1e-37)
            if dtype in HALVES:
                assert torch.equal(p, state["master"].to(dtype))


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
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "ema": 0.9}], ids=str)
def test_same_bits_for_any_number_of_threads(options: dict) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            params = parameters((300, 1000), (64,), (70_001,), (2000, 1000))
            optimizer = LARS(params, lr=1.0, weight_decay=1e-4, **options)
            for _ in range(3):
                optimizer.step()
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@fused
@pytest.mark.parametrize("device", DEVICES)
def test_twenty_runs_give_the_same_bits(device: str) -> None:
    def run() -> list[Tensor]:
        params = parameters((300, 1000), (64,), (70_001,), (), device=device)
        optimizer = LARS(params, lr=1.0, weight_decay=1e-4, max_norm=3.0)
        optimizer.step()
        optimizer.step()
        return params

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@fused
@pytest.mark.parametrize("device", DEVICES)
def test_a_network_learns_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of a small ResNet in float64, each with its own gradients."""

    def losses() -> list[float]:
        torch.manual_seed(0)
        encoder = resnet("resnet8")
        model = nn.Sequential(encoder, nn.Linear(encoder.num_features, 4)).to(device, torch.float64)
        images, targets = torch.randn(16, 3, 16, 16, device=device).double(), torch.arange(16, device=device) % 4
        optimizer = LARS(lars_param_groups(model, 1e-4), lr=0.5, trust_coefficient=0.01)
        found = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    first = losses()
    assert first[-1] < 0.1 * first[0]
    for name in ("foreach", "reference"):
        monkeypatch.setattr(LARS, "_step_function", lambda self, device, name=name: getattr(steps, f"lars_{name}"))
        assert losses() == pytest.approx(first, rel=1e-6, abs=1e-9)


def test_nan_spoils_only_its_own_tensor(lars_step: str) -> None:
    params = parameters((4, 4), (4, 4))
    params[0].grad[1, 2] = float("nan")
    LARS(params, lr=1.0).step()
    assert params[0][1, 2].isnan()
    assert params[1].isfinite().all()


def test_chunks_cover_every_element_once() -> None:
    """Also of tensors of more than 2^31 elements, whose indices do not fit 32 bits."""
    numels = [5, 0, 2**33 + 3, 1, 2**31]
    chunk = 2**21
    table = steps.chunk_table(numels, chunk)
    assert table.dtype == torch.int64
    for owner, numel in enumerate(numels):
        begin, end = table[table[:, 0] == owner][:, 1:].unbind(1)
        assert end.sub(begin).sum() == numel
        assert len(begin) == -(-numel // chunk)
        if numel:
            assert (begin[0], end[-1]) == (0, numel)
            assert torch.equal(begin[1:], end[:-1])
            assert (end - begin <= chunk).all()
            assert (begin % 4 == 0).all()
    assert torch.equal(table[:, 0], table[:, 0].sort().values)
    assert steps.chunk_table([0, 0], 16).shape == (0, 3)


@pytest.mark.parametrize("place", [3, 16])  # of 17: in a vector, and after the last one
@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_an_infinite_gradient_stops_its_tensor(lars_step: str, place: int, flags: dict) -> None:
    """Its norm is infinite, and the others' steps are 0; not adapted, they step as ever."""
    (p,), (q,) = parameters((17,)), parameters((17,))
    p.grad[place] = torch.inf
    others = torch.arange(17) != place
    LARS([p], lr=1.0, **flags).step()
    assert not p[place].isfinite()
    if flags.get("adapt", True):
        assert torch.equal(p[others], q[others])
