import importlib
import json
import sys

import pytest

from tests.train_common import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("knn_bench")


def test_results_and_a_missing_package(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lightly", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("lightly.")]:
        monkeypatch.setitem(sys.modules, name, None)
    file = tmp_path / "knn.jsonl"
    sizes = ["--bank", "4200", "--queries", "60", "--features", "16", "--k", "20"]
    assert bench.main([*sizes, "--seconds", "0.1", "--json", str(file)]) == 0
    lines = {line["contender"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert lines["lightly"]["status"].startswith("not installed")
    for name in ("simclr_fast", "simclr_fast, float32"):
        line = lines[name]
        assert len(line["raw_s"]) >= 3
        assert 0 < line["seconds"]["p20"] <= line["seconds"]["p50"] <= line["seconds"]["p80"]
        assert line["agrees"] == 1.0
        assert line["device"]
        assert line["commit"]
    assert lines["simclr_fast"]["same_sets"] == 1.0
    assert lines["simclr_fast"]["largest_difference"] < 1e-6
    assert "not installed" in capsys.readouterr().out


def test_half_of_a_pair_of_flags(bench):
    with pytest.raises(SystemExit):
        bench.main(["--data", "shapes"])
