"""The embedded data set `shapes`: small JPEGs whose class is the glyph that is scattered over them.

All else is drawn at random: the lattice that the glyphs stand on, the angle and colour of each, the light and
texture of the ground. So raw pixels do not tell the class, and crops of an image share little but the glyph.
Each glyph has its own colour, since one for the whole image would tell images apart. All are dark on light.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_fast.data.sources import DataError, cache_folder

VERSION = 1  # part of the folder's name; another recipe needs another
SIDE, OVERSAMPLING = 32, 3
PITCH = (0.27, 0.31)  # of the lattice, in sides
CELLS = 7  # lattice points a side, enough to cover the image at any angle
SHIFT, RADIUS = 0.06, 0.45  # in pitches
LEVEL = (100, 200)  # of the ground
TINT, TEXTURE = 10, 12  # its standard deviations over channels, and over places
CONTRAST = 60  # luma by which a glyph is at least darker than that level
LUMA, QUALITY = (0.299, 0.587, 0.114), 92


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)


def _beyond(x: np.ndarray, y: np.ndarray, sides: int, distance: float) -> np.ndarray:
    """How many sides of a regular polygon, that distance from its centre, a point is beyond."""
    angles = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    return np.array([float(np.cos(a)) * x + float(np.sin(a)) * y > distance for a in angles]).sum(0)


# Whether a point of the plane is inside; every glyph fits into the unit disc.
GLYPHS = {
    "bar": lambda x, y: (abs(x) < 0.95) & (abs(y) < 0.28),
    "corner": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.7) & (np.minimum(x, y) < -0.25),
    "crescent": lambda x, y: (_length(x, y) < 0.95) & (_length(x - 0.45, y) > 0.75),
    "disc": lambda x, y: _length(x, y) < 0.85,
    "dumbbell": lambda x, y: (_length(abs(x) - 0.58, y) < 0.38) | ((abs(x) < 0.58) & (abs(y) < 0.13)),
    "frame": lambda x, y: abs(np.maximum(abs(x), abs(y)) - 0.54) < 0.16,
    "plus": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.92) & (np.minimum(abs(x), abs(y)) < 0.24),
    "ring": lambda x, y: abs(_length(x, y) - 0.73) < 0.2,
    "star": lambda x, y: _beyond(x, y, 5, 0.31) < 2,
    "triangle": lambda x, y: _beyond(x, y, 3, 0.5) < 1,
}


def _turned(x: np.ndarray, y: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return np.stack([cos * x + sin * y, cos * y - sin * x])


def draw(glyph: str, seed: tuple[int, ...]) -> np.ndarray:
    """An image with glyphs of one kind, uint8 [SIDE, SIDE, 3], a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(*LEVEL)
    noise = Image.fromarray(rng.normal(0, TEXTURE, (4, 4)).astype(np.float32))
    texture = np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    ground = level + rng.normal(0, TINT, 3) + texture[..., None]

    pitch, tilt, phase = rng.uniform(*PITCH), rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5, (2, 1, 1))
    turn, shift = rng.uniform(0, 2 * np.pi, CELLS**2), rng.uniform(-SHIFT, SHIFT, (2, CELLS**2))
    colour, luma = rng.uniform(0, 255, (CELLS**2, 3)), rng.uniform(0, level - CONTRAST, (CELLS**2, 1))
    colour = np.minimum(colour * luma / (colour @ LUMA)[:, None], 255)

    n = SIDE * OVERSAMPLING
    axis = ((np.arange(n) + 0.5) / n - 0.5) / pitch
    place = (_turned(axis, axis[:, None], np.cos(tilt), np.sin(tilt)) + phase).astype(np.float32)
    nearest = np.rint(place)
    cell = (nearest[0] + CELLS * nearest[1]).astype(np.int64) + CELLS**2 // 2
    cos, sin, *centre = np.array([np.cos(turn), np.sin(turn), *shift], np.float32).take(cell, axis=1)
    x, y = (place - nearest - centre) / RADIUS
    inside = GLYPHS[glyph](*_turned(x, y, cos, sin))
    hits = inside.reshape(SIDE, OVERSAMPLING, SIDE, OVERSAMPLING).sum(1, dtype=np.uint8).sum(2)
    middle = slice(OVERSAMPLING // 2, None, OVERSAMPLING)
    pixels = ground + (hits / OVERSAMPLING**2)[..., None] * (colour[cell[middle, middle]] - ground)
    return pixels.round().clip(0, 255).astype(np.uint8)


def make_shapes(train: int = 400, test: int = 100) -> Path:
    """The folder with train/CLASS/*.jpg and test/CLASS/*.jpg: made in the cache on first use, all or nothing.

    Args:
        train, test: images of each of the ten classes.
    Raises:
        DataError: the cache cannot be written to.
    """
    cache = cache_folder()
    folder = cache / f"shapes-{VERSION}-{train}-{test}"
    if folder.is_dir():
        return folder
    jobs = [(split, kind, i) for split, n in enumerate((train, test)) for kind in range(10) for i in range(n)]
    print(f"drawing the {len(jobs):,} images of the data set shapes, once, into {folder}", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as parent:
            root = Path(parent, "shapes")  # the parent is readable by its owner alone
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(partial(_write, root), jobs))
            os.replace(root, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process came first
            raise DataError(f"shapes cannot be written, set XDG_CACHE_HOME: {error}") from error
    return folder


def _write(root: Path, job: tuple[int, int, int]) -> None:
    split, glyph = ("train", "test")[job[0]], list(GLYPHS)[job[1]]
    path = root / split / glyph / f"{job[2]:04d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(glyph, (VERSION, *job))).save(path, quality=QUALITY)
