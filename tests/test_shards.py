"""The format of packed shards: index, checksums, manifest."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from simclr_fast.data.commands.shards import BLOCK, MANIFEST, RECORD, Manifest, Shard, Tar, index_text, shard_fault
from simclr_fast.data.sources import DataError

SAMPLES = [
    ("000000000", {"jpg": b"x" * 700, "cls": b"dog"}),
    ("000000001", {"png": b"y" * BLOCK}),
    ("000000002", {"jpg": b"", "cls": "Käse".encode()}),
]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    tar = Tar(tmp_path, "train", 3)
    for key, files in SAMPLES:
        tar.add(key, files)
    return tar.finish(0, 3)


def manifest(**changes) -> Manifest:
    facts = {"settings": {"seed": 0}, "images": {"train": 3}, "digests": {"train": "d"}, "classes": ("a", "b")}
    return Manifest(source="set", **facts | changes)


def test_a_tar_holds_what_was_added(shard: Shard, tmp_path: Path):
    path = tmp_path / "train-000003.tar"
    assert (shard.name, shard.images, shard.bytes) == (path.name, 3, path.stat().st_size)
    assert not shard.bytes % RECORD
    with tarfile.open(path, "r:") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    assert found == {f"{key}.{kind}": content for key, files in SAMPLES for kind, content in files.items()}
    assert path.read_bytes()[257:263] == b"ustar\0"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-000003.idx", "train-000003.tar"]


def test_the_size_with_one_more_is_the_size_then(tmp_path: Path):
    tar = Tar(tmp_path, "train", 0)
    for key, files in SAMPLES:
        expected = tar.size_with(files)
        tar.add(key, files)
    assert tar.finish(0, 3).bytes == expected


def test_the_index_is_that_of_wds2idx_to_the_byte(shard: Shard, tmp_path: Path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI exists for Linux only")
    with wds2idx.IndexCreator(str(tmp_path / shard.name), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    theirs = (tmp_path / "theirs.idx").read_bytes()
    assert (tmp_path / "train-000003.idx").read_bytes() == theirs
    assert index_text(tmp_path / shard.name).encode() == theirs


def test_every_kind_of_damage_is_found(shard: Shard, tmp_path: Path):
    path, index = tmp_path / shard.name, tmp_path / "train-000003.idx"
    content, text = path.read_bytes(), index.read_text()
    assert shard_fault(tmp_path, shard) == ""
    path.write_bytes(content[:-1])
    assert shard_fault(tmp_path, shard) == f"it has {shard.bytes - 1:,} bytes, not {shard.bytes:,}"
    path.write_bytes(b"z" + content[1:])
    assert "its checksum is" in shard_fault(tmp_path, shard)
    path.write_bytes(content)
    index.write_text(text.replace("700", "701"))
    assert shard_fault(tmp_path, shard) == "its index does not match"
    index.write_bytes(b"\xff")
    assert shard_fault(tmp_path, shard)
    index.unlink()
    assert shard_fault(tmp_path, shard) == "train-000003.idx is missing"
    path.unlink()
    assert shard_fault(tmp_path, shard) == "train-000003.tar is missing"


def test_a_discarded_tar_leaves_nothing(tmp_path: Path):
    tar = Tar(tmp_path, "test", 0)
    tar.add(*SAMPLES[0])
    tar.discard()
    assert not list(tmp_path.iterdir())


def test_a_manifest_is_loaded_as_it_was_saved(shard: Shard, tmp_path: Path):
    saved = manifest(shards=(shard,), lost=(("a/ü\udce9.jpg", "gone"),), complete=True)
    saved.save(tmp_path)
    assert Manifest.load(tmp_path) == saved
    assert Manifest.load(tmp_path / "nowhere") is None


def test_a_shard_takes_the_place_of_one_of_its_name(shard: Shard):
    other = shard._replace(name="train-000004.tar")
    again = shard._replace(sha256="new")
    assert manifest(shards=(shard, other)).having(again).shards == (again, other)


def test_differences_are_named():
    ours = manifest()
    assert ours.differences(manifest(complete=True)) == []
    assert ours.differences(manifest(settings={"seed": 1}, images={"train": 4})) == [
        "seed: 0 -> 1",
        "train images: 3 -> 4",
    ]
    assert ours.differences(manifest(digests={"train": "e"})) == ["names, sizes or labels of the images"]
    assert ours.differences(manifest(classes=("a", "c"))) == ["names, sizes or labels of the images"]


@pytest.mark.parametrize(
    "values", [{"layout": 2}, {"layout": 1}, {"layout": 1, "shards": [{}], "classes": [], "lost": []}]
)
def test_a_manifest_of_another_layout_is_refused(tmp_path: Path, values: dict):
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"{MANIFEST} must be"):
        Manifest.load(tmp_path)


def test_another_programs_manifest_is_none_of_ours(tmp_path: Path):
    (tmp_path / MANIFEST).write_text("[]")
    assert Manifest.load(tmp_path) is None


def test_the_index_of_a_tar_by_another_program(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("folder"), io.BytesIO())
        for name in ("a.seg.png", "a.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    assert index_text(tmp_path / "x.tar").splitlines()[-1] == "seg.png 1024 3 a.seg.png jpg 2048 3 a.jpg"
