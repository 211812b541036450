"""evaluate compare: figures, settings that differ, warnings, unfinished runs, and what it refuses."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from simclr_fast import evaluate
from simclr_fast.evaluation import compare
from simclr_fast.record import claimed, read_metrics
from simclr_fast.report import median
from tests.browser import CHROMIUM, Browser
from tests.pages_common import check, result

SETTINGS = {"data": "/data/pets", "arch": "resnet18", "batch": 256, "temperature": 0.1, "epochs": 10, "seed": 0,
            "method": "simclr", "loss_scale": "paper", "out": "x", "resume": "auto", "config": None}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    def made(name, *results, steps=3, finished=True, **settings):
        folder = tmp_path / name
        (folder / "evaluations").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
        rows = [
            {"step": k, "epoch": k, "loss": 5 / k, "contrastive_top1": 0.1 * k, "lr": 0.1, "images_per_s": 100.0 * k,
             "knn_top1": 0.2 * k} for k in range(1, steps + 1)
        ]  # fmt: skip
        if finished and rows:
            rows.append(rows[-1] | {"knn": {}, "finished": True})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number, one in enumerate(results):
            (folder / "evaluations" / f"{number}.json").write_text(json.dumps(one))
        return str(folder)

    return made


@pytest.fixture
def page(tmp_path):
    return tmp_path / "out" / "compare.html"


def command(page, *runs):
    return evaluate.main(["compare", *runs, "--out", str(page)])


def row(text, name):
    """The cells of a printed row."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return re.split(r"  +", line[len(name) :].strip())


def test_figures_and_settings_side_by_side(make, page, capsys):
    runs = [
        make("a", result(step=3)),
        make("b", result(step=2, figures={"top-1": 0.5, "top-5": 0.75}), steps=2, seed=1),
    ]
    assert command(page, *runs) == 0
    said = capsys.readouterr().out
    assert row(said, "state") == ["finished", "finished"]
    assert row(said, "loss") == ["1.667", "2.5"]
    assert row(said, "kNN top-1") == ["60%\u00a0★", "40%"]
    assert row(said, "images per second, median") == ["200", "150"]
    assert row(said, "Nearest neighbours on pets: top-1") == ["75%\u00a0★", "50%"]
    assert row(said, "seed") == ["0", "1"]
    assert "temperature" not in said
    assert "comparable" not in said
    text = page.read_text()
    reader = check(text)
    assert {"75%\u00a0★", "50%", "1.667", "finished", "All others are the same."} <= set(reader.texts)
    assert str(page) in said
    assert [svg["aria-label"].split(":")[0] for svg in reader.of("svg") if "aria-label" in svg] == [
        "Loss", "Contrastive top-1", "kNN top-1", "Learning rate", "Images per second"
    ]  # fmt: skip
    assert os.listdir(page.parent) == ["compare.html"]


def test_the_newest_result_of_each_kind_counts(make, page, capsys):
    old = result(when="2026-01-01T00:00:00Z", figures={"top-1": 0.1}, step=1)
    new = result(when="2026-01-02T00:00:00Z", figures={"top-1": 0.2}, step=2)
    other = result(settings={"k": 5, "temperature": 0.1, "layer": "h"}, figures={"top-1": 0.3}, step=3)
    assert command(page, make("a", new, old, other), make("b", result(step=3))) == 0
    said = capsys.readouterr().out
    assert row(said, "Nearest neighbours on pets (k –): top-1") == ["20% (step 2)", "75%\u00a0★"]
    assert row(said, "Nearest neighbours on pets (k 5): top-1") == ["30%", "–"]


def test_figures_of_h_stand_in_a_row_whatever_else_was_measured(make, page, capsys):
    both = {"settings": {"k": 5, "layer": "both"}, "figures": {"top-1": 0.25, "top-1 of z": 0.5}}
    later = {"settings": {"k": 5, "layer": "h"}, "figures": {"top-1": 0.75}, "when": "2026-12-02T00:00:00Z"}
    runs = make("a", result(step=3, **both), result(step=3, **later)), make("b", result(step=3, **both))
    assert command(page, *runs) == 0
    said = capsys.readouterr().out
    assert row(said, "Nearest neighbours on pets: top-1") == ["75%\u00a0★", "25%"]
    assert row(said, "Nearest neighbours on pets: top-1 of z") == ["50%", "50%"]
    other = make("c", result(step=3, **both), result(step=3, **later, weights="others"))
    assert command(page, other, runs[1]) == 0
    assert row(capsys.readouterr().out, "Nearest neighbours on pets: top-1 of z") == ["–", "50%"]


