"""Packing: what is in the shards, whatever stops it, and what is refused."""

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.data import DataError, Dataset, Split, open_dataset
from simclr_fast.data.commands import shards
from simclr_fast.data.commands.pack import Packing, Progress, pack
from simclr_fast.data.commands.shards import MANIFEST, Manifest

N = 20  # images of the set, 16 of them for training


def encoded(number: int, size: tuple[int, int] = (9, 12), kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def fill(root: Path) -> Path:
    for k in range(N):
        path = root / ("test" if k >= 16 else "train") / ("früh", "b")[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k))
    return root


def contents(split: Split, dataset: Dataset) -> list[tuple[str, bytes]]:
    assert split.labels is not None
    return [(dataset.classes[split.labels[k]], split.read(k).tobytes()) for k in range(len(split))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fill(tmp_path / "source")


@pytest.fixture
def dataset(source: Path) -> Dataset:
    return open_dataset(str(source))


def test_the_shards_open_as_the_same_set_in_another_order(dataset: Dataset, tmp_path: Path):
    manifest = pack(dataset, tmp_path / "packed", settings=Packing(per_shard=5))
    assert [shard.images for shard in manifest.shards] == [5, 5, 5, 1, 4]
    assert sorted(files(tmp_path / "packed")) == sorted(
        [MANIFEST, *(f"train-00000{k}.{kind}" for k in range(4) for kind in ("idx", "tar"))]
        + ["test-000000.idx", "test-000000.tar"]
    )
    packed = open_dataset(str(tmp_path / "packed"))
    assert (packed.classes, packed.skipped) == (dataset.classes, ())
    for ours, theirs in ((dataset.train, packed.train), (dataset.test, packed.test)):
        assert ours is not None
        assert theirs is not None
        before, after = contents(ours, dataset), contents(theirs, packed)
        assert before != after
        assert sorted(before) == sorted(after)


def test_dali_reads_the_shards(dataset: Dataset, tmp_path: Path):
    dali = pytest.importorskip("nvidia.dali", reason="DALI exists for Linux only")
    pack(dataset, tmp_path / "packed", settings=Packing(per_shard=6))
    tars = sorted(map(str, (tmp_path / "packed").glob("train-*.tar")))

    @dali.pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def reader():
        indices = [tar.replace(".tar", ".idx") for tar in tars]
        return tuple(dali.fn.readers.webdataset(paths=tars, index_paths=indices, ext=["jpg", "cls"]))

    images, classes = reader().run()
    found = [(bytes(np.asarray(classes[k])).decode(), bytes(np.asarray(images[k]))) for k in range(16)]
    assert sorted(found) == sorted(contents(dataset.train, dataset))


def test_the_bytes_depend_on_the_seed_and_not_on_the_workers(dataset: Dataset, tmp_path: Path):
    settings = Packing(per_shard=7, short_side=6)
    for name, workers in (("one", 1), ("five", 5)):
        pack(dataset, tmp_path / name, settings=settings, workers=workers)
    pack(dataset, tmp_path / "other", settings=Packing(per_shard=7, short_side=6, seed=1))
    assert files(tmp_path / "one") == files(tmp_path / "five")
    assert files(tmp_path / "one")["train-000000.tar"] != files(tmp_path / "other")["train-000000.tar"]


def test_shards_stay_below_their_size(dataset: Dataset, tmp_path: Path):
    manifest = pack(dataset, tmp_path / "packed", settings=Packing(shard_mib=0.02))
    assert len(manifest.shards) > 2
    assert all(shard.bytes <= 0.02 * 2**20 for shard in manifest.shards)
    alone = pack(dataset, tmp_path / "alone", settings=Packing(shard_mib=1e-3))
    assert {shard.images for shard in alone.shards} == {1}


def test_images_are_made_smaller_and_never_larger(tmp_path: Path):
    profile = {"exif": Image.Exif().tobytes(), "icc_profile": b"profile", "comment": b"text"}
    originals = {
        "tall.jpg": encoded(1, (400, 100), **profile),
        "wide.png": encoded(2, (50, 90), "PNG", "RGBA"),
        "gray.jpg": encoded(3, (64, 64), mode="L"),
        "cmyk.jpg": encoded(4, (64, 64), mode="CMYK"),
        "deep.png": encoded(5, (64, 64), "PNG", "I;16"),
        "small.jpg": encoded(6, (300, 32)),
    }
    (tmp_path / "source").mkdir()
    for name, content in originals.items():
        (tmp_path / "source" / name).write_bytes(content)
    pack(open_dataset(str(tmp_path / "source")), tmp_path / "packed", settings=Packing(short_side=32))
    packed = open_dataset(str(tmp_path / "packed")).train
    assert sorted(map(tuple, packed.sizes.tolist())) == sorted([(128, 32), (32, 58), *3 * [(32, 32)], (300, 32)])
    images = {tuple(size): Image.open(io.BytesIO(packed.read(k).tobytes())) for k, size in enumerate(packed.sizes)}
    modes = [Image.open(io.BytesIO(packed.read(k).tobytes())).mode for k in range(len(packed))]
    assert sorted(modes) == ["L", *5 * ["RGB"]]
    assert not {"exif", "icc_profile", "comment"} & set(images[128, 32].info)
    assert originals["small.jpg"] in [packed.read(k).tobytes() for k in range(len(packed))]
    plain = Image.open(io.BytesIO(originals["tall.jpg"])).resize((32, 128), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(images[128, 32], float) - np.asarray(plain, float)).mean() < 2


def test_an_array_becomes_pngs_of_the_same_pixels(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    zeros = np.zeros(3, np.int64)
    split = Split(list("abc"), ["x"] * 3, zeros, zeros, np.full((3, 2), 8), np.array([0, 1, -1]), pixels)
    pack(Dataset("x", split, None, ("no", "yes"), ()), tmp_path / "packed")
    packed = open_dataset(str(tmp_path / "packed")).train
    found = [np.asarray(Image.open(io.BytesIO(packed.read(k).tobytes()))).tobytes() for k in range(3)]
    assert sorted(found) == sorted(image.tobytes() for image in pixels)


KILLED = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from simclr_fast.data import open_dataset
from simclr_fast.data.commands import shards
from simclr_fast.data.commands.pack import Packing, pack

source, parent = map(Path, sys.argv[1:])
dataset, settings = open_dataset(str(source)), Packing(per_shard=7)
files = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
pack(dataset, parent / "whole", settings=settings, workers=1)
whole = files(parent / "whole")

def doomed(moment):
    left = itertools.count(moment, -1)
    def before(function):
        def wrapped(*args):
            if not next(left):
                if function is write:
                    args[0].file.write(args[1][: len(args[1]) // 2])
                    args[0].file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return wrapped
    write, shards.Tar._write = shards.Tar._write, before(shards.Tar._write)
    os.replace, os.fsync = before(os.replace), before(os.fsync)

write = shards.Tar._write
for moment in itertools.count(1, 9):
    folder = parent / str(moment)
    child = os.fork()
    if not child:
        doomed(moment)
        pack(dataset, folder, settings=settings, workers=1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        break
    left = files(folder)
    named = {name: content for name, content in left.items() if not name.endswith(".partial")}
    manifest = shards.Manifest.load(folder)
    listed = manifest.shards if manifest else ()
    assert all(content == whole[name] for name, content in named.items() if name != "manifest.json"), moment
    assert not any(shards.shard_fault(folder, shard) for shard in listed), moment
    assert len(set(left) - set(named)) <= 2, left.keys()  # a tar's and its index's
    pack(dataset, folder, settings=settings, workers=1)
    assert files(folder) == whole, moment
    shutil.rmtree(folder)
print(moment)
"""


def test_killed_at_any_moment_it_leaves_whole_shards_and_goes_on_to_the_same_bytes(source: Path, tmp_path: Path):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert not done.returncode, done.stderr
    assert int(done.stdout) > 100


def test_a_finished_set_is_verified_and_a_damaged_shard_written_again(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, settings = tmp_path / "packed", Packing(per_shard=4)
    first = pack(dataset, folder, settings=settings)
    whole, times = files(folder), {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert pack(dataset, folder, settings=settings) == first
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == times
    damaged = bytearray(whole["train-000001.tar"])
    damaged[700] ^= 1
    (folder / "train-000001.tar").write_bytes(damaged)
    (folder / "train-000002.tar").unlink()
    (folder / "test-000000.idx").write_text("v1.2 0\n")
    pack(dataset, folder, settings=settings)
    assert files(folder) == whole
    told = capsys.readouterr().err
    assert "train-000001.tar is written again: its checksum is" in told
    assert "train-000002.tar is written again: train-000002.tar is missing" in told
    assert "test-000000.tar is written again: its index does not match" in told
    assert (folder / "train-000003.tar").stat().st_mtime_ns == times[folder / "train-000003.tar"]


def test_other_settings_or_images_are_refused_with_what_differs(dataset: Dataset, source: Path, tmp_path: Path):
    pack(dataset, tmp_path / "packed", settings=Packing(per_shard=4))
    with pytest.raises(DataError, match="another set.*seed: 0 -> 3; per_shard: 4 -> None; shard_mib: None -> 256.0"):
        pack(dataset, tmp_path / "packed", settings=Packing(seed=3))
    (source / "train" / "b" / "1.jpg").rename(source / "train" / "b" / "1_.jpg")
    with pytest.raises(DataError, match="names, sizes or labels"):
        pack(open_dataset(str(source)), tmp_path / "packed", settings=Packing(per_shard=4))
    (source / "train" / "b" / "1_.jpg").unlink()
    with pytest.raises(DataError, match="train images: 16 -> 15"):
        pack(open_dataset(str(source)), tmp_path / "packed", settings=Packing(per_shard=4))


@pytest.mark.parametrize("content", ["garbage", '{"layout": 1}', '{"layout": 99}'])
def test_a_manifest_that_cannot_be_used(dataset: Dataset, tmp_path: Path, content: str):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="manifest.json must be"):
        pack(dataset, tmp_path / "packed")


def test_a_folder_that_is_not_fit_stays_as_it_is(dataset: Dataset, source: Path, tmp_path: Path):
    for folder in (source, source / "deep" / "packed"):
        with pytest.raises(DataError, match="must lie outside"):
            pack(dataset, folder, source=str(source))
    assert not (source / "deep").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / MANIFEST).write_text('{"name": "of another program"}')
    with pytest.raises(DataError, match=f"must be empty .* has '{MANIFEST}'"):
        pack(dataset, tmp_path / "used")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: File exists"):
        pack(dataset, tmp_path / "file")


def test_two_at_once_are_refused(dataset: Dataset, tmp_path: Path):
    import fcntl

    (tmp_path / "packed").mkdir()
    handle = os.open(tmp_path / "packed", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            pack(dataset, tmp_path / "packed")
    finally:
        os.close(handle)


def test_a_full_disk_leaves_whole_shards_and_a_message(dataset: Dataset, tmp_path: Path):
    folder, settings = tmp_path / "packed", Packing(per_shard=15)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))  # bytes of a file; the first shard has more
        with pytest.raises(
            DataError, match="cannot be written: File too large; 0 shards in it are whole, and the same"
        ):
            pack(dataset, folder, settings=settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(files(folder)) == [MANIFEST]
    assert pack(dataset, folder, settings=settings).complete


def test_what_does_not_read_back_gets_no_name(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_sha256", lambda path: "0" * 64)
    with pytest.raises(DataError, match="does not read back as it was written"):
        pack(dataset, tmp_path / "packed")
    assert list(files(tmp_path / "packed")) == [MANIFEST]


def test_images_that_vanish_are_counted_up_to_a_share(dataset: Dataset, source: Path, tmp_path: Path):
    (source / "train" / "b" / "3.jpg").unlink()
    (source / "train" / "b" / "5.jpg").write_bytes(encoded(5, (20, 20)))
    manifest = pack(dataset, tmp_path / "packed", settings=Packing(per_shard=4))
    assert dict(manifest.lost) == {
        "train/b/3.jpg": "No such file or directory",
        "train/b/5.jpg": "it was changed since it was checked: image file is truncated (4 bytes not processed)",
    }
    assert sum(shard.images for shard in manifest.shards) == N - 2
    assert Manifest.load(tmp_path / "packed") == manifest
    with pytest.raises(DataError, match="images must stay .* 1 of 16 cannot be read any more; the last is train/b/"):
        pack(dataset, tmp_path / "strict", tolerate=0)
    for path in source.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="all 16 of train are gone"):
        pack(dataset, tmp_path / "gone")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got seed=-1"),
        ({"shard_mib": 0}, "shard_mib must be positive"),
        ({"per_shard": 0}, "per_shard must be at least 1"),
        ({"short_side": 0}, "short_side must be at least 1"),
        ({"quality": 101}, r"quality must be in \[1, 100\]"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        Packing(**settings)


def test_a_class_that_would_be_read_back_under_another_name(dataset: Dataset, tmp_path: Path):
    with pytest.raises(DataError, match="without space around it, got ' b'"):
        pack(Dataset("x", dataset.train, None, ("a", " b"), ()), tmp_path / "packed")


def test_the_manifest_names_what_was_done(dataset: Dataset, tmp_path: Path):
    pack(dataset, tmp_path / "packed", settings=Packing(short_side=4, seed=2))
    values = json.loads((tmp_path / "packed" / MANIFEST).read_text())
    assert values["settings"] == {"seed": 2, "shard_mib": 256.0, "short_side": 4, "quality": 92}
    assert (values["images"], values["classes"], values["complete"]) == ({"train": 16, "test": 4}, ["b", "früh"], True)


def test_the_progress_line_has_rates_and_the_time_left():
    progress = Progress("packing", 7200)
    progress.add(3600, 10**9)
    assert progress.line(1800.0) == "packing: 3,600 of 7,200 images, 2 images/s, 0.6 MB/s, 0:30:00 left"
