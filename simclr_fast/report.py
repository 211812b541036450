"""report.html: what a run learnt, on one page that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from simclr_fast.record import write_text

POINTS = 240  # of a curve, about so many are drawn
PNG_PIXELS = 96 * 96  # larger images become JPEG
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 190, 54, 8, 10, 24  # of a chart, and its margins
Neighbour = tuple[np.ndarray, str | None, float]  # uint8 [H, W, 3], label, similarity to the test image


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the page shows. Accuracies and waits are fractions; what is empty is left out."""

    title: str
    settings: Mapping[str, object]
    versions: Mapping[str, str]
    metrics: list[dict[str, Any]]
    """Records as in metrics.jsonl, oldest first: step, epoch, loss, lr, images_per_s, data_wait,
    contrastive_top1 and, in some, knn_top1. A value that is None or not finite is a gap in its curve."""
    chance_loss: float  # in nats, of embeddings that are all alike: ln(2N - 1)
    knn: Mapping[str, float] = field(default_factory=dict)  # by the features used, the trained encoder's last
    knn_note: str = ""  # how they were taken, or why there are none
    views: np.ndarray | None = None  # uint8 [rows, 3, H, W, 3]: an image, its first and its second view
    neighbours: list[tuple[np.ndarray, str | None, list[Neighbour]]] = field(default_factory=list)
    """Test images, uint8 [H, W, 3], each with its label, or None, and its nearest neighbours in order."""
    notes: list[str] = field(default_factory=list)  # sentences under the title


def write_report(path: Path, run: Run) -> None:
    """Write the page, whole or not at all.

    Raises ValueError where an image is not uint8, or `views` or an image not of the shape that `Run` gives.
    """
    sections = (_accuracies, _figures, _curves, _views, _neighbours, _tables)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    title, notes = escape(run.title), "".join(f"<p>{escape(note)}</p>" for note in run.notes)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title} · simclr_fast</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body><main>
<header><small>simclr_fast · report</small><h1>{title}</h1>{notes}</header>
{"".join(section(run) for section in sections)}</main></body></html>
"""
    write_text(path, page)


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{content}</section>"


def _accuracies(run: Run) -> str:
    bars = ""
    for name, value in run.knn.items():
        share = 100 * min(max(value, 0), 1) if _known(value) else 0
        bars += f"<div><span>{escape(name)}</span><strong>{_percent(value)}</strong>"
        bars += f'<i><b style="width:{share:.1f}%"></b></i></div>'
    text = "How often the nearest training images vote for a test image's class; training saw no labels."
    text = f"{text if bars else ''} {escape(run.knn_note)}".strip()
    return _section("kNN accuracy", text, f'<div class="bars grid">{bars}</div>') if text else ""


def _figures(run: Run) -> str:
    last = run.metrics[-1] if run.metrics else {}
    figures = [
        ("Loss", _plain(last.get("loss")), f"chance is {_plain(run.chance_loss)}"),
        ("Contrastive top-1", _percent(last.get("contrastive_top1")), "on the last step"),
        ("Images per second", _count(_median(run, "images_per_s")), "median"),
        ("Waiting for data", _percent(_median(run, "data_wait")), "of the time, median"),
        ("Epochs", _plain(last.get("epoch")), f"{_count(last.get('step'))} steps"),
    ]
    tiles = [f"<div><dt>{name}</dt><dd>{big}</dd><small>{note}</small></div>" for name, big, note in figures]
    return f"<dl>{''.join(tiles)}</dl>" if last else ""


def _curves(run: Run) -> str:
    charts = _chart(run, "loss", "Loss", _plain, level=run.chance_loss)
    charts += _chart(run, "contrastive_top1", "Contrastive top-1", _percent)
    charts += _chart(run, "knn_top1", "kNN top-1", _percent)
    charts += _chart(run, "lr", "Learning rate", _plain)
    charts += _chart(run, "images_per_s", "Images per second", _count)
    charts += _chart(run, "data_wait", "Waiting for data", _percent)
    text = """Over epochs, with the last value of each. Dashed: ln(2N − 1), the loss of embeddings all alike.