def test_other_data_are_said_first(make, page, capsys):
    shown = [make("a", result()), make("b", result(data="food", step=3), data="/data/food", batch=512)]
    assert command(page, *shown) == 0
    said = capsys.readouterr().out
    assert (
        "on different data, and their figures of training are not comparable: a on /data/pets, b on /data/food." in said
    )
    assert "Losses are not comparable: runs differ in batch." in said
    assert said.index("not comparable") < said.index("Training")
    assert compare.BEST not in said
    assert row(said, "Nearest neighbours on food: top-1") == ["–", "75%"]
    text = page.read_text()
    check(text)
    assert text.index("not comparable") < text.index("<table>")
    assert text.count('<p class="warning">') == 2


def test_only_what_is_comparable_has_a_best(make, page, capsys):
    seen, low = {"data_digest": "12 images (aaa)"}, {"figures": {"top-1": 0.5}}
    other = make("b", result(step=2, **seen, **low), steps=2, data="/data/food")
    assert command(page, make("a", result(step=3, **seen)), other) == 0
    said = capsys.readouterr().out
    assert row(said, "kNN top-1") == ["60%", "40%"]
    assert row(said, "Nearest neighbours on pets: top-1") == ["75%\u00a0★", "50%"]
    assert page.read_text().count("marks the best") == 1
    assert command(page, make("c", result(step=3)), make("d", result(step=3, **low), data="/data/food")) == 0
    assert row(capsys.readouterr().out, "Nearest neighbours on pets: top-1") == ["75%", "50%"]
    assert "marks the best" not in page.read_text()


def test_other_test_images_are_said(make, page, capsys):
    runs = make("a", result()), make("b", result(counts={"test images": 10_000}, figures={"top-1": 0.5}))
    assert command(page, *runs) == 0
    said = capsys.readouterr().out
    assert "different numbers of test images, 12 and 10,000" in said
    assert said.count(compare.BEST) == 0


def test_modes_are_other_measurements(make, page, capsys):
    idle = {"holdout": 0.1, "l2": None, "batch": None, "lr": 0.1, "weight_decay": 0.0}
    exact, long = ({"mode": mode, "epochs": 90, **idle} for mode in ("exact", "sgd"))
    a = [result(protocol="linear", settings=one, step=3) for one in (exact, long)]
    b = [result(protocol="linear", settings=one | {"epochs": 2}, step=3) for one in (exact, long)]
    assert command(page, make("a", *a), make("b", *b)) == 0
    said = capsys.readouterr().out
    assert row(said, "Linear classifier, exact on pets: top-1") == ["75%", "75%"]
    assert row(said, "Linear classifier, the paper's recipe (sgd) on pets (epochs 90): top-1") == ["75%", "–"]
    assert row(said, "Linear classifier, the paper's recipe (sgd) on pets (epochs 2): top-1") == ["–", "75%"]


def test_steps_are_those_of_the_checkpoint_where_it_is_further(make, page, capsys):
    ahead, behind, none = (make(name, result(step=4), finished=False) for name in ("ahead", "behind", "none"))
    for folder, step in (ahead, 4), (behind, 2):
        (Path(folder) / "checkpoints").mkdir()
        state = {"step": step, "images": 256, "config": {"batch": 256, "epochs": 10}}
        torch.save(state, Path(folder) / "checkpoints" / "last.pt")
    assert command(page, ahead, behind, none, make("whole")) == 0
    said = capsys.readouterr().out
    assert row(said, "steps") == ["4", "3", "at least 3", "3"]
    assert row(said, "epochs") == ["4", "3", "3", "3"]
    assert row(said, "state")[0] == "unfinished, epoch 4 of 10"
    assert row(said, "Nearest neighbours on pets: top-1") == ["75%", "75% (step 4)", "75% (step 4)", "–"]
    (Path(ahead) / "checkpoints" / "last.pt").write_bytes(b"cut")
    assert command(page, ahead, behind) == 0
    assert row(capsys.readouterr().out, "steps") == ["at least 3", "3"]


def test_the_speed_is_that_of_the_report(make, page, capsys):
    folder = make("a", steps=4)
    records = read_metrics(Path(folder))
    assert command(page, folder, make("b")) == 0
    assert row(capsys.readouterr().out, "images per second, median")[0] == "250"
    assert median(records, "images_per_s") == median(records[:-1], "images_per_s") == 250


