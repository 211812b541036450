"""The bench of LARS on a small network: whom it measures, and that they step alike."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from simclr_fast.optim import steps

BENCH = Path(__file__).resolve().parents[1] / "bench"


def small(width: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 30 * width), nn.BatchNorm1d(30 * width), nn.Linear(30 * width, 5)).to(device)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    return module


@pytest.mark.skipif(not steps.extension(), reason="simclr_fast._C is not built")
def test_every_contender_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import lars_bench

    monkeypatch.setattr(lars_bench, "model", small)
    monkeypatch.delitem(lars_bench.CONTENDERS, "plain loop, compiled")  # takes a minute
    out = tmp_path / "lars.jsonl"
    arguments = ["--device", "cpu", "--widths", "1", "2", "--seconds", "0.1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["lars_bench.py", *arguments])
    lars_bench.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    measured = {(line["contender"], line["width"]): line for line in lines if line["status"] == "ok"}
    names = {"simclr_fast", "foreach", "plain loop", "copy"}
    assert names <= {name for name, width in measured if width == 1}
    for (name, _), line in measured.items():
        assert 0 < line["ms"]["p20"] <= line["ms"]["p50"] <= line["ms"]["p80"]
        assert line["error"] is None if name == "copy" else line["error"] < 1e-3, line
        assert line["commit"]
    for line in lines:
        if line["status"] != "ok":
            assert line["status"].startswith("not installed")
            assert line["contender"] in ("lightly", "solo-learn", "apex LARC")
