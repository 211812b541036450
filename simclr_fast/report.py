"""report.html: what a run learnt, on one page that needs no network, no script and no other file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from simclr_fast.pages.charts import chart
from simclr_fast.pages.document import MARKS, document
from simclr_fast.pages.parts import bars, count, hood, known, pairs, percent, picture, plain, section, tiles
from simclr_fast.record import write_text

CURVES: list[tuple[str, str, Callable[[object], str]]] = [
    ("loss", "Loss", plain),
    ("contrastive_top1", "Contrastive top-1", percent),
    ("knn_top1", "kNN top-1", percent),
    ("online_top1", "Linear classifier beside training, top-1 on training views", percent),
    ("embedding_spread", "Embedding spread (0: collapsed)", plain),
    ("lr", "Learning rate", plain),
    ("images_per_s", "Images per second", count),
    ("data_wait", "Waiting for data", percent),
]
"""Those of a training, each where it was recorded: key of the records, title, a value as text."""
Neighbour = tuple[np.ndarray, str | None, float]  # uint8 [H, W, 3], label, similarity to the test image


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the page shows. Accuracies and waits are fractions; what is empty is left out."""

    title: str
    settings: Mapping[str, object]
    versions: Mapping[str, str]
    metrics: list[dict[str, Any]]
    """Records as in metrics.jsonl, oldest first: step, epoch, loss, lr, images_per_s, data_wait, contrastive_top1,
    embedding_spread and, in some, online_top1 and knn_top1. A value that is None or not finite is a gap in its curve.
    """
    chance_loss: float  # in nats, of embeddings that are all alike: ln(2N - 1)
    knn: Mapping[str, float] = field(default_factory=dict)  # by the features used, the trained encoder's last
    knn_note: str = ""  # how they were taken, or why there are none
    views: np.ndarray | None = None  # uint8 [rows, 3, H, W, 3]: an image, its first and its second view
    neighbours: list[tuple[np.ndarray, str | None, list[Neighbour]]] = field(default_factory=list)
    """Test images, uint8 [H, W, 3], each with its label, or None, and its nearest neighbours in order."""
    notes: list[str] = field(default_factory=list)  # sentences under the title
    evaluation: str = ""  # HTML, as `evaluation.page.evaluations` makes it


def write_report(path: Path, run: Run) -> None:
    """Write the page, whole or not at all. Evaluations have a place there, that `pages.document` can fill again.

    Raises ValueError where an image is not uint8, or `views` or an image not of the shape that `Run` gives.
    """
    sections = (_accuracies, _figures, _curves, _evaluation, _views, _neighbours, _tables)
    write_text(path, document(run.title, "report", run.notes, "".join(part(run) for part in sections)))


def _accuracies(run: Run) -> str:
    text = "How often the nearest training images vote for a test image's class; training saw no labels."
    text = f"{text if run.knn else ''} {escape(run.knn_note)}".strip()
    return section("kNN accuracy", text, bars(run.knn, [*run.knn][-1] if run.knn else None)) if text else ""


def _figures(run: Run) -> str:
    last = run.metrics[-1] if run.metrics else {}
    chance = f"{plain(run.chance_loss)} is that of embeddings all alike; an untrained network may lie above"
    figures = [
        ("Loss", plain(last.get("loss")), chance),
        ("Contrastive top-1", percent(last.get("contrastive_top1")), "on the last step"),
        ("Images per second", count(median(run.metrics, "images_per_s")), "median"),
        ("Waiting for data", percent(median(run.metrics, "data_wait")), "of the time, median"),
        ("Epochs", plain(last.get("epoch")), f"{count(last.get('step'))} steps"),
    ]
    return tiles(figures) if last else ""


def _curves(run: Run) -> str:
    charts = ""
    for key, name, show in CURVES:
        charts += chart(name, {name: curve(run.metrics, key)}, show, run.chance_loss if key == "loss" else None)
    text = """Over epochs, with the last value of each. Dashed: ln(2N − 1), the loss of embeddings all alike.
Contrastive top-1: how often a view finds the other view of its image among all images of the batch."""
    return section("Training", text, f'<div class="charts grid">{charts}</div>') if charts else ""


def curve(metrics: list[dict[str, Any]], key: str) -> list[tuple[object, object]]:
    """(epoch, value) of the records that have one."""
    return [(record["epoch"], record[key]) for record in metrics if key in record and known(record.get("epoch"))]


def _evaluation(run: Run) -> str:
    return MARKS[0] + run.evaluation + MARKS[1]


def _views(run: Run) -> str:
    views, rows = np.empty((0, 3)) if run.views is None else run.views, ""
    if views.shape[1] != 3:
        raise ValueError(f"views must be [rows, 3, H, W, 3], got {list(views.shape)}")
    for row in views:
        rows += f"<div>{''.join(map(picture, row, ('original', 'view 1', 'view 2')))}</div>"
    text = "Images, and two random views of each. Training pulls the two views of an image together."
    return section("Views", text, f'<div class="views grid">{rows}</div>') if rows else ""


def _neighbours(run: Run) -> str:
    rows = ""
    for image, label, found in run.neighbours:
        near = [
            picture(one, f"{name or ''}\n{similarity:.2f}".strip(), alike(label, name))
            for one, name, similarity in found
        ]
        rows += hood(picture(image, label or "test image"), near)
    text = "Images, and the training images with the most similar features, by cosine similarity."
    return section("Nearest neighbours", text, rows) if rows else ""


def alike(label: str | None, name: str | None) -> bool | None:
    """Whether two images are of one class; None where that is not known of both."""
    return None if label is None or name is None else label == name


def _tables(run: Run) -> str:
    tables = ""
    for name, rows in ("Settings", run.settings), ("Versions", run.versions):
        tables += section(name, "", pairs(f"{name} of the run", rows)) if rows else ""
    return f'<div class="tables grid">{tables}</div>'


def median(metrics: list[dict[str, Any]], key: str) -> float:
    """Over the records that have it, but for one that says `finished`, which repeats another; NaN of none."""
    values = [record[key] for record in metrics if known(record.get(key)) and not record.get("finished")]
    return float(np.median(values or math.nan))
