"""Originals and views on one page, with the parameters of each view, for every engine side by side."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from simclr_fast.data import engine_name, train_views
from simclr_fast.data.commands.shards import replace_text
from simclr_fast.data.engines.torchvision_engine import decode
from simclr_fast.data.policy import Params, Policy, permutation
from simclr_fast.data.sources import DataError, Dataset, Split
from simclr_fast.data.sources.samples import shown

ENGINES = {"dali": "DALI", "torchvision": "torchvision"}
ORIGINAL_SIDE, VIEW_SIDE = 480, 320  # pixels; larger ones are shown smaller
PNG_PIXELS = 96 * 96  # larger images become JPEG
FRAME_REM = 24  # height of a frame at most
FACTORS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True, eq=False)
class _Made:
    """The views of some images, in the order of the epoch."""

    indices: np.ndarray  # int64 [n], images of the split
    params: tuple[Params, Params]  # of the first views and of the second
    levels: dict[str, np.ndarray]  # by engine: float32 [n, 2, S, S, 3], in 8-bit levels
    notes: list[str]  # why an engine is missing

    def differences(self) -> np.ndarray | None:
        """float64 [n, 2, 2]: largest and mean difference of the two engines in each view; None if there is one."""
        if len(self.levels) < 2:
            return None
        first, second = self.levels.values()
        distance = abs(first - second).reshape(len(first), 2, -1)
        return np.stack([distance.max(2), distance.mean(2, dtype=np.float64)], axis=2)


def write_preview(
    dataset: Dataset,
    path: str | os.PathLike[str],
    policy: Policy,
    *,
    count: int = 8,
    seed: int = 0,
    epoch: int = 0,
) -> None:
    """Write a page that needs no network and no other file, whole or not at all.

    It shows the first images of an epoch of training with this seed, with the very views that training makes of them.

    Args:
        path: of the HTML file; folders above it are made.
        policy: the augmentation; views are shown with at most 320 pixels a side, originals with 480.
        count: images, fewer if the training part has fewer.
        seed, epoch: the run's seed, and the epoch from 0 on.
    Raises:
        DataError: the count, seed or epoch is out of range, an image cannot be read, or the page not be written.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if not least <= value < 2**31:
            raise DataError(f"{name} must be in [{least}, 2^31), got {name}={value}")
    split = dataset.train
    try:
        made = _make(split, policy, min(count, len(split)), seed, epoch)
        page = _page(dataset, policy, made, {"seed": seed, "epoch": epoch})
    except OSError as error:
        raise DataError(f"the images must stay while they are shown: {shown(str(error))}") from error
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, page)
    except OSError as error:
        raise DataError(f"the page {str(target)!r} cannot be written: {error.strerror}") from error


def _make(split: Split, policy: Policy, count: int, seed: int, epoch: int) -> _Made:
    indices = permutation(len(split), seed, epoch)[:count]
    epochs, sizes = np.full(count, epoch), split.sizes[indices]
    first, second = (policy.draw(seed, epochs, indices, view, sizes) for view in (0, 1))
    mean, std = (np.array(values, np.float32) for values in (policy.mean, policy.std))
    levels, notes = {}, []
    for engine in ENGINES:
        try:
            engine_name(engine)
        except ValueError as error:
            notes.append(f"{ENGINES[engine]} is not shown: {error}.")
            continue
        # One image a step, so that the steps of the epoch start where the epoch starts.
        start = epoch * len(split)
        steps = train_views(split, policy, batch=1, seed=seed, start_step=start, steps=count, workers=0, engine=engine)
        views = np.empty((count, 2, policy.size, policy.size, 3), np.float32)
        for row, (one, two, taken) in enumerate(steps):
            if taken[0] != indices[row]:  # the engines go on with another image
                raise DataError(f"{shown(split.names[indices[row]])} cannot be read any more")
            views[row] = torch.cat([one, two]).permute(0, 2, 3, 1).numpy()
        levels[engine] = 255 * (views * std + mean)
        if not np.isfinite(levels[engine]).all():
            notes.append(f"{ENGINES[engine]} gives values that are not numbers; they are shown as black.")
    return _Made(indices, (first, second), levels, notes)


