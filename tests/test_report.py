"""The report: self-contained, escaped, right about gaps and labels, and whole in a browser."""

import base64
import dataclasses
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from simclr_fast.pages.charts import ticks
from simclr_fast.pages.parts import percents
from simclr_fast.report import Run, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
)
COLOURS = [(255, 0, 255), (255, 128, 0), (0, 255, 255), (128, 0, 255), (255, 255, 0), (0, 64, 0)]
VOID = {"meta", "link", "img"}


def plain(colour: tuple[int, int, int], side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


def record(step: int, **values: float) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 6 / (1 + step / 40),
        "lr": 0.1 * step,
        "images_per_s": 1000.0 + step,
        "data_wait": 0.01,
        "contrastive_top1": 0.5,
    } | values


@pytest.fixture
def run() -> Run:
    return Run(
        title="a run <of> many",
        settings={"data": "a&b", "width": 0.5},
        versions={"torch": "2.13"},
        metrics=[record(0), record(10, knn_top1=0.5), record(20, knn_top1=0.75)],
        chance_loss=math.log(511),
        knn={"raw pixels": 0.25, "untrained encoder": 0.375, "trained encoder": 0.875},
        knn_note="of 2,000 test images",
        views=np.stack([np.stack([plain(c) for c in COLOURS[:3]])]),
        neighbours=[(plain(COLOURS[3]), "cat", [(plain(COLOURS[4]), "cat", 0.9), (plain(COLOURS[5]), "<dog>", 0.5)])],
        notes=["took 3 s"],
    )


def written(folder: Path, run: Run) -> str:
    write_report(folder / "report.html", run)
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects the page's elements and texts; fails where a tag is not closed, or closed twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_needs_nothing_else(tmp_path, run):
    page = written(tmp_path, run)
    reader = Reader(page)
    assert not reader.of("script")
    assert [tag for tag in reader.of("link") if not tag["href"].startswith("data:")] == []
    assert all(tag["src"].startswith("data:image/") for tag in reader.of("img"))
    assert "url(" not in page
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_text_is_escaped_and_complete(tmp_path, run):
    reader = Reader(written(tmp_path, run))
    for text in (
        "a run <of> many",
        "a&b",
        "2.13",
        "took 3 s",
        "25.0%",
        "37.5%",
        "87.5%",
        "✗ <dog>\n0.50",
        "✓ cat\n0.90",
    ):
        assert text in reader.texts
    assert not {tag for tag, _ in reader.elements} & {"of", "dog"}
    assert any(text.endswith("of 2,000 test images") for text in reader.texts)
    assert "6.236 is that of embeddings all alike; an untrained network may lie above" in reader.texts


def test_images_survive(tmp_path, run):
    large = np.random.default_rng(0).integers(0, 256, (1, 1, 1, 1, 3)).repeat(128, 2).repeat(128, 3).repeat(3, 1)
    for views, form, tolerance in ((run.views, "PNG", 0), (large.astype(np.uint8), "JPEG", 3)):
        images = Reader(written(tmp_path, dataclasses.replace(run, views=views))).of("img")[:3]
        for tag, expected in zip(images, views[0], strict=True):
            image = Image.open(io.BytesIO(base64.b64decode(tag["src"].split(",")[1])))
            assert image.format == form
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance
            assert (int(tag["height"]), int(tag["width"])) == expected.shape[:2]
        assert [tag["alt"] for tag in images] == ["original", "view 1", "view 2"]


def test_neighbours_are_marked_only_where_both_labels_are_known(tmp_path, run):
    def marks(label, name):
        pair = (plain(COLOURS[0]), label, [(plain(COLOURS[1]), name, 0.25)])
        reader = Reader(written(tmp_path, dataclasses.replace(run, views=None, neighbours=[pair])))
        return [tag.get("class", "") for tag in reader.of("figure")][-2:], reader.texts

    assert marks("cat", "cat")[0] == ["", "right"]
    assert marks("cat", "dog")[0] == ["", "wrong"]
    for label, name in ((None, None), ("cat", None), (None, "dog")):
        classes, texts = marks(label, name)
        assert classes == ["", ""]
        assert (f"{name}\n0.25" if name else "0.25") in texts