def test_other_images_of_the_same_name_are_said_and_never_side_by_side(make, page, capsys):
    here, there = {"data_digest": "12 images (aaa)"}, {"data_digest": "12 images (bbb)"}
    later = result(step=3, when="2026-12-01", figures={"top-1": 0.5}, **there)
    assert command(page, make("a", result(step=3, **here), later), make("b", result(step=3, **here))) == 0
    said = capsys.readouterr().out
    assert row(said, "Nearest neighbours on pets, 12 images (aaa): top-1") == ["75%", "75%"]
    assert row(said, "Nearest neighbours on pets, 12 images (bbb): top-1") == ["50%", "–"]
    assert "pets are not the same images in all evaluations: 12 images (aaa) and 12 images (bbb)." in said
    assert command(page, make("c", result(step=3, **here)), make("d", result(step=3, **here))) == 0
    assert "images (" not in capsys.readouterr().out


def test_unfinished_runs_are_said_to_be(make, page, capsys):
    begun, empty, going = make("a", finished=False), make("b", steps=0), make("c", finished=False)
    with claimed(Path(going)):
        assert command(page, begun, empty, going) == 0
    said = capsys.readouterr().out
    assert row(said, "state") == [
        "unfinished, epoch 3 of 10",
        "unfinished, epoch 0 of 10",
        "in training, epoch 3 of 10",
    ]
    assert row(said, "loss") == ["1.667", "–", "1.667"]
    check(page.read_text())
    assert "<p>a is unfinished, epoch 3 of 10.</p>" in page.read_text()


def test_runs_of_one_name_get_longer_ones(make, page, capsys):
    assert command(page, make("x/run"), make("y/run")) == 0
    assert row(capsys.readouterr().out.replace("\n", "\n§", 1), "§") == ["x/run", "y/run"]


def test_damaged_results_are_left_out(make, page, capsys):
    folder = make("a", result(step=3), {"when": "x", "name": "y"}, result(figures=[0.5]))
    (page.parent.parent / "a" / "evaluations" / "odd.json").write_text("{")
    assert command(page, folder, make("b")) == 0
    assert row(capsys.readouterr().out, "Nearest neighbours on pets: top-1") == ["75%", "–"]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], "runs must be two or more folders, got 0"),
        (["a"], "runs must be two or more folders, got 1"),
        (["a", "a/../a"], "runs must be different ones, got .*/a more than once"),
        (["a", "none"], "runs must be folders that the training wrote, and .*none is not there"),
        (["a", "empty"], "runs must be folders that the training wrote, and .*empty has no config.json"),
        (["a", "a/config.json"], "runs must be folders that the training wrote, and .*config.json is a file"),
        (["a", "broken"], "config must be a readable config.json"),
    ],
)
def test_what_is_refused(make, page, tmp_path, capsys, runs, said):
    make("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert command(page, *(str(tmp_path / one) for one in runs)) == 2
    assert re.search(f"error: {said}", capsys.readouterr().err)
    assert not page.exists()


def test_a_page_that_cannot_be_written(make, tmp_path, capsys):
    runs = [make("a"), make("b")]
    (tmp_path / "file").write_text("")
    assert evaluate.main(["compare", *runs, "--out", str(tmp_path)]) == 2
    assert f"out must be an .html file, got out={tmp_path}" in capsys.readouterr().err
    assert evaluate.main(["compare", *runs, "--out", str(tmp_path / "file" / "x.html")]) == 2
    said = capsys.readouterr()
    assert (said.out, f"out must be a folder that can be written, got {tmp_path / 'file'}" in said.err) == ("", True)


def test_names_are_escaped_and_many_runs_have_their_lines(make, page):
    runs = [make(f"<run> {k} & more", result(step=3)) for k in range(12)]
    assert command(page, *runs) == 0
    reader = check(page.read_text())
    assert "<run> 7 & more" in reader.texts
    lines = re.findall(r'<li class="(s\d)"><svg[^>]*><path class="(line[^"]*)"', page.read_text())
    assert len(set(lines)) == 12


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_it(make, page, tmp_path, capsys):
    runs = [make(f"a-run-with-quite-a-long-name-{k}", result(step=3), data="/data/" + "x" * 60 * k) for k in range(6)]
    assert command(page, *runs) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 600
    browser = Browser(tmp_path / "profile")
    try:
        for width, dark in ((360, False), (1280, True)):
            browser.open(page, width, dark=dark)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.complaints == []
        picture = browser.picture()
        assert picture[3, 3].mean() < 40
        assert (picture == (255, 161, 77)).all(-1).sum() > 20  # the second run's line
    finally:
        browser.close()


def test_settings_that_only_one_version_knows(make):
    runs = compare.read([make("a"), make("b", new=3)])
    assert compare.differing(runs) == [["new", "–", "3"]]
