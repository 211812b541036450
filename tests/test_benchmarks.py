"""The 12 transfer sets: how they lie on the disk, how they are divided, and what is wrong with some."""

import urllib.error
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from simclr_fast.data import DataError
from simclr_fast.evaluation.benchmarks import BENCHMARKS, Task, fingerprint, open_task, published
from simclr_fast.evaluation.benchmarks.task import draw, hold_out
from tests.transfer_miniatures import MAKERS, class_folders, make, write

OFFICIAL_VAL = {"fgvc_aircraft", "voc2007", "dtd", "flowers102"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(name: str, folder: Path, **options) -> Task:
    task = open_task(BENCHMARKS[name], folder, workers=1, **options)
    assert task is not None
    return task


def test_every_set_has_a_miniature_and_the_papers_figures():
    assert list(MAKERS) == list(BENCHMARKS)
    assert [round(100 * published("linear", "SimCLR", name), 1) for name in ("food101", "birdsnap", "flowers102")] == [
        68.4, 37.4, 91.2,
    ]  # fmt: skip
    assert published("finetune", "supervised", "voc2007") == pytest.approx(0.850)
    assert published("linear", "SimCLR 4x", "oxford_iiit_pet") == pytest.approx(0.892)
    for mode in ("linear", "finetune"):
        for method in ("SimCLR", "supervised", "SimCLR 4x", "supervised 4x"):
            assert all(0.37 < published(mode, method, name) < 0.99 for name in BENCHMARKS)


@pytest.mark.parametrize("name", MAKERS)
def test_torchvision_opens_the_miniature_and_the_task_has_its_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    benchmark, folder = BENCHMARKS[name], make(name, tmp_path, monkeypatch)
    task = opened(name, folder)
    assert len(task.classes) == 3
    parts = (task.train, task.val, task.test)
    rows = np.concatenate(parts)
    assert len(set(rows)) == len(rows)
    assert all(len(part) for part in parts)
    if not benchmark.kind:
        return
    theirs = {
        part: getattr(datasets, benchmark.kind)(str(folder / name), download=False, **options)
        for part, options in benchmark.parts.items()
    }
    if "test" in theirs:
        assert len(task.test) == len(theirs["test"])
        assert len(task.train) + len(task.val) == sum(len(one) for part, one in theirs.items() if part != "test")
    if name in OFFICIAL_VAL:
        assert len(task.val) == len(theirs["val"])
    for part, row in (("test", task.test[1]), ("train", task.train[0])):
        if part in theirs and task.images.pixels is not None and part == "test":
            np.testing.assert_array_equal(task.images.pixels[row], np.asarray(theirs[part][1][0]))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "voc2007"])
def test_an_image_has_the_class_of_its_colour(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = opened(name, make(name, tmp_path, monkeypatch))
    colours = {}
    for row in np.concatenate([task.train, task.val, task.test]):
        colour = mean_colour(task, int(row)).argmax()
        assert colours.setdefault(int(task.targets[row]), colour) == colour
    assert len(colours) == 3


def mean_colour(task: Task, row: int) -> np.ndarray:
    from simclr_fast.data.engines.torchvision_engine import decode

    return decode(task.images.read(row)).double().mean((1, 2)).numpy()


def test_difficult_objects_of_voc_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = opened("voc2007", make("voc2007", tmp_path, monkeypatch))
    assert task.classes == ("aeroplane", "bird", "cat")
    assert task.several
    by_name = dict(zip(task.images.names, task.targets.tolist(), strict=True))
    assert by_name["VOCdevkit/VOC2007/JPEGImages/000000.jpg"] == [1, 0, 0]
    assert by_name["VOCdevkit/VOC2007/JPEGImages/002001.jpg"] == [-1, 1, 1]


def test_an_easy_object_counts_beside_a_difficult_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make("voc2007", tmp_path, monkeypatch) / "voc2007" / "VOCdevkit" / "VOC2007"
    objects = "".join(f"<object><name>cat</name><difficult>{hard}</difficult></object>" for hard in (1, 0, 1))
    (base / "Annotations" / "000000.xml").write_text(f"<annotation>{objects}</annotation>")
    task = opened("voc2007", tmp_path)
    assert task.targets[list(task.images.names).index("VOCdevkit/VOC2007/JPEGImages/000000.jpg")].tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", ["food101", "sun397", "caltech101"])
def test_what_is_drawn_depends_on_the_seed_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make(name, tmp_path, monkeypatch, 8)
    (folder / "sun397" / "SUN397" / "Training_01.txt").unlink(missing_ok=True)
    first, again, other = (opened(name, folder, seed=seed) for seed in (0, 0, 1))
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(first, part), getattr(again, part))
    assert first.val.tolist() != other.val.tolist()


