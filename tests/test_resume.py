"""Going on with a run: other numbers of ranks, other images, kept BatchNorm blocks; and what comes before a start."""

import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch

from simclr_fast import checkpoint, train
from simclr_fast import run as run_module
from simclr_fast.cli import parse
from simclr_fast.record import RunError, read_metrics
from simclr_fast.resume import Job, take_up
from simclr_fast.resume import begin as begin_run
from tests.train_common import ROOT, assert_same_bits, command, images, jpeg, run, weights

__all__ = ["images"]  # a fixture is used by its name


@pytest.fixture(scope="module")
def own_images(images, tmp_path_factory):
    """A copy that a test may change."""
    return shutil.copytree(images, tmp_path_factory.mktemp("own") / "images")


def stop_after(monkeypatch, steps):
    """Have a run stop after so many steps, by a signal."""
    asked = iter(range(1, 1000))
    monkeypatch.setattr(
        run_module.Interrupt, "wanted", lambda *_: (signal.SIGTERM if next(asked) == steps else 0, False)
    )


def test_on_another_number_of_ranks_it_goes_on_as_it_would_have(images, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(images, whole) == 0
    stop_after(monkeypatch, 3)
    assert run(images, out) == 75
    monkeypatch.undo()
    done = subprocess.run(command(images, out, "--ranks", "2"), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stdout
    np.testing.assert_allclose(*([r["loss"] for r in read_metrics(folder)] for folder in (whole, out)), rtol=1e-3)
    one, two = weights(whole), weights(out)
    for name, tensor in one.items():
        assert (two[name] - tensor).double().norm() < 2e-2 * tensor.double().norm().clamp(min=1e-3), name


def test_the_blocks_of_batchnorm_stay_those_that_a_run_began_with(images, tmp_path, monkeypatch, capsys):
    flags = ("--bn-group", "1", "--epochs", "1")
    process = subprocess.run(command(images, tmp_path / "two", "--ranks", "2", *flags), cwd=ROOT, timeout=300)
    assert process.returncode == 0
    assert checkpoint.read(tmp_path / "two" / "checkpoints" / "last.pt")["bn_images"] == 8
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one" / "metrics.jsonl").write_text("".join(lines[:-1]))  # as if it had not ended
    assert run(images, tmp_path / "one", *flags) == 0
    assert "BatchNorm takes its statistics over 8 images" in capsys.readouterr().out


def test_changed_images_are_refused_unless_told(own_images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    stop_after(monkeypatch, 2)
    assert run(own_images, out) == 75
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    (own_images / "train" / "ant" / "0.jpg").write_bytes(jpeg(4321))  # as many as there were
    assert run(own_images, out) == 2
    named = r"1 has changed \(ant/0.jpg\)\. Put back .*--accept-changed-data"
    assert re.search(rf"holds a run on 40 images .*now has 40 images.*: {named}", capsys.readouterr().err)
    assert before == {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    assert run(own_images, out, "--accept-changed-data") == 0
    assert "the steps to come take their images from these" in capsys.readouterr().out
    assert run(own_images, out) == 0  # finished, on these
    (own_images / "train" / "ant" / "0.jpg").write_bytes(jpeg(1234))
    assert run(own_images, out) == 2
    assert re.search(named, capsys.readouterr().err)
    assert run(own_images, out, "--accept-changed-data") == 0
    assert "it was finished before" in capsys.readouterr().out


def test_a_finished_run_of_an_earlier_version_shows_its_results(images, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(images, out, "--epochs", "1") == 0
    last = out / "checkpoints" / "last.pt"
    later = ("data", "bn_images", "classes")  # which it did not write
    torch.save({name: value for name, value in checkpoint.read(last).items() if name not in later}, last)
    capsys.readouterr()
    assert run(images, out, "--epochs", "1") == 0
    assert "This run is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bn-chunk", "3"), "bn_chunk must divide"),
        (("--accumulate", "2", "--compile", "reduce-overhead"), "compile must be off or default for accumulate=2"),
        (("--init", "torchvision"), "init"),
    ],
)
def test_what_is_refused_deletes_no_run(images, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert run(images, out, "--epochs", "1") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(images, out, "--epochs", "1", "--resume", "never", *flags) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_signal_before_the_first_step_leaves_the_marker_where_a_run_goes_on(images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    stop_after(monkeypatch, 2)
    assert run(images, out) == 75
    monkeypatch.undo()
    (out / "requeue").unlink()
    capsys.readouterr()
    monkeypatch.setattr(run_module, "new_method", lambda *_: signal.raise_signal(signal.SIGTERM))
    for flags in (("--resume", "never"), ("--seed", "9")):  # neither goes on with it
        assert run(images, out, *flags) in (128 + signal.SIGTERM, 2)
        assert "the same command goes on" not in capsys.readouterr().err
        assert not (out / "requeue").exists()
    assert run(images, out) == 75
    assert "stopped after step 2 with a checkpoint; the same command goes on" in capsys.readouterr().err
    assert (out / "requeue").read_text() == "2\n"


def test_auto_finds_chunks_that_fit_and_they_change_nothing(images, tmp_path, monkeypatch, capsys):
    whole, out = ("--bn-chunk", "4", "--epochs", "1"), ("--accumulate", "auto")
    assert run(images, tmp_path / "whole", *whole) == 0
    monkeypatch.setattr(run_module, "free_memory", lambda: int(5.2 * 2**20))
    assert run(images, tmp_path / "few", *whole, *out) == 0
    found = re.search(r"(\d+) chunks of a batch; BatchNorm takes its statistics over 4 images", capsys.readouterr().out)
    assert int(found[1]) in (2, 4)
    first, second = (weights(tmp_path / name) for name in ("whole", "few"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=2e-2, atol=1e-4, msg=name)
    monkeypatch.setattr(run_module, "free_memory", lambda: 2**10)
    assert run(images, tmp_path / "none", *whole, *out) == 2
    assert "does not fit into memory even image by image" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_writes_nothing(images, tmp_path, capsys):
    assert run(images, tmp_path / "run", "--dry-run", "--ranks", "2", "--link", "10") == 0
    shown = capsys.readouterr().out
    for words in (
        "40 training images",
        "lr 0.01875 = 0.3 x 16/256",
        "8 = 40 x 3 epochs / 16 + 1",
        "gradients",
        "ms in",
    ):
        assert words in shown
    assert not (tmp_path / "run").exists()


def test_a_cluster_can_be_planned_where_there_is_none(images, tmp_path, capsys):
    flags = ("--dry-run", "--batch", "16", "--gpus", "8", "--precision", "auto")
    assert run(images, tmp_path / "run", *flags) == 0
    shown = capsys.readouterr().out
    for words in ("GPUs that are not here; 8 GPUs, bf16", "at 450 GB/s", "BatchNorm", "estimated"):
        assert words in shown
    assert "can be used" not in shown
    assert run(images, tmp_path / "run", *flags, "--accumulate", "auto") == 2


def test_a_dry_run_refuses_what_does_not_fit(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "free_memory", lambda: 5 * 2**20)
    assert run(images, tmp_path / "run", "--dry-run") == 2
    captured = capsys.readouterr()
    assert "sum" in captured.out
    assert re.search(r"accumulate: a step takes .* that can be used; give --accumulate auto", captured.err)
    assert not (tmp_path / "run").exists()


def test_weights_of_a_run_start_another(images, tmp_path, capsys):
    assert run(images, tmp_path / "first", "--epochs", "1") == 0
    assert (
        run(images, tmp_path / "second", "--epochs", "1", "--init", str(tmp_path / "first"), "--base-lr", "1e-9") == 0
    )
    first, second = (weights(tmp_path / name) for name in ("first", "second"))
    name = "method.encoder.conv1.weight"
    torch.testing.assert_close(first[name], second[name])
    assert json.loads((tmp_path / "second" / "config.json").read_text())["init"] == str(tmp_path / "first")
    known = [read_metrics(tmp_path / name)[-1]["knn"] for name in ("first", "second")]
    assert list(known[1]) == ["raw pixels", "initial encoder", "trained encoder"]
    assert known[1]["initial encoder"] == known[0]["trained encoder"]
    assert run(images, tmp_path / "third", "--init", str(tmp_path / "nowhere")) == 2
    assert "init" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_checkpoint_is_written_after_some_minutes_too(images, tmp_path, monkeypatch):
    steps = []
    real = checkpoint.save

    def noted(folder, state, *, best):
        steps.append(state["step"])
        real(folder, state, best=best)

    monkeypatch.setattr(checkpoint, "save", noted)
    assert run(images, tmp_path / "often", "--checkpoint-minutes", "1e-9") == 0
    assert steps == list(range(1, 9))
    monkeypatch.undo()
    assert run(images, tmp_path / "seldom") == 0
    assert_same_bits(tmp_path / "often", tmp_path / "seldom")


def test_a_finished_run_has_no_marker(images, tmp_path):
    out = tmp_path / "run"
    os.makedirs(out)
    (out / "requeue").write_text("3\n")
    assert run(images, out, "--epochs", "1") == 0
    assert not (out / "requeue").exists()


def job(name, *launchers):
    return Job(name, frozenset(launchers))


def taken_up(out, resume, of):
    """Take up the run in a folder, as far as it goes; whether there is one after that."""
    cfg = parse("simclr_fast.train", ["--data", "nowhere", "--out", str(out), "--resume", resume])
    out.mkdir(exist_ok=True)
    if take_up(cfg, out, "images", str, of).new:
        begin_run(cfg, out, of)
    return bool(read_metrics(out))


def begin(out, resume, of):
    assert not taken_up(out, resume, of)
    (out / "metrics.jsonl").write_text('{"step": 1}\n')


ALONE = job("")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ALONE, ALONE),
        (job("", "1"), job("", "2")),
        (job("", "1"), ALONE),
        (job("none", "1"), ALONE),
        (job("none", "1"), job("", "2")),
        (ALONE, job("none", "1")),
        (job("a", "1"), job("b", "2")),
    ],
    ids=str,
)
def test_never_deletes_the_run_of_another_job(tmp_path, first, second):
    for resume in ("auto", "never"):
        out = tmp_path / resume
        begin(out, resume, first)
        begin(out, "never", second)
        assert Job.of(out) == second


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_job_goes_on_with_its_own_run_while_its_hosts_come_and_go(tmp_path, resume):
    begin(tmp_path / "run", resume, job("none", "1"))
    for launchers in ("12", "2", "23", "3", "1"):
        assert taken_up(tmp_path / "run", resume, job("none", *launchers))
    assert Job.of(tmp_path / "run") == job("none", *"123")


def test_a_run_that_a_job_has_taken_up_is_its_own(tmp_path):
    begin(tmp_path / "run", "auto", job("", "1"))
    assert taken_up(tmp_path / "run", "auto", job("", "2"))
    assert taken_up(tmp_path / "run", "never", job("", "2"))
    assert not taken_up(tmp_path / "run", "never", job("", "1"))


@pytest.mark.parametrize("name", ["none", "7.0.0"])
def test_never_is_refused_where_it_cannot_be_told_whose_the_run_is(tmp_path, name):
    out = tmp_path / "run"
    begin(out, "never", job(name, "1"))
    for again in (job(name, "2"), job(name)):
        with pytest.raises(RunError, match=rf"would delete the run in {out}.* the same --rdzv-id, {name}\. Delete"):
            taken_up(out, "never", again)
    assert read_metrics(out)
    shutil.rmtree(out)
    begin(out, "never", job(name, "2"))


def test_a_job_that_was_killed_while_it_deleted_a_run_deletes_the_rest(tmp_path, monkeypatch):
    out, mine = tmp_path / "run", job("", "2")
    begin(out, "auto", job("", "1"))
    (out / "checkpoints").mkdir()

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            taken_up(out, "never", mine)
    assert not taken_up(out, "never", mine)
    assert not (out / "checkpoints").exists()


@pytest.fixture
def stopped(images, tmp_path, monkeypatch):
    """The folder of a run that was stopped, without the marker that says so."""
    out = tmp_path / "run"
    with monkeypatch.context() as context:
        stop_after(context, 2)
        assert run(images, out) == 75
    (out / "requeue").unlink()
    monkeypatch.setattr(train, "prepare", lambda *_: signal.raise_signal(signal.SIGTERM))
    return out


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_breaks_nothing_off_that_the_first_one_asks_for(images, stopped, monkeypatch, second):
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path: (signal.raise_signal(second), read(path))[1])
    assert run(images, stopped) == 75
    assert (stopped / "requeue").read_text() == "2\n"


def test_a_marker_that_cannot_be_written_is_said(images, stopped, capsys):
    (stopped / "requeue").mkdir()  # as a disk that refuses it
    assert run(images, stopped) == 75
    error = capsys.readouterr().err
    assert f"cannot write {stopped}/requeue: " in error
    assert "stopped after step 2 with a checkpoint" in error


def test_a_checkpoint_that_cannot_be_read_asks_for_no_other_start(images, stopped, capsys):
    os.truncate(stopped / "checkpoints" / "last.pt", 100)
    assert run(images, stopped) == 128 + signal.SIGTERM
    assert "requeue: cannot read" in capsys.readouterr().err
    assert not (stopped / "requeue").exists()
