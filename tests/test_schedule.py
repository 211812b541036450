"""The schedule against the official code's step counts and learning rates."""

import json
from pathlib import Path

import pytest

from simclr_fast.optim.schedule import Schedule, describe_lr, scaled_lr, total_steps, warmup_steps


def test_vectors(vectors: Path) -> None:
    cases = json.loads((vectors / "lr_schedule.json").read_text())
    assert len(cases) == 21
    for case in cases:
        n, batch, peak = case["num_examples"], case["batch"], case["peak_lr"]
        assert scaled_lr(case["base"], batch, case["scaling"]) == pytest.approx(peak, rel=1e-15)
        assert warmup_steps(n, case["warmup_epochs"], batch) == case["warmup_steps"]
        assert total_steps(n, case["epochs"], batch) == case["total_steps"]
        schedule = Schedule(peak, case["warmup_steps"], case["total_steps"])
        for step, lr in case["lr"].items():
            assert schedule(int(step)) == pytest.approx(lr, rel=1e-12, abs=1e-12 * peak), (case["name"], step)


@pytest.mark.parametrize(
    ("base", "scaling", "text"),
    [(0.3, "linear", "lr 4.8 = 0.3 x 4096/256"), (0.075, "sqrt", "lr 4.8 = 0.075 x sqrt(4096)")],
)
def test_describe(base: float, scaling: str, text: str) -> None:
    assert describe_lr(base, 4096, scaling) == text


def test_unknown_scaling() -> None:
    with pytest.raises(ValueError, match="scaling must be one of linear, sqrt, got 'cubic'"):
        scaled_lr(0.3, 4096, "cubic")


def test_run_shorter_than_its_warmup() -> None:
    schedule = Schedule(peak=2.0, warmup_steps=10, total_steps=4)
    assert [schedule(step) for step in range(4)] == [0.0, 0.2, 0.4, pytest.approx(0.6)]


def test_no_warmup_starts_at_the_peak_and_ends_at_zero() -> None:
    schedule = Schedule(peak=1.6, warmup_steps=0, total_steps=10)
    assert schedule(0) == 1.6
    assert schedule(5) == pytest.approx(0.8)
    assert schedule(10) == schedule(11) == 0.0
