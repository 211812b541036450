"""The embedded data set and its settings: learning shows, and it comes from the views."""

import functools

import pytest

from simclr_fast import run as run_module
from simclr_fast import train
from simclr_fast.record import read_metrics


def accuracies(out, *flags):
    assert train.main(["--gpus", "0", "--out", str(out), *flags]) == 0
    return read_metrics(out)[-1]["knn"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_learning_shows(tmp_path, seed):
    raw, untrained, trained = accuracies(tmp_path / "run", "--seed", str(seed)).values()
    assert raw <= 0.30
    assert untrained <= 0.40
    assert trained >= max(0.80, untrained + 0.35)


@pytest.mark.slow
def test_without_augmentation_little_is_learnt(tmp_path, monkeypatch):
    plain = functools.partial(run_module.Policy, flip=0.0, jitter_p=0.0, gray_p=0.0)
    monkeypatch.setattr(run_module, "Policy", plain)
    assert accuracies(tmp_path / "run", "--min-area", "1")["trained encoder"] < 0.60