Contrastive top-1: how often a view finds the other view of its image among all images of the batch."""
    return _section("Training", text, f'<div class="charts grid">{charts}</div>') if charts else ""


def _chart(run: Run, key: str, name: str, show: Callable[[Any], str], level: float | None = None) -> str:
    """One curve; its y axis reaches down to 0, or is fitted to the curve and a dashed `level`."""
    points = [(r["epoch"], r.get(key)) for r in run.metrics if key in r and _known(r.get("epoch"))]
    known = [(x, y) for x, y in points if _known(y)]
    if not known:
        return ""
    values = [y for _, y in known] + [level if _known(level) else 0]
    right, y_ticks = max(x for x, _ in points) or 1, _ticks(min(values), max(values))

    def at(x: float, y: float) -> tuple[float, float]:
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + x / right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    svg = ""
    for y in y_ticks:
        svg += f'<path d="M{LEFT} {at(0, y)[1]:.1f}H{WIDTH - RIGHT}"/>'
        svg += f'<text class="y" x="{LEFT - 8}" y="{at(0, y)[1] + 4:.1f}">{show(y)}</text>'
    for x in [x for x in _ticks(0, right) if x <= right]:
        svg += f'<text x="{at(x, 0)[0]:.1f}" y="{HEIGHT - 6}">{_plain(x)}</text>'
    if _known(level):
        svg += f'<path class="level" d="M{LEFT} {at(0, level)[1]:.1f}H{WIDTH - RIGHT}"/>'
    line, pen, marks = "", "M", []
    for x, value in points[: -1 : -(-len(points) // POINTS)] + points[-1:]:
        if _known(value):
            (left, top), hint = at(x, value), f"epoch {_plain(x)}: {show(value)}"
            line += f"{pen}{left:.1f} {top:.1f}"
            marks.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.5"><title>{hint}</title></circle>')
        pen = "L" if _known(value) else "M"
    few = "few" if len(marks) <= 24 else "many"
    svg += f'<path class="line" d="{line}"/><g class="{few}">{"".join(marks)}</g></svg>'
    head = f"<figcaption>{name}<strong>{show(known[-1][1])}</strong></figcaption>"
    return f'<figure>{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{svg}</figure>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the first not above `low`, the last not below `high`."""
    span = high - low if high - low > 1e-6 * abs(high) else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * span / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _views(run: Run) -> str:
    views, rows = np.empty((0, 3)) if run.views is None else run.views, ""
    if views.shape[1] != 3:
        raise ValueError(f"views must be [rows, 3, H, W, 3], got {list(views.shape)}")
    for row in views:
        rows += f"<div>{''.join(map(_picture, row, ('original', 'view 1', 'view 2')))}</div>"
    text = "Images, and two random views of each. Training pulls the two views of an image together."
    return _section("Views", text, f'<div class="views grid">{rows}</div>') if rows else ""


def _neighbours(run: Run) -> str:
    rows = ""
    for image, label, found in run.neighbours:
        near = ""
        for picture, name, similarity in found:
            sign, kind = ("✓ ", "right") if label == name else ("✗ ", "wrong")
            if label is None or name is None:
                sign, kind = "", ""
            near += _picture(picture, f"{sign}{name or ''}\n{similarity:.2f}".strip(), kind)
        rows += f'<div class="hood">{_picture(image, label or "")}<div class="grid">{near}</div></div>'
    text = "Images, and the training images with the most similar features, by cosine similarity."
    return _section("Nearest neighbours", text, rows) if rows else ""


def _tables(run: Run) -> str:
    tables = ""
    for name, rows in ("Settings", run.settings), ("Versions", run.versions):
        cells = [f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items()]
        tables += _section(name, "", f"<table>{''.join(cells)}</table>") if cells else ""
    return f'<div class="tables grid">{tables}</div>'


def _picture(image: np.ndarray, caption: str, kind: str = "") -> str:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    form = "png" if height * width <= PNG_PIXELS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, quality=88)
    data, text = base64.b64encode(file.getvalue()).decode(), escape(caption)
    tag = f'<img src="data:image/{form};base64,{data}" width="{width}" height="{height}" alt="{text}">'
    return f'<figure class="{kind}">{tag}<figcaption>{text}</figcaption></figure>'


