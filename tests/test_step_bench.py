"""The bench of a step on tiny networks: what it writes, what it says of who is missing, what it refuses to time."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast.distributed import Ranks

BENCH = Path(__file__).resolve().parents[1] / "bench"
PEERS = ("lightly", "solo")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """In one thread: several for so little work would wait for each other; and with first weights that are quick to
    draw."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda w, std, a, b: torch.nn.init.uniform_(w, a, b))
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCH)
    import step_bench

    yield step_bench
    torch.set_num_threads(threads)


@pytest.fixture
def task(bench: ModuleType):
    return bench.Task("resnet18", 8, 4, "fp32", Ranks(use_gpu=False))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """8 JPEGs in two classes."""
    rng = np.random.default_rng(0)
    for k in range(8):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def flags(file: Path, *more: str) -> list[str]:
    small = ["--quick", "--image-size", "8", "--batch", "4", "--precision", "fp32"]
    return ["--device", "cpu", *small, "--json", str(file), *more]


def test_results_and_missing_packages(bench, monkeypatch, tmp_path, capsys):
    for name in [*PEERS, *(name for name in sys.modules if name.split(".")[0] in PEERS)]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    file = tmp_path / "step.jsonl"
    chosen = ["--only", "plain, channels_last", "lightly", "solo"]
    assert bench.main(flags(file, *chosen)) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line["device"] and line["torch"] and line["commit"] and line["peers"] for line in lines)
    assert all(line["arch"] == "resnet18" and line["image_size"] == 8 and line["ranks"] == 1 for line in lines)
    measured = {line["contender"]: line for line in lines if line["status"] == "ok"}
    assert set(measured) == {"simclr_fast", "plain, channels_last"}
    for line in measured.values():
        assert len(line["raw_ms"]) == 2
        assert 0 < line["images_per_s"]["p20"] <= line["images_per_s"]["p50"] <= line["images_per_s"]["p80"]
        assert line["error_loss"] < 1e-5
        assert line["error_gradient"] < 1e-2
        assert 0 <= line["waiting"]["p50"] < 1
        assert line["first_step_s"] > 0
    ours = measured["simclr_fast"]
    assert ours["ours_over_it"]["p50"] == 1
    assert set(ours["phases_ms"]) == {"waiting", "input", "encoder", "head", "loss", "backward", "LARS", "rest"}
    assert ours["phases_ms"]["backward"]["p50"] > ours["phases_ms"]["head"]["p50"] > 0
    assert ours["communication_ms"] is None  # no rank alone was timed
    shown = capsys.readouterr().out
    for name in ("lightly", "solo-learn"):
        assert f"{name}: not installed" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.slow
def test_real_images_come_through_each_ones_own_input(bench, images, tmp_path):
    file = tmp_path / "step.jsonl"
    chosen = ["--only", "plain, channels_last"]
    assert bench.main(flags(file, "--data", str(images), "--workers", "1", *chosen)) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    named = {(line["data"], line["contender"]) for line in lines}
    assert named == {(data, name) for data in ("synthetic", "images") for name in ("simclr_fast", *chosen[1:])}
    assert all(line["status"] == "ok" and 0 <= line["waiting"]["p50"] < 1 for line in lines)


def test_phases_of_a_step_add_up_to_it(bench, task):
    from _step_contenders import OURS, contenders, synthetic
    from _step_phases import PHASES, Marks, marked

    ours = next(c for c in contenders(task) if c.name == OURS)
    trainer, views, mark = ours.build(task), synthetic(task, ours), Marks(task.device)
    with marked(trainer, mark):
        for _ in range(2):
            mark("start")
            mark("waiting")
            trainer.step(*views)
            mark("rest")
    trainer.step(*views)  # not marked any more
    for spans in mark.steps():
        assert tuple(spans) == PHASES
        assert all(ms >= 0 for ms in spans.values())
    first, last = mark._ends[0][1], mark._ends[-1][1]
    assert sum(sum(spans.values()) for spans in mark.steps()) == pytest.approx(1e3 * (last - first), rel=0.1)
    assert "loss" not in trainer.network.__dict__


