"""What a look at a data set reports."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.data import open_dataset
from simclr_fast.data.commands.audit import FIRST, Report, check
from simclr_fast.data.commands.pack import Packing, pack
from simclr_fast.data.commands.shards import MANIFEST, Manifest


def encoded(number: int, size: tuple[int, int] = (12, 9), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight images for training in two classes, two for testing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for k in range(10):
        path = tmp_path / "source" / ("test" if k >= 8 else "train") / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k, (10 + k, 30)))
    return tmp_path / "source"


def audit(source: Path, **options) -> Report:
    return check(open_dataset(str(source), tolerate=1.0), folder=source, **options)


def test_a_clean_set(source: Path):
    (source / "train" / "a" / "0.jpg").write_bytes(encoded(0, (10, 30), "PNG"))
    report = audit(source, image_size=13)
    train, test = report.parts["train"], report.parts["test"]
    assert report.clean
    assert (report.name, report.classes, report.shards, report.copies) == ("source", ("a", "b"), None, 0)
    assert (train.images, train.formats, test.images) == (8, {"JPEG": 7, "PNG": 1}, 2)
    assert train.short_side == {"smallest": 10, "5 %": 10, "median": 14, "95 %": 17, "largest": 17}
    assert train.per_class["smallest"] == train.per_class["largest"] == 4
    assert (train.small, test.small) == (3, 0)
    assert test.bytes["largest"] == max(path.stat().st_size for path in (source / "test").rglob("*.jpg"))
    assert json.loads(json.dumps(report.json()))["parts"]["train"]["images"] == 8
    text = list(report.lines())
    assert text[0] == "source: 2 classes"
    assert text[-1] == "clean"
    assert any("3 images with a side below 13 pixels" in line for line in text)


def test_images_that_are_there_several_times(source: Path):
    first = (source / "train" / "a" / "0.jpg").read_bytes()
    for name in ("train/b/copy.jpg", "train/b/copy2.jpg", "test/a/copy.jpg"):
        (source / name).write_bytes(first)
    report = audit(source)
    assert (report.copies, report.copies_across, report.clean) == (3, 1, True)
    assert report.first_copies == [["train/a/0.jpg", "train/b/copy.jpg", "train/b/copy2.jpg", "test/a/copy.jpg"]]
    assert any("3 images with the bytes of an earlier one, 1 of them in test and in train" in x for x in report.lines())


def test_what_cannot_be_read_is_counted_and_the_first_named(source: Path):
    for k in range(FIRST + 2):
        (source / "train" / "a" / f"bad{k:02d}.jpg").write_bytes(b"")
    report = audit(source)
    assert (report.clean, report.unreadable, len(report.first_unreadable)) == (False, FIRST + 2, FIRST)
    assert "zero bytes" in report.first_unreadable[0][1]
    assert list(report.lines())[-2:] == ["            and 2 more", "not clean"]


def test_images_left_out_are_named_and_are_no_fault(source: Path):
    left_out = tuple((f"{k}.jpg", "nobody lists it") for k in range(FIRST + 1))
    report = check(replace(open_dataset(str(source)), left_out=left_out))
    assert (report.clean, report.unreadable, report.left_out, len(report.first_left_out)) == (True, 0, FIRST + 1, FIRST)
    lines = list(report.lines())
    assert f"left out    {FIRST + 1} images" in lines
    assert "            0.jpg: nobody lists it" in lines
    assert lines[-3:] == ["            and 1 more", "unreadable  0 images", "clean"]


def test_what_vanishes_or_changes_meanwhile_is_counted(source: Path):
    dataset = open_dataset(str(source))
    (source / "train" / "a" / "2.jpg").unlink()
    (source / "test" / "b" / "9.jpg").write_bytes(encoded(1, (40, 40)))
    report = check(dataset)
    assert [name for name, _ in report.first_unreadable] == ["a/2.jpg", "b/9.jpg"]
    assert (report.parts["train"].images, report.parts["test"].images) == (7, 1)


def test_all_of_a_part_may_vanish(source: Path):
    dataset = open_dataset(str(source))
    for path in (source / "test").rglob("*.jpg"):
        path.unlink()
    report = check(dataset)
    assert (report.unreadable, report.parts["test"].images, report.parts["test"].bytes) == (2, 0, {})
    assert list(report.lines())


def test_packed_shards_are_compared_with_their_manifest(source: Path, tmp_path: Path):
    folder = tmp_path / "packed"
    pack(open_dataset(str(source)), folder, settings=Packing(per_shard=3))
    report = audit(folder)
    assert (report.clean, report.shards, report.shard_faults) == (True, 4, [])
    (folder / "train-000001.idx").write_text("v1.2 0\n")
    with open(folder / "train-000002.tar", "r+b") as file:
        file.seek(100)  # in a header, where the mode is: the image can still be read
        file.write(b"0000600")
    os.link(folder / "train-000000.tar", folder / "train-000009.tar")
    dataset = open_dataset(str(folder), tolerate=1.0)
    Manifest(**{**vars(Manifest.load(folder)), "complete": False}).save(folder)
    report = check(dataset, folder=folder)
    assert not report.clean
    assert [name for name, _ in report.shard_faults] == [
        "train-000001.tar",
        "train-000002.tar",
        "train-000009.tar",
        MANIFEST,
    ]
    assert report.copies == 3
