"""Packing again into a folder: damaged shards whose images vanished or came back, the tolerance, and interrupts."""

from pathlib import Path

import pytest

from simclr_fast.data import DataError, Dataset, open_dataset
from simclr_fast.data.commands import pack as packing
from simclr_fast.data.commands.pack import Packing, pack
from simclr_fast.data.commands.shards import MANIFEST, Manifest, Shard
from simclr_fast.data.policy import permutation

N = 40
SETTINGS = Packing(per_shard=4)


def content(number: int) -> bytes:
    return b"P6 2 2 255\n" + bytes(range(number, number + 12))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 images without classes, 00.ppm to 39.ppm."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    for k in range(N):
        (tmp_path / "source" / f"{k:02d}.ppm").write_bytes(content(k))
    return tmp_path / "source"


@pytest.fixture
def dataset(source: Path) -> Dataset:
    return open_dataset(str(source))


def names(number: int) -> list[str]:
    """Of the images of a shard."""
    return [f"{k:02d}.ppm" for k in permutation(N, 0, 0)[4 * number : 4 * number + 4].tolist()]


def loaded(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    assert manifest
    return manifest


def place(shard: Shard) -> int:
    return int(shard.name[6:12])


@pytest.mark.parametrize("number", [3, 9])
def test_a_damaged_shard_without_images_is_removed(
    source: Path, dataset: Dataset, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "packed"
    pack(dataset, folder, settings=SETTINGS)
    with open(folder / f"train-{number:06d}.tar", "ab") as file:
        file.write(b"x")
    for name in names(number):
        (source / name).unlink()
    for _ in range(2):
        manifest = pack(dataset, folder, settings=SETTINGS, tolerate=0.1)
        assert manifest == loaded(folder)
        assert manifest.complete
        assert [place(shard) for shard in manifest.shards] == [k for k in range(10) if k != number]
        assert sorted(dict(manifest.lost)) == sorted(f"train/{name}" for name in names(number))
        assert {path.name for path in folder.iterdir()} == {MANIFEST} | {
            Path(shard.name).with_suffix(end).name for shard in manifest.shards for end in (".tar", ".idx")
        }
    assert len(open_dataset(str(folder)).train) == N - 4
    assert f"train-{number:06d}.tar is removed: none of its images" in capsys.readouterr().err


def test_an_image_that_came_back_is_lost_no_more(source: Path, dataset: Dataset, tmp_path: Path):
    folder = tmp_path / "packed"
    first, second = names(2)[0], names(5)[1]
    for name in (first, second):
        (source / name).unlink()
    assert set(dict(pack(dataset, folder, settings=SETTINGS, tolerate=0.05).lost)) == {
        f"train/{first}",
        f"train/{second}",
    }
    number = int(first[:2])
    (source / first).write_bytes(content(number))
    damaged = next(shard for shard in loaded(folder).shards if shard.first <= 4 * 2 < shard.end)
    (folder / damaged.name).unlink()
    manifest = pack(dataset, folder, settings=SETTINGS, tolerate=0.05)
    assert set(dict(manifest.lost)) == {f"train/{second}"}
    assert sum(shard.images for shard in manifest.shards) == N - 1


def test_the_tolerance_is_for_all_runs_together(source: Path, dataset: Dataset, tmp_path: Path):
    folder = tmp_path / "packed"
    for name in names(0)[:2]:
        (source / name).unlink()
    pack(dataset, folder, settings=SETTINGS, tolerate=0.05)
    last = loaded(folder).shards[-1]
    (folder / last.name).unlink()
    (source / names(9)[3]).unlink()
    with pytest.raises(DataError, match="but 3 of 40 cannot be read any more; the last is train/"):
        pack(dataset, folder, settings=SETTINGS, tolerate=0.05)
    assert not loaded(folder).complete


def test_images_of_one_name_in_both_parts_are_lost_apart(source: Path, tmp_path: Path):
    for k in range(N):
        folder = source / ("train" if k % 2 else "test")
        folder.mkdir(exist_ok=True)
        (source / f"{k:02d}.ppm").rename(folder / f"{k // 2}.ppm")
    dataset = open_dataset(str(source))
    for part in ("train", "test"):
        (source / part / "7.ppm").unlink()
    assert set(dict(pack(dataset, tmp_path / "packed").lost)) == {"train/7.ppm", "test/7.ppm"}


def test_an_interrupted_verification_leaves_a_set_complete(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "packed"
    before = pack(dataset, folder, settings=SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "shard_fault", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(dataset, folder, settings=SETTINGS)
    assert loaded(folder) == before
    (folder / "train-000001.tar").unlink()
    monkeypatch.setattr(packing, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(dataset, folder, settings=SETTINGS)
    assert not loaded(folder).complete


def test_the_cores_that_the_process_may_use_are_taken(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counts: list[int] = []

    class Pool(packing.ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            counts.append(count)
            super().__init__(count)

    monkeypatch.setattr(packing, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(packing, "cores", lambda: 3)
    pack(dataset, tmp_path / "packed")
    assert counts == [3]
