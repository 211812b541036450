"""The torchvision engine: its own operators, its worker processes, and when it is chosen."""

import builtins
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from simclr_fast.data import Policy, engine_name, open_dataset, reference, train_views
from simclr_fast.data.engines import choice


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch):
    """As if DALI were not installed."""
    real = builtins.__import__

    def fake(name: str, *args, **kwargs):
        if name.startswith("nvidia.dali"):
            raise ModuleNotFoundError("No module named 'nvidia.dali'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    monkeypatch.delitem(sys.modules, "simclr_fast.data.engines.dali", raising=False)
    choice._dali_fault.cache_clear()
    yield
    choice._dali_fault.cache_clear()


@pytest.mark.usefixtures("no_dali")
def test_without_dali_auto_is_torchvision_and_says_why():
    name, reason = engine_name("auto")
    assert name == "torchvision"
    assert "nvidia.dali" in reason
    with pytest.raises(ValueError, match="engine 'dali' needs NVIDIA DALI"):
        engine_name("dali")
    assert engine_name("torchvision") == ("torchvision", "")


def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine must be one of auto, dali, torchvision, resident, got 'ffcv'"):
        engine_name("ffcv")


def test_batch_must_fit_the_split_and_the_ranks(shared: Path):
    split = open_dataset(str(shared / "data" / "photos-256.tar")).train
    for batch, world in ((257, 1), (9, 2), (0, 1)):
        with pytest.raises(ValueError, match=f"batch must be .* got batch={batch}, parts=1, world={world}"):
            next(train_views(split, Policy(8), batch=batch, seed=0, start_step=0, steps=1, world=world))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_worker_processes_change_nothing_and_leave_the_global_generator_alone(shared: Path):
    split = open_dataset(str(shared / "data" / "photos-256.tar")).train

    def made(workers: int) -> list:
        options = {"batch": 4, "seed": 1, "start_step": 2, "steps": 3, "engine": "torchvision", "workers": workers}
        return list(train_views(split, Policy(16), **options))

    before = torch.get_rng_state()
    for one, other in zip(made(0), made(2), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert one[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(before, torch.get_rng_state())


def test_tf_operators(vectors: Path):
    arrays = np.load(vectors / "augment.npz")
    operators = {"contrast": reference.contrast_tf, "saturation": reference.saturation_tf, "hue": reference.hue_tf}
    listed = json.loads((vectors / "augment_cases.json").read_text())
    for case in (case for case in listed["ops"] if case["op"] in operators):
        x = torch.from_numpy(arrays[f"img/{case['img']}"]).permute(2, 0, 1)
        got = operators[case["op"]](x, case["value"]).clamp(0, 1).permute(1, 2, 0)
        np.testing.assert_allclose(got, arrays[case["key"]].clip(0, 1), atol=1e-12, err_msg=case["key"])


def test_blur_is_torchvisions_and_tensorflows(vectors: Path):
    x = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    for sigma in (0.1, 0.7, 2.0):
        expected = F.gaussian_blur(x, [23, 23], sigma)
        torch.testing.assert_close(reference.blur(x, sigma, 11, False), expected, atol=1e-5, rtol=0)
    arrays = np.load(vectors / "augment.npz")
    for case in json.loads((vectors / "augment_cases.json").read_text())["blur"]:
        x = torch.from_numpy(arrays[case["image"]]).float().permute(2, 0, 1)
        got = reference.blur(x, case["sigma"], case["taps"] // 2, True).permute(1, 2, 0)
        np.testing.assert_allclose(got, arrays[case["key"]], atol=2e-6, err_msg=case["key"])
