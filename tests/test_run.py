"""A run's loop: evaluations that are killed, stopped or not saved, ranks' own metrics, pixels decoded before it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simclr_fast import checkpoint, probe
from simclr_fast import run as run_module
from simclr_fast.data.engines import resident
from simclr_fast.record import read_metrics
from tests.processes import environment, until
from tests.train_common import ROOT, assert_same_bits, command, images, one_thread, run, untimed, whole

__all__ = ["images", "one_thread", "whole"]  # fixtures are used by their names


@pytest.fixture
def evaluation(monkeypatch):
    """Have something happen in the evaluation of that number, 0 being that of the first epoch, in place of it."""

    def meet(number, happens):
        real, made = probe.Probe.accuracy, iter(range(-2, 1000))  # before training there are two

        def accuracy(*given):
            return happens(*given) if next(made) == number else real(*given)

        monkeypatch.setattr(probe.Probe, "accuracy", accuracy)

    return meet


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("number", "step"), [(0, 3), (2, 8)])
def test_killed_in_an_evaluation_it_makes_it_again(images, whole, tmp_path, monkeypatch, evaluation, number, step):
    out = tmp_path / "run"
    evaluation(number, killed)
    assert run(images, out) == 130
    monkeypatch.undo()
    assert checkpoint.read(out / "checkpoints" / "last.pt")["pending"]["step"] == step
    assert read_metrics(out)[-1]["step"] == step - 1
    assert run(images, out) == 0
    assert_same_bits(whole, out)
    assert untimed(out) == untimed(whole)
    assert best(out) == best(whole)


def best(out):
    """The step that was best, and how good a later run takes it to be."""
    state = checkpoint.load(out / "checkpoints")[0]
    return checkpoint.read(out / "checkpoints" / "best.pt")["step"], state["best"]


def test_killed_after_an_evaluation_it_does_not_make_it_again(images, whole, tmp_path, monkeypatch):
    out, look = tmp_path / "run", run_module.Run._look
    monkeypatch.setattr(run_module.Run, "_look", lambda self: killed() if self.step == 3 else look(self))
    assert run(images, out) == 130
    monkeypatch.undo()
    assert checkpoint.read(out / "checkpoints" / "last.pt")["pending"]["step"] == read_metrics(out)[-1]["step"] == 3
    made, real = [], probe.Probe.accuracy
    monkeypatch.setattr(probe.Probe, "accuracy", lambda *given: made.append(1) or real(*given))
    assert run(images, out) == 0
    assert len(made) == 2  # of the epochs to come
    assert_same_bits(whole, out)
    assert untimed(out) == untimed(whole)
    assert best(out) == best(whole)


def test_a_signal_ends_an_evaluation_after_the_batch_under_way(images, whole, tmp_path, monkeypatch, evaluation):
    out, real, accuracy, taken = tmp_path / "run", probe.Probe._images, probe.Probe.accuracy, []

    def signalled(self, split, indices):
        for batch in real(self, split, indices):
            taken.append(len(batch[1]))
            signal.raise_signal(signal.SIGUSR1)
            yield batch

    def begins(*given):
        monkeypatch.setattr(probe, "EVAL_BATCH", 4)
        monkeypatch.setattr(probe.Probe, "_images", signalled)
        return accuracy(*given)

    evaluation(0, begins)
    assert run(images, out) == 75
    monkeypatch.undo()
    assert taken == [4]
    assert (out / "requeue").read_text() == "3\n"
    assert run(images, out) == 0
    assert_same_bits(whole, out)
    assert untimed(out) == untimed(whole)


@pytest.mark.parametrize("full", [False, True])
def test_an_evaluation_whose_checkpoint_could_not_be_written_is_stopped_with_one(
    images, whole, tmp_path, monkeypatch, evaluation, capsys, full
):
    out, real = tmp_path / "run", checkpoint.save
    taken = []

    def failing(folder, state, *, best):
        taken.append(state["step"])
        if full or len(taken) == 1:
            raise checkpoint.CheckpointError("could not write a checkpoint")
        real(folder, state, best=best)

    def signalled(self, encoder, stop):
        signal.raise_signal(signal.SIGTERM)
        stop.agree()

    monkeypatch.setattr(checkpoint, "save", failing)
    evaluation(0, signalled)
    assert run(images, out) == (2 if full else 75)
    assert taken == [3, 3]
    monkeypatch.undo()
    assert run(images, out) == 0
    assert_same_bits(whole, out)
    assert untimed(out) == untimed(whole)


def test_one_checkpoint_for_an_evaluation_and_none_that_is_best_and_cannot_be_kept(
    images, whole, tmp_path, monkeypatch, capsys
):
    out, real, saved = tmp_path / "run", checkpoint.save, []

    def noted(folder, state, *, best):
        saved.append((state["step"], best))
        real(folder, state, best=best)

    def full(source, target):
        if target.name == "best.pt":
            raise OSError(28, "No space left on device")
        copy(source, target)

    copy = checkpoint._copy
    monkeypatch.setattr(checkpoint, "save", noted)
    monkeypatch.setattr(checkpoint, "_copy", full)
    assert run(images, out) == 0
    assert saved == [(3, False), (5, False), (8, False)]
    assert re.search(
        r"could not keep .*last\.pt as best\.pt: .*No space left.* The run goes on", capsys.readouterr().out
    )
    assert checkpoint.load(out / "checkpoints")[0]["best"] == -np.inf
    assert_same_bits(whole, out)


def test_a_checkpoint_that_does_not_know_of_pending_evaluations(images, whole, tmp_path, monkeypatch):
    out, save = tmp_path / "run", checkpoint.save

    def older(folder, state, *, best):
        without = {name: value for name, value in state.items() if name != "pending"}
        save(folder, without | {"interval": state["interval"][0]}, best=best)

    monkeypatch.setattr(checkpoint, "save", older)
    monkeypatch.setattr(run_module.Interrupt, "wanted", lambda *_: (signal.SIGUSR1, False))
    for _ in range(2):
        assert run(images, out) == 75
    monkeypatch.undo()
    assert run(images, out) == 0
    assert_same_bits(whole, out)


SLOW = """
import functools, os, sys, time
from pathlib import Path
from simclr_fast import probe, run, train