def test_caltech_trains_on_30_of_each_class_with_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = opened("caltech101", make("caltech101", tmp_path, monkeypatch))
    assert "BACKGROUND_Google" in task.classes
    labels = task.targets.numpy()
    assert np.bincount(labels[np.concatenate([task.train, task.val])]).tolist() == [30, 30, 30]
    assert np.bincount(labels[task.val]).tolist() == [3, 3, 3]
    assert np.bincount(labels[task.test]).tolist() == [4, 4, 4]
    assert any("BACKGROUND_Google is a class" in note for note in task.notes)


def test_sun_has_its_first_split_where_the_lists_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = opened("sun397", make("sun397", tmp_path, monkeypatch))
    assert task.classes == ("abbey", "bakery/shop", "zoo")
    assert all("/sun_b" in task.images.names[row] for row in task.test)
    assert all("/sun_a" in task.images.names[row] for row in (*task.train, *task.val))
    (tmp_path / "sun397" / "SUN397" / "Testing_01.txt").unlink()
    drawn = opened("sun397", tmp_path)
    assert (len(drawn.train) + len(drawn.val), len(drawn.test)) == (12, 12)
    assert any("not the official first split" in note for note in drawn.notes)


def test_an_image_that_the_lists_of_sun_name_and_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make("sun397", tmp_path, monkeypatch)
    (folder / "sun397" / "SUN397" / "z" / "zoo" / "sun_a000.jpg").unlink()
    with pytest.raises(
        DataError, match="sun397 .* must be whole, .*1 of the 24 images that its lists name are missing"
    ):
        opened("sun397", folder)


def test_drawing_and_holding_out():
    labels = np.array([0] * 10 + [1] * 3 + [2])
    rest, held = hold_out(labels, np.arange(14), np.random.default_rng(0))
    assert labels[held].tolist() == [0, 1]
    assert sorted([*rest, *held]) == list(range(14))
    train, test = draw(labels, np.arange(13), (4, None), np.random.default_rng(0))
    assert np.bincount(labels[train]).tolist() == [4, 2]
    assert np.bincount(labels[test]).tolist() == [6, 1]
    train, test = draw(labels, np.arange(13), (4, 4), np.random.default_rng(0))
    assert np.bincount(labels[train]).tolist() == [4, 1]
    assert np.bincount(labels[test]).tolist() == [4, 2]


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "voc2007"])
def test_any_set_may_be_folders_of_parts(name: str, tmp_path: Path):
    class_folders(tmp_path / name, {"train": 3, "val": 2, "test": 2})
    task = opened(name, tmp_path)
    assert (len(task.train), len(task.val), len(task.test)) == (9, 6, 6)
    assert task.classes == ("a", "b", "c")
    assert any("not the paper's set: 3 classes, not" in note for note in task.notes)


def test_an_image_in_several_class_folders_has_several_classes(tmp_path: Path):
    class_folders(tmp_path / "voc2007", {"train": 3, "val": 2, "test": 2})
    task = opened("voc2007", tmp_path)
    assert (len(task.train), len(task.val), len(task.test)) == (3, 2, 2)  # 0.jpg lies in a, b and c
    assert (task.targets == 1).all()


def test_folders_of_parts_without_val_or_without_test(tmp_path: Path):
    class_folders(tmp_path / "dtd", {"train": 10, "test": 2})
    assert [len(part) for part in (lambda t: (t.train, t.val, t.test))(opened("dtd", tmp_path))] == [27, 3, 6]
    class_folders(tmp_path / "food101", {"train": 10, "validation": 2})
    task = opened("food101", tmp_path)
    assert (len(task.val), len(task.test)) == (3, 6)
    assert any("no test folder" in note for note in task.notes)


def test_a_pool_of_class_folders_is_drawn_from_only_where_the_paper_draws(tmp_path: Path):
    class_folders(tmp_path / "caltech101", {"": 33})
    task = opened("caltech101", tmp_path)
    assert (len(task.train) + len(task.val), len(task.test)) == (90, 9)
    class_folders(tmp_path / "dtd", {"": 3})
    with pytest.raises(
        DataError, match=r"dtd in .* must hold train/CLASS/\* and test/CLASS/\*, or dtd/dtd as torchvision"
    ):
        opened("dtd", tmp_path)


