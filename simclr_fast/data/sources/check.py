"""Whether an image can be decoded. As a program, it answers for those that it is sent; scan.py starts it.

It imports Pillow and nothing of the package, so that a process of it starts quickly and stays small.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import stat
import struct
import sys
import warnings
import zlib
from typing import NamedTuple

from PIL import Image

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "PPM")  # what every engine decodes, by Pillow's names
MAX_PIXELS = 100_000_000
MAX_BYTES = 2**30
_MAX_HEADER = 2**16  # bytes of a pixmap that are searched for its largest value
RULES = 2  # what was found by other rules is not taken from the cache


class Verdict(NamedTuple):
    """The size of an image in pixels, or why it cannot be used."""

    height: int = 0
    width: int = 0
    fault: str = ""
    lasting: bool = True  # whether the fault is the file's, and so stays until the file changes


def check(path: str | bytes, offset: int, length: int) -> Verdict:
    """Decode the whole image in a stretch of a file, strictly.

    Args:
        offset, length: of the encoded image in the file, bytes.
    """
    if length > MAX_BYTES:
        return Verdict(fault=f"it has over {MAX_BYTES >> 20} MiB")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            return Verdict(fault="it is not a regular file")
        with open(path, "rb") as file:
            file.seek(offset)
            encoded = file.read(length)
    except OSError as error:  # of the disk, which may pass
        return Verdict(fault=f"OSError: [Errno {error.errno}] {error.strerror}", lasting=False)
    except ValueError as error:  # a NUL in the name
        return Verdict(fault=str(error))
    if encoded and len(encoded) < length:
        return Verdict(fault="its file is cut short", lasting=False)
    return examine(encoded)


def examine(encoded: bytes) -> Verdict:
    """Decode the whole image, strictly."""
    if not encoded:
        return Verdict(fault="it has zero bytes")
    try:
        return _decoded(encoded)
    except Image.UnidentifiedImageError:
        return Verdict(fault="it is not an image")
    except Image.DecompressionBombError:
        return Verdict(fault=_TOO_LARGE)
    except Exception as error:  # plug-ins raise whatever they like
        return Verdict(fault=str(error) or type(error).__name__, lasting=not isinstance(error, MemoryError))


_TOO_LARGE = f"it has over {MAX_PIXELS // 10**6} megapixels"


def _decoded(encoded: bytes) -> Verdict:
    with Image.open(io.BytesIO(encoded)) as image:
        if image.format not in FORMATS:
            return Verdict(fault=f"{image.format} is not supported, only {', '.join(FORMATS)}")
        if image.width * image.height > MAX_PIXELS:
            return Verdict(fault=_TOO_LARGE)
        if image.mode == "F":
            return Verdict(fault="pixels of floating point are not supported")
        image.load()
        fault = _refused(image.format, encoded, image.height, image.width)
        return Verdict(fault=fault) if fault else Verdict(image.height, image.width)


def _refused(kind: str, encoded: bytes, height: int, width: int) -> str:
    """Why DALI fails where Pillow does not, or nothing."""
    if kind in ("JPEG", "MPO") and not _whole_segments(encoded):
        return "its header is damaged"
    if kind == "PNG" and not _whole_chunks(encoded):
        return "its chunks are damaged, or it is cut short"
    if kind == "BMP" and not _whole_rows(encoded, height, width):
        return "its header is damaged, or it is cut short"
    if kind == "BMP" and _bits(encoded) == 16:
        return "a BMP of 16 bits a pixel is not supported"
    if kind == "PPM" and encoded[:2] not in _PIXMAPS:
        return "of pixmaps only P1 to P6 are supported"
    if kind == "PPM" and (largest := _largest(encoded)) not in (255, 65535):
        return f"a pixmap must have 255 or 65535 as its largest value, not {largest}"
    if kind == "PPM" and encoded[:2] in (b"P1", b"P2", b"P3") and not encoded[-1:].isspace():
        return "its last number is not ended, it may be cut short"
    return ""


_PIXMAPS = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")


def _largest(pixmap: bytes) -> int:
    """The largest value in the header of a pixmap, which DALI does not scale by; 255 where the format has none."""
    if pixmap[:2] in (b"P1", b"P4"):
        return 255
    words = re.sub(rb"#[^\r\n]*[\r\n]", b"", pixmap[2:_MAX_HEADER]).split(maxsplit=3)
    return int(words[2]) if len(words) > 2 and words[2].isdigit() else 0


def _bits(bmp: bytes) -> int:
    """Bits of a pixel, by the header of a BMP."""
    return int.from_bytes(bmp[28:30] if int.from_bytes(bmp[14:18], "little") >= 40 else bmp[24:26], "little")


def _whole_segments(jpeg: bytes) -> bool:
    """Whether the segments of a JPEG lead to its scan. Where they do not, Pillow searches on and DALI fails."""
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker == 0xDA:
            return True
        place += 1 if marker == 0xFF else 2 + 256 * jpeg[place + 2] + jpeg[place + 3]
    return False


def _whole_chunks(png: bytes) -> bool:
    """Whether the chunks of a PNG lead to its end and have their checksums. Pillow leaves out the last of them."""
    place = 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4])
        kind, end = png[place + 4 : place + 8], place + 12 + length
        if end > len(png):
            return False
        if zlib.crc32(png[place + 4 : end - 4]) != int.from_bytes(png[end - 4 : end]):
            return False
        if kind == b"IEND":
            return True
        place = end
    return False


def _whole_rows(bmp: bytes, height: int, width: int) -> bool:
    """Whether a BMP has all its rows, and no more colours than its pixels can name.

    Pillow does without the padding of the last row, and with the colours that are there.
    """
    if len(bmp) < 54:
        return False
    start, header, bits, packing, colours = struct.unpack_from("<10xII10xHI12xI", bmp)
    if header < 40 or packing:
        return True
    return start + (width * bits + 31) // 32 * 4 * height <= len(bmp) and (bits > 8 or colours <= 1 << bits)


def main() -> None:
    """Answer each line on stdin, a JSON list of [path as Latin-1, offset, length], with the list of the verdicts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when its stdin does
    warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it can read
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        found = [check(path.encode("latin-1"), offset, length) for path, offset, length in json.loads(line)]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