def _page(dataset: Dataset, policy: Policy, made: _Made, facts: dict[str, int]) -> str:
    title, names = escape(shown(dataset.name)), " and ".join(ENGINES[engine] for engine in made.levels)
    differences = made.differences()
    makes = "make" if len(made.levels) > 1 else "makes"
    lines = [
        f"The first {len(made.indices)} of {len(dataset.train):,} training images in epoch {facts['epoch']} of a run "
        f"with seed {facts['seed']}, and the two views that {names} {makes} of each. Frames on an original are the "
        "crops: the solid one is view 1, the dashed one view 2."
    ]
    if differences is not None:
        largest, mean = differences[..., 0].max(), differences[..., 1].mean()
        lines.append(
            f"Over all these views the engines differ by {_levels(mean)} of 255 levels on average, by "
            f"{_levels(largest)} at most."
        )
    lines += made.notes
    cards = "".join(_card(dataset, policy, made, row, differences) for row in range(len(made.indices)))
    settings = facts | {
        "dialect": policy.dialect,
        "size of a view": f"{policy.size} × {policy.size} px",
        "smallest crop": f"{policy.min_area:.3g} of the area",
        "flip": _percent(policy.flip),
        "jitter": f"{_percent(policy.jitter_p)}, strength {policy.jitter_strength:g}",
        "gray": _percent(policy.gray_p),
        "blur": f"{_percent(policy.blur_p)}, {2 * policy.blur_radius + 1} taps"
        if policy.blur_radius
        else "none at this size",
    }
    csp = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title} · views · simclr_fast</title>
<meta http-equiv="Content-Security-Policy" content="{csp}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body><main>
<header><small>simclr_fast · views</small><h1>{title}</h1>{"".join(f"<p>{escape(line)}</p>" for line in lines)}</header>
{cards}
<section><h2>Settings</h2>{_list(settings)}</section></main></body></html>
"""


def _card(dataset: Dataset, policy: Policy, made: _Made, row: int, differences: np.ndarray | None) -> str:
    """An image: the original with both crops, and its views."""
    split, index = dataset.train, int(made.indices[row])
    name, label = shown(split.names[index]), -1 if split.labels is None else int(split.labels[index])
    text = f"{split.sizes[index][1]:,} × {split.sizes[index][0]:,} px"
    text += f" · {shown(dataset.classes[label])}" if label >= 0 else ""
    views = ""
    for view, params in enumerate(made.params):
        pictures = ""
        for engine, levels in made.levels.items():
            alt = f"View {view + 1} of {name}, made by {ENGINES[engine]}"
            pixels = np.nan_to_num(levels[row, view]).round().clip(0, 255).astype(np.uint8)
            picture = _image(pixels, VIEW_SIDE, alt)
            pictures += f"<figure>{picture}<figcaption>{ENGINES[engine]}</figcaption></figure>"
        words = _words(params, row, split.sizes[index], policy)
        if differences is not None:
            largest, mean = differences[row, view]
            words["difference"] = f"{_levels(mean)} of 255 levels on average, {_levels(largest)} at most"
        heading = f'<h3><i class="key view{view + 1}"></i>View {view + 1}</h3>'
        views += f'<div class="view">{heading}<div class="pair">{pictures}</div>{_list(words)}</div>'
    original = _framed(split, index, name, [params.window[row] for params in made.params])
    return f"""<section><h2>{escape(name)}</h2><div class="card"><figure>{original}
