"""Hugging Face image folders: metadata files that say which images there are, and of which class."""

import json
import os
from pathlib import Path

import pytest

from simclr_fast.data.sources import DataError, open_dataset
from tests.images_common import encoded, fill, pack


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_metadata_at_the_root_name_images_and_classes(tmp_path: Path):
    fill(tmp_path, "img/1.jpg", "img/2.jpg", "img/unlisted.jpg")
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,text,label\nimg/2.jpg,a dog,dog\nimg/1.jpg,a cat,cat\n")
    data = open_dataset(str(tmp_path))
    assert (data.train.names, data.classes) == (["2.jpg", "1.jpg"], ("cat", "dog"))
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [1, 0]
    assert (data.skipped, data.left_out) == ((), (("img/unlisted.jpg", "the metadata do not list it"),))


def test_metadata_in_each_part(tmp_path: Path):
    fill(tmp_path, "train/1.jpg", "train/2.jpg", "test/3.jpg")
    (tmp_path / "train" / "metadata.jsonl").write_text(
        jsonl({"file_name": "1.jpg", "label": 7}, {"file_name": "2.jpg", "label": 10})
    )
    (tmp_path / "test" / "metadata.jsonl").write_text(jsonl({"file_name": "3.jpg", "label": 10}))
    data = open_dataset(str(tmp_path))
    assert data.classes == ("7", "10")
    assert data.test is not None
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("header", "classes"),
    [("file_name,label,class", ("l0", "l1")), ("file_name,class,labels", ("l0", "l1")), ("file_name,text,id", ())],
)
def test_the_class_is_in_label_else_labels_else_class(tmp_path: Path, header: str, classes: tuple[str, ...]):
    fill(tmp_path, "1.jpg", "2.jpg")
    columns = header.split(",")
    first = next((c for c in ("label", "labels", "class") if c in columns), "")
    rows = [",".join(f"{k}.jpg" if c == "file_name" else f"{'l' if c == first else 'x'}{k - 1}" for c in columns)
            for k in (1, 2)]  # fmt: skip
    (tmp_path / "metadata.csv").write_text("\n".join([header, *rows]))
    assert open_dataset(str(tmp_path)).classes == classes


def test_without_a_column_of_classes_folders_are_classes(tmp_path: Path):
    fill(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,text\na/1.jpg,one\nb/2.jpg,two\n")
    assert open_dataset(str(tmp_path)).classes == ("a", "b")


def test_lists_of_labels_are_no_class(tmp_path: Path):
    fill(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "metadata.jsonl").write_text(
        jsonl({"file_name": "1.jpg", "label": [1, 2]}, {"file_name": "2.jpg", "label": None})
    )
    assert open_dataset(str(tmp_path)).classes == ()


def test_a_table_without_file_names_is_none_of_ours(tmp_path: Path):
    fill(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "metadata.csv").write_text("camera,year\nx,1999\n")
    data = open_dataset(str(tmp_path))
    assert (data.classes, data.skipped) == (("a", "b"), ())


def test_lines_without_their_image_are_skipped_and_counted(tmp_path: Path):
    fill(tmp_path, "1.jpg", "2.jpg")
    lines = jsonl({"file_name": "1.jpg", "label": "a"}, {"file_name": "lost.jpg", "label": "a"}, {"label": "b"})
    (tmp_path / "metadata.jsonl").write_text(lines + "not json\n" + jsonl({"file_name": "2.jpg", "label": "b"}) * 2)
    data = open_dataset(str(tmp_path))
    assert data.train.names == ["1.jpg", "2.jpg"]
    assert [name for name, _ in data.skipped] == ["lost.jpg", "metadata.jsonl, image 3", "metadata.jsonl, image 4"]
    assert data.skipped[0][1] == "OSError: [Errno 2] No such file or directory"


def test_metadata_with_names_that_are_not_utf8(tmp_path: Path):
    fill(tmp_path, os.fsdecode(b"caf\xe9.jpg"))
    (tmp_path / "metadata.csv").write_bytes(b"file_name,label\ncaf\xe9.jpg,\xe9\n")
    assert open_dataset(str(tmp_path)).train.names == ["caf\\xe9.jpg"]


def test_metadata_that_are_a_folder_or_garbage_do_not_stop_the_search(tmp_path: Path):
    fill(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "metadata.csv").mkdir()
    (tmp_path / "a" / "metadata.jsonl").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "b" / "metadata.csv").write_bytes(encoded())
    assert open_dataset(str(tmp_path)).classes == ("a", "b")


def test_an_empty_label_is_no_class_though_it_lies_in_a_folder(tmp_path: Path):
    fill(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,label\na/1.jpg,cat\nb/2.jpg,dog\nc/3.jpg,\n")
    assert open_dataset(str(tmp_path)).classes == ()


def test_test_images_without_a_label_are_left_out(tmp_path: Path):
    fill(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg", "test/a/4.jpg")
    lines = "train/a/1.jpg,a\ntrain/b/2.jpg,b\ntest/a/3.jpg,a\ntest/a/4.jpg,\n"
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + lines)
    data = open_dataset(str(tmp_path))
    assert data.test is not None
    assert (data.test.names, data.left_out) == (["a/3.jpg"], (("a/4.jpg", "it has no class"),))


def test_hidden_folders_are_not_searched(tmp_path: Path):
    data = open_dataset(str(fill(tmp_path / ".set", "a/1.jpg", "b/2.jpg", ".Trash-0/files/3.jpg", "a/.x/4.jpg")))
    assert (data.classes, len(data.train)) == (("a", "b"), 2)


def test_tars_beside_images_are_left_out_and_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    fill(tmp_path, "logo.png")
    for k in range(3):
        pack(tmp_path / f"{k}.tar", {f"{k}.jpg": encoded()})
    data = open_dataset(str(tmp_path))
    assert (data.train.names, data.skipped) == (["logo.png"], ())
    assert [name for name, _ in data.left_out] == ["0.tar", "1.tar", "2.tar"]
    line = "3 tars are left out, since there are images beside them, the first logo.png\n"
    assert capsys.readouterr().err == line


def test_packing_that_has_not_ended_is_refused(tmp_path: Path):
    pack(tmp_path / "train-000000.tar", {"1.jpg": encoded()})
    manifest = {"layout": 1, "shards": [], "complete": False}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is not complete: give the same `python -m simclr_fast.data pack` again"):
        open_dataset(str(tmp_path))
    assert len(open_dataset(str(tmp_path), tolerate=1).train) == 1
    for other in ({**manifest, "complete": True}, {"complete": False}, ["layout"]):
        (tmp_path / "manifest.json").write_text(json.dumps(other))
        assert len(open_dataset(str(tmp_path)).train) == 1


def test_a_list_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "list.txt").write_text("1.jpg\n")
    monkeypatch.setattr(Path, "read_text", refuse)  # not by its mode, which does not bind root
    with pytest.raises(DataError, match="a list of images must be readable, got .*list.txt.*Permission denied"):
        open_dataset(str(tmp_path / "list.txt"))


def test_a_path_that_may_not_be_looked_up_is_refused(monkeypatch: pytest.MonkeyPatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(DataError, match="data must be a path that can be read, got 'closed/x'.*Permission denied"):
        open_dataset("closed/x")


def test_a_home_folder_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="must name a user of this computer, got '~nouser-here/x'"):
        open_dataset("~nouser-here/x")
    monkeypatch.setenv("SIMCLR_FAST_DATA", "~nouser-here")
    with pytest.raises(DataError, match="must name a user of this computer"):
        open_dataset("cifar10")
