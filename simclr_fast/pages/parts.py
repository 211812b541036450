"""Parts of a page: sections, tables, bars, tiles, pictures, and how numbers are written."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

PNG_PIXELS = 96 * 96  # larger images become JPEG
DATE = re.compile(r"\d{4}-\d\d-\d\d\b")


def known(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float | np.floating) and math.isfinite(value)


def plain(value: object) -> str:
    return f"{value:.4g}" if known(value) else "–"


def count(value: object) -> str:
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if known(value) else "–"


def percent(value: object) -> str:
    return f"{100 * value:.3g}%" if known(value) else "–"


def percents(values: Iterable[object]) -> list[str]:
    """All with as many decimals as the one that has most as `percent`: at most one, or two where all are below 10 %."""
    rows = list(values)
    numbers = [value for value in rows if known(value)]
    most = max((len(percent(value).rstrip("%").partition(".")[2]) for value in numbers), default=0)
    decimals = min(most, 2 if max(numbers, default=0) < 0.1 else 1)
    return [f"{100 * value:.{decimals}f}%" if known(value) else "–" for value in rows]


def section(title: str, text: str, content: str) -> str:
    """A section under an h2; `title` and `text` are HTML."""
    return f"<section><h2>{title}</h2>{f'<p>{text}</p>' if text else ''}{content}</section>"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first cells name the rows; it scrolls in itself where the screen is narrow.

    Args:
        rows: cells are text, or fractions, shown as per cent, or None, shown as a dash.
    """
    filled = [list(row) for row in rows]
    words = [bool(filled) and all(_is_words(row[k]) for row in filled) for k in range(len(columns))]
    dates = [bool(filled) and all(DATE.match(str(row[k])) for row in filled) for k in range(len(columns))]
    kinds = [' class="words"' if word else ' class="date"' if date else ""
             for word, date in zip(words, dates, strict=True)]  # fmt: skip
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = ""
    for first, *rest in filled:
        cells = "".join(f"<td{kind}>{escape(_cell(cell))}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body += f'<tr><th scope="row">{escape(_cell(first))}</th>{cells}</tr>'
    top = f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>"
    return region(caption, f"<table>{top}<tbody>{body}</tbody></table>")


def region(name: str, content: str, kind: str = "") -> str:
    """What scrolls sideways by itself, also by keyboard; `name` is text."""
    classes = f"wide {kind}".strip()
    return f'<div class="{classes}" role="region" aria-label="{escape(name)}" tabindex="0">{content}</div>'


def pairs(caption: str, rows: Mapping[str, object]) -> str:
    """A table of names and values, its caption for those who hear it."""
    cells = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(str(value))}</td></tr>' for key, value in rows.items()
    )
    return f'<table><caption class="unseen">{escape(caption)}</caption><tbody>{cells}</tbody></table>'


def bars(values: Mapping[str, object], chosen: str | None = None) -> str:
    """Big fractions with a bar each, by name; the one called `chosen` in colour."""
    items = ""
    for (name, value), text in zip(values.items(), percents(values.values()), strict=True):
        kind = ' class="chosen"' if name == chosen else ""
        items += f"<li{kind}><span>{escape(name)}</span><strong>{text}</strong>{_bar(value)}</li>"
    return f'<ul class="bars grid">{items}</ul>' if items else ""


def ranks(values: Iterable[tuple[str, float]]) -> str:
    """Fractions with a small bar each, in order."""
    rows = list(values)
    items = (
        f'<li title="{escape(name)}"><span>{escape(name)}</span>{_bar(value)}<strong>{text}</strong></li>'
        for (name, value), text in zip(rows, percents(value for _, value in rows), strict=True)
    )
    return f'<ul class="ranks">{"".join(items)}</ul>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Small figures: (name, figure, note)."""
    boxes = (f"<div><dt>{name}</dt><dd>{big}<small>{note}</small></dd></div>" for name, big, note in figures)
    return f"<dl>{''.join(boxes)}</dl>"


def picture(image: np.ndarray | str, caption: str, right: bool | None = None) -> str:
    """A figure: uint8 [H, W, 3], or what `data_uri` made of it. `right` frames it as right or wrong."""
    source = image if isinstance(image, str) else data_uri(image)
    size = "" if isinstance(image, str) else f' width="{image.shape[1]}" height="{image.shape[0]}"'
    sign, kind = {True: ("✓ ", ' class="right"'), False: ("✗ ", ' class="wrong"'), None: ("", "")}[right]
    text = escape(sign + caption)
    return f'<figure{kind}><img src="{escape(source)}"{size} alt="{text}"><figcaption>{text}</figcaption></figure>'


def data_uri(image: np.ndarray) -> str:
    """An image as text: PNG, or JPEG where it is large.

    Raises:
        ValueError: it is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    form = "png" if image.shape[0] * image.shape[1] <= PNG_PIXELS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, quality=88)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"


def hood(image: str, near: Iterable[str]) -> str:
    """A picture, and those that lie near it in a row."""
    return f'<div class="hood">{image}<div class="grid">{"".join(near)}</div></div>'


def _is_words(cell: object) -> bool:
    return isinstance(cell, str) and not cell[:1].isdigit() and cell != "–"


def _bar(value: object) -> str:
    share = 100 * min(max(value, 0), 1) if known(value) else 0
    return f'<i aria-hidden="true"><b style="width:{share:.1f}%"></b></i>'


def _cell(cell: Any) -> str:
    if cell is None:
        return "–"
    return f"{cell:.1%}" if isinstance(cell, float) and known(cell) else str(cell)