def test_another_function_is_an_error_and_is_not_timed(bench, task):
    from _step_check import disagreement, errors, prepare, truth, weights
    from _step_contenders import contenders

    ours, state = contenders(task)[0], weights(task)
    loss, grads = truth(ours, task, state)

    def times(factor):
        return factor * loss, {name: factor * grad for name, grad in grads.items()}

    for factor, allowed in ((1.0, True), (1.05, False), (float("nan"), False)):
        assert (disagreement(errors(times(factor), (loss, grads)), "fp32") is None) == allowed
    trainer, found = prepare(ours, task, state, times(1.05))
    assert trainer is None
    assert found["status"].startswith("ERROR: another function than the trainer's step: error_loss")


def test_a_contender_that_fails_on_one_rank_fails_on_all(bench, monkeypatch):
    from _step_check import agreed

    ranks = Ranks(use_gpu=False)
    assert agreed(ranks, "ok") == "ok"
    ranks.world, ranks.group = 3, "these"
    for told in (["ok", "ok", "ok"], ["ok", "out of memory", "failed: it"]):
        monkeypatch.setattr(
            torch.distributed, "all_gather_object", lambda every, _, told=told: every.__setitem__(slice(None), told)
        )
        assert {agreed(ranks, own) for own in told} == {told[1]}


def test_another_network_and_failures_are_said(bench, task):
    from _step_check import prepare, weights
    from _step_contenders import Contender, PlainLARS, assembled, contenders, gathered_masked

    def headless(task):
        return assembled(task, torch.nn.Identity(), gathered_masked, lambda network: PlainLARS(network.parameters()))

    def exhausted(task):
        raise torch.OutOfMemoryError("no memory")

    ours, state = contenders(task)[0], weights(task)
    told = [
        prepare(Contender("it", build, ours.start), task, state, None)[1]["status"] for build in (headless, exhausted)
    ]
    assert told[0].startswith("failed: RuntimeError: another network: it lacks ['head.0.weight'")
    assert told[1] == "out of memory"


def test_plain_lars_is_ours(bench):
    from _step_contenders import DECAY, LR, TRUST, PlainLARS

    from simclr_fast.optim import LARS

    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,))]
    both = [[w.clone().requires_grad_() for w in first] for _ in range(2)]
    groups = [{"params": both[0][:1], "weight_decay": DECAY}, {"params": both[0][1:], "adapt": False}]
    optimizers = LARS(groups, lr=LR, trust_coefficient=TRUST), PlainLARS(both[1])
    for _ in range(3):
        grads = [torch.randn(w.shape, generator=generator) for w in first]
        for params, optimizer in zip(both, optimizers, strict=True):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    for a, b, w in zip(*both, first, strict=True):
        torch.testing.assert_close(a - w, b - w, rtol=1e-3, atol=1e-9)


def test_lightly_has_the_same_network(bench, task):
    pytest.importorskip("lightly", reason="needs the extra peers")
    from _step_check import prepare, truth, weights
    from _step_contenders import contenders

    ours, lightly = (next(c for c in contenders(task) if c.name == name) for name in ("simclr_fast", "lightly"))
    state = weights(task)
    assert prepare(lightly, task, state, truth(ours, task, state))[1]["status"] == "ok"


