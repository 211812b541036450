"""What is found in folders, tars and lists, and what is refused or left out."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.data import eval_images
from simclr_fast.data.policy import Policy
from simclr_fast.data.sources import KNOWN, DataError, Dataset, Split, open_dataset, samples, scan, write_skipped
from tests.images_common import encoded, fill, pack


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_train_and_test_folders(tmp_path: Path):
    root = fill(tmp_path / "set", "train/b/1.jpg", "train/a/2.JPEG", "test/a/3.Jpg", "test/c/4.jpg", "train/a/notes.md")
    data = open_dataset(str(root))
    assert (data.name, data.classes, data.train.names) == ("set", ("a", "b"), ["a/2.JPEG", "b/1.jpg"])
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 1]
    assert data.test is not None
    assert data.test.names == ["a/3.Jpg"]
    assert (data.skipped, data.left_out) == ((), (("c/4.jpg", "class 'c' is not in train"),))
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
        ("shaeps", "must be an existing path or one of shapes, cifar10.* got 'shaeps'; did you mean 'shapes'"),
        ("cifar_10", "did you mean 'cifar10'"),
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
    (tmp_path / "list.txt").write_bytes("a.jpg\n".encode("utf-16"))
    with pytest.raises(DataError, match="must be UTF-8 text, got NUL bytes"):
        open_dataset(str(tmp_path / "list.txt"))


def test_a_link_to_a_folder_above_is_followed_once(tmp_path: Path):
    root = fill(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    (root / "b" / "up").symlink_to(root)
    assert len(open_dataset(str(root)).train) == 2


def test_names_that_are_not_utf8_are_read_and_shown_with_escapes(tmp_path: Path):
    raw = os.fsdecode(b"caf\xe9")
    root = tmp_path / "data"
    fill(root / raw, "1.jpg")
    fill(root / "b", os.fsdecode(b"\xff.jpg"))
    fill(root / raw, "2.jpg", content=b"no")
    (tmp_path / "list.txt").write_bytes(b"data/caf\xe9/1.jpg\tcaf\xe9\ndata/b/\xff.jpg\tb\n")
    data = open_dataset(str(root))
    assert (data.classes, data.train.names) == (("b", "caf\\xe9"), ["b/\\xff.jpg", "caf\\xe9/1.jpg"])
    assert data.skipped == (("caf\\xe9/2.jpg", "it is not an image"),)
    assert data.train.read(0).tobytes() == encoded()
    json.dumps([data.train.names, data.skipped], ensure_ascii=False).encode()
    assert open_dataset(str(tmp_path / "list.txt")).classes == ("b", "caf\\xe9")


def test_folders_that_cannot_be_listed_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "data", "a/1.jpg", "b/2.jpg", "c/3.jpg")
    listed = os.scandir

    def refuse(folder):
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # not by its mode, which does not bind root
    data = open_dataset(str(root))
    assert data.train.names == ["a/1.jpg", "c/3.jpg"]
    ((name, reason),) = data.skipped
    assert name == "b/"
    assert "Permission denied" in reason


def hundred(tmp_path: Path, bad: int) -> Path:
    fill(tmp_path / "set", *(f"train/{k:03d}.jpg" for k in range(80)), *(f"test/{k:03d}.jpg" for k in range(20)))
    return fill(tmp_path / "set", *(f"test/{k:03d}.jpg" for k in range(bad)), content=b"")


def test_five_in_a_hundred_may_be_unreadable(tmp_path: Path):
    data = open_dataset(str(hundred(tmp_path, 5)))
    assert data.test is not None
    assert (len(data.train), len(data.test), len(data.skipped)) == (80, 15, 5)


def test_more_are_refused_and_it_says_what_to_do(tmp_path: Path):
    root = str(hundred(tmp_path, 6))
    with pytest.raises(
        DataError, match=r"at most 5 % .* got 6 of 100 .* first test/000.jpg: it has zero bytes"
    ) as error:
        open_dataset(root)
    assert "--tolerate-unreadable (0.07)" in str(error.value)
    assert len(open_dataset(root, tolerate=0.07).skipped) == 6


def test_of_fewer_than_twenty_any_number_may_be_unless_none_is_tolerated(tmp_path: Path):
    root = fill(fill(tmp_path / "set", "1.jpg"), "2.jpg", "3.jpg", content=b"")
    assert len(open_dataset(str(root)).train) == 1
    with pytest.raises(DataError, match="at most 0 %"):
        open_dataset(str(root), tolerate=0)
    with pytest.raises(DataError, match="tolerate must be a share"):
        open_dataset(str(root), tolerate=5)


def test_what_was_skipped_is_written_line_by_line(tmp_path: Path):
    root = fill(fill(tmp_path / "set", "1.jpg"), "a\tb\n.jpg", content=b"")
    data, path = open_dataset(str(root)), tmp_path / "run" / "skipped.tsv"
    write_skipped(path, data)
    assert path.read_text() == "a\\tb\\n.jpg\tit has zero bytes\n"
    assert [file.name for file in path.parent.iterdir()] == ["skipped.tsv"]
    write_skipped(path, Dataset("set", data.train, None, (), ()))
    assert not path.exists()
    write_skipped(path, Dataset("set", data.train, None, (), ()))


@pytest.mark.parametrize("engine", ["auto", "torchvision"])
def test_pixels_are_read_as_they_are(engine: str):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    sizes = np.full((5, 2), 8)
    split = Split(list("abcde"), ["x"] * 5, np.zeros(5, int), np.zeros(5, int), sizes, np.full(5, -1), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(split.read(3).tobytes()))), pixels[3])
    policy = Policy(8)
    ((images, indices),) = eval_images(split, policy, batch=5, workers=0, engine=engine)
    shown = images.permute(0, 2, 3, 1).numpy() * np.array(policy.std) + np.array(policy.mean)
    np.testing.assert_allclose(255 * shown, pixels[indices], atol=0.02)


def test_a_file_that_has_become_shorter_is_not_read(tmp_path: Path):
    split = open_dataset(str(fill(tmp_path / "set", "1.jpg"))).train
    os.truncate(tmp_path / "set" / "1.jpg", 100)
    with pytest.raises(OSError, match="it is shorter than"):
        split.read(0)


def test_known_names_are_text_and_shapes_is_first():
    assert KNOWN[0] == "shapes"
    assert {"cifar10", "cifar100", "stl10", "food101"} < set(KNOWN)


def test_nothing_is_printed_or_left_over_for_a_small_set(tmp_path: Path, capfd: pytest.CaptureFixture):
    open_dataset(str(fill(tmp_path / "set", "1.jpg")))
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()


def test_where_the_search_and_the_check_take_long_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(samples.Ticker, "due", lambda self: True)
    fill(fill(tmp_path / "set", "1.jpg"), "2.jpg", content=b"")
    open_dataset(str(tmp_path / "set"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "finding images: 1"
    assert lines[-1].startswith("checking images: 2 of 2, ")
    assert lines[-1].endswith(" images/s, 0:00:00 left, 1 unreadable")


def test_a_full_disk_costs_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scan, "CACHED_FROM", 1)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(open_dataset(str(fill(tmp_path / "set", "1.jpg"))).train) == 1


@pytest.mark.parametrize(("bad", "total"), [(29, 100), (57, 100), (1, 20), (7, 25)])
def test_the_share_that_is_advised_is_enough(tmp_path: Path, bad: int, total: int):
    fill(tmp_path / "set", *(f"{k:03d}.jpg" for k in range(total)), content=encoded((1, 1)))
    root = str(fill(tmp_path / "set", *(f"{k:03d}.jpg" for k in range(bad)), content=b""))
    assert len(open_dataset(root, tolerate=bad / total).skipped) == bad
    with pytest.raises(DataError) as error:
        open_dataset(root, tolerate=0.01)
    advised = float(str(error.value).rpartition("(")[2].rstrip(")"))
    assert len(open_dataset(root, tolerate=advised).skipped) == bad


def test_a_file_is_written_whole_or_not_at_all_also_at_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        samples.write_whole(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())
