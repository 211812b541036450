"""The command as its users run it, on a few tiny images: whole runs, stops, several ranks, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from simclr_fast import checkpoint, train
from simclr_fast import run as run_module
from simclr_fast.data.engines import tune
from simclr_fast.record import read_metrics
from tests.train_common import (
    ROOT,
    SMALL,
    assert_same_bits,
    command,
    images,
    jpeg,
    one_thread,
    run,
    untimed,
    weights,
    whole,
)

__all__ = ["SMALL", "images", "one_thread", "whole"]  # fixtures are used by their names


def test_a_run_leaves_what_the_readme_says(whole):
    assert {"config.json", "metrics.jsonl", "checkpoints", "report.html"} <= set(os.listdir(whole))
    assert list(whole.glob("events.out.tfevents.*"))
    assert sorted(os.listdir(whole / "checkpoints")) == ["best.pt", "last.pt", "previous.pt"]
    records = read_metrics(whole)
    for record in records:
        assert {"step", "epoch", "loss", "lr", "images_per_s", "data_wait", "contrastive_top1"} <= record.keys()
        assert 0 <= record["data_wait"] <= 1
    last = records[-1]
    assert last["finished"] is True
    assert last["step"] == 3 * 40 // 16 + 1
    assert 0 <= last["knn_top1"] <= 1
    assert list(last["knn"]) == ["raw pixels", "untrained encoder", "trained encoder"]
    assert last["knn"]["trained encoder"] == last["knn_top1"]
    assert json.loads((whole / "config.json").read_text())["image_size"] == 16


def test_a_finished_run_shows_its_results_and_how_to_start_afresh(images, whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert run(images, whole) == 0
    shown = capsys.readouterr().out
    assert "kNN accuracy: raw pixels" in shown
    assert "--resume never" in shown
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_same_command_gives_the_same_bits_and_never_starts_afresh(images, whole, tmp_path):
    assert run(images, tmp_path / "run") == 0
    assert_same_bits(whole, tmp_path / "run")
    assert run(images, tmp_path / "run", "--resume", "never", "--seed", "1") == 0
    with pytest.raises(AssertionError):
        assert_same_bits(whole, tmp_path / "run")


def test_a_config_file_repeats_a_run(whole, tmp_path):
    assert train.main(["--config", str(whole / "config.json"), "--out", str(tmp_path / "run")]) == 0
    assert_same_bits(whole, tmp_path / "run")


def test_other_settings_are_refused_and_named(images, whole, capsys):
    assert run(images, whole, "--temperature", "0.5", "--workers", "1") == 2
    error = capsys.readouterr().err
    assert "temperature: 0.1 -> 0.5" in error
    assert "workers" not in error


def test_a_run_that_stopped_at_an_epoch_goes_on_bit_for_bit(images, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    save = checkpoint.save

    def save_and_stop(folder, state, *, best):
        save(folder, state, best=best)
        if state["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    assert run(images, out) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(images, out) == 0
    assert "Going on after epoch 2 of 3, step 5" in capsys.readouterr().out
    assert_same_bits(whole, out)
    assert untimed(out) == untimed(whole)


@pytest.mark.parametrize("flags", [[], ["--accumulate", "2", "--bn-chunk", "4", "--epochs", "2"]])
def test_stopped_after_every_single_step_it_learns_the_same_bits(images, whole, tmp_path, monkeypatch, flags):
    """By a signal: checkpoint within the step, status 75, a marker that is gone once the run goes on.

    What a stop at the last step leaves over is its evaluation.
    """
    out, expected = tmp_path / "run", whole
    if flags:
        expected = tmp_path / "whole"
        assert run(images, expected, *flags) == 0
    steps = read_metrics(expected)[-1]["step"]
    monkeypatch.setattr(run_module.Interrupt, "wanted", lambda *_: (signal.SIGUSR1, False))
    for step in range(1, steps + 1):
        assert run(images, out, *flags) == 75
        assert checkpoint.read(out / "checkpoints" / "last.pt")["step"] == step
        assert (out / "requeue").read_text() == f"{step}\n"
    assert run(images, out, *flags) == 0
    assert not (out / "requeue").exists()
    assert_same_bits(expected, out)
    assert untimed(out) == untimed(expected)


def test_checkpoints_without_their_settings_are_refused(images, whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints")
    assert run(images, tmp_path / "run") == 2
    assert "holds checkpoints and no config.json" in capsys.readouterr().err


def test_a_run_killed_while_it_was_deleted_is_not_gone_on_with(images, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(whole, out)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    assert run(images, out, "--resume", "never", "--seed", "5") == 130
    monkeypatch.undo()
    assert run(images, out, "--seed", "5") == 2


def test_a_truncated_checkpoint_gives_way_to_the_previous_one(images, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(run_module.Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(images, out) == 130
    monkeypatch.undo()
    os.truncate(out / "checkpoints" / "last.pt", 1000)
    assert run(images, out) == 0
    shown = capsys.readouterr().out
    assert "cannot read" in shown
    assert "Going on after epoch 2" in shown
    assert_same_bits(whole, out)


def test_a_signal_between_the_last_step_and_the_end_asks_for_another_start(images, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(run_module.Run, "finish", lambda *_: signal.raise_signal(signal.SIGUSR1))
    assert run(images, out) == 75
    assert (out / "requeue").read_text() == "8\n"
    monkeypatch.undo()
    assert run(images, out) == 0
    assert read_metrics(out)[-1]["finished"]
    assert not (out / "requeue").exists()
    assert_same_bits(whole, out)


def test_a_signal_before_there_is_anything_to_go_on_with(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_dataset", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert run(images, tmp_path / "run") == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_moment_it_goes_on(images, tmp_path, how):
    out = tmp_path / "run"
    flags = ("--epochs", "400")
    process = subprocess.Popen(
        command(images, out, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "previous.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    _, error = process.communicate(timeout=300)
    assert process.returncode == (-9 if how == signal.SIGKILL else 75), error.decode()
    state, complaints = checkpoint.load(out / "checkpoints")
    assert not complaints
    saved = dict(json.loads((out / "config.json").read_text()))
    assert saved["epochs"] == 400
    recorded = [record["step"] for record in (*read_metrics(out), state["pending"]) if record]
    assert max(recorded) >= state["step"]


def test_bf16_ends_with_the_run(images, tmp_path):
    assert run(images, tmp_path / "run", "--epochs", "1", "--precision", "bf16") == 0
    assert not torch.is_autocast_enabled("cpu")
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["loss"])


def test_two_ranks_learn_what_one_learns(images, whole, tmp_path):
    out = tmp_path / "run"
    done = subprocess.run(command(images, out, "--ranks", "2"), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = weights(whole), weights(out)
    assert "Warning" not in done.stderr
    for name, tensor in one.items():
        # A rounding that turns a ReLU off or on moves a gradient by 1e-3; half a batch would move it by 1e-1 and more.
        difference = (two[name] - tensor).double().norm() / tensor.double().norm().clamp(min=1e-3)
        assert difference < 2e-2, name
    losses = [[record["loss"] for record in read_metrics(folder)] for folder in (whole, out)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert done.stdout.count("kNN accuracy") == 1


def test_no_classes_no_accuracy_and_it_says_so(images, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate((images / "train").rglob("*.jpg")):
        (flat / f"{number}.JPG").write_bytes(path.read_bytes())
    assert run(flat, tmp_path / "run", "--epochs", "1") == 0
    shown = capsys.readouterr().out
    assert "no kNN accuracy: the data have no classes" in shown
    assert "knn_top1" not in read_metrics(tmp_path / "run")[-1]


def test_bad_files_among_good_ones_are_counted_and_named(images, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(18):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, mode=("RGB", "L", "CMYK")[number % 3]))
    (folder / "a-zero.jpg").write_bytes(b"")
    (folder / "b-half.jpg").write_bytes(jpeg(99)[:200])
    assert run(folder, tmp_path / "run", "--epochs", "1") == 2
    refused = capsys.readouterr().err
    assert re.search(r"at most 5 % .* got 2 of 20 .*a-zero\.jpg: it has zero bytes.*--tolerate-unreadable", refused)
    assert run(folder, tmp_path / "run", "--epochs", "1", "--tolerate-unreadable", "0.2") == 0
    assert re.search(r"skipped 2 .*a-zero\.jpg.*skipped\.tsv", capsys.readouterr().out)
    lines = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a-zero.jpg", "b-half.jpg"]


def test_small_images_are_held_as_pixels_and_learn_the_same(images, tmp_path, capsys):
    assert run(images, tmp_path / "held", "--epochs", "1") == 0
    assert "all 40 images (0 MiB of pixels) are held on cpu" in capsys.readouterr().out
    assert run(images, tmp_path / "files", "--epochs", "1", "--loader", "dali") == 0
    assert "dali decodes files" in capsys.readouterr().out
    first, second = (read_metrics(tmp_path / name)[-1]["loss"] for name in ("held", "files"))
    assert first == second


def test_tuning_is_remembered_and_changes_nothing(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "SECONDS", 0.1)
    assert run(images, tmp_path / "first", "--epochs", "1", "--tune-input") == 0
    found = re.search(r"input measured, images/s \(1 workers: .*\): (\d+) workers", capsys.readouterr().err)
    assert run(images, tmp_path / "second", "--epochs", "1") == 0
    assert f"; {found[1]} threads a rank" in capsys.readouterr().out
    first, second = (read_metrics(tmp_path / name)[-1]["loss"] for name in ("first", "second"))
    assert first == second


def test_waiting_for_data_is_said_with_advice(images, tmp_path, capsys, monkeypatch):
    real = run_module.train_views

    def slow(*args, **options):
        for made in real(*args, **options):
            time.sleep(0.2)
            yield made

    monkeypatch.setattr(run_module, "train_views", slow)
    assert run(images, tmp_path / "run") == 0
    assert re.search(r"waiting for data took \d\d% of the time: --tune-input", capsys.readouterr().out)
    assert "--tune-input" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--batch", "64"], "batch must be at most the number of training images, 40, got batch=64"),
        (["--ranks", "3"], "batch must be divisible by the number of processes, got batch=16, processes=3"),
        (["--gpus", "9"], r"visible GPUs, \d+, got gpus=9"),
        (["--loader", "dalli"], "dali"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(images, tmp_path, capsys, flags, match):
    try:
        status = run(images, tmp_path / "run", *flags)
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2
    assert re.search(match, captured.err + captured.out)
    assert not (tmp_path / "run").exists()


def test_bad_data_stops_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "x.jpg").write_bytes(b"not a picture")
    for data in ("missing", "empty", "corrupt"):
        assert run(tmp_path / data, tmp_path / "run") == 2
        assert data in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(images, tmp_path / "file" / "run") == 2
    assert "out must be a folder that can be written" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path, capsys):
    assert run(images, tmp_path / "run", "--base-lr", "1e30", "--trust-coefficient", "1e8") == 3
    assert re.search(r"steps 1 to 5 were all skipped: .*loss was nan on rank 0", capsys.readouterr().err)


def test_a_start_that_weights_do_not_fit_leaves_no_run_behind(images, tmp_path, capsys):
    other = ("--arch", "resnet18", "--width", "0.125", "--epochs", "1")
    assert run(images, tmp_path / "other", *other) == 0
    assert run(images, tmp_path / "run", "--epochs", "1", "--init", str(tmp_path / "other")) == 2
    assert "init" in capsys.readouterr().err
    assert run(images, tmp_path / "run", "--epochs", "1") == 0
