"""Curves and scatters as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from simclr_fast.pages.parts import known, plain

POINTS = 240  # of a curve, about so many are drawn
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 190, 54, 8, 10, 24  # of a chart, and its margins
HUES, DASHES, SHAPES = 10, 4, 4
COLOURED = HUES * SHAPES // 2  # classes that can be told apart, by hue and shape together
SIDE = 1000  # of a scatter
Points = Sequence[tuple[object, object]]
"""(x, y) in order: of equal x the last counts, and a y that is no finite number is a gap."""


def chart(
    name: str, curves: Mapping[str, Points], show: Callable[[object], str], level: float | None = None, x: str = "epoch"
) -> str:
    """Curves by their names; the y axis reaches down to 0, or is fitted to the curves and a dashed `level`.

    Args:
        name: of the chart, text.
        show: a value as text.
        x: what the x axis is, one of it.
    Returns:
        a figure, or nothing where no curve has a point.
    """
    rows = {label: [*{at: (at, y) for at, y in points if known(at)}.values()] for label, points in curves.items()}
    rows = {label: points for label, points in rows.items() if any(known(y) for _, y in points)}
    if not rows:
        return ""
    places = {label: k for k, label in enumerate(curves)}  # a curve has its colour on every chart
    values = [y for points in rows.values() for _, y in points if known(y)] + [level if known(level) else 0]
    right, y_ticks = max(at for points in rows.values() for at, _ in points) or 1, ticks(min(values), max(values))

    def at(x: float, y: float) -> tuple[float, float]:
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + x / right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    svg = ""
    for y in y_ticks:
        svg += f'<path d="M{LEFT} {at(0, y)[1]:.1f}H{WIDTH - RIGHT}"/>'
        svg += f'<text class="y" x="{LEFT - 8}" y="{at(0, y)[1] + 4:.1f}">{show(y)}</text>'
    for tick in [tick for tick in ticks(0, right) if tick <= right]:
        svg += f'<text x="{at(tick, 0)[0]:.1f}" y="{HEIGHT - 6}">{plain(tick)}</text>'
    if known(level):
        svg += f'<path class="level" d="M{LEFT} {at(0, level)[1]:.1f}H{WIDTH - RIGHT}"/>'
    told = []
    for label, points in rows.items():
        hue = "" if len(curves) == 1 else f' class="{_hue(places[label])}"'
        svg += f"<g{hue}>{_curve(points, at, show, x, places[label], '' if len(curves) == 1 else f'{label}, ')}</g>"
        final = [(at, y) for at, y in points if known(y)][-1]
        who = f"{label} " if len(curves) > 1 else ""
        told.append(f"{who}{show(final[1])} at {x} {plain(final[0])}")
    last = f"<strong>{told[0].split(' at ')[0]}</strong>" if len(curves) == 1 else ""
    head, label = f"<figcaption>{escape(name)}{last}</figcaption>", escape(f"{name}: {'; '.join(told)}")
    return f'<figure>{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{svg}</svg></figure>'


def _curve(
    points: Points, at: Callable[[float, float], tuple[float, float]], show: Callable[[object], str], x: str,
    place: int, who: str,
) -> str:  # fmt: skip
    line, pen, marks = "", "M", []
    for where, value in [*points[: -1 : -(-len(points) // POINTS)], *points[-1:]]:
        if known(where) and known(value):
            (left, top), hint = at(where, value), escape(f"{who}{x} {plain(where)}: {show(value)}")
            line += f"{pen}{left:.1f} {top:.1f}"
            marks.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.5"><title>{hint}</title></circle>')
        pen = "L" if known(value) else "M"
    few = "few" if len(marks) <= 24 else "many"
    return f'<path class="line{_dash(place)}" d="{line}"/><g class="{few}">{"".join(marks)}</g>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the first not above `low`, the last not below `high`."""
    span = high - low if high - low > 1e-6 * abs(high) else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * span / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def curve_legend(labels: Sequence[str]) -> str:
    """Which line is whose."""
    items = ""
    for k, label in enumerate(labels):
        line = f'<svg viewBox="0 0 22 12" aria-hidden="true"><path class="line{_dash(k)}" d="M1 6H21"/></svg>'
        items += f'<li class="{_hue(k)}">{line}{escape(label)}</li>'
    return f'<ul class="legend">{items}</ul>'


def scatter(title: str, points: Sequence[Sequence[float]], labels: Sequence[int], classes: Sequence[str]) -> str:
    """A square of points, a class each hue and shape; where there are too many, the most frequent ones."""
    xy = np.asarray(points, float).reshape(-1, 2)
    inside = np.isfinite(xy).all(1)
    xy, owners = xy[inside], np.asarray(labels, int)[inside]
    if not len(xy):
        return ""
    middle, reach = (xy.max(0) + xy.min(0)) / 2, max(float(np.ptp(xy, 0).max()), 1e-12)
    places = ((xy - middle) / reach * [1, -1] * (SIDE - 40) + SIDE / 2).round().astype(int)
    shown = coloured(owners, classes)
    groups = [("rest", 0, "other images", ~np.isin(owners, shown))]
    groups += [(_hue(k), k % SHAPES, classes[owner], owners == owner) for k, owner in enumerate(shown)]
    svg = ""
    for hue, shape, name, rows in groups:
        if rows.any():
            marks = "".join(_mark(shape, left, top) for left, top in places[rows])
            svg += f'<g class="{hue}"><title>{escape(name)}</title><path class="{_SHAPES[shape]}" d="{marks}"/></g>'
    among = f" in {len(shown)} classes" if len(shown) == len(set(owners[owners >= 0])) and shown else ""
    label = escape(f"{title}: {len(xy):,} points{among}")
    head = f"<figcaption>{escape(title)}</figcaption>"
    frame = f'<svg class="points" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{label}">{svg}</svg>'
    return f"<figure>{head}{frame}</figure>"


def coloured(labels: Sequence[int] | np.ndarray, classes: Sequence[str]) -> list[int]:
    """The classes that a scatter shows in colour, in order: the most frequent ones, where there are too many."""
    owners = np.asarray(labels, int)
    counts = np.bincount(owners[(owners >= 0) & (owners < len(classes))], minlength=len(classes))
    order = np.argsort(-counts, kind="stable")[:COLOURED]
    return sorted(int(owner) for owner in order if counts[owner])


def scatter_legend(shown: Sequence[int], classes: Sequence[str]) -> str:
    """Which mark is of which class."""
    items = ""
    for k, owner in enumerate(shown):
        mark = f'<path class="{_SHAPES[k % SHAPES]}" d="{_mark(k % SHAPES, 10, 10)}"/>'
        frame = f'<svg class="points" viewBox="0 0 20 20" aria-hidden="true">{mark}</svg>'
        items += f'<li class="{_hue(k)}">{frame}{escape(classes[owner])}</li>'
    return f'<ul class="legend">{items}</ul>' if items else ""


_SHAPES = ("round", "square", "filled", "filled")


def _mark(shape: int, x: int, y: int) -> str:
    return f"M{x} {y}{('h0', 'h0', 'm0-6l6 11h-12z', 'm0-7l6 7-6 7-6-7z')[shape]}"


def _hue(place: int) -> str:
    return f"s{place % HUES}"


def _dash(place: int) -> str:
    return f" d{place % DASHES}" if place % DASHES else ""