def curves(page: str) -> dict[str, ElementTree.Element]:
    """The charts by name; each must be well-formed XML."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    return {svg.attrib["aria-label"].split(":")[0]: svg for svg in found}


def line(svg: ElementTree.Element) -> str:
    return next(path.attrib["d"] for path in svg.iter("path") if path.attrib.get("class") == "line")


def test_curves_show_every_value_inside_the_chart(tmp_path, run):
    charts = curves(written(tmp_path, run))
    assert list(charts) == [
        "Loss", "Contrastive top-1", "kNN top-1", "Learning rate", "Images per second", "Waiting for data"
    ]  # fmt: skip
    assert charts["Loss"].attrib["aria-label"] == "Loss: 4 at epoch 2"
    assert "epoch 1: 4.8" in [title.text for title in charts["Loss"].iter("title")]
    assert len(list(charts["kNN top-1"].iter("circle"))) == 2
    for svg in charts.values():
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for dot in svg.iter("circle"):
            assert 0 < float(dot.attrib["cx"]) < width
            assert 0 < float(dot.attrib["cy"]) < height


def test_loss_chart_has_the_level_of_chance(tmp_path, run):
    charts = curves(written(tmp_path, run))
    levels = {name: [p for p in svg.iter("path") if p.attrib.get("class") == "level"] for name, svg in charts.items()}
    assert [name for name, found in levels.items() if found] == ["Loss"]
    start = float(line(charts["Loss"]).split("L")[0].split()[1])
    level = float(levels["Loss"][0].attrib["d"].split()[1].split("H")[0])
    assert level < start  # ln 511 lies above the first loss, 6


def test_what_was_recorded_beside_the_loss_has_its_chart(tmp_path, run):
    metrics = [record(step, online_top1=0.25, embedding_spread=0.99) for step in (10, 20)]
    names = [*curves(written(tmp_path, dataclasses.replace(run, metrics=metrics)))]
    assert "Linear classifier beside training, top-1 on training views" in names
    assert "Embedding spread (0" in names


def test_of_records_of_one_epoch_the_last_is_drawn(tmp_path, run):
    metrics = [record(0), record(10, loss=4.0), record(11, epoch=1.0, loss=2.0)]
    svg = curves(written(tmp_path, dataclasses.replace(run, metrics=metrics)))["Loss"]
    assert [title.text for title in svg.iter("title")] == ["epoch 0: 6", "epoch 1: 2"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.25, 0.235], ["25.0%", "23.5%"]),
        ([1, 0.0526, 0.75], ["100.0%", "5.3%", "75.0%"]),
        ([0.5, math.nan, None], ["50%", "–", "–"]),
        ([0.0525, 0.01], ["5.25%", "1.00%"]),
        ([1e-7], ["0%"]),
        ([1.25e-4, 1e-7], ["0.01%", "0.00%"]),
        ([], []),
    ],
)
def test_figures_of_a_row_have_the_same_decimals(values, texts):
    assert percents(values) == texts


@pytest.mark.parametrize("gap", [math.nan, math.inf, None])
def test_gaps_break_the_curve(tmp_path, run, gap):
    metrics = [record(step, loss=gap if step == 20 else 3.0) for step in range(0, 50, 10)]
    page = written(tmp_path, dataclasses.replace(run, metrics=metrics))
    assert re.sub(r"[\d. ]", "", line(curves(page)["Loss"])) == "MLML"
    assert not [text for text in Reader(page).texts if text in ("nan", "inf", "None")]
    assert not [svg for svg in re.findall(r"<svg.*?</svg>", page) if re.search("nan|inf|None", svg)]


def test_long_runs_are_thinned_but_keep_their_ends(tmp_path, run):
    metrics = [record(step) for step in range(5003)]
    svg = curves(written(tmp_path, dataclasses.replace(run, metrics=metrics)))["Loss"]
    titles = [title.text for title in svg.iter("title")]
    assert titles[0].startswith("epoch 0:")
    assert titles[-1].startswith("epoch 500.2:")
    assert 200 < len(titles) < 300


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        (dict(metrics=[]), "Training"),
        (dict(metrics=[{"step": 1, "epoch": 0.0}]), "Training"),
        (dict(metrics=[record(0, loss=math.nan)], chance_loss=math.nan), "nothing"),
        (dict(knn={}, knn_note=""), "kNN accuracy"),
        (dict(knn={"trained encoder": math.nan}), "nothing"),
        (dict(views=None), "Views"),
        (dict(views=np.zeros((0, 3, 8, 8, 3), np.uint8)), "Views"),
        (dict(neighbours=[]), "Nearest neighbours"),
        (dict(settings={}), "Settings"),
    ],
)
def test_what_is_empty_is_left_out(tmp_path, run, changes, absent):
    texts = Reader(written(tmp_path, dataclasses.replace(run, **changes))).texts
    sections = ["kNN accuracy", "Training", "Views", "Nearest neighbours", "Settings", "Versions"]
    assert [name for name in sections if name in texts] == [name for name in sections if name != absent]


def test_note_stands_alone_without_accuracies(tmp_path, run):
    page = written(tmp_path, dataclasses.replace(run, knn={}, knn_note="no labels, no kNN"))
    assert "<p>no labels, no kNN</p>" in page


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.94, [0, 0.25, 0.5, 0.75, 1]),
        (2.1, 6.2, [2, 4, 6, 8]),
        (0, 1.2e-5, [0, 5e-6, 1e-5, 1.5e-5]),
        (0, 2438, [0, 1000, 2000, 3000]),
        (-0.5, 0.5, [-0.5, -0.25, 0, 0.25, 0.5]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 5.0, 5, -2.0, 1e-7, 3e8])
def test_ticks_of_a_constant_enclose_it(value):
    found = ticks(value, value)
    assert found[0] <= value <= found[-1]
    assert found[0] < found[-1]


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (np.zeros((1, 3, 8, 8, 3), np.float32), r"uint8 \[H, W, 3\], got float32 \[8, 8, 3\]"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"uint8 \[H, W, 3\], got uint8 \[8, 8\]"),
        (np.zeros((1, 2, 8, 8, 3), np.uint8), r"views must be \[rows, 3, H, W, 3\], got \[1, 2, 8, 8, 3\]"),
    ],
)
def test_bad_images_leave_the_old_page(tmp_path, run, views, message):
    page = written(tmp_path, run)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.html", dataclasses.replace(run, views=views))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert len(list(tmp_path.iterdir())) == 1


def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium on the page, with an empty profile beside it."""
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_browser_shows_all_of_it(tmp_path, run, theme):
    write_report(tmp_path / "report.html", run)
    picture = tmp_path / "page.png"
    size = ("--window-size=900,2600", f"--blink-settings=preferredColorScheme={int(theme == 'light')}")
    log = browse(tmp_path / "report.html", f"--screenshot={picture}", *size).stderr
    # What the page's policy blocks, or fails to load, is reported on the console.
    assert not re.search(r"CONSOLE|Refused|Page load failed|net::ERR", log), log

    pixels = np.asarray(Image.open(picture).convert("RGB"))
    background = pixels[5, 5].mean()
    assert background < 40 if theme == "dark" else background > 240
    for colour in COLOURS:  # an image that fails to decode shows none of its colour
        assert (pixels == colour).all(-1).sum() > 1000, colour
    main = (47, 95, 208) if theme == "light" else (126, 166, 255)
    assert (pixels == main).all(-1).sum() > 1000  # the trained encoder's bar and the curves


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_browser_reads_the_page_as_written(tmp_path, run):
    written_elements = Reader(written(tmp_path, run)).elements
    dom = browse(tmp_path / "report.html", "--dump-dom").stdout
    for tag in ("img", "svg", "circle", "path", "figure", "section", "tr"):
        count = sum(name == tag for name, _ in written_elements)
        assert len(re.findall(rf"<{tag}[ >]", dom)) == count > 0
