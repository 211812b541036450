"""The page of views: the images of the run, their parameters, and what happens where an engine is missing."""

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast.data import DataError, Dataset, Params, Policy, engine_name, open_dataset, train_views
from simclr_fast.data.commands import preview
from simclr_fast.data.commands.preview import write_preview
from simclr_fast.data.policy import permutation
from tests.test_report import CHROMIUM, FLAGS, Reader

BOTH = engine_name("auto")[0] == "dali"
SIZES = [(30, 40), (24, 24), (90, 30), (3, 200)]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Four images in two classes; one of them has a name that has to be escaped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for k, size in enumerate(SIZES):
        path = tmp_path / "set" / ("<b>", "a&c")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return open_dataset(str(tmp_path / "set"))


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def pictures(reader: Reader) -> dict[str, np.ndarray]:
    """Pixels by alternative text."""
    found = {}
    for image in reader.of("img"):
        content = base64.b64decode(image["src"].partition("base64,")[2])
        found[image["alt"]] = np.asarray(Image.open(io.BytesIO(content)))
    return found


@pytest.mark.parametrize("dialect", ["torchvision", "tf"])
def test_the_page_shows_the_views_of_the_run(dataset: Dataset, tmp_path: Path, dialect):
    policy, n = Policy(24, dialect=dialect), len(SIZES)
    write_preview(dataset, tmp_path / "deep" / "page.html", policy, count=9, seed=3, epoch=2)
    reader = read(tmp_path / "deep" / "page.html")
    found = pictures(reader)
    engines = ["DALI", "torchvision"] if BOTH else ["torchvision"]
    assert len(found) == n * (1 + 2 * len(engines))
    steps = train_views(dataset.train, policy, batch=n, seed=3, start_step=2, steps=1, engine="torchvision", workers=0)
    first, second, indices = next(iter(steps))
    assert indices.tolist() == permutation(n, 3, 2).tolist()
    for row, index in enumerate(indices):
        name = dataset.train.names[index]
        for view, images in enumerate((first, second)):
            levels = 255 * (images[row].permute(1, 2, 0).numpy() * policy.std + policy.mean)
            for engine in engines:
                shown = found[f"View {view + 1} of {name}, made by {engine}"]
                assert np.abs(shown - levels.clip(0, 255)).max() <= 0.6  # rounded
    if BOTH:
        assert any("the engines differ by under 0.001" in text or "differ by 0.0" in text for text in reader.texts)


