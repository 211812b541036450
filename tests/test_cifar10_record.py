"""The record on CIFAR-10 at a toy size: what it runs and writes; the linear classifier; the table and the picture."""

import json
import shutil
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import cifar10_record

    return cifar10_record


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """16 training and 6 test images for each of two classes, which differ in colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 6)):
        for label in range(2):
            folder = tmp_path / "data" / part / "ab"[label]
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{k}.jpg", quality=75)
    return tmp_path / "data"


@pytest.mark.slow
def test_a_run_is_timed_and_evaluated(record, images, tmp_path, capfd):
    """Whole, with a training in a process of its own."""
    file = tmp_path / "cifar10.jsonl"
    flags = ["--quick", "--data", str(images), "--seeds", "1", "--json", str(file), "--gpus", "0", "--batch", "16"]
    assert record.main(flags) == 0
    (line,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (line["epochs"], line["seed"], line["data"], line["quick"]) == (1, 0, "data", True)
    assert line["recipe"].endswith("--gpus 0 --batch 16")
    assert line["config"]["batch"] == 16
    assert (line["train_images"], line["test_images"]) == (32, 12)
    assert 0 < line["training_seconds"] < line["seconds"]
    assert 0 <= line["knn_top1"] <= 1
    assert line["linear_top1"] >= 0.5
    assert line["l2"] in record.L2
    assert line["device"]
    assert line["commit"]
    shown = capfd.readouterr().out
    assert "kNN %" in shown


def test_accuracies_are_taken_in_float32(record, monkeypatch):
    before, during = torch.backends.cudnn.allow_tf32, []

    def trained(flags, out):
        out.mkdir()
        (out / "config.json").write_text(json.dumps({"flags": flags}))
        return {"seconds": 1.0}

    def features(out, device):
        during.append(torch.backends.cudnn.allow_tf32)
        rows, labels = torch.eye(2).repeat(10, 1), torch.arange(2).repeat(10)
        return rows, labels, rows[:4], labels[:4]

    monkeypatch.setattr(record, "trained", trained)
    monkeypatch.setattr(record, "features", features)
    found = record.run(["it"], "cpu")
    assert (found["knn_top1"], found["linear_top1"], found["train_images"], found["test_images"]) == (1, 1, 20, 4)
    assert found["config"]["flags"] == ["it"]
    assert during == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_training_that_fails_ends_it(record, tmp_path, monkeypatch):
    monkeypatch.setattr(record.sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match="training ended with status 1"):
        record.trained([], tmp_path / "run")


def test_the_classifier_is_the_minimum(record):
    """Its gradient vanishes, and it learns what is linear."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    labels = (x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)).argmax(1)
    weights = record.regression(x.float(), labels, 1e-2).double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(record.scores(x, weights), labels) + 5e-3 * weights[:-1].square().sum()
    loss.backward()
    assert weights.grad.abs().max() < 1e-4
    assert record.share_right(x, labels, weights.detach()) > 0.95


def test_the_test_images_choose_nothing(record, monkeypatch):
    """The L2 that is chosen is the best on the held-out images: strong where labels are noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 80, generator=generator)
    noisy = torch.where(torch.rand(400, generator=generator) < 0.4, torch.randint(2, (400,), generator=generator), 1)
    labels = torch.where(x[:, 0] > 0, noisy, 1 - noisy)
    clean = (x[:, 0] > 0).long()
    accuracy, l2 = record.linear(x, labels, x, clean)
    other, same = record.linear(x, labels, x, 1 - clean)
    assert l2 == same >= 1e-2
    assert accuracy == pytest.approx(1 - other)
    monkeypatch.setattr(record, "L2", (1e-5,))
    assert accuracy > record.linear(x, labels, x, clean)[0]


def test_a_few_of_each_class_are_unpacked(record, images, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as tar:
        for part in ("train", "test"):
            tar.add(images / part, part)
    monkeypatch.setattr(record, "CIFAR", tmp_path / "all.tar.gz")
    assert len(list(record.unpacked(tmp_path / "few", 3).rglob("*.jpg"))) == 12
    assert len(list(record.unpacked(tmp_path / "all", None).rglob("*.jpg"))) == 44
    monkeypatch.setattr(record, "CIFAR", tmp_path / "absent.tar.gz")
    with pytest.raises(SystemExit, match="give --data DIR"):
        record.unpacked(tmp_path / "none", None)


def test_table_and_picture(record, tmp_path):
    line = {"data": "it", "device": "cpu", "recipe": "--batch 512 " * 20, "training_seconds": 60.0}
    runs = [
        line | {"epochs": epochs, "seconds": 90.0 + k, "knn_top1": 0.5 + 0.02 * k, "linear_top1": 0.6}
        | {"images_per_s_median": 10.0}
        for epochs, k in ((10, 0), (10, 1), (20, 2))
    ]  # fmt: skip
    rows = record.table(runs).splitlines()
    assert max(map(len, rows)) <= 120
    assert rows[-2].split()[:5] == ["10", "2", "51.00", "+-", "1.41"]
    assert rows[-1].split()[:3] == ["20", "1", "54.00"]
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    record.picture(runs, tmp_path / "it.svg")
    assert (tmp_path / "it.svg").read_text().count("<svg") == 1


def test_epochs_and_seeds_must_be_positive(record, capsys):
    assert record.parsed(["--preset", "cifar10"])[0].epochs == [1000]
    assert record.parsed(["--epochs", "1", "2", "--width", "2"])[1] == ["--width", "2"]
    with pytest.raises(SystemExit):
        record.parsed(["--seeds", "0"])
    assert "--epochs and --seeds must be at least 1" in capsys.readouterr().err
