"""The bench of batch normalisation: its layers are those of the network, and it measures whom it names."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from simclr_fast.models.resnet import resnet

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(BENCH)
    import batch_norm_bench

    return batch_norm_bench


def test_the_layers_are_those_of_the_network(bench) -> None:
    with torch.device("meta"):
        model = resnet("resnet50")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    sides: list[tuple[int, int]] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: sides.append((inputs[0].shape[1], inputs[0].shape[2])))
    model(torch.empty(2, 3, 224, 224, device="meta"))
    found = Counter()
    for layer, count in bench.layers().items():
        found[layer.channels, layer.side] += count
    assert found == Counter(sides)


def test_every_contender_is_measured(bench) -> None:
    layer = bench.Layer(8, 2, True, True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = bench.measure(layer, 2, 0.0, device, {bench.OURS: bench.ours, "plain": bench.plain})
    names = {(line["contender"], line["pass"]) for line in lines}
    assert names == {("copy", "copy"), *((name, stage) for name in (bench.OURS, "plain") for stage in bench.PASSES)}
    for line in lines:
        assert 0 < line["ms"]["p20"] <= line["ms"]["p50"] <= line["ms"]["p80"]
    assert "8 x 2 x 2 + residual + relu, 3 times" in bench.table(layer, 3, lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so(bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["batch_norm_bench.py"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