<figcaption>{escape(text)}</figcaption></figure>{views}</div></section>
"""


def _framed(split: Split, index: int, name: str, windows: Sequence[np.ndarray]) -> str:
    """The original and, over it, a rectangle for each crop."""
    height, width = split.sizes[index].tolist()
    scale = ORIGINAL_SIDE / max(height, width)
    across, down = width * scale, height * scale
    frames = ""
    for view, window in enumerate(windows):
        y, x, h, w = (scale * float(value) for value in window)
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        frames += f'<rect class="halo" {shape}/><rect class="view{view + 1}" {shape}/>'
    pixels = decode(split.read(index)).permute(1, 2, 0).numpy()
    picture = _image(pixels, ORIGINAL_SIDE, f"{name}, the original")
    style = f"aspect-ratio:{across:.1f}/{down:.1f};width:min(100%,{FRAME_REM * across / down:.2f}rem)"
    svg = f'<svg viewBox="0 0 {across:.1f} {down:.1f}" preserveAspectRatio="none" aria-hidden="true">{frames}</svg>'
    return f'<div class="frame" style="{style}">{picture}{svg}</div>'


def _words(params: Params, row: int, size: np.ndarray, policy: Policy) -> dict[str, str]:
    """The parameters of a view, in words."""
    y, x, height, width = params.window[row].tolist()
    share = height * width / float(size[0] * size[1])
    jitter = []
    for operator in params.order[row].tolist():
        factor = float(params.factors[row, operator])
        amount = f"{360 * factor:+.0f}°".replace("-", "−") if FACTORS[operator] == "hue" else f"×\u00a0{factor:.2f}"
        jitter.append(f"{FACTORS[operator]} {amount}")
    blur = float(params.sigma[row]) if policy.blur_radius else 0.0
    return {
        "crop": f"{width:,} × {height:,} px at x {x:,}, y {y:,}: {_percent(share)} of the area",
        "flip": "yes" if params.flip[row] else "no",
        "jitter": ", then ".join(jitter) if params.jitter[row] else "no",
        "gray": "yes" if params.gray[row] else "no",
        "blur": f"sigma {blur:.2f} px" if blur else "no",
    }


def _list(rows: Mapping[str, object]) -> str:
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in rows.items())
    return f"<dl>{items}</dl>"


def _image(pixels: np.ndarray, side: int, alt: str) -> str:
    """An img element of uint8 [H, W, 3], made smaller if it is over `side` pixels long."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    form = "png" if image.width * image.height <= PNG_PIXELS else "jpeg"
    file = io.BytesIO()
    image.save(file, form, quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    small = ' class="small"' if max(image.size) <= 128 else ""
    source = f"data:image/{form};base64,{data}"
    return f'<img src="{source}" width="{image.width}" height="{image.height}" alt="{escape(alt)}"{small}>'


def _levels(value: float) -> str:
    return "under 0.001" if value < 0.001 else f"{value:.2g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}\u00a0%"


STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1d2129; --soft: #666d7a;
  --rule: #e6e3dd; --one: #2f5fd0; --two: #d9651f; }
@media (prefers-color-scheme: dark) { :root { --page: #14161b; --card: #1c1f26; --ink: #e8eaee;
  --soft: #98a0ae; --rule: #2d313a; --one: #7ea6ff; --two: #ffa25e; } }
* { box-sizing: border-box; margin: 0; } main { max-width: 1180px; margin: 0 auto; padding: 56px 24px 72px; }
body { background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
section { margin-top: 40px; } h1 { font-size: 34px; line-height: 1.2; margin: 4px 0 8px; }
h2 { font-size: 19px; margin-bottom: 12px; } h3 { font-size: 15px; margin-bottom: 8px; }
header p { color: var(--soft); max-width: 52em; text-wrap: pretty; } header p + p { margin-top: 8px; }
small, dt, figcaption { color: var(--soft); font-size: 13px; } figcaption { margin-top: 4px; }
.card { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 28px; padding: 20px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
@media (max-width: 860px) { main { padding: 32px 16px 48px; } .card { grid-template-columns: minmax(0, 1fr); } }
.frame { position: relative; } .frame img, .frame svg { width: 100%; height: 100%; display: block; }
.frame svg { position: absolute; inset: 0; overflow: visible; }
rect { fill: none; vector-effect: non-scaling-stroke; stroke-width: 3px; }
rect.halo { stroke: #000a; stroke-width: 5px; }
rect.view1 { stroke: #7ea6ff; } rect.view2 { stroke: #ffa25e; stroke-dasharray: 8 5; }
.key { display: inline-block; width: 22px; margin-right: 8px; vertical-align: middle;
  border-top: 3px solid var(--one); }
.key.view2 { border-top: 3px dashed var(--two); }
.pair { display: flex; gap: 10px; } .pair figure { flex: 1; max-width: 320px; }
img { display: block; width: 100%; height: auto; border-radius: 6px; } img.small { image-rendering: pixelated; }
dl { margin-top: 10px; } dl div { display: flex; gap: 12px; padding: 5px 0; border-bottom: 1px solid var(--rule); }
dl div:last-child { border-bottom: 0; } dt { flex: 0 0 7.2em; line-height: 22px; }
dd { flex: 1; font-size: 14px; line-height: 22px; }
"""