def test_the_page_needs_nothing_else_and_has_headings_and_texts(dataset: Dataset, tmp_path: Path):
    write_preview(dataset, tmp_path / "page.html", Policy(16))
    reader = read(tmp_path / "page.html")
    assert not reader.of("script")
    assert all(tag["src"].startswith("data:image/") and tag["alt"] for tag in reader.of("img"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://", page)
    headings = [tag for tag, _ in reader.elements if tag in ("h1", "h2", "h3")]
    assert headings == ["h1", *len(SIZES) * ["h2", "h3", "h3"], "h2"]
    assert {"<b>/0.png", "a&c/1.png", "40 × 30 px · <b>"} <= set(reader.texts)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


def test_the_frames_stand_where_the_crops_are(dataset: Dataset, tmp_path: Path):
    write_preview(dataset, tmp_path / "page.html", Policy(16), seed=1)
    reader = read(tmp_path / "page.html")
    order = permutation(len(SIZES), 1, 0)
    drawn = [tag for tag in reader.of("rect") if tag["class"] != "halo"]
    for view in (0, 1):
        windows = Policy(16).draw(1, np.zeros(4, int), order, view, dataset.train.sizes[order]).window
        for row, index in enumerate(order):
            scale = 480 / max(dataset.train.sizes[index])
            frame = drawn[2 * row + view]
            assert frame["class"] == f"view{view + 1}"
            expected = [windows[row][1], windows[row][0], windows[row][3], windows[row][2]]
            found = [float(frame[key]) for key in ("x", "y", "width", "height")]
            np.testing.assert_allclose(found, scale * np.array(expected), atol=0.06)


def test_parameters_in_words():
    params = Params(
        window=np.array([[1, 2, 30, 40]]),
        flip=np.array([True]),
        jitter=np.array([True]),
        gray=np.array([False]),
        factors=np.array([[1.5, 0.25, 1, -0.125]], np.float32),
        order=np.array([[3, 0, 2, 1]], np.uint8),
        sigma=np.array([0.5], np.float32),
    )
    assert preview._words(params, 0, np.array([60, 40]), Policy(64)) == {
        "crop": "40 × 30 px at x 2, y 1: 50\u00a0% of the area",
        "flip": "yes",
        "jitter": "hue −45°, then brightness ×\u00a01.50, then saturation ×\u00a01.00, then contrast ×\u00a00.25",
        "gray": "no",
        "blur": "sigma 0.50 px",
    }
    assert preview._words(params, 0, np.array([60, 40]), Policy(16))["blur"] == "no"


def test_a_missing_engine_is_named_with_its_reason(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def absent(engine: str) -> tuple[str, str]:
        if engine == "dali":
            raise ValueError("engine 'dali' needs NVIDIA DALI")
        return engine, ""

    monkeypatch.setattr(preview, "engine_name", absent)
    write_preview(dataset, tmp_path / "page.html", Policy(16), count=1)
    reader = read(tmp_path / "page.html")
    assert "DALI is not shown: engine 'dali' needs NVIDIA DALI." in reader.texts
    assert len(reader.of("img")) == 3
    assert not any("differ" in text for text in reader.texts)


def test_values_that_are_not_numbers_and_other_images_are_told(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    view = torch.full((1, 3, 16, 16), torch.nan)
    index = permutation(len(SIZES), 0, 0)[:1]
    monkeypatch.setattr(preview, "train_views", lambda *_, **__: [(view, view, index)])
    write_preview(dataset, tmp_path / "page.html", Policy(16), count=1)
    monkeypatch.setattr(preview, "train_views", lambda *_, **__: [(view, view, index + 1)])
    with pytest.raises(DataError, match="cannot be read any more"):
        write_preview(dataset, tmp_path / "other.html", Policy(16), count=1)
    assert any("torchvision gives values that are not numbers" in text for text in read(tmp_path / "page.html").texts)


def test_eight_large_photos_take_less_than_three_megabytes(shared: Path, tmp_path: Path):
    photos = open_dataset(str(shared / "data" / "photos-256.tar"))
    write_preview(photos, tmp_path / "page.html", Policy(224))
    assert (tmp_path / "page.html").stat().st_size < 3e6
    assert len(pictures(read(tmp_path / "page.html"))) == 8 * (5 if BOTH else 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, r"count must be in \[1, 2\^31\), got count=0"),
        ({"seed": -1}, "seed must be in"),
        ({"epoch": 2**31}, "epoch must be in"),
    ],
)
def test_arguments_out_of_range(dataset: Dataset, tmp_path: Path, options: dict, message: str):
    with pytest.raises(DataError, match=message):
        write_preview(dataset, tmp_path / "page.html", Policy(16), **options)
    assert not (tmp_path / "page.html").exists()


def test_an_image_that_is_gone_and_a_page_that_cannot_be_written(dataset: Dataset, tmp_path: Path):
    with pytest.raises(DataError, match="cannot be written: "):
        write_preview(dataset, tmp_path / "set", Policy(16))
    for path in (tmp_path / "set").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="must stay .*No such file"):
        write_preview(dataset, tmp_path / "page.html", Policy(16))


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize(("width", "theme", "ground"), [(1200, 1, (251, 250, 248)), (500, 0, (20, 22, 27))])
def test_a_browser_shows_it_wide_and_narrow_light_and_dark(dataset: Dataset, tmp_path: Path, width, theme, ground):
    write_preview(dataset, tmp_path / "page.html", Policy(16), count=1)
    shot = tmp_path / "shot.png"
    flags = [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},1400", f"--screenshot={shot}"]
    flags += [f"--blink-settings=preferredColorScheme={theme}", (tmp_path / "page.html").as_uri()]
    subprocess.run([CHROMIUM, *FLAGS.split(), *flags], capture_output=True, check=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert (pixels[:, -12:] == ground).all()  # nothing reaches over the margin
    for colour in ((126, 166, 255), (255, 162, 94)):  # of the frames
        assert (pixels == colour).all(2).sum() > 50
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
