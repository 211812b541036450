"""LARS as one of PyTorch's optimisers: groups, schedulers, GradScaler, state dicts, dtypes, errors."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simclr_fast.optim import LARS, lars, lars_param_groups, steps
from tests.lars_common import HALVES, fused, parameters


def moved(optimizer: LARS, params: list[Tensor]) -> list[Tensor]:
    optimizer.step()
    return [p.detach().clone() for p in params]


def test_works_as_a_torch_optimizer(lars_step: str) -> None:
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
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    optimizer.step()  # no gradients: nothing to do
    assert optimizer.param_groups[1]["param_names"] == ["bias"]


def test_hooks_run_around_a_step(lars_step: str) -> None:
    seen, params = [], parameters((3,))
    optimizer = LARS(params, lr=0.1)
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_go_on_alike(lars_step: str, way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    params = parameters((6, 5), (5,), dtype=dtype)
    optimizer = LARS(params, lr=0.3, weight_decay=1e-4, ema=0.5)
    optimizer.step()
    if way == "pickle":
        again, copies = pickle.loads(pickle.dumps((optimizer, params)))
    elif way == "deepcopy":
        again, copies = copy.deepcopy((optimizer, params))
    else:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        copies = copy.deepcopy(params)
        again = LARS(copies, lr=9.0)
        again.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert (again.param_groups[0]["lr"], again.param_groups[0]["ema"]) == (0.3, 0.5)
    for p, q in zip(params, copies, strict=True):
        q.grad = p.grad.clone()
    for a, b in zip(moved(optimizer, params), moved(again, copies), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(params, copies, strict=True):
        for name, value in optimizer.state[p].items():
            assert value.dtype == again.state[q][name].dtype == torch.float32
            assert torch.equal(value, again.state[q][name]), name


@fused
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", ["foreach", "reference"])
def test_state_dict_moves_between_steps(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    params, copies = parameters((6, 5), (5,), dtype=dtype), parameters((6, 5), (5,), dtype=dtype)
    first = LARS(params, lr=0.3, weight_decay=1e-4)
    first.step()
    second = LARS(copies, lr=9.0)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p.data)
    first.step()
    monkeypatch.setattr(LARS, "_step_function", lambda self, device: getattr(steps, f"lars_{name}"))
    second.step()
    for p, q in zip(params, copies, strict=True):
        for key in first.state[p]:
            torch.testing.assert_close(first.state[p][key], second.state[q][key], rtol=1e-6, atol=1e-7)


def test_a_state_dict_without_newer_settings_takes_the_defaults() -> None:
    optimizer = LARS(parameters((3,)), lr=0.1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["maximize"]
    optimizer.load_state_dict(saved)
    optimizer.step()


def test_groups_are_added_and_parameters_come_and_go(lars_step: str) -> None:
    """What is kept from step to step follows the parameters, their gradients and their states."""
    params = parameters((4, 3), (5,), (2, 2))
    alone = parameters((4, 3), (5,), (2, 2))
    optimizer, plain = LARS(params[:2], lr=0.5), [LARS([p], lr=0.5) for p in alone]
    optimizer.step(), plain[0].step(), plain[1].step()
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    optimizer.step(), [o.step() for o in plain]
    params[1].grad = alone[1].grad = None  # frozen
    optimizer.step(), [o.step() for o in plain]
    params[1].grad, alone[1].grad = torch.ones(5), torch.ones(5)
    params[0].grad, alone[0].grad = -params[0].grad, -alone[0].grad  # other tensors
    optimizer.step(), [o.step() for o in plain]
    optimizer.state[params[0]] = {}  # momentum forgotten
    plain[0].state.clear()
    optimizer.step(), [o.step() for o in plain]
    optimizer.state[params[2]].clear()
    plain[2].state[alone[2]].pop("momentum_buffer")
    optimizer.step(), [o.step() for o in plain]
    params[2].data, alone[2].data = params[2].data.clone() * 2, alone[2].data.clone() * 2  # other memory
    optimizer.step(), [o.step() for o in plain]
    torch.testing.assert_close(params, alone, rtol=1e-6, atol=1e-7)


def test_sets_that_take_turns_are_prepared_once(step_was_prepared: list[object]) -> None:
    params = parameters((4, 3), (5,), (2, 2))
    optimizer = LARS(params, lr=0.5)
    for turn in range(6):
        for k, p in enumerate(params):
            p.grad = torch.ones_like(p) if k != turn % 2 else None
        optimizer.step()
    assert len(step_was_prepared) == 3  # the first set anew when the second one's states came
    optimizer.add_param_group({"params": parameters((3,))[0].detach().requires_grad_()})  # without a gradient
    optimizer.step()
    assert len(step_was_prepared) == 4  # another number of groups


@pytest.fixture
def step_was_prepared(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    made: list[object] = []
    right = lars._Batch.__init__
    monkeypatch.setattr(lars._Batch, "__init__", lambda self, *args: (made.append(self), right(self, *args))[1])
    return made


def test_a_parameter_may_change_its_size(lars_step: str) -> None:
    """As when a head is replaced in place."""
    p, memory = parameters((10,))[0], torch.ones(64)
    optimizer = LARS([p], lr=0.5)
    optimizer.step()
    for size in (5, 20):
        p.data, p.grad = memory[:size].fill_(2.0), None
        p.grad = torch.full((size,), 0.5)
        optimizer.state[p]["momentum_buffer"] = torch.zeros(size)
        memory[size:] = 7.0
        optimizer.step()
        assert (p != 2.0).all()
        assert (memory[size:] == 7.0).all()


def test_a_default_device_changes_nothing(lars_step: str) -> None:
    params, wanted = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    LARS(wanted, lr=0.5, max_norm=0.1).step()
    with torch.device("meta"):
        LARS(params, lr=0.5, max_norm=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


def test_hooks_may_change_what_is_loaded(lars_step: str) -> None:
    params = parameters((4, 3), dtype=torch.bfloat16)
    optimizer = LARS(params, lr=0.5)
    optimizer.step()

    def forget(_: object, loaded: dict) -> dict:
        state = {0: {**loaded["state"][0], "momentum_buffer": torch.zeros(4, 3)}}
        return {**loaded, "state": state}

    seen = []
    optimizer.register_load_state_dict_pre_hook(forget)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["master"].dtype))
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state[params[0]]["momentum_buffer"].any()
    assert seen == [torch.float32]


def test_lr_and_decay_may_be_tensors(lars_step: str) -> None:
    params, wanted = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    lr, decay = torch.tensor(0.5), torch.tensor(0.1, dtype=torch.float64)
    tensors, numbers = LARS(params, lr=lr, weight_decay=decay), LARS(wanted, lr=0.5, weight_decay=0.1)
    tensors.step(), numbers.step()
    lr.fill_(0.25)
    numbers.param_groups[0]["lr"] = 0.25
    tensors.step(), numbers.step()
    torch.testing.assert_close(params, wanted, rtol=1e-6, atol=0)


def test_max_norm_is_clip_grad_norm(lars_step: str) -> None:
    """Over groups and precisions; the gradients themselves stay as they are."""
    params, wanted = ([*parameters((5, 5), (5,)), *parameters((7,), dtype=torch.float64)] for _ in range(2))
    grads = [p.grad.clone() for p in params]
    LARS([{"params": params[:1]}, {"params": params[1:], "adapt": False}], lr=0.1, max_norm=0.5).step()
    nn.utils.clip_grad_norm_(wanted, 0.5)
    LARS([{"params": wanted[:1]}, {"params": wanted[1:], "adapt": False}], lr=0.1).step()
    torch.testing.assert_close(params, wanted, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


def test_ema_of_the_weights(lars_step: str) -> None:
    params = parameters((5, 5), (20_000,), (), dtype=torch.float64)
    averages = [p.detach().clone() for p in params]
    optimizer = LARS(params, lr=0.1, ema=0.9)
    for _ in range(3):
        optimizer.step()
        averages = [0.9 * a + 0.1 * p.detach() for a, p in zip(averages, params, strict=True)]
    got = [optimizer.state[p]["ema"] for p in params]
    torch.testing.assert_close(got, averages, rtol=1e-13, atol=1e-15)


def test_state_of_another_model_is_refused() -> None:
    small, large = LARS(parameters((4, 3)), lr=0.1), LARS(parameters((4, 5)), lr=0.1)
    small.step()
    large.load_state_dict(small.state_dict())
    with pytest.raises(ValueError, match=r"state of shape \[4, 3\] for a parameter of shape \[4, 5\]"):
        large.step()


def test_settings_for_all_are_looked_at_in_every_step() -> None:
    optimizer = LARS([{"params": p} for p in parameters((3,), (4,))], lr=0.1)
    optimizer.param_groups[1]["max_norm"] = 1.0
    with pytest.raises(ValueError, match="max_norm holds for all groups, got both None and 1.0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be >= 0, got nan"),
        ({"lr": float("inf")}, "lr must be >= 0, got inf"),
        ({"lr": "1e-6"}, "lr must be a number, got '1e-6'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"lr": 1.0, "ema": "0.9"}, "ema must be a number, got '0.9'"),
        ({"lr": 1.0, "ema": -0.5}, "ema must be >= 0, got -0.5"),
        ({"lr": 1.0, "max_norm": float("nan")}, "max_norm must be >= 0, got nan"),
        ({"lr": 1.0, "momentum": -0.5}, "momentum must be >= 0, got -0.5"),
        ({"lr": 1.0, "weight_decay": -1e-4}, "weight_decay must be >= 0, got -0.0001"),
        ({"lr": 1.0, "max_norm": -1.0}, "max_norm must be >= 0, got -1.0"),
        ({"lr": torch.tensor([1.0, 2.0])}, "lr must be a number, or if lr or weight_decay one in a tensor"),
        ({"lr": torch.tensor(1)}, "lr must be a number"),
        ({"lr": 1.0, "momentum": torch.tensor(0.9)}, "momentum must be a number"),
        ({"lr": 1.0, "ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LARS(parameters((2,)), **arguments)


def test_bad_groups_leave_the_optimiser_as_it_was() -> None:
    optimizer = LARS(parameters((2,)), lr=0.1)
    for group, message in [
        ({"lr": -2.0}, "lr must be >= 0, got -2.0"),
        ({"max_norm": 1.0}, "max_norm holds for all groups"),
        ({"ema": 0.5}, "ema holds for all groups"),
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "got torch.complex64 of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": parameters((3,)), **group})
        assert len(optimizer.param_groups) == 1
    optimizer.step()


def test_sparse_gradients_are_refused_before_anything_changes(lars_step: str) -> None:
    dense, table = parameters((3,), (4, 2))
    table.grad = table.grad.to_sparse()
    before = dense.detach().clone()
    with pytest.raises(ValueError, match=r"sparse one of shape \[4, 2\]"):
        LARS([dense, table], lr=1.0).step()
    assert torch.equal(dense, before)


def test_one_warning_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_ABSENT", "cannot be loaded (not built)")
    steps._warn_once.cache_clear()
    optimizer = LARS(parameters((2, 2)), lr=1.0)
    with pytest.warns(RuntimeWarning, match="plain PyTorch, more slowly: .*not built.*pip install") as record:
        optimizer.step()
    assert record[0].filename == __file__
    optimizer.step()  # a second warning would be an error
    steps._warn_once.cache_clear()
