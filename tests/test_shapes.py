"""The embedded data set: deterministic, whole or absent, and not readable from its raw pixels."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast import knn
from simclr_fast.data.sources import DataError
from simclr_fast.data.sources.shapes import CONTRAST, GLYPHS, LUMA, SIDE, draw, make_shapes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "simclr_fast"


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_files_are_colour_jpegs_in_class_folders(cache):
    folder = make_shapes(train=2, test=1)
    assert folder.parent == cache
    for split, count in (("train", 2), ("test", 1)):
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(GLYPHS)
        assert {len(list(path.iterdir())) for path in (folder / split).iterdir()} == {count}
    for path in folder.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))


def test_bytes_are_deterministic_and_differ_between_images(cache, monkeypatch):
    first = make_shapes(train=3, test=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "again"))
    second = make_shapes(train=3, test=2)
    assert first != second
    assert digest(first) == digest(second)
    contents = [path.read_bytes() for path in first.rglob("*.jpg")]
    assert len(set(contents)) == len(contents) == 50


def test_made_once_and_says_so_once(cache, capsys):
    folder = make_shapes(train=1, test=1)
    assert capsys.readouterr().err.count("20 images") == 1
    (folder / "mark").touch()
    assert make_shapes(train=1, test=1) == folder
    assert (folder / "mark").exists()
    assert not capsys.readouterr().err


def test_concurrent_callers_get_one_whole_folder(cache):
    with ThreadPoolExecutor(4) as pool:
        folders = {future.result() for future in [pool.submit(make_shapes, 2, 1) for _ in range(4)]}
    assert list(cache.iterdir()) == list(folders)
    assert len(list(folders.pop().rglob("*.jpg"))) == 30


def test_an_interrupted_start_leaves_nothing(cache, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("simclr_fast.data.sources.shapes._write", full_disk)
    with pytest.raises(DataError, match=r"No space left"):
        make_shapes(train=1, test=1)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        make_shapes(train=1, test=1)


@pytest.mark.parametrize("glyph", GLYPHS)
def test_glyphs_fit_the_unit_disc_and_are_darker_than_the_ground(glyph):
    y, x = np.mgrid[-1.5:1.5:151j, -1.5:1.5:151j].astype(np.float32)
    inside = GLYPHS[glyph](x, y)
    assert 0.1 < inside.mean() * 9 / np.pi < 0.8
    assert np.hypot(x, y)[inside].max() <= 1.03
    luma = draw(glyph, (0, 1)) @ np.array(LUMA)
    assert np.quantile(luma, 0.9) - luma.min() > CONTRAST


def test_raw_pixels_do_not_tell_the_class():
    """Fewer images than the set has, so a little less than its figure; chance is 10 %."""
    images = np.stack([draw(glyph, (0, i, k)) for k, glyph in enumerate(GLYPHS) for i in range(100)])
    pixels = torch.from_numpy(images).flatten(1).float() / 255 - 0.5
    labels, test = torch.arange(10).repeat_interleave(100), torch.arange(1000) % 5 == 0
    assert knn.accuracy(pixels[~test], labels[~test], pixels[test], labels[test]) <= 0.3
