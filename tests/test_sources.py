"""What is found in folders, tars and lists, and what is refused or left out."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.data import sources
from simclr_fast.data.sources import DataError, open_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(size: tuple[int, int] = (12, 9), mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def fill(root: Path, *names: str, content: bytes | None = None) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded() if content is None else content)
    return root


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_train_and_test_folders(tmp_path: Path):
    root = fill(tmp_path / "set", "train/b/1.jpg", "train/a/2.JPEG", "test/a/3.Jpg", "test/c/4.jpg", "train/a/notes.md")
    data = open_dataset(str(root))
    assert (data.name, data.classes, data.train.names) == ("set", ("a", "b"), ["a/2.JPEG", "b/1.jpg"])
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 1]
    assert data.test is not None
    assert data.test.names == ["a/3.Jpg"]
    assert data.skipped == (("c/4.jpg", "class 'c' is not in train"),)
    assert data.train.sizes.tolist() == [[12, 9], [12, 9]]
    assert data.train.read(0).tobytes() == encoded()


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("a/1.jpg", "b/2.jpg"), ("a", "b")),
        (("photos/a/1.jpg", "photos/b/deep/2.jpg"), ("a", "b")),
        (("10/1.jpg", "9/2.jpg"), ("9", "10")),
        (("1.jpg", "2.jpg"), ()),
        (("1.jpg", "a/2.jpg", "b/3.jpg"), ()),
        (("only/1.jpg", "only/2.jpg"), ()),
    ],
)
def test_classes_are_the_first_folders(tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...]):
    data = open_dataset(str(fill(tmp_path / "set", *names)))
    assert data.classes == classes
    assert (data.train.labels is None) == (not classes)
    assert len(data.train) == len(names)


def test_tars_and_folders_hold_the_same(tmp_path: Path):
    names = ("train/a/1.jpg", "train/b/2.jpg", "test/b/3.jpg")
    tar = pack(tmp_path / "set.tar", {name: encoded() for name in names})
    for data in (open_dataset(str(tar)), open_dataset(str(fill(tmp_path / "folder", *names)))):
        assert data.train.names == ["a/1.jpg", "b/2.jpg"]
        assert data.test is not None
        assert data.test.read(0).tobytes() == encoded()


def test_folder_of_webdataset_shards(tmp_path: Path):
    for part, labels in (("train", "21"), ("val", "1")):
        for shard, label in enumerate(labels):
            pack(tmp_path / f"{part}-{shard:04d}.tar", {"x.jpg": encoded(), "x.cls": label.encode()})
    data = open_dataset(str(tmp_path))
    assert data.classes == ("1", "2")
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [1, 0]
    assert data.test is not None
    assert len(data.test) == 1


def test_list_of_files(tmp_path: Path):
    fill(tmp_path, "one.jpg", "sub/two.jpg")
    listed = tmp_path / "list.txt"
    listed.write_text("one.jpg\tcat\nsub/two.jpg\tdog\nlost.jpg\tcat\n")
    data = open_dataset(str(listed))
    assert data.classes == ("cat", "dog")
    assert [name for name, _ in data.skipped] == ["lost.jpg"]


def test_what_cannot_be_read_is_skipped_with_its_reason(tmp_path: Path):
    good = encoded((40, 40))
    root = fill(tmp_path / "set", "0.jpg", content=good)
    (root / "png.jpg").write_bytes(encoded(kind="PNG"))
    (root / "gray.jpg").write_bytes(encoded(mode="L"))
    (root / "cmyk.jpg").write_bytes(encoded(mode="CMYK"))
    bad = {
        "zero.jpg": (b"", "zero bytes"),
        "text.jpg": (b"not an image at all", "not an image"),
        "cut.jpg": (good[: len(good) // 2], "truncated"),
        "moving.gif": (encoded(kind="GIF"), "GIF is not supported"),
    }
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
    data = open_dataset(str(root))
    assert data.train.names == ["0.jpg", "cmyk.jpg", "gray.jpg", "png.jpg"]
    skipped = dict(data.skipped)
    assert set(skipped) == set(bad)
    for name, (_, reason) in bad.items():
        assert reason in skipped[name]


def test_tar_cut_short_keeps_its_whole_members(tmp_path: Path):
    tar = pack(tmp_path / "set.tar", {f"{k}.jpg": encoded((60, 60)) for k in range(4)})
    os.truncate(tar, 3 * tar.stat().st_size // 10)
    data = open_dataset(str(tar))
    assert 1 <= len(data.train) < 4
    assert data.skipped


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shaeps", "must be an existing path or one of shapes, got 'shaeps'; did you mean 'shapes'"),
        ("nowhere/at/all", "must be an existing path"),
        ("empty", "must hold images .* found none in"),
        ("corrupt", "can be read, all 2 in .* fail; a.jpg: it has zero bytes"),
        ("set.tar.gz", "must not be compressed: unpack"),
        ("one.jpg", "must be a folder, a .tar or a .txt list"),
    ],
)
def test_unusable_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "corrupt", "a.jpg", "b.jpg", content=b"")
    fill(tmp_path, "one.jpg", "set.tar.gz")
    with pytest.raises(DataError, match=message):
        open_dataset(spec)


def test_checked_files_are_not_decoded_again_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "set", "a.jpg", "b.jpg")
    monkeypatch.setattr(sources, "CACHED_FROM", 2)
    first = open_dataset(str(root))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_check", lambda sample: pytest.fail("decoded again"))
        again = open_dataset(str(root))
    assert again.train.names == first.train.names
    np.testing.assert_array_equal(again.train.sizes, first.train.sizes)
    fill(root, "b.jpg", content=b"")
    assert len(open_dataset(str(root)).skipped) == 1
    cache = next((tmp_path / "cache").rglob("checked-*"))
    cache.write_text("garbage")
    assert len(open_dataset(str(root)).train) == 1


def test_the_sample_sets(shared: Path, tmp_path: Path):
    photos = open_dataset(str(shared / "data" / "photos-256.tar"))
    assert (len(photos.train), len(photos.classes), photos.skipped) == (256, 256, ())
    with tarfile.open(shared / "data" / "cifar10-jpeg.tar.gz") as archive:
        for member in archive:
            if member.name.endswith(("/0000.jpg", "/0001.jpg")):
                archive.extract(member, tmp_path / "cifar", filter="data")
            if member.name.startswith("test/") and member.name.endswith("/0001.jpg") and "truck" in member.name:
                break
    cifar = open_dataset(str(tmp_path / "cifar"))
    assert len(cifar.classes) == 10
    assert cifar.test is not None
    assert set(map(tuple, cifar.train.sizes)) == {(32, 32)}


def test_a_link_to_nothing_is_counted(tmp_path: Path):
    root = fill(tmp_path / "data", "1.jpg")
    (root / "2.jpg").symlink_to(tmp_path / "nothing")
    assert [name for name, _ in open_dataset(str(root)).skipped] == ["2.jpg"]


def test_a_jpeg_whose_segments_do_not_follow_each_other_is_left_out(tmp_path: Path):
    root = fill(tmp_path / "data", "1.jpg", "2.jpg")
    damaged = bytearray((root / "2.jpg").read_bytes())
    damaged[4:6] = (0, 60)  # the length of the first segment
    (root / "2.jpg").write_bytes(damaged)
    assert [name for name, _ in open_dataset(str(root)).skipped] == ["2.jpg"]


def test_images_named_like_a_part_stay_in_their_tar(tmp_path: Path):
    (tmp_path / "data").mkdir()
    pack(tmp_path / "data" / "train-0.tar", {"a/train_1.jpg": encoded(), "b/test_1.jpg": encoded()})
    pack(tmp_path / "data" / "test-0.tar", {"a/test_2.jpg": encoded(), "b/test_3.jpg": encoded()})
    data = open_dataset(str(tmp_path / "data"))
    assert (len(data.train), len(data.test)) == (2, 2)


def test_a_list_that_is_not_text(tmp_path: Path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(DataError, match="UTF-8"):
        open_dataset(str(tmp_path / "list.txt"))


def test_a_link_to_a_folder_above_is_followed_once(tmp_path: Path):
    root = fill(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    (root / "b" / "up").symlink_to(root)
    assert len(open_dataset(str(root)).train) == 2
