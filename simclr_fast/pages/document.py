"""The frame and the style of every page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from simclr_fast.record import RunError, write_text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MARKS = "<!-- evaluation -->", "<!-- end of evaluation -->"
"""Around the part of a page that can be replaced alone. All other text is escaped, so that none can stand there."""


def document(title: str, kind: str, notes: Iterable[str], content: str) -> str:
    """A page.

    Args:
        title: text, its one h1.
        kind: a word above it: what the page is.
        notes: sentences under it, text.
        content: HTML of the sections, whose headings start at h2.
    """
    name, said = escape(title), "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name} · simclr_fast</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body><main>
<header><small>simclr_fast · {escape(kind)}</small><h1>{name}</h1>{said}</header>
{content}</main></body></html>
"""


def replace_marked(path: Path, content: str) -> None:
    """Put `content` between the marks of a page, or at its end where it has none, and give it the style of now.

    Raises:
        RunError: the file is no page of this package.
        OSError: it cannot be read or written; it is then as it was.
    """
    page = path.read_text(encoding="utf-8")
    block = MARKS[0] + content + MARKS[1]
    first, last = page.find(MARKS[0]), page.rfind(MARKS[1])
    if 0 <= first < last:
        page = page[:first] + block + page[last + len(MARKS[1]) :]
    elif (end := page.rfind("</main>")) >= 0:
        page = page[:end] + block + page[end:]
    else:
        raise RunError(f"{path} must be a page that was written by the training, and has no <main>")
    write_text(path, re.sub(r"<style>.*?</style>", lambda _: f"<style>{STYLE}</style>", page, count=1, flags=re.S))


STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1d2129; --soft: #626976;
  --rule: #e6e3dd; --main: #2f5fd0; --pale: #aab6cc; --right: #177a4b; --wrong: #bf3f2a;
  --s0: #2f5fd0; --s1: #d9730d; --s2: #178a5a; --s3: #c2315d; --s4: #7b4fc9; --s5: #0e8fa8; --s6: #8a6d12;
  --s7: #d0469b; --s8: #5f6b7a; --s9: #6a8f1f; }
@media (prefers-color-scheme: dark) { :root { --page: #14161b; --card: #1c1f26; --ink: #e8eaee;
  --soft: #98a0ae; --rule: #2d313a; --main: #7ea6ff; --pale: #566178; --right: #4cc38a; --wrong: #ff8a70;
  --s0: #7ea6ff; --s1: #ffa14d; --s2: #4cc38a; --s3: #ff7f9f; --s4: #b99bff; --s5: #4fd0e6; --s6: #d9bb5a;
  --s7: #ff8fd0; --s8: #a3adbb; --s9: #b2d95f; } }
* { box-sizing: border-box; margin: 0; } main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 72px; }
body { background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
section, dl { margin-top: 56px; } h1 { font-size: 34px; line-height: 1.2; margin: 4px 0 8px; }
h2 { font-size: 21px; } h3 { font-size: 18px; line-height: 1.35; } h4 { font-size: 15px; margin-top: 28px; }
header p, section > p, .about { color: var(--soft); max-width: 48em; text-wrap: pretty; }
small, dt, th, caption, figcaption, .bars span, summary small { color: var(--soft); font-size: 13px; font-weight: 400; }
:focus-visible { outline: 3px solid var(--main); outline-offset: 2px; border-radius: 4px; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
ul, ol { list-style: none; padding: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell)), 1fr));
  gap: 16px; margin-top: 20px; }
