"""Which images are for training, for testing or for neither, and their classes."""

import time
from pathlib import Path

import pytest

from simclr_fast.data.sources import DataError, open_dataset, write_skipped
from simclr_fast.data.sources.parts import class_names
from tests.images_common import encoded, fill, pack


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_images_of_no_part_are_left_out_and_listed(tmp_path: Path):
    root = fill(tmp_path / "set", "train/1.jpg", "test/2.jpg", "val/3.jpg", "unlabeled/4.jpg", "5.jpg", "other/6.jpg")
    data = open_dataset(str(fill(root, "train/0.jpg", content=b"")))
    assert data.test is not None
    assert (data.train.names, data.test.names) == (["1.jpg"], ["2.jpg"])
    assert data.skipped == (("train/0.jpg", "it has zero bytes"),)
    left_out = ["5.jpg", "other/6.jpg", "unlabeled/4.jpg", "val/3.jpg"]
    assert sorted(data.left_out) == [(name, "it is neither in train nor in test") for name in left_out]
    write_skipped(tmp_path / "skipped.tsv", data)
    lines = (tmp_path / "skipped.tsv").read_text().splitlines()
    assert lines[0] == "train/0.jpg\tit has zero bytes"
    assert sorted(lines[1:]) == [f"{name}\tit is neither in train nor in test" for name in left_out]


def test_a_class_may_be_named_train(tmp_path: Path):
    data = open_dataset(str(fill(tmp_path / "set", "bicycle/1.jpg", "car/2.jpg", "train/3.jpg")))
    assert (data.classes, len(data.train), data.left_out) == (("bicycle", "car", "train"), 3, ())


@pytest.mark.parametrize("beside", ["unlabeled/2.jpg", "unlabelled/2.jpg", "extra/2.jpg", "2.jpg"])
def test_train_without_test_is_a_part_beside_known_folders(tmp_path: Path, beside: str):
    data = open_dataset(str(fill(tmp_path / "set", "train/a/1.jpg", "train/b/3.jpg", beside)))
    assert (data.classes, data.train.names, data.test) == (("a", "b"), ["a/1.jpg", "b/3.jpg"], None)
    assert data.left_out == ((beside, "it is neither in train nor in test"),)


def test_test_images_do_not_become_the_training_set_where_it_cannot_be_read(tmp_path: Path):
    root = fill(tmp_path / "set", *(f"test/{k}.jpg" for k in range(30)))
    fill(root, "train/1.jpg", content=b"")
    with pytest.raises(DataError, match="must hold images in train that can be read, got only 30 in other folders"):
        open_dataset(str(root))
    folder = tmp_path / "tars"
    folder.mkdir()
    pack(folder / "test-0.tar", {f"{k}.jpg": encoded() for k in range(30)})
    (folder / "train-0.tar").write_bytes(b"garbage" * 1000)
    with pytest.raises(DataError, match="must hold images in train"):
        open_dataset(str(folder))


def test_a_damaged_tar_does_not_change_the_folders_of_the_others(tmp_path: Path):
    tar = pack(tmp_path / "set.tar", {f"photos/{kind}/1.jpg": encoded() for kind in "abc"})
    with open(tar, "ab") as file:
        file.write(b"garbage")
    data = open_dataset(str(tar))
    assert (data.classes, len(data.skipped)) == (("a", "b", "c"), 1)


def test_tars_named_after_their_parts_in_other_words(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("imagenet1k-train-0000.tar", "data/imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"):
        pack(tmp_path / name, {"1.jpg": encoded()})
    data = open_dataset(str(tmp_path))
    assert data.test is not None
    assert (len(data.train), len(data.test), data.left_out) == (2, 1, ())


def test_many_numbered_classes_are_sorted_at_once():
    names = {str(k) for k in range(50_000)}
    start = time.monotonic()
    assert class_names(names) == tuple(map(str, range(50_000)))
    assert time.monotonic() - start < 5
