"""What the check of an image refuses, and what size it finds."""

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.data.sources.check import Verdict, check
from tests.images_common import encoded


def verdict(content: bytes, tmp_path: Path) -> Verdict:
    path = tmp_path / "image"
    path.write_bytes(content)
    return check(str(path), 0, len(content))


@pytest.mark.parametrize(
    ("size", "mode", "kind"),
    [
        ((1, 1), "RGB", "JPEG"),
        ((3, 2000), "RGB", "JPEG"),
        ((20000, 100), "RGB", "JPEG"),
        ((12, 9), "CMYK", "JPEG"),
        ((12, 9), "L", "JPEG"),
        ((12, 9), "1", "PNG"),
        ((12, 9), "P", "PNG"),
        ((12, 9), "RGBA", "PNG"),
        ((12, 9), "I;16", "PNG"),
        ((12, 9), "RGB", "WEBP"),
    ],
)
def test_sound_images_have_their_size(tmp_path: Path, size: tuple[int, int], mode: str, kind: str):
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.full(size, 40000, np.uint16)).save(buffer, kind)
        content = buffer.getvalue()
    else:
        content = encoded(size, mode, kind)
    assert verdict(content, tmp_path) == Verdict(*size)


def test_a_turned_image_has_the_size_that_it_is_stored_in(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert verdict(encoded((10, 20), exif=exif), tmp_path) == Verdict(10, 20)


@pytest.mark.parametrize("side", [(10_001, 10_000), (20_000, 20_000)])
def test_too_many_pixels_are_a_fault_in_plain_words(tmp_path: Path, side: tuple[int, int]):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", side).save(buffer, "PNG")
        found = verdict(buffer.getvalue(), tmp_path)
    assert found.fault == "it has over 100 megapixels"


def test_a_float_or_unended_text_pixmap_is_refused_as_dali_does(tmp_path: Path):
    buffer = io.BytesIO()
    Image.new("F", (4, 4)).save(buffer, "PPM")
    assert "not supported" in verdict(buffer.getvalue(), tmp_path).fault
    assert verdict(b"P2\n2 2\n255\n1 2 3 4\n", tmp_path) == Verdict(2, 2)
    assert "cut short" in verdict(b"P2\n2 2\n255\n1 2 3 4", tmp_path).fault


@pytest.mark.parametrize("damage", ["no end", "checksum", "last chunk"])
def test_a_png_must_have_its_chunks_to_the_end(tmp_path: Path, damage: str):
    content = bytearray(encoded(kind="PNG"))
    if damage == "no end":
        del content[-12:]
    elif damage == "checksum":
        content[-14] ^= 1  # of the last data chunk
    else:
        content[-8] ^= 1
    assert verdict(bytes(content), tmp_path).fault


def test_a_bmp_must_have_its_last_padding_and_a_palette_that_fits(tmp_path: Path):
    content = bytearray(encoded((5, 7), "L", "BMP"))
    assert verdict(content, tmp_path) == Verdict(5, 7)
    assert "cut short" in verdict(content[:-1], tmp_path).fault
    content = bytearray(encoded((5, 7), "1", "BMP"))
    assert verdict(content, tmp_path) == Verdict(5, 7)
    content[46:50] = (40_000).to_bytes(4, "little")
    assert "damaged" in verdict(content, tmp_path).fault


def test_what_dali_refuses_or_shows_otherwise_is_refused(tmp_path: Path):
    header = struct.pack("<2sI4xIIiiHHIIiiII", b"BM", 54 + 8, 54, 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
    assert verdict(header + bytes(8), tmp_path).fault == "a BMP of 16 bits a pixel is not supported"
    assert verdict(b"P5 2 2 255\n1234", tmp_path) == Verdict(2, 2)
    assert verdict(b"P5 2 # 9\n2 65535\n12345678", tmp_path) == Verdict(2, 2)
    assert verdict(b"P4 2 2\n12", tmp_path) == Verdict(2, 2)
    largest = "a pixmap must have 255 or 65535 as its largest value, not 100"
    assert verdict(b"P5 2 # 255\n2 100\n1234", tmp_path).fault == largest
    assert verdict(b"P3\n1 1\n100\n1 2 3\n", tmp_path).fault == largest
    assert verdict(b"PyP 2 2 255\n1234", tmp_path).fault == "of pixmaps only P1 to P6 are supported"
    assert verdict(b"P0CMYK 1 1 255\n1234", tmp_path).fault == "of pixmaps only P1 to P6 are supported"


def test_what_is_no_file_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert check(str(tmp_path / "pipe.jpg"), 0, 10).fault == "it is not a regular file"
    assert check(str(tmp_path), 0, 10).fault == "it is not a regular file"


def test_a_file_without_permission_is_a_fault_for_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)  # not by its mode, which does not bind root
    found = check("a.jpg", 0, 10)
    assert (found.fault, found.lasting) == ("OSError: [Errno 13] Permission denied", False)


def test_a_file_that_shrinks_or_goes_is_a_fault_for_now(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(encoded())
    assert check(str(tmp_path / "a.jpg"), 0, 10**6) == Verdict(0, 0, "its file is cut short", False)
    gone = check(str(tmp_path / "gone.jpg"), 0, 10)
    assert (gone.fault, gone.lasting) == ("OSError: [Errno 2] No such file or directory", False)