.bars { --cell: 300px; column-gap: 32px; } .bars > * * { display: block; }
.bars strong { font-size: 52px; line-height: 1.15; font-weight: 650; letter-spacing: -.03em; }
.bars i { height: 10px; margin-top: 8px; border-radius: 5px; background: var(--rule); overflow: hidden; }
.bars b { height: 100%; background: var(--pale); } .bars .chosen b { background: var(--main); }
.bars .chosen strong { color: var(--main); } .charts strong { color: var(--ink); }
dl, .charts figure, article { border: 1px solid var(--rule); border-radius: 12px; }
dl { display: flex; flex-wrap: wrap; gap: 1px; overflow: hidden; background: var(--rule); }
dl div { flex: 1 1 150px; padding: 16px; background: var(--card); } dd { font-size: 25px; font-weight: 600; }
dd small { display: block; }
.charts { --cell: 400px; } .charts figure { background: var(--card); padding: 14px 16px 10px; }
.charts figcaption { display: flex; justify-content: space-between; gap: 16px; font-size: 15px; margin-bottom: 6px; }
svg, img { display: block; width: 100%; height: auto; } svg { overflow: visible; } img { border-radius: 6px; }
text { fill: var(--soft); font-size: 11.5px; text-anchor: middle; } text.y { text-anchor: end; }
path { fill: none; stroke: var(--rule); } path.level { stroke: var(--soft); stroke-dasharray: 5 4; }
path.line { stroke: var(--hue); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
circle { fill: var(--hue); opacity: 0; } circle:hover, circle:last-child, .few circle { opacity: 1; }
body { --hue: var(--main); } .s0 { --hue: var(--s0); } .s1 { --hue: var(--s1); } .s2 { --hue: var(--s2); }
.s3 { --hue: var(--s3); } .s4 { --hue: var(--s4); } .s5 { --hue: var(--s5); } .s6 { --hue: var(--s6); }
.s7 { --hue: var(--s7); } .s8 { --hue: var(--s8); } .s9 { --hue: var(--s9); } .rest { --hue: var(--pale); }
.d1 { stroke-dasharray: 8 4; } .d2 { stroke-dasharray: 2 4; } .d3 { stroke-dasharray: 9 4 2 4; }
.points path { stroke: var(--hue); stroke-width: 9; opacity: .75; } .points .filled { fill: var(--hue); stroke: none; }
.points .round { stroke-linecap: round; } .points .square { stroke-linecap: square; stroke-width: 7; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: 14px; }
.legend li { display: flex; align-items: center; gap: 7px; } .legend svg { width: 22px; flex: none; }
.views { --cell: 290px; gap: 20px 28px; } .views > div { display: flex; gap: 6px; } .views figure { flex: 1; }
.hood { display: flex; gap: 28px; padding: 18px 0; border-bottom: 1px solid var(--rule); }
.hood > figure { width: 104px; flex: none; } .hood .grid { --cell: 80px; flex: 1; gap: 12px; margin: 0; }
.hood figcaption { line-height: 1.35; margin-top: 5px; white-space: pre-line; }
.right img { outline: 3px solid var(--right); } .right figcaption { color: var(--right); }
.wrong img { outline: 3px solid var(--wrong); } .wrong figcaption { color: var(--wrong); }
.tables { --cell: 320px; gap: 0 48px; margin: 0; } table { width: 100%; border-collapse: collapse; }
th, td { text-align: left; padding: 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { text-align: right; padding-left: 16px; font-size: 14px; }
.wide { overflow-x: auto; margin-top: 12px; } .wide table { width: auto; min-width: min(100%, 560px); }
.wide th, .wide td { overflow-wrap: break-word; max-width: 20em; padding: 7px 0 7px 20px; }
.wide :is(th, td):first-child { padding-left: 0; }
.wide thead th { text-align: right; vertical-align: bottom; } .wide tbody th { color: var(--ink); font-size: 14px; }
.wide thead th:first-child, td.words, thead th.words { text-align: left; } td.words { min-width: 9em; }
.date { white-space: nowrap; }
caption { text-align: left; padding-bottom: 6px; font-size: 14px; color: var(--ink); font-weight: 600; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(100%, calc(100vw - 76px)); }
article { background: var(--card); padding: 22px 24px 24px; margin-top: 24px; }
article .bars strong { font-size: 40px; } article .bars { --cell: 150px; column-gap: 20px; }
.bars strong, .charts strong { white-space: nowrap; } .about { font-size: 14px; }
.about span { display: inline-block; margin-right: .35em; }
article > p:not(.about) { margin-top: 12px; font-size: 14px; max-width: 60em; }
details { margin-top: 20px; } summary { cursor: pointer; font-weight: 600; font-size: 15px; padding: 4px 0; }
details details summary { font-size: 14px; }
.ranks { columns: 2 320px; column-gap: 40px; margin-top: 10px; }
.ranks li { display: grid; break-inside: avoid; padding: 2px 0;
  grid-template-columns: minmax(0, 11em) 1fr 4.4em; gap: 12px; align-items: center;
  font-size: 14px; } .ranks strong { text-align: right; font-weight: 500; }
.ranks span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; }
.ranks i { height: 8px; border-radius: 4px; background: var(--rule); overflow: hidden; }
.ranks b { display: block; height: 100%; background: var(--main); }
.confusion table { width: auto; min-width: 0; border-collapse: separate; border-spacing: 2px; }
.wide.confusion th, .wide.confusion td { padding: 4px 7px; border: 0; font-size: 13px; }
.wide.confusion thead th:not(:first-child) { writing-mode: vertical-rl; transform: rotate(180deg); padding: 6px 2px;
  text-align: left; vertical-align: middle; }
.wide.confusion tbody th { position: sticky; left: 0; background: var(--card); }
.confusion th span { display: block; max-inline-size: 9em; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.confusion tbody td { min-width: 34px; text-align: center; border-radius: 4px; font-variant-numeric: tabular-nums;
  background: color-mix(in srgb, var(--wrong) min(50%, var(--share) * 120%), transparent); }
.confusion tbody .hit { font-weight: 650;
  background: color-mix(in srgb, var(--main) calc(var(--share) * 50%), transparent); }
.confusion .none { color: var(--soft); }
.warning { border-left: 4px solid var(--wrong); padding: 10px 16px; margin-top: 20px; background: var(--card); }
@media (max-width: 560px) { main { padding: 32px 16px 56px; } section, dl { margin-top: 44px; } .hood { gap: 16px; }
  article { padding: 18px 14px; } .ranks li { grid-template-columns: minmax(0, 7em) 1fr 4.2em; }
  .hood > figure { width: 84px; } .hood .grid { --cell: 64px; } .charts text { font-size: 14px; }
  .wide tbody th { max-width: 11em; } .confusion tbody th span { max-inline-size: 6em; } }
@media print { details::details-content { content-visibility: visible; } }
"""
