"""The comparison of losses: what it writes, what it says of who is missing, and what it draws."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
PEERS = ("lightly", "pytorch_metric_learning", "open_clip", "inf_cl", "memeff")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import loss_bench

    return loss_bench


def test_results_and_missing_packages(bench, monkeypatch, tmp_path, capsys):
    for name in [*PEERS, *(name for name in sys.modules if name.split(".")[0] in PEERS)]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    file = tmp_path / "loss.jsonl"
    flags = ["--device", "cpu", "--quick", "--sizes", "16", "--json", str(file)]
    assert bench.main([*flags, "--only", "fp32", "closed", "lightly", "metric", "open_clip", "Inf-CL", "memeff"]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line["device"] and line["torch"] and line["python"] and line["commit"] for line in lines)
    assert all(line["peers"]["lightly"] == "not installed: lightly" for line in lines)
    measured = {line["contender"]: line for line in lines if "2N" in line}
    assert {"simclr_fast", "reference fp32", "chunked closed form"} == set(measured)
    for line in measured.values():
        assert line["status"] == "ok"
        assert (line["2N"], line["D"], line["threads"]) == (16, 128, torch.get_num_threads())
        assert len(line["raw_ms"]["both"]) >= 3
        assert line["ms"]["both"]["p20"] <= line["ms"]["both"]["p50"] <= line["ms"]["both"]["p80"]
        assert line["error_gradient"] < 1e-5
        assert 0 <= line["extra_bytes"] < 2**25
        assert line["tflops"] > 0
        assert line["roofline_share"] > 0
    assert measured["simclr_fast"]["ours_over_it"]["p50"] == 1
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    for name in ("lightly", "pytorch-metric-learning", "open_clip", "Inf-CL", "memeff"):
        assert f"  {name}: not installed" in shown


def test_another_loss_is_an_error_and_is_not_timed(bench):
    from _contenders import EVERY, Contender, masked
    from _times import measure

    ours = EVERY[0]
    wrong = Contender("wrong", lambda tau: lambda z1, z2: 1.01 * masked(z1, z2, tau))
    results = {ours: {"status": "ok"}, wrong: {"status": "ok"}}
    measure((32, 16), results, 0.1, "cpu", seconds=0)
    assert results[ours]["status"] == "ok"
    assert results[wrong]["status"].startswith("ERROR")
    assert "ms" not in results[wrong]


def test_one_that_fails_does_not_stop_the_others(bench):
    from _contenders import EVERY, Contender
    from _times import measure

    def exhausted(z1, z2):
        raise torch.OutOfMemoryError("no memory")

    fails, ours = Contender("fails", lambda tau: exhausted), EVERY[0]
    results = {fails: {"status": "ok"}, ours: {"status": "ok"}}
    measure((32, 16), results, 0.1, "cpu", seconds=0)
    assert results[fails]["status"] == "out of memory"
    assert results[ours]["ms"]["both"]["p50"] > 0


@pytest.mark.parametrize("name", ["reference fp32", "chunked checkpoint", "chunked closed form"])
def test_contenders_of_several_blocks_are_the_same_loss(bench, name):
    from _contenders import EVERY, expected
    from _memory import inputs

    views = inputs(1034, 8, "cpu")  # two blocks and a tail
    loss = next(c for c in EVERY if c.name == name).build(0.1)(*views)
    value, gradient = expected("NT-Xent", *views, 0.1)
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    found = torch.cat(torch.autograd.grad(loss, views)).double()
    assert (found - gradient).norm() < 1e-5 * gradient.norm()


KNOWN = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from _memory import _peak_cpu

def run():
    torch.ones(1 << 24).add_(1)
    return (torch.ones(1 << 20),)

torch.set_num_threads(1)
run()
peak, gradients = _peak_cpu(run)
print(peak, gradients[0].nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_what_is_allocated():
    # In a process of its own, as in the bench: here, other tests' threads may allocate meanwhile.
    done = subprocess.run([sys.executable, "-c", KNOWN, BENCH], capture_output=True, text=True, check=True)
    peak, gradients = map(int, done.stdout.split())
    assert 2**26 - 2**20 < peak < 2**26 + 2**22 + 2**21
    assert gradients == 2**22


def test_launches_that_are_tuned(bench):
    from loss_tune import neighbours

    from simclr_fast.kernels.nt_xent import LAUNCH, Launch

    entry = LAUNCH[128, "fp16"][0]
    found = list(neighbours(entry, 1))
    assert found[0] == entry
    assert all(isinstance(launch, Launch) for launch in found)
    assert len(set(found)) == len(found) > 5
    assert all(sum(a != b for a, b in zip(launch, entry, strict=True)) == 1 for launch in found[1:])


def test_picture(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    from _loss_report import apart, picture

    assert apart([0.5, 0.5, 1.0], 0.1) == pytest.approx([0.5, 0.6, 1.0])
    line = {"device": "cpu", "torch": "2.15", "loss": "NT-Xent", "D": 128, "contender": "simclr_fast"}
    lines = [line | {"2N": n, "ms": {"both": {"p50": n / 100}}, "extra_bytes": 100 * n} for n in (256, 512)]
    picture(lines, tmp_path / "loss.svg", 128)
    assert (tmp_path / "loss.svg").read_text().count("<svg") == 1