@pytest.mark.parametrize("limit", [0, 7, 8, 100, 1000, 1023])
def test_the_largest_batch_is_found_to_a_sixteenth(bench, limit):
    asked = []

    def peak(batch):
        asked.append(batch)
        return 100 * batch if batch <= limit else "out of memory"

    found = bench.largest(peak, 8)
    size = found["largest_batch"]
    assert found["larger"] == "out of memory"
    assert found["largest_memory_bytes"] == (100 * size or None)
    assert limit - max(1, limit // 16) <= size <= limit if limit >= 8 else size == 0
    assert len(asked) < 20


def test_the_largest_batch_is_sought_before_a_trainer_is_built(bench, tmp_path, monkeypatch):
    def built(*_):
        raise SystemExit("built")

    args, asked = bench.parsed(flags(tmp_path / "x")), []
    args.largest = True
    monkeypatch.setattr(bench, "largest", lambda peak, start: asked.append(start) or {})
    monkeypatch.setattr(bench, "ready", built)
    with pytest.raises(SystemExit, match="built"):
        next(bench.measure(args, Ranks(use_gpu=False)))
    assert asked == [4, 4]


@pytest.mark.gpu
def test_the_peak_of_a_larger_batch_is_larger(bench):
    from _step_check import peak_of
    from _step_contenders import contenders

    task = bench.Task("resnet18", 32, 8, "bf16", Ranks(use_gpu=True))
    peak = peak_of(contenders(task)[0], task)
    assert 0 < peak(8) < peak(64)


@pytest.mark.slow
def test_two_ranks_compute_what_plain_ddp_computes(bench, tmp_path):
    """Both in processes of their own; without several ranks there is neither communication nor a rank alone."""
    file = tmp_path / "step.jsonl"
    assert bench.main(flags(file, "--ranks", "2", "--only", "plain, channels_last")) == 0
    lines = {line["contender"]: line for line in map(json.loads, file.read_text().splitlines())}
    kinds = {"simclr_fast", "simclr_fast, a rank alone", "simclr_fast, BN of a rank", "plain, channels_last"}
    assert set(lines) == kinds
    assert all(line["status"] == "ok" and line["ranks"] == 2 and line["threads"] >= 1 for line in lines.values())
    assert lines["plain, channels_last"]["error_gradient"] < 1e-2
    assert lines["simclr_fast"]["communication_ms"]["p50"] is not None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch", "6", "--ranks", "4"], "--batch must be a multiple of --ranks"),
        (["--image-size", "0"], "must be at least 1"),
        (["--largest"], "--largest is for --device cuda"),
        (["--data", "absent"], "--data must be a folder or file, got absent"),
    ],
)
def test_flags_that_are_refused(bench, capsys, flags, told):
    with pytest.raises(SystemExit):
        bench.parsed(["--device", "cpu", *flags])
    assert told in capsys.readouterr().err


def test_too_few_images_are_refused(bench, images, tmp_path):
    args = bench.parsed(flags(tmp_path / "x", "--batch", "16", "--data", str(images)))
    task = bench.Task("resnet18", 8, 16, "fp32", Ranks(use_gpu=False))
    with pytest.raises(SystemExit, match="--data must have at least --batch images, 16, got 8"):
        bench.real_work(args, task, tmp_path)


@pytest.mark.slow
def test_bf16_is_within_its_tolerance(bench, task):
    from _step_check import prepare, truth, weights
    from _step_contenders import contenders

    half = bench.replace(task, precision="bf16")
    ours, state = contenders(half)[0], weights(half)
    found = prepare(ours, half, state, truth(ours, half, state))[1]
    assert found["status"] == "ok"
    assert found["error_gradient"] > 1e-3  # it was bf16


def results(spans: dict[str, dict[str, float]]) -> list[dict]:
    line = {"device": "cpu", "torch": "2.15", "arch": "resnet18", "image_size": 8, "batch": 4, "precision": "fp32"}
    one = {f"p{p}": 1234.5 for p in (20, 50, 80)}
    line |= {"data": "synthetic", "ranks": 2, "status": "ok", "ms": one, "images_per_s": one, "waiting": one}
    other = line | {"contender": "plain, NCHW", "ours_over_it": one}
    other |= {"largest_batch": 4096, "largest_memory_bytes": 2**30, "larger": "out of memory"}
    return [
        line | {"contender": "simclr_fast", "phases_ms": spans, "communication_ms": one, "memory_bytes": 2**40},
        other,
    ]


def test_table_and_picture(bench, tmp_path):
    from _step_phases import PHASES

    lines = results({phase: {"p50": 12345.6} for phase in PHASES})
    shown = bench.table(lines)
    assert max(map(len, shown.splitlines())) <= 120
    assert "head, loss and LARS together: 37.5%" in shown
    assert "of which communication 1,234 ms" in shown
    assert "plain, NCHW: largest batch 4,096, 1,024 MiB; beyond it: out of memory" in shown
    assert "lightly and solo-learn: their parts, in this bench's loop" in shown
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    bench.picture(lines, tmp_path / "step.svg")
    assert (tmp_path / "step.svg").read_text().count("<svg") == 1