def _known(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.floating) and math.isfinite(value)


def _median(run: Run, key: str) -> float:
    return float(np.median([r[key] for r in run.metrics if _known(r.get(key))] or math.nan))


def _plain(value: object) -> str:
    return f"{value:.4g}" if _known(value) else "–"


def _count(value: object) -> str:
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if _known(value) else "–"


def _percent(value: object) -> str:
    return f"{100 * value:.3g}%" if _known(value) else "–"


STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1d2129; --soft: #666d7a;
  --rule: #e6e3dd; --main: #2f5fd0; --pale: #aab6cc; --right: #1c8a56; --wrong: #c8452f; }
@media (prefers-color-scheme: dark) { :root { --page: #14161b; --card: #1c1f26; --ink: #e8eaee;
  --soft: #98a0ae; --rule: #2d313a; --main: #7ea6ff; --pale: #566178; --right: #4cc38a; --wrong: #ff8a70; } }
* { box-sizing: border-box; margin: 0; } main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 72px; }
body { background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
section, dl { margin-top: 56px; } h1 { font-size: 34px; line-height: 1.2; margin: 4px 0 8px; }
h2 { font-size: 21px; } header p, section > p { color: var(--soft); max-width: 48em; text-wrap: pretty; }
small, dt, th, figcaption, .bars span { color: var(--soft); font-size: 13px; font-weight: 400; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell)), 1fr));
  gap: 16px; margin-top: 20px; }
.bars { --cell: 300px; column-gap: 32px; } .bars * { display: block; }
.bars strong { font-size: 52px; line-height: 1.15; font-weight: 650; letter-spacing: -.03em; }
.bars i { height: 10px; margin-top: 8px; border-radius: 5px; background: var(--rule); overflow: hidden; }
.bars b { height: 100%; background: var(--pale); } .bars > :last-child b { background: var(--main); }
.bars > :last-child strong { color: var(--main); } .charts strong { color: var(--ink); }
dl, .charts figure { border: 1px solid var(--rule); border-radius: 12px; }
dl { display: flex; flex-wrap: wrap; gap: 1px; overflow: hidden; background: var(--rule); }
dl div { flex: 1 1 150px; padding: 16px; background: var(--card); } dd { font-size: 25px; font-weight: 600; }
.charts { --cell: 400px; } .charts figure { background: var(--card); padding: 14px 16px 10px; }
.charts figcaption { display: flex; justify-content: space-between; font-size: 15px; margin-bottom: 6px; }
svg, img { display: block; width: 100%; height: auto; } svg { overflow: visible; } img { border-radius: 6px; }
text { fill: var(--soft); font-size: 11.5px; text-anchor: middle; } text.y { text-anchor: end; }
path { fill: none; stroke: var(--rule); } path.level { stroke: var(--soft); stroke-dasharray: 5 4; }
path.line { stroke: var(--main); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
circle { fill: var(--main); opacity: 0; } circle:hover, circle:last-child, .few circle { opacity: 1; }
.views { --cell: 290px; gap: 20px 28px; } .views > div { display: flex; gap: 6px; } .views figure { flex: 1; }
.hood { display: flex; gap: 28px; padding: 18px 0; border-bottom: 1px solid var(--rule); }
.hood > figure { width: 104px; } .hood .grid { --cell: 80px; flex: 1; gap: 12px; margin: 0; }
.hood figcaption { line-height: 1.35; margin-top: 5px; white-space: pre-line; }
.right img { outline: 3px solid var(--right); } .right figcaption { color: var(--right); }
.wrong img { outline: 3px solid var(--wrong); } .wrong figcaption { color: var(--wrong); }
.tables { --cell: 320px; gap: 0 48px; margin: 0; } table { width: 100%; border-collapse: collapse; }
th, td { text-align: left; padding: 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { text-align: right; padding-left: 16px; font-size: 14px; }
"""
