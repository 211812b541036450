"""evaluate linear: known answers, an encoder that does not move, several processes, worst inputs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from simclr_fast import evaluate
from simclr_fast.distributed import Ranks
from simclr_fast.evaluation import linear
from simclr_fast.evaluation.job import Job
from simclr_fast.evaluation.supervised import Frozen, Recipe, classifier, fit
from simclr_fast.record import RunError
from tests.processes import environment
from tests.train_common import ROOT, run

EXACT = ("--gpus", "0", "--precision", "fp32")
SGD = (*EXACT, "--mode", "sgd")
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}


def folder_of(root, train, test, colours=COLOURS, seed=0):
    """Class folders of images of one colour with noise; `train` and `test` are numbers of images, or by class."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", train), ("test", test)):
        for label, (name, colour) in enumerate(colours.items()):
            here = root / split / name
            here.mkdir(parents=True)
            for k in range(number[label] if isinstance(number, tuple) else number):
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (20, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(here / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("colours"), 12, 4)


@pytest.fixture(scope="module")
def trained(colours, tmp_path_factory):
    """An encoder of a few steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(colours, out, "--epochs", "1") == 0
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def evaluated(trained, tmp_path, capsys):
    """(status, result or None, stdout, stderr) of the command."""

    def call(*flags, protocol="linear"):
        out = tmp_path / "out"
        before = set(out.glob("*.json"))
        status = evaluate.main([protocol, "--checkpoint", str(trained), "--out", str(out), *flags])
        said = capsys.readouterr()
        fresh = set(out.glob("*.json")) - before
        return status, json.loads(fresh.pop().read_text()) if fresh else None, said.out, said.err

    return call


def job_of(trained, *flags, settings=linear.Settings):
    import tyro

    own = tyro.cli(settings, args=["--checkpoint", str(trained), "--gpus", "0", "--precision", "fp32", *flags])
    return Job(own, Ranks(use_gpu=False), lambda text: None)


def test_colours_are_told_apart_to_the_last_image(evaluated):
    status, found, out, _ = evaluated(*EXACT)
    assert status == 0
    assert found["figures"] == {"top-1": 1.0, "top-5": 1.0}
    assert found["confusion"] == [[0, 0, 4], [1, 1, 4], [2, 2, 4]]
    assert found["counts"] == {"training images": 36, "of them held out to choose l2": 3, "test images": 12}
    (table,) = found["tables"]
    assert table["rows"][0][0].startswith("1e-06")
    assert table["rows"][-1][0].startswith("1e+05")
    assert sum("(chosen)" in row[0] for row in table["rows"]) == 1
    assert "top-1 100.00%" in out


def test_the_paper_s_recipe_tells_them_apart_too(evaluated):
    status, found, out, _ = evaluated(*SGD, "--epochs", "60", "--lr", "2", "--batch", "12")
    assert status == 0
    assert found["figures"]["top-1"] == 1.0
    assert found["counts"] == {"training images": 36, "batch": 12, "steps": 181, "test images": 12}
    assert "181 steps of 12 images, lr 0.09375" in out
    assert "waiting for data" in out


def test_labels_that_mean_nothing_stay_at_chance(trained, tmp_path, evaluated):
    grey = {f"c{k}": (128, 128, 128) for k in range(2)}
    data = folder_of(tmp_path / "grey", 30, 50, grey)
    _, found, _, _ = evaluated(*EXACT, "--data", str(data))
    assert abs(found["figures"]["top-1"] - 0.5) < 4 * 0.05


def test_the_same_command_gives_the_same_result(evaluated):
    found = [evaluated(*flags)[1] for flags in ((*SGD, "--epochs", "2"), (*SGD, "--epochs", "2", "--no-cache"))]
    assert found[1] is None or found[0]["figures"] == found[1]["figures"]


def test_l2_can_be_given(evaluated):
    status, found, _, _ = evaluated(*EXACT, "--l2", "0.5")
    assert status == 0
    assert found["tables"] == []
    assert found["notes"][0].startswith("l2 0.5 (C 1), ")


@pytest.mark.parametrize("ranks_flags", [("--mode", "exact"), ("--mode", "sgd", "--epochs", "4", "--batch", "12")])
def test_two_processes_find_what_one_does(trained, tmp_path, evaluated, ranks_flags):
    _, one, _, _ = evaluated(*EXACT, *ranks_flags)
    done = subprocess.run(
        [sys.executable, "-m", "simclr_fast.evaluate", "linear", "--checkpoint", str(trained), *EXACT, "--ranks", "2",
         *ranks_flags, "--out", str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(XDG_CACHE_HOME=tmp_path / "two cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "two").glob("*.json")
    two = json.loads(path.read_text())
    assert two["confusion"] == one["confusion"]
    assert two["counts"] == one["counts"]


class Thawed(Frozen):
    """A freeze that is broken: train mode reaches the encoder, whose BatchNorm statistics then move."""

    def train(self, mode=True):
        return torch.nn.Module.train(self, mode)


def moved(trained, kind):
    """Whether training a classifier changes the encoder's digest; and the classifier."""
    job = job_of(trained, "--mode", "sgd")
    train, _ = job.labelled()
    before, head = job.encoder.digest(), classifier(job.encoder.num_features, 3)
    fit(kind(job.encoder.network, head), train, Recipe(batch=12, steps=4, lr=1.0), job)
    assert head.weight.abs().max() > 0
    return job.encoder.digest() != before


def test_the_encoder_does_not_move_and_a_broken_freeze_is_found(trained):
    assert not moved(trained, Frozen)
    assert moved(trained, Thawed)


def test_a_frozen_encoder_stays_in_eval_mode_and_gets_no_gradient():
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    model = Frozen(encoder, classifier(144, 2)).train()
    assert model.training
    assert model.head.training
    assert not any(module.training for module in encoder.modules())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_the_evaluation_leaves_the_encoder_as_it_is(trained):
    for mode in ("exact", "sgd"):
        job = job_of(trained, "--mode", mode, *(("--epochs", "2") if mode == "sgd" else ()))
        before = job.encoder.digest()
        linear.run(job.settings, job)
        assert job.encoder.digest() == before


def test_a_loss_that_is_not_finite_ends_with_a_sentence(trained):
    job = job_of(trained)
    train, _ = job.labelled()
    model = Frozen(job.encoder.network, classifier(job.encoder.num_features, 3))
    with pytest.raises(RunError, match=r"lr must be lower: the loss of training is (nan|inf) by step 8, with rates"):
        fit(model, train, Recipe(batch=12, steps=8, lr=1.0), job, loss=lambda logits, y: cross_entropy(logits, y) / 0)


def test_the_others_wait_for_the_fits_and_the_data_as_long_as_it_takes(trained, monkeypatch):
    waits, from_main = [], Ranks.from_main
    monkeypatch.setattr(
        Ranks, "from_main", lambda self, compute, patient=False: waits.append(patient) or from_main(self, compute)
    )
    job = job_of(trained, "--no-cache", "--l2", "1")
    linear.run(job.settings, job)
    assert waits.count(True) == 2


def test_features_that_are_not_finite(trained, evaluated, monkeypatch):
    original = Job.features

    def spoilt(self, *args, **options):
        h, labels = original(self, *args, **options)
        return torch.where(torch.arange(len(h))[:, None] == 3, torch.nan, h), labels

    monkeypatch.setattr(Job, "features", spoilt)
    status, _, _, err = evaluated(*EXACT)
    assert status == 2
    assert "features must be finite, got NaN or infinity for" in err


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ((3, 3, 0), 2, "data must have training images of every class that is tested"),
        ((3, 0, 0), (2, 0, 0), "data must have labels (class folders train/CLASS/*)"),
        (1, 2, "holdout must leave training images to choose l2 on, and no class has images enough for holdout=0.1"),
        (3, (0, 0, 0), "data must have labelled test images"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, evaluated, train, test, words):
    status, found, _, err = evaluated(*EXACT, "--data", str(folder_of(tmp_path / "data", train, test)))
    assert (status, found) == (2, None)
    assert words in err


def test_one_image_a_class_with_a_given_l2_and_with_the_recipe(tmp_path, evaluated):
    data = folder_of(tmp_path / "data", 1, 3)
    for flags in ((*EXACT, "--l2", "1"), (*SGD, "--epochs", "5")):
        status, found, _, err = evaluated(*flags, "--data", str(data))
        assert status == 0, err
        assert found["counts"]["training images"] == 3


def test_no_labels(tmp_path, evaluated):
    folder = tmp_path / "flat"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (20, 20), (k * 60, 0, 0)).save(folder / f"{k}.png")
    status, _, _, err = evaluated(*EXACT, "--data", str(folder))
    assert status == 2
    assert "data must have labels (class folders train/CLASS/*)" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--holdout", "0"), "holdout must be a share, between 0 and 1"),
        (("--holdout", "1"), "holdout must be a share, between 0 and 1"),
        (("--l2", "0"), "l2 must be positive"),
        (("--epochs", "0"), "epochs must be at least 1"),
        (("--lr", "-1"), "lr must be positive"),
        (("--weight-decay", "-1"), "weight_decay must be 0 or more"),
        (("--batch", "0"), "batch must be at least 1"),
        (("--workers", "100000"), "workers must be at most 1,024"),
        (("--timeout", "1e20"), "timeout must be at most 2,592,000 s"),
        (("--epochs", "10"), "epochs must be left out without --mode sgd, got epochs=10"),
        (("--mode", "sgd", "--l2", "1"), "l2 must be left out without --mode exact, got l2=1.0"),
    ],
)
def test_settings_that_cannot_be(trained, capsys, flags, words):
    with pytest.raises(SystemExit):
        evaluate.main(["linear", "--checkpoint", str(trained), *flags])
    assert words in " ".join(capsys.readouterr().err.split())
