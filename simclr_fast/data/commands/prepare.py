"""What becomes of one image when it is packed."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr_fast.data.engines.torchvision_engine import decode
from simclr_fast.data.sources import Split

REDUCING_GAP = 3.0  # an image is first reduced by a whole factor, to no less than this many times its final size
KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm"}


class Prepared(NamedTuple):
    """An encoded image, or why there is none."""

    kind: str = ""  # its extension
    content: bytes = b""
    fault: str = ""


def prepare(split: Split, index: int, short_side: int | None, quality: int) -> Prepared:
    """An image of a split: its bytes, or a JPEG of it if its short side is over `short_side` pixels.

    An array's image becomes a PNG. What cannot be read, or is not what was checked, has a fault.
    """
    try:
        encoded = split.read(index)
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            if (image.height, image.width) != tuple(split.sizes[index]):
                return Prepared(fault="it has changed since it was checked")
            if short_side and min(image.size) > short_side:
                return Prepared("jpg", _shrunk(image, encoded, short_side, quality))
            content = encoded.tobytes() if split.pixels is None else _png(image)
            return Prepared(KINDS[str(image.format)], content)
    except OSError as error:
        return Prepared(fault=error.strerror or str(error))
    except Exception as error:  # Pillow's decoders raise anything
        return Prepared(fault=str(error) or type(error).__name__)


def _shrunk(image: Image.Image, encoded: np.ndarray, short_side: int, quality: int) -> bytes:
    """The JPEG of an image with this short side."""
    scale = short_side / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    box = None
    if image.format in ("JPEG", "MPO"):
        drafted = image.draft(None, (int(REDUCING_GAP * width), int(REDUCING_GAP * height)))  # the decoder reduces
        box = drafted and drafted[1]
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    else:
        image = Image.fromarray(decode(encoded).permute(1, 2, 0).numpy())
    small = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=REDUCING_GAP)
    small.info.clear()
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    """Of a set that is an array, whose own are made to be quick and not small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
