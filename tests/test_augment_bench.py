"""The bench of augment on the CPU: whom it measures, what it counts, and that a wrong peer is said."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import augment_bench

    return augment_bench


def run(bench: ModuleType, folder: Path, *flags: str) -> tuple[int, list[dict]]:
    file = folder / "augment.jsonl"
    code = bench.main(["--device", "cpu", "--quick", "--json", str(file), *flags])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def test_every_contender_is_measured(bench, monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "kornia"] + ["kornia", "kornia.augmentation"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    code, lines = run(bench, tmp_path, "--size", "72", "24", "--batch", "3")
    assert code == 0
    measured = {(line["contender"], line["size"]): line for line in lines if line["status"] == "ok"}
    names = {"simclr_fast float32", "torchvision v2, image by image", "torchvision v2, one draw a batch", "copy"}
    assert set(measured) == {(name, size) for name in names for size in (72, 24)}
    for (name, size), line in measured.items():
        assert len(line["raw_ms"]) >= 3
        assert 0 < line["ms"]["p20"] <= line["ms"]["p50"] <= line["ms"]["p80"]
        assert (line["batch"], line["crop"]) == (3, size == 24)
        assert line["commit"]
        assert line["device"]
        if name == "simclr_fast float32":
            assert line["error"] < 1e-4
            assert line["error_levels"] < 0.1
            assert line["ours_over_it"]["p50"] == 1
            assert line["share_of_copy"] > 0
    assert [line["status"][:13] for line in lines if line["contender"] == "kornia"] == ["not installed"] * 2
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    assert "kornia: not installed" in shown


def test_plain_pytorch_is_measured_where_there_is_time(bench):
    args = bench.argparse.Namespace(device="cpu", quick=False, seconds=0, backend="auto")
    lines = {line["contender"]: line for line in bench.lines_of(bench.case(16, 2, "cpu"), args)}
    assert lines["plain PyTorch, view by view"]["error"] < 1e-5
    assert lines["plain PyTorch, view by view"]["ours_over_it"]["p50"] > 0


def test_a_peer_that_makes_something_else_is_not_timed(bench, monkeypatch, tmp_path):
    def wrong(case):
        return lambda: [torch.zeros(1), torch.zeros(1)]

    def broken(case):
        raise TypeError("no such argument")

    monkeypatch.setattr(bench, "PEERS", {"wrong": (wrong, "torch", ""), "broken": (broken, "torch", "")})
    code, lines = run(bench, tmp_path, "--size", "16", "--batch", "2")
    statuses = {line["contender"]: line for line in lines}
    assert code == 1
    assert statuses["wrong"]["status"].startswith("failed: its views are not [2, 3, 16, 16]")
    assert statuses["broken"]["status"] == "failed: TypeError: no such argument"
    assert "ms" not in statuses["wrong"]


def test_bytes_are_those_of_the_windows_and_of_the_views(bench):
    params = torch.zeros(2, 16)
    params[:, 2:4] = torch.tensor([[4.0, 5.0], [8.0, 8.0]])
    params[1, 5] = 1  # jitter
    written = 2 * 8 * 8 * 3 * 4
    assert bench.bytes_moved(params, 8, True, 4, True) == (60 + 64) + 2 * (192 + 64) + written
    assert bench.bytes_moved(params, 8, True, 4, False) == (60 + 64) + (192 + 64) + written
    assert bench.bytes_moved(params, 8, False, 2, True) == 3 * (192 + 64) + written // 2


def test_both_views_are_of_the_same_images_where_the_set_is_held(bench):
    held, crops = bench.case(24, 4, "cpu"), bench.case(72, 4, "cpu")
    assert held.images[0] is held.images[1]
    assert len(held.images[0]) >= 2048
    assert crops.images[0].shape == (4, 72, 72, 3)
    assert not torch.equal(crops.images[0], crops.images[1])
    assert not torch.equal(held.params[0], held.params[1])
