"""The evaluation in report.html: what it shows, that it is put there whole and once, and how a browser shows it."""

import html
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from simclr_fast import report
from simclr_fast.evaluation import page as evaluation_page
from simclr_fast.evaluation.job import MODES
from simclr_fast.evaluation.page import add_evaluations
from simclr_fast.evaluation.results import read_all
from simclr_fast.pages import parts
from simclr_fast.pages.document import MARKS, STYLE
from simclr_fast.record import RunError, read_metrics
from tests.browser import CHROMIUM, Browser
from tests.pages_common import check, result
from tests.train_common import images, run

__all__ = ["images"]  # a fixture is used by its name
LONG = "a class whose name goes on without_any_place_where_it_could_be_broken_into_two_lines"


def many(classes, seed=0):
    """What was said of the images of so many classes."""
    rng = np.random.default_rng(seed)
    counts = np.eye(classes, dtype=int) * 40 + rng.integers(0, 3, (classes, classes))
    return [[k, j, int(counts[k, j])] for k, j in np.argwhere(counts).tolist()]


def probe():
    """A result with a table, scatters and pictures."""
    rng, names = np.random.default_rng(0), [f"class {k}" for k in range(11)] + [LONG]
    labels = rng.integers(-1, 12, 300).tolist()
    picture = parts.data_uri(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    near = [{"image": picture, "text": f"class {k}\n0.9{k}", "right": k % 2 == 0} for k in range(6)]
    return result(
        name="probe-pets-1", protocol="probe", figures={"mean of h": 0.9, "mean of g(h)": 0.6}, classes=names,
        confusion=[], when="2026-11-30T01:00:00Z", notes=["Said <b>plainly</b>."],
        tables=[{"title": "How an image was changed", "columns": ["property", "chance", "h", "g(h)", "paper's h"],
                 "rows": [["colour or grayscale", 0.8, 0.96, 0.94, None], [LONG, 0.25, 0.5, 0.255, 0.676]]}],
        scatters=[{"title": f"t-SNE of {layer}", "points": rng.normal(size=(300, 2)).tolist(), "labels": labels}
                  for layer in "hz"],
        pictures=[{"title": "Nearest training images by h", "rows": [[{"image": picture, "text": "cat"}, *near]] * 2}],
    )  # fmt: skip


def large():
    """A result of more classes than a matrix shows."""
    names = [f"{k}: {LONG}" for k in range(40)]
    return result(name="linear-food-1", protocol="linear", data="food" * 30, classes=names, confusion=many(40))


def full():
    names = [*(f"class {k}" for k in range(24)), LONG]
    return [result(name="knn-pets-0", when="2026-11-29T20:00:00Z", step=900, figures={"top-1": 0.5}),
            result(classes=names, confusion=many(25)), large(), probe()]  # fmt: skip


@pytest.fixture
def page(tmp_path):
    """The report of a run, without evaluations."""
    rows = [
        {"step": k, "epoch": k / 10, "loss": 5 / (k + 1), "images_per_s": 900.0, "online_top1": 0.155}
        for k in range(30)
    ]
    views = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    images = [(views[0, 0], "cat", [(views[0, 1], "cat", 0.9), (views[1, 1], "dog", 0.8)])]
    settings = {"data": "/a/path/" + "folder/" * 20, "arch": "resnet18"}
    shown = report.Run(title="a run", settings=settings, versions={"torch": "2.14"}, metrics=rows, chance_loss=5.5,
                       knn={"raw pixels": 0.2, "trained encoder": 0.9}, views=views, neighbours=images)  # fmt: skip
    report.write_report(tmp_path / "report.html", shown)
    return tmp_path / "report.html"


def test_what_it_shows(page):
    add_evaluations(page, full())
    reader = check(page.read_text())
    texts = " ".join(reader.texts)
    for text in ("Nearest neighbours", "Linear classifier", "What h keeps and g(h) loses", "75%", "step 1,313",
                 "4,000 training images", "2026-11-29\u00a023:43\u00a0UTC", "Said <b>plainly</b>.", "96.0%", "67.6%",
                 "Other settings, and earlier ones (1)", "bf16", "step 900", "took 2.5 s"):  # fmt: skip
        assert text in texts, text
    assert len(reader.of("article")) == 4
    assert page.read_text().index("Training</h2>") < page.read_text().index("Evaluation</h2>")


def test_a_small_matrix_is_whole_and_its_classes_are_sorted(page):
    add_evaluations(page, [result()])
    text = page.read_text()
    check(text)
    cells = re.findall(r'<td class="(\w*)" style="--share:([\d.]+)" title="([^"]+)">(\d+)</td>', text)
    assert [int(cell[3]) for cell in cells] == [4, 0, 0, 1, 3, 0, 0, 2, 2]
    assert [cell[0] for cell in cells] == ["hit", "none", "none", "", "hit", "none", "none", "", "hit"]
    assert cells[3][1:3] == ("0.250", "dog, said cat: 1 of 4")
    ranked = re.findall(r"<li[^>]*><span>([^<]+)</span><i[^>]*><b[^>]*></b></i><strong>([^<]+)</strong></li>", text)
    assert ranked == [("cat", "100%"), ("dog", "75%"), ("&lt;eel&gt;", "50%")]
    assert "best cat 100%, worst &lt;eel&gt; 50%" in text
    assert "All evaluations" not in text  # of one


def test_a_large_matrix_becomes_the_pairs_that_are_confused_most(page):
    counts = [*([k, k, 9] for k in range(26)), [3, 7, 11], [8, 2, 1]]
    add_evaluations(page, [result(classes=[f"c{k}" for k in range(26)], confusion=counts)])
    text = page.read_text()
    check(text)
    table = text[text.index("Most confused classes, of 26") :]
    rows = re.findall(r'<tr><th scope="row">(c\d+)</th><td[^>]*>(c\d+)</td><td>(\d+)</td><td>([\d.]+%)</td>', table)
    assert rows == [("c3", "c7", "11", "55.0%"), ("c8", "c2", "1", "10.0%")]
    assert "<details><summary>Accuracy by class" in text  # folded


def test_again_it_replaces_itself_and_nothing_else(page):
    before = page.read_text()
    add_evaluations(page, full())
    first = page.read_text()
    add_evaluations(page, full())
    assert page.read_text() == first
    add_evaluations(page, [result()])
    assert page.read_text().count("Evaluation</h2>") == 1
    assert page.read_text().count(MARKS[0]) == page.read_text().count(MARKS[1]) == 1
    add_evaluations(page, [])
    assert page.read_text() == before


def test_earlier_results_are_brief_and_each_is_made_once(page, monkeypatch):
    made = []
    monkeypatch.setattr(evaluation_page, "_settings", lambda one: made.append(one["when"]) or "")
    one = probe() | {"confusion": many(12)}
    whole = {"<img": 14, "<figcaption>t-SNE of": 2, "Accuracy by class": 1, "Confusion matrix:": 1}
    before, sizes = page.stat().st_size, []
    for count in (1, 2, 10):
        made.clear()
        add_evaluations(page, [one | {"name": str(k), "when": f"2026-11-{k:02}"} for k in range(1, count + 1)])
        assert sorted(made) == [f"2026-11-{k:02}" for k in range(1, count + 1)]
        text = page.read_text()
        check(text)
        shown = text.split(MARKS[0])[1].split(MARKS[1])[0]
        sizes.append(page.stat().st_size - before)
        assert shown.count("Said &lt;b&gt;plainly") == count
        assert {word: shown.count(word) for word in whole} == whole
    assert (sizes[2] - sizes[1]) / 8 < 3000 < sizes[0] / 5


def test_modes_are_other_measurements_and_none_hides_the_other(page):
    settings = {"holdout": 0.1, "l2": None, "batch": None, "epochs": 90, "lr": 0.1, "weight_decay": 0.0}
    tried = [{"title": "L2 regulariser", "columns": ["l2", "top-1"], "rows": [["1", 0.5], ["0.0178 (chosen)", 0.7]]}]
    exact = result(protocol="linear", settings=settings | {"mode": "exact"}, tables=tried, figures={"top-1": 0.625})
    recipe = result(protocol="linear", settings=settings | {"mode": "sgd", "epochs": 2}, when="2026-11-30",
                    counts={"batch": 60}, figures={"top-1": 0.25})  # fmt: skip
    tuned = [result(protocol="transfer", settings={"mode": mode, "steps": 20_000}) for mode in ("finetune", "linear")]
    add_evaluations(page, [exact, recipe, *tuned])
    text = page.read_text()
    texts = check(text).texts
    cards = re.findall("<article><h3>(.*?)</h3>.*?</article>", text)
    assert [html.unescape(card) for card in cards] == [
        "Linear classifier, exact", "Linear classifier, the paper's recipe (sgd)", "Transfer, linear classifier",
        "Transfer, fine-tuned",
    ]  # fmt: skip
    assert "earlier ones" not in text
    assert {"l2 0.0178, chosen ·", "2 epochs ·", "batch 60 ·", "20,000 steps ·", "62.5% top-1", "25.0% top-1"} <= {
        *texts
    }
    assert "90 epochs ·" not in texts
    assert "Settings</th>" not in text.split("All evaluations")[1].split("</table>")[0]
    add_evaluations(page, [exact | {"settings": exact["settings"] | {"l2": 3.0}}, exact])
    assert "l2 3, given ·" in check(page.read_text()).texts
    assert "earlier ones (1)" in page.read_text()


def test_each_share_of_the_labels_is_a_measurement(page):
    few = {"labels": None, "subset": None, "from_layer": 0, "lr": 0.05}
    changes = [{}, {"labels": 10.0}, {"labels": 10.0, "from_layer": 1}, {"subset": "/data/list.txt"}, {"lr": 0.1}]
    add_evaluations(page, [result(protocol="finetune", settings=few | change) for change in changes])
    text = page.read_text()
    check(text)
    assert re.findall("<article><h3>(.*?)</h3>", text) == [
        "Fine-tuned on 1 % of the labels", "Fine-tuned on labels of list.txt",
        "Fine-tuned on 10 % of the labels, from layer 1 of the head", "Fine-tuned on 10 % of the labels",
        "Fine-tuned on 1 % of the labels",
    ]  # fmt: skip
    assert "Other settings, and earlier ones (1)" in text


@pytest.mark.parametrize("protocol", ["linear", "transfer"])
def test_settings_of_one_mode_are_those_that_their_help_names(protocol):
    source = (Path(evaluation_page.__file__).parent / f"{protocol}.py").read_text()
    named = re.findall(r'    (\w+): [^\n]*\n    """(\w+): ', source)
    for mode, keys in MODES[protocol].items():
        assert [key for key, of in named if of == mode] == [*keys]
    assert named


def test_other_images_of_the_same_name_are_other_results(page):
    here, there = (result(name=f"knn-{k}", data_digest=f"{k} images (abc)") for k in (12, 13))
    add_evaluations(page, [here, there, here | {"when": "2026-11-30"}])
    text = page.read_text()
    check(text)
    assert "earlier ones (1)" in text
    assert text.count(", 12 images (abc)</td>") == 2
    assert text.count(", 13 images (abc)</td>") == 1


def test_marks_in_texts_are_no_marks(page):
    nasty = result(classes=[MARKS[1], MARKS[0], "</main>"], notes=[f"{MARKS[1]}</main>{MARKS[0]}</style>"])
    add_evaluations(page, [nasty])
    first = page.read_text()
    check(first)
    add_evaluations(page, [nasty])
    assert page.read_text() == first


def test_a_page_of_before_the_marks(page):
    old = page.read_text().replace("".join(MARKS), "").replace(STYLE, "body { color: red }")
    page.write_text(old)
    for _ in range(2):
        add_evaluations(page, [result()])
        text = page.read_text()
        check(text)
        assert text.count("Evaluation</h2>") == 1
        assert text.endswith(f"{MARKS[1]}</main></body></html>\n")
        assert text.count("<style>") == 1
        assert STYLE in text


def test_what_is_no_page_is_left_alone(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("not a page")
    with pytest.raises(RunError, match=r"report\.html must be a page that was written by the training"):
        add_evaluations(path, [result()])
    assert path.read_text() == "not a page"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    "odd",
    [
        {}, {"when": "2026", "name": "x"}, result(figures=None), result(figures=[1]), result(tables=[{"title": "x"}]),
        result(tables=[{"title": "x", "columns": ["a"], "rows": [[1, 2]]}]), result(confusion=[[1]], figures={}),
        result(scatters=[{"title": "x", "points": [[1, 2, 3]], "labels": [0]}]), result(settings=[1]),
        result(pictures=[{"title": "x", "rows": [[]]}]), result(confusion=[["a", "b", "c"]] * 3),
        result(confusion=[[4, 0, 0], [1, 3, 0], [0, 2, 2]]),
    ],
)  # fmt: skip
def test_what_is_no_result_is_left_out(page, odd):
    before = page.read_text()
    add_evaluations(page, [odd])
    assert page.read_text() == before
    add_evaluations(page, [result(name="whole"), odd])
    assert len(check(page.read_text()).of("article")) == 1


def test_what_is_empty_or_unknown_is_left_out(page):
    bare = {"name": "x", "when": "2026-01-01T00:00:00Z", "protocol": "new", "data": "d", "figures": {"f": float("nan")}}
    for one in (
        bare,
        result(step=None, confusion=[], classes=[]),
        result(confusion=[[1, 1, 2]], classes=["a", "b"]),
    ):
        add_evaluations(page, [one])
        text = page.read_text()
        check(text)
        assert "nan" not in text.replace("nance", "")
        assert "checkpoint of step" not in text or one.get("step")


def test_readers_never_see_half_of_it(page):
    stop, seen = threading.Event(), set()

    def look():
        while not stop.is_set():
            seen.add(page.read_text().endswith("</main></body></html>\n"))

    watcher = threading.Thread(target=look)
    watcher.start()
    for number in range(20):
        add_evaluations(page, full()[: number % 4 + 1])
    stop.set()
    watcher.join()
    assert seen == {True}


def test_the_end_of_a_training_shows_what_was_evaluated_before(images, tmp_path):
    out = tmp_path / "run"
    assert run(images, out, "--epochs", "1") == 0
    (out / "evaluations").mkdir()
    (out / "evaluations" / "knn.json").write_text(json.dumps(result()))
    (out / "evaluations" / "odd.json").write_text("{}")
    records = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(records[:-1]))  # as if it had been stopped before its end
    (out / "report.html").unlink()
    assert run(images, out, "--epochs", "1") == 0
    assert read_metrics(out)[-1]["finished"]
    text = (out / "report.html").read_text()
    check(text)
    assert "75%" in text[text.index("Evaluation</h2>") :]
    assert run(images, out, "--epochs", "1", "--resume", "never") == 0
    assert "Evaluation</h2>" not in (out / "report.html").read_text()
    assert read_all(out / "evaluations") == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_a_fault(page, browser, width, dark):
    add_evaluations(page, full())
    browser.open(page, width, dark=dark)
    folded = browser.value("document.body.scrollHeight")
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    for measure in ("document.documentElement.scrollWidth", "document.body.scrollWidth"):
        assert browser.value(measure) <= width
    assert browser.value("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    lines = "[...document.querySelectorAll('.date, .bars strong, .charts strong')].map(one => {"
    lines += (
        " const range = document.createRange(); range.selectNodeContents(one); return range.getClientRects().length })"
    )
    assert set(browser.value(lines)) == {1}
    wide = "[...document.querySelectorAll('.wide')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert (browser.value(wide) > 0) == (width == 360) or width == 1280
    picture = browser.picture()
    assert len(picture) > folded > 3000
    assert picture.shape[1] == width
    ground = picture[3, 3].mean()
    assert ground < 40 if dark else ground > 240
    main = (126, 166, 255) if dark else (47, 95, 208)
    assert (picture == main).all(-1).sum() > 1000
    assert picture.std(axis=(0, 1)).min() > 5
    assert browser.complaints == []


def test_the_keyboard_reaches_what_scrolls_and_folds(page, browser):
    add_evaluations(page, full())
    browser.open(page, 360)
    reached = []
    for _ in range(8):
        browser.press("Tab")
        reached.append(browser.value("document.activeElement.tagName + ' ' + document.activeElement.className"))
        assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert browser.value("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    assert reached[0] == "DIV wide"
    assert {"DIV wide confusion", "SUMMARY "} < set(reached)