def test_other_images_and_other_divisions_are_told_apart(tmp_path: Path):
    for place, first in (("a", 0), ("again", 0), ("b", 1)):
        for part in ("train", "test"):
            for number in range(first, first + 2 + 2 * (part == "train")):
                for label in ("ant", "bee"):
                    write(tmp_path / place / "food101" / part / label / f"{number}.jpg", label == "bee", number)
    one, again, other = (opened("food101", tmp_path / place) for place in ("a", "again", "b"))
    assert fingerprint([one]) == fingerprint([again])
    assert fingerprint([one]).startswith("12 images (")
    divided = opened("food101", tmp_path / "a", seed=1)
    assert len({fingerprint(tasks) for tasks in ([one], [other], [divided], [one, other])}) == 4


def test_a_set_that_is_not_there(tmp_path: Path):
    assert open_task(BENCHMARKS["food101"], tmp_path) is None
    assert open_task(BENCHMARKS["caltech101"], tmp_path / "none") is None
    assert list(tmp_path.iterdir()) == []


def test_sets_beside_one_another_as_torchvision_lays_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make("food101", tmp_path, monkeypatch)
    assert opened("food101", tmp_path / "food101").classes == ("pie", "soup", "waffles")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("empty", "must hold train/CLASS/\\* .* got no folder of images"),
        ("no labels", "must have a folder for each class, train/CLASS/\\*, got train/1.jpg"),
        ("no test", "must hold test/CLASS/\\*, got the folders train"),
        ("one class", "must hold two classes or more"),
        ("unseen", "must have training images of every class that is tested, got none of 1 \\(d\\)"),
        ("one each", "must have two training images or more of some class"),
        ("empty val", "must have training images that can be read|cannot be read"),
    ],
)
def test_folders_that_are_wrong_are_refused(wrong: str, message: str, tmp_path: Path):
    root = tmp_path / "birdsnap"
    root.mkdir()
    if wrong == "no labels":
        write(root / "train" / "1.jpg", 0, 0)
        write(root / "test" / "a" / "1.jpg", 0, 0)
    elif wrong == "no test":
        class_folders(root, {"train": 2})
    elif wrong == "one class":
        class_folders(root, {"train": 2, "test": 2}, ("a",))
    elif wrong == "unseen":
        class_folders(root, {"train": 3, "test": 2})
        write(root / "test" / "d" / "1.jpg", 0, 0)
    elif wrong == "one each":
        class_folders(root, {"train": 1, "test": 2})
    elif wrong == "empty val":
        class_folders(root, {"train": 2, "test": 2})
        for path in (root / "train").rglob("*.jpg"):
            path.write_bytes(b"")
    with pytest.raises(DataError, match=f"data birdsnap.* {message}"):
        opened("birdsnap", tmp_path)


def test_damaged_files_are_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make("food101", tmp_path, monkeypatch)
    (folder / "food101" / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(DataError, match="food101 in .* must be whole, as torchvision unpacks it, got: "):
        opened("food101", folder)
    make("caltech101", folder, monkeypatch)
    base = folder / "caltech101" / "caltech101" / "101_ObjectCategories"
    (base / "BACKGROUND_Google").rename(base / "zebra")
    with pytest.raises(DataError, match="caltech101 .* there is no folder BACKGROUND_Google"):
        opened("caltech101", folder)


def test_unreadable_images_are_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, *others = (make("dtd", tmp_path, monkeypatch) / "dtd").rglob("woven_2*.jpg")
    first.write_bytes(b"")
    task = opened("dtd", tmp_path)
    assert len(task.test) == 11
    assert "unreadable images, left out: 1" in task.notes
    for path in others:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="at most 5 % images that cannot be read, got 4 of 36"):
        opened("dtd", tmp_path)


def test_a_class_folder_that_is_missing_though_lists_name_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make("food101", tmp_path, monkeypatch)
    for path in (folder / "food101" / "food-101" / "images" / "soup").iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match="at most 5 % images that cannot be read, got 8 of 24 in 'food101', .*soup.*; remove"
    ):
        opened("food101", folder)


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError, match=rf"dtd cannot be fetched into {tmp_path}: .*Name or service not known"):
        open_task(BENCHMARKS["dtd"], tmp_path, download=True)
    for name in ("birdsnap", "stanford_cars"):
        with pytest.raises(DataError, match=f"{name} must be copied into .*{name}, for there is no download of it"):
            open_task(BENCHMARKS[name], tmp_path, download=True)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make("flowers102", tmp_path, monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="flowers102 needs the package scipy: pip install scipy"):
        opened("flowers102", tmp_path)
