"""Tars: with an index beside them, with one that does not match, and damaged ones."""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from simclr_fast.data.sources import tars
from simclr_fast.data.sources.samples import Sample
from simclr_fast.data.sources.tars import tar_samples
from tests.images_common import encoded, pack

MEMBERS = {
    "./a/1.jpg": encoded(),
    "a/1.cls": b"cat\n",
    "a/2.x.jpg": encoded((30, 30)),
    "b/.hidden.jpg": encoded(),
    "n" * 120 + "/3.png": encoded(kind="PNG"),
    "4.txt": b"text",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return pack(tmp_path / "set.tar", MEMBERS)


def index(tar: Path, text: str | None = None) -> Path:
    """An index as wds2idx writes it, from what tarfile finds; or this text."""
    with tarfile.open(tar) as archive:
        lines = [f"{m.name.rpartition('.')[2]} {m.offset_data} {m.size} {m.name}" for m in archive if m.isreg()]
    path = tar.with_suffix(".idx")
    path.write_text(f"v1.2 {len(lines)}\n" + "\n".join(lines) + "\n" if text is None else text)
    return path


def found(tar: Path) -> list[Sample]:
    return tar_samples(tar.name, str(tar))


def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars that are walked from now on."""
    seen, real = [], tars._walked
    monkeypatch.setattr(tars, "_walked", lambda path, *rest: seen.append(path) or real(path, *rest))
    return seen


def test_a_matching_index_saves_the_walk(tar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    without = found(tar)
    assert [(s.name[-7:], s.label, s.fault) for s in without] == [
        ("a/1.jpg", "cat", ""),
        ("2.x.jpg", None, ""),
        ("n/3.png", None, ""),
    ]
    index(tar)
    seen = walked(monkeypatch)
    assert found(tar) == without
    assert (seen, capsys.readouterr().err) == ([], "")


def test_a_large_tar_is_walked_once_until_it_changes(tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "CACHED_FROM", 1)
    seen, first = walked(monkeypatch), found(tar)
    assert found(tar) == first
    assert len(seen) == 1
    (cache,) = (tmp_path / "cache").rglob("*.json")
    for garbage in ("garbage", "[1, 2]", "{}"):
        cache.write_text(garbage)
        assert found(tar) == first
    pack(tar, {"new.jpg": encoded()})
    assert [s.name for s in found(tar)] == ["new.jpg"]


@pytest.mark.parametrize("names", [("a/1.jpg", "b/2.jpg"), ("a/caf\u00e9.jpg", "b/back\\slash.jpg")])
def test_the_index_that_dali_writes_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]):
    script = importlib.util.find_spec("wds2idx")
    command = [sys.executable, str(script.origin)] if script else [""]
    if not command[0] or not shutil.which("tar"):
        pytest.skip("needs DALI's wds2idx and tar")
    tar = pack(tmp_path / "set.tar", {name: encoded() for name in names} | {"a/1.cls": b"0"})
    without = found(tar)
    subprocess.run([*command, str(tar), str(tar.with_suffix(".idx"))], check=True, capture_output=True)
    seen = walked(monkeypatch)
    assert found(tar) == without
    assert not seen


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "its version must be v1.2, got ''"),
        ("v1.1 1\njpg 512 10\n", "its version must be v1.2, got 'v1.1'"),
        ("v1.2 7\njpg 512 10 a.jpg\n", "it has 1 lines and says '7'"),
        ("v1.2 1\njpg 512 10\n", "a line must be of"),
        ("v1.2 1\njpg x 10 a.jpg\n", "invalid literal"),
        ("v1.2 0\n", "it lists nothing"),
        ("v1.2 1\njpg 513 10 a.jpg\n", "an offset is not of a member"),
        ("v1.2 2\njpg 512 600 a.jpg\njpg 1024 600 b.jpg\n", "its members overlap"),
        ("v1.2 1\njpg 512 99999999 a.jpg\n", "it goes beyond"),
        ("v1.2 1\njpg 1024 10 a/1.jpg\n", "a/1.jpg is not where it says"),
        (f"v1.2 1\njpg 512 {len(encoded())} b.jpg\n", "it says b.jpg, the tar ./a/1.jpg"),
        (f"v1.2 1\njpg 512 {len(encoded())} ./a/1.jpg\n", "the tar goes on after the last"),
        ("\0\udcff", "its version must be"),
    ],
)
def test_an_index_that_does_not_match_is_told_and_the_tar_walked(
    tar: Path, capsys: pytest.CaptureFixture, text: str, reason: str
):
    without = found(tar)
    tar.with_suffix(".idx").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert found(tar) == without
    said = capsys.readouterr().err
    assert "does not match its tar, which is read instead" in said
    assert reason in said


def test_an_index_of_a_tar_that_was_cut_short_is_not_believed(tar: Path, capsys: pytest.CaptureFixture):
    index(tar)
    os.truncate(tar, 2000)
    kept = found(tar)
    assert "it goes beyond the 2,000 bytes" in capsys.readouterr().err
    assert [s.fault for s in kept if s.name == "a/1.jpg"] == [""]
    assert any(s.fault for s in kept)


@pytest.mark.parametrize("cut", range(100, 4000, 300))
def test_a_tar_cut_anywhere_has_a_fault(tmp_path: Path, cut: int):
    tar = pack(tmp_path / "set.tar", {f"{k}.jpg": encoded() for k in range(4)})
    with tarfile.open(tar) as archive:
        end = archive.getmembers()[-1].offset_data + len(encoded())
    os.truncate(tar, min(cut, end))
    assert any("tar" in s.fault for s in found(tar))


def test_a_tar_cut_between_members_has_a_fault(tmp_path: Path):
    tar = pack(tmp_path / "set.tar", {f"{k}.jpg": encoded() for k in range(4)})
    with tarfile.open(tar) as archive:
        os.truncate(tar, archive.getmembers()[2].offset)
    assert [s.fault for s in found(tar)] == ["", "", "not a whole tar: its end is missing"]


def test_garbage_between_members_is_told(tmp_path: Path):
    tar = pack(tmp_path / "set.tar", {f"{k}.jpg": encoded() for k in range(4)})
    with tarfile.open(tar) as archive:
        at = archive.getmembers()[2].offset
    with open(tar, "r+b") as file:
        file.seek(at)
        file.write(b"garbage" * 40)
    assert [s.fault for s in found(tar)] == ["", "", f"not a whole tar: byte {at:,} should begin a member"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"garbage" * 1000])
def test_what_is_not_a_tar_is_a_fault(tmp_path: Path, content: bytes):
    (tmp_path / "set.tar").write_bytes(content)
    (sample,) = found(tmp_path / "set.tar")
    assert sample.fault.startswith("not a whole tar: ")


def test_a_tar_that_is_gone_is_a_fault(tmp_path: Path):
    (sample,) = found(tmp_path / "set.tar")
    assert sample.fault.startswith("OSError: ")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_utf8_are_shown_with_escapes(tmp_path: Path, form: int):
    with tarfile.open(tmp_path / "set.tar", "w", format=form, errors="surrogateescape", encoding="utf-8") as archive:
        (tmp_path / "image").write_bytes(encoded())
        archive.add(tmp_path / "image", os.fsdecode(b"caf\xe9.jpg"))
    (sample,) = found(tmp_path / "set.tar")
    assert (sample.name, sample.fault) == ("caf\\xe9.jpg", "")


@pytest.mark.parametrize(
    ("tar", "part"),
    [
        ("imagenet1k-train-0000.tar", "train/"),
        ("imagenet1k-validation-00.tar", "validation/"),
        ("data/test-0.tar", "test/"),
        ("test_of_ours/Train.0.tar", "train/"),
        ("val/0.tar", "val/"),
        ("trains-0.tar", ""),
        ("constrain.tar", ""),
    ],
)
def test_a_word_in_the_name_or_a_folder_is_the_part(tmp_path: Path, tar: str, part: str):
    pack(tmp_path / "set.tar", {"a/1.jpg": encoded()})
    assert [s.name for s in tar_samples(tar, str(tmp_path / "set.tar"))] == [f"{part}a/1.jpg"]


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.size": "abc"},
        {"GNU.sparse.map": "1,x", "GNU.sparse.size": "7"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"size": "9" * 30},
        {"size": "-1024"},
    ],
)
def test_headers_that_make_no_sense_are_a_fault(tmp_path: Path, headers: dict[str, str]):
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, more in (("1.jpg", {}), ("2.jpg", headers)):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(encoded()), more
            archive.addfile(info, io.BytesIO(encoded()))
    kept = found(tmp_path / "set.tar")
    assert [s.name for s in kept if not s.fault] == ["1.jpg"]
    assert any(s.fault.startswith("not a whole tar: ") for s in kept)


def test_an_index_with_numbers_beyond_all_files_is_told(tar: Path, capsys: pytest.CaptureFixture):
    without = found(tar)
    index(tar, f"v1.2 1\njpg {'9' * 20} 10 a.jpg\n")
    assert found(tar) == without
    assert "does not match its tar" in capsys.readouterr().err


def test_a_hard_link_is_the_image_that_it_leads_to_or_a_fault(tmp_path: Path):
    tar = tmp_path / "set.tar"
    with tarfile.open(tar, "w") as archive:
        for name, target in (("./a/1.jpg", ""), ("b/2.jpg", "a/1.jpg"), ("b/3.jpg", "gone.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.LNKTYPE, target) if target else (tarfile.REGTYPE, "")
            info.size = 0 if target else len(encoded())
            archive.addfile(info, None if target else io.BytesIO(encoded()))
    first, second, third = found(tar)
    assert second == first._replace(name="b/2.jpg")
    assert (second.length, second.fault) == (len(encoded()), "")
    assert third.fault == "it is a hard link to gone.jpg, which the tar does not hold"


def test_an_index_without_the_hard_links_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture):
    tar = tmp_path / "set.tar"
    with tarfile.open(tar, "w") as archive:
        for name, target in (("1.jpg", ""), ("2.jpg", "1.jpg"), ("3.jpg", "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.LNKTYPE, target) if target else (tarfile.REGTYPE, "")
            info.size = 0 if target else len(encoded())
            archive.addfile(info, None if target else io.BytesIO(encoded()))
    index(tar)
    assert [s.name for s in found(tar)] == ["1.jpg", "2.jpg", "3.jpg"]
    assert "it leaves out hard links" in capsys.readouterr().err


def test_a_sparse_member_is_a_fault(tmp_path: Path):
    if not (gnu := shutil.which("tar")):
        pytest.skip("needs GNU tar")
    with open(tmp_path / "1.jpg", "wb") as file:
        file.write(encoded())
        file.truncate(2**20)
    done = subprocess.run([gnu, "-cSf", "set.tar", "1.jpg"], cwd=tmp_path, capture_output=True)
    with tarfile.open(tmp_path / "set.tar") as archive:
        if done.returncode or not archive.getmembers()[0].issparse():
            pytest.skip("this tar or file system knows no holes")
    (sample,) = found(tmp_path / "set.tar")
    assert "sparse" in sample.fault


@pytest.mark.parametrize("indexed", [False, True])
def test_tars_one_behind_the_other_are_a_fault(tar: Path, indexed: bool):
    if indexed:
        index(tar)
    with open(tar, "ab") as file:
        file.write(pack(tar.with_name("second.tar"), {"9.jpg": encoded()}).read_bytes())
    *images, last = found(tar)
    assert [s.fault for s in images] == [""] * 3
    assert "more follows after its end" in last.fault


def test_members_in_hidden_folders_are_left_out(tmp_path: Path):
    tar = pack(tmp_path / "set.tar", {"a/1.jpg": encoded(), ".Trash/2.jpg": encoded(), "a/.b/c/3.jpg": encoded()})
    assert [s.name for s in found(tar)] == ["a/1.jpg"]


def test_a_label_is_found_by_webdatasets_key(tmp_path: Path):
    images = {name: encoded() for name in ("k.x.jpg", "k.y.png", "a.b/1.5.jpg")}
    labels = {"k.cls": b"one", "k.y.cls": b"two", "a.b/1.cls": b"three"}
    assert [s.label for s in found(pack(tmp_path / "set.tar", images | labels))] == ["one", "two", "three"]
