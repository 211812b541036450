"""The benchmark of the main job: the control learns from views that are all alike."""

import sys
from pathlib import Path

import pytest

from tests.train_common import SMALL, images

__all__ = ["images"]  # a fixture is used by its name


@pytest.mark.parametrize("control", [False, True])
def test_a_job_is_measured(images, monkeypatch, control):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
    import shapes_bench

    flags = [*SMALL, "--epochs", "1", "--data", str(images)]
    found = shapes_bench.measure(0, control=control, flags=flags)
    assert list(found["knn"]) == ["raw pixels", "untrained encoder", "trained encoder"]
    assert found["seconds"] > 0
    assert ("control" in found["job"]) == control


def test_the_control_s_views_are_alike(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
    import numpy as np
    import shapes_bench

    from simclr_fast import run, train

    monkeypatch.setattr(run, "Policy", run.Policy)
    monkeypatch.setattr(train, "main", lambda argv: 0)
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(SystemExit):
        exec(shapes_bench.CONTROL)
    policy = run.Policy(32, min_area=1.0, blur_p=0.0, jitter_strength=0.5)
    for view in (0, 1):
        drawn = policy.draw(0, np.zeros(64, np.int64), np.arange(64), view, np.full((64, 2), 48))
        assert not np.concatenate([drawn.flip, drawn.jitter, drawn.gray]).any()
