"""Images, folders and tars that the tests of the data sources make."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(size: tuple[int, int] = (12, 9), mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    """Noise of this height and width in a format."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def fill(root: Path, *names: str, content: bytes | None = None) -> Path:
    """Write files below a folder: an image each, or the content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded() if content is None else content)
    return root


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