images, accuracy, steps = probe.Probe._images, probe.Probe.accuracy, Path(os.environ["STEPS"])

def slow(self, *given):
    for batch in images(self, *given):
        time.sleep(float(os.environ["PAUSE"]) * (probe.EVAL_BATCH == 4))
        yield batch

def evaluated(self, encoder, stop=None):
    if stop is not None:
        probe.EVAL_BATCH = 4
        (steps / os.environ["RANK"]).touch()
    return accuracy(self, encoder, stop)

probe.Probe._images, probe.Probe.accuracy, train.MODULE = slow, evaluated, "slow_probe"
run.Interrupt = functools.partial(run.Interrupt, grace_s=float(os.environ["GRACE"]))
sys.exit(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pause", "grace", "said"), [(1, 60, "stopped after step 3"), (60, 2, "did not end within 2 s")]
)
def test_two_ranks_are_stopped_in_an_evaluation(images, tmp_path, pause, grace, said):
    out, steps = tmp_path / "run", tmp_path / "steps"
    (tmp_path / "slow_probe.py").write_text(SLOW)
    steps.mkdir()
    start = [sys.executable, "-m", "slow_probe", *command(images, out, "--ranks", "2")[3:]]
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}", STEPS=steps, PAUSE=pause, GRACE=grace)
    with subprocess.Popen(start, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        until(lambda: len(list(steps.iterdir())) == 2 or process.poll() is not None)
        process.send_signal(signal.SIGUSR1)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 75, error
    assert said in error
    assert (out / "requeue").read_text() == "3\n"
    assert checkpoint.load(out / "checkpoints")[0]["pending"]["step"] == 3
    assert run(images, out) == 0
    assert [record["step"] for record in read_metrics(out) if "knn_top1" in record] == [3, 5, 8, 8]


def test_each_rank_goes_on_with_its_own_metrics():
    """A loss that was bad on one rank is not said of all of them after a new start."""
    steps = torch.tensor([[[1.0, 0, 1, 0], [2, 0, 1, 0]], [[3, 1, 1, 0], [float("nan"), 1, 1, 1]]])
    gathered = [rank.flatten().tolist() for rank in steps]

    def rank(number, world=2):
        ranks = SimpleNamespace(rank=number, world=world, gather=lambda own: gathered if own else [[], []])
        return SimpleNamespace(ranks=ranks, _interval=list(steps[number]))

    rows = run_module.Run._rows(rank(0))
    for number in (0, 1):
        torch.testing.assert_close(
            run_module.Run._own(rank(number), rows), steps[number], rtol=0, atol=0, equal_nan=True
        )
    assert run_module.Run._own(rank(0, world=4), rows)[0].tolist() == [2, 0.5, 1, 0]
    assert run_module.Run._own(rank(0), steps[1]) is not None
    empty = run_module.Run._rows(SimpleNamespace(ranks=rank(0).ranks, _interval=[]))
    assert run_module.Run._own(rank(1), empty).shape == (0, 4)


@pytest.mark.parametrize("labelled", [False, True])
def test_decoding_all_pixels_is_no_stall_of_a_reader(images, tmp_path, monkeypatch, capfd, labelled):
    """At the start, where nothing has looked at the images before, and when a run is taken up."""
    data, out, flags = tmp_path / "flat", tmp_path / "run", ("--timeout", "2", "--epochs", "1")
    if labelled:
        data = images
        with monkeypatch.context() as patch:
            patch.setattr(run_module.Interrupt, "wanted", lambda *_: (signal.SIGUSR1, False))
            assert run(data, out, *flags) == 75
    else:
        data.mkdir()
        for number, path in enumerate((images / "train").rglob("*.jpg")):
            shutil.copy(path, data / f"{number}.jpg")
    real = resident._decoding

    def slow(pixels, *given):
        time.sleep(2 * (len(pixels) == 40))
        yield from real(pixels, *given)

    monkeypatch.setattr(resident, "_decoding", slow)
    monkeypatch.setattr(os, "_exit", lambda status: None)  # it would be that of these tests
    assert run(data, out, *flags) == 0
    assert "no data for" not in capfd.readouterr().err
