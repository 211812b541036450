import importlib
import json

import pytest

from tests.train_common import ROOT


def test_a_result(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="needs the extra evaluate")
    monkeypatch.syspath_prepend(ROOT / "bench")
    bench, file = importlib.import_module("linear_bench"), tmp_path / "linear.jsonl"
    assert bench.main(["--bank", "600", "--queries", "90", "--features", "12", "--json", str(file)]) == 0
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["values"] == len(line["iterations"]) == 45
    assert line["converged"]
    assert line["sweep_s"] > 0
    assert line["fit_s"] > 0
    assert line["device"]
    assert abs(line["scikit_learn_excess_nats"]) < 1e-6
    assert line["top1"] > 0.2
    assert "45 values of l2" in capsys.readouterr().out
