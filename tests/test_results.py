"""The file of a result: where it lies, what it is named by, and how large it is."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simclr_fast.data import Dataset, fingerprint
from simclr_fast.data.sources.dataset import array_split
from simclr_fast.evaluation.job import Common, results_folder
from simclr_fast.evaluation.measures import confusion, per_class
from simclr_fast.evaluation.results import Result, read_all, save, short

CLASSES = 3000


def images(*labels):
    """A data set of gray images with these labels, of a name that all have."""
    held = torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8).numpy()
    split = array_split("train", held, torch.tensor(labels).numpy())
    return Dataset("pets", split, None, ("cat", "dog"), ())


def job(folder, data):
    encoder = SimpleNamespace(origin="last.pt", step=1, digest=lambda: "0123")
    settings = Common(checkpoint="x", out=str(folder))
    return SimpleNamespace(
        settings=settings, encoder=encoder, dataset=data, extractor=SimpleNamespace(precision="fp32")
    )


def result(**changes):
    return Result(**{"protocol": "knn", "data": "pets", "figures": {"top-1": 0.5}} | changes)


def test_only_the_same_images_take_the_place(tmp_path):
    here, there = images(0, 1), images(1, 0)
    first = save(result(), job(tmp_path, here), 1.0)
    assert save(result(figures={"top-1": 0.75}), job(tmp_path, images(0, 1)), 1.0) == first
    other = save(result(), job(tmp_path, there), 1.0)
    assert other != first
    assert {one["data_digest"]: one["figures"]["top-1"] for one in read_all(tmp_path)} == {
        fingerprint(here): 0.75,
        fingerprint(there): 0.5,
    }
    own = save(result(data_digest="those of a protocol"), job(tmp_path, here), 1.0)
    assert json.loads(own.read_text())["data_digest"] == "those of a protocol"


def test_many_classes_make_no_large_file(tmp_path):
    truth = torch.arange(2 * CLASSES) % CLASSES
    said = (truth + (torch.arange(2 * CLASSES) < CLASSES).long()) % CLASSES
    began = time.process_time()
    path = save(result(confusion=confusion(truth, said, CLASSES)), job(tmp_path, images(0, 1)), 1.0)
    assert time.process_time() - began < 2
    assert path.stat().st_size < 200_000
    assert set(per_class(read_all(tmp_path)[0]["confusion"]).values()) == {0.5}


def test_what_is_saved_is_not_copied_first(tmp_path):
    class Count(int):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    found = result(confusion=[[0, 1, Count(2)]])
    assert json.loads(save(found, job(tmp_path, images(0, 1)), 1.0).read_text())["confusion"] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("runs/a", "runs/a/evaluations"),
        ("runs/a/checkpoints/best.pt", "runs/a/evaluations"),
        ("a.pt", "a-evaluations"),
        ("else/where/a.b.pt", "else/where/a.b-evaluations"),
        ("exported.v1", "exported.v1-evaluations"),
        ("exported.v1/model.safetensors", "exported.v1/model-evaluations"),
        ("torchvision", "torchvision-evaluations"),
        ("timm", "timm-evaluations"),
    ],
)
def test_where_results_are_written(tmp_path, monkeypatch, checkpoint, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)  # which has a namesake outside
    (tmp_path / "runs" / "a" / "config.json").write_text("{}")
    (tmp_path / "exported.v1").mkdir()
    for given in {checkpoint, checkpoint if checkpoint in ("torchvision", "timm") else str(tmp_path / checkpoint)}:
        assert results_folder(Common(checkpoint=given)).resolve() == tmp_path / expected
    assert results_folder(Common(checkpoint=checkpoint, out="o")) == Path("o")


def test_the_folder_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "exported").mkdir()
    monkeypatch.chdir(tmp_path / "exported")
    assert results_folder(Common(checkpoint=".")) == tmp_path / "exported-evaluations"


def test_names_of_data_and_digests_make_names_of_files(tmp_path):
    path = save(result(data="a/b"), job(tmp_path, images(0, 1)), 1.0)
    assert path.parent == tmp_path
    assert path.name.startswith("knn-a-b-")
    assert short("a") == short("a") != short("b")
