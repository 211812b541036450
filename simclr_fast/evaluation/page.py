"""The evaluation in a run's report.html: every result, the newest of each kind first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from simclr_fast.evaluation.job import MODES
from simclr_fast.evaluation.measures import per_class
from simclr_fast.pages import charts, parts
from simclr_fast.pages.document import replace_marked
from simclr_fast.pages.parts import known, percents

NAMES = {
    "knn": "Nearest neighbours",
    "linear": "Linear classifier",
    "linear exact": "Linear classifier, exact",
    "linear sgd": "Linear classifier, the paper's recipe (sgd)",
    "finetune": "Fine-tuned",
    "transfer": "Transfer",
    "transfer linear": "Transfer, linear classifier",
    "transfer finetune": "Transfer, fine-tuned",
    "probe": "What h keeps and g(h) loses",
}
SAID = {"knn": ("layer",)}  # by protocol, settings that the names of its figures say
SQUARE = 25  # classes up to which a confusion matrix is shown whole
OPEN = 12  # classes up to which their accuracies are shown unasked
CHOSEN = " (chosen)"  # after the value of a table that was taken
PAIRS = 15  # pairs of classes that are confused most, of more classes
Record = Mapping[str, Any]  # a result as `results.read_all` gives it


def add_evaluations(report: Path, results: Sequence[Record]) -> None:
    """Show the results, oldest first, in a page that `report.write_report` wrote.

    What it showed of others before is replaced. Nothing else of the page changes but its style.

    Raises:
        RunError: the file is no such page.
        OSError: it cannot be read or written.
    """
    replace_marked(report, evaluations(results))


def evaluations(results: Sequence[Record]) -> str:
    """HTML of the results, oldest first: an overview, a card for the newest of each kind, the others folded, in brief.

    Those that are no results of any version are left out; nothing where there are none.
    """
    first, others, kinds = list[tuple[Record, str]](), list[tuple[Record, str]](), set[tuple[object, ...]]()
    for result in reversed(results):
        kind = (name(result), *(str(result.get(key)) for key in ("data", "data_digest")))
        if card := _shown(result, brief=kind in kinds):
            (others if kind in kinds else first).append((result, card))
            kinds.add(kind)
    if not first:
        return ""
    first.sort(key=lambda one: _place(one[0]))
    text = "What the encoder is worth for other tasks than its own."
    every = sorted((result for result, _ in (*first, *others)), key=_place)
    content = overview(every) if len(every) > 1 else ""
    content += "".join(f"<article>{card}</article>" for _, card in first)
    folded = "".join(
        f'<details><summary>{escape(name(one))} <small class="date">{escape(_when(one))}</small></summary>'
        f"<article>{card}</article></details>"
        for one, card in others
    )
    if folded:
        content += f"<details><summary>Other settings, and earlier ones ({len(others)})</summary>{folded}</details>"
    return parts.section("Evaluation", text, content)


def readable(result: Record) -> bool:
    """Whether its figures can be shown: a file may be of another version, or made by hand."""
    return bool(_shown(result, brief=True))


def _shown(result: Record, *, brief: bool) -> str:
    """Its card, or nothing."""
    try:
        return _card(result, brief) if result["figures"] and overview([result]) else ""
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return ""


def overview(results: Sequence[Record]) -> str:
    """A table, a row for each result."""
    rows = [
        [name(one), images(one, results), figure, _step(one), _when(one), told(distinct(one, results))]
        for one, figure in zip(results, headlines(results), strict=True)
    ]
    columns = ["Evaluation", "Data", "Result", "Step", "When (UTC)", "Settings"]
    if not any(row[-1] for row in rows):
        rows, columns = [row[:-1] for row in rows], columns[:-1]
    return parts.table("All evaluations", columns, rows)


def name(result: Record) -> str:
    """Of its protocol and mode, as it is read."""
    kind, settings = _kind(result), result.get("settings")
    if kind != "finetune" or not isinstance(settings, Mapping):
        return NAMES.get(kind, kind)
    listed, layer, share = (settings.get(key) for key in ("subset", "from_layer", "labels"))
    share = f"{share:g}" if isinstance(share, int | float) else share or 1
    labels = f"labels of {Path(str(listed)).name}" if listed else f"{share} % of the labels"
    return f"{NAMES[kind]} on {labels}{f', from layer {layer} of the head' if layer else ''}"


def _kind(result: Record) -> str:
    """Its protocol, with the mode where that is another measurement."""
    protocol, settings = str(result.get("protocol", "–")), result.get("settings")
    kind = f"{protocol} {settings.get('mode')}" if isinstance(settings, Mapping) else protocol
    return kind if kind in NAMES else protocol


def _counting(result: Record) -> dict[str, Any]:
    """Its settings that count in its mode."""
    settings = result.get("settings") or {}
    modes, mode = MODES.get(str(result.get("protocol")), {}), settings.get("mode")
    others = {key for other, keys in modes.items() if other != mode for key in keys}
    idle = (others if mode in modes else set()) | {*SAID.get(str(result.get("protocol")), ())}
    return {key: value for key, value in settings.items() if key not in idle}


def images(result: Record, results: Sequence[Record]) -> str:
    """The name of its data, and which images those are where the name stands for several."""
    digests = {one.get("data_digest") for one in results if one.get("data") == result.get("data")}
    own = result.get("data_digest")
    return f"{result.get('data', '–')}{f', {own}' if own and len(digests - {None}) > 1 else ''}"


def headlines(results: Sequence[Record]) -> list[str]:
    """The main figure of each as text."""
    first = [next(iter((one.get("figures") or {}).items()), ("", None)) for one in results]
    texts = percents(value for _, value in first)
    return [f"{text} {label}".strip() for text, (label, _) in zip(texts, first, strict=True)]


def distinct(result: Record, results: Sequence[Record]) -> dict[str, Any]:
    """Its settings that count and differ among results of its protocol and mode."""
    alike = [_counting(one) for one in results if _kind(one) == _kind(result)]
    own = _counting(result)
    return {key: value for key, value in own.items() if any(other.get(key) != value for other in alike)}


def told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {'–' if value is None else value}" for key, value in settings.items())


def _card(result: Record, brief: bool) -> str:
    """
    Args:
        brief: without what grows with the classes and the images.
    """
    figures = {str(label): value for label, value in (result.get("figures") or {}).items()}
    about = [f"on {result.get('data', '–')}", *_recipe(result), *_counts(result)]
    if result.get("step") is not None:
        about.append(f"checkpoint of step {_step(result)}")
    about += [f"{_when(result)}\u00a0UTC", f"took {parts.count(result.get('seconds'))} s"]
    pieces = "".join(f"<span>{escape(piece)} ·</span>" for piece in about).removesuffix(" ·</span>") + "</span>"
    card = f'<h3>{escape(name(result))}</h3><p class="about">{pieces}</p>'
    card += parts.bars(figures, next(iter(figures), None))
    card += "".join(f"<p>{escape(str(note))}</p>" for note in result.get("notes") or [])
    for table in result.get("tables") or []:
        card += parts.table(table["title"], table["columns"], table["rows"])
    if brief:
        return card + _settings(result)
    card += _by_class(result) + _scatters(result)
    for sheet in result.get("pictures") or []:
        rows = [parts.hood(_picture(first), [_picture(one) for one in near]) for first, *near in sheet["rows"]]
        card += f"<details><summary>{escape(sheet['title'])}</summary>{''.join(rows)}</details>"
    return card + _settings(result)


def _picture(picture: Record) -> str:
    return parts.picture(str(picture["image"]), picture["text"], picture.get("right"))


def _by_class(result: Record) -> str:
    """The accuracy of each class, best first, and what is taken for what."""
    counts, classes = result.get("confusion") or [], result.get("classes") or []
    if not counts or not classes:
        return ""
    known = [(classes[label], value) for label, value in per_class(counts).items()]
    known.sort(key=lambda one: -one[1])
    text = ""
    if len(known) > 1:
        best, *_, worst = percents(value for _, value in known)
        text = f"best {known[0][0]} {best}, worst {known[-1][0]} {worst}"
    shown = " open" if len(known) <= OPEN else ""
    found = f"<details{shown}><summary>Accuracy by class <small>{escape(text)}</small></summary>"
    found += f"{parts.ranks(known)}</details>"
    return found + (_matrix(classes, counts) if len(classes) <= SQUARE else _confused(classes, counts))


def _matrix(classes: Sequence[str], counts: list[list[int]]) -> str:
    head = "".join(f'<th scope="col" title="{escape(label)}"><span>{escape(label)}</span></th>' for label in classes)
    rows, known = "", {(true, said): number for true, said, number in counts}
    for k, label in enumerate(classes):
        row, cells = [known.get((k, j), 0) for j in range(len(classes))], ""
        total = sum(row)
        for j, number in enumerate(row):
            share = number / total if total else 0
            kind = "hit" if j == k else "" if number else "none"
            hint = escape(f"{label}, said {classes[j]}: {number:,} of {total:,}")
            cells += f'<td class="{kind}" style="--share:{share:.3f}" title="{hint}">{number:,}</td>'
        rows += f'<tr><th scope="row" title="{escape(label)}"><span>{escape(label)}</span></th>{cells}</tr>'
    caption = "Confusion matrix: test images by their class (rows) and the class that was said (columns)"
    table = f'<table><caption><span>{caption}</span></caption><thead><tr><th scope="col">class</th>{head}</tr></thead>'
    return parts.region("Confusion matrix", f"{table}<tbody>{rows}</tbody></table>", "confusion")


def _confused(classes: Sequence[str], counts: list[list[int]]) -> str:
    total = Counter[int]()
    for k, _, number in counts:
        total[k] += number
    top = sorted((one for one in counts if one[0] != one[1]), key=lambda one: (-one[2], one[0], one[1]))[:PAIRS]
    rows = [[classes[k], classes[j], f"{number:,}", number / total[k]] for k, j, number in top]
    columns = ["Class", "Said", "Images", "Of the class"]
    return parts.table(f"Most confused classes, of {len(classes)}", columns, rows) if rows else ""


def _scatters(result: Record) -> str:
    classes = result.get("classes") or []
    given = result.get("scatters") or []
    found = "".join(charts.scatter(one["title"], one["points"], one["labels"], classes) for one in given)
    if not found:
        return ""
    shown = charts.coloured([label for one in given for label in one["labels"]], classes)
    more = f"<p>The {len(shown)} most frequent of {len(classes)} classes are in colour.</p>"
    legend = charts.scatter_legend(shown, classes) + (more if 0 < len(shown) < len(classes) else "")
    return f'<h4>Pictures of the features</h4>{legend}<div class="charts grid">{found}</div>'


def _settings(result: Record) -> str:
    rows = {key: value for key, value in _counting(result).items() if value is not None}
    versions = ", ".join(f"{key} {value}" for key, value in (result.get("versions") or {}).items())
    rows |= {
        "images": result.get("data_digest") or "–", "checkpoint": result.get("checkpoint", "–"),
        "weights": result.get("weights", "–"), "arithmetic": result.get("precision", "–"), "versions": versions or "–",
    }  # fmt: skip
    return f"<details><summary>Settings</summary>{parts.pairs(f'Settings of {name(result)}', rows)}</details>"


def _place(result: Record) -> tuple[int, str]:
    order, kind = [*NAMES], _kind(result)
    return order.index(kind) if kind in order else len(order), str(result.get("data"))


def _recipe(result: Record) -> list[str]:
    """What makes the figure more than the images do: for how long it was trained, or the regulariser."""
    settings = _counting(result)
    found = [f"{settings[key]:,} {key}" for key in ("epochs", "steps") if known(settings.get(key))]
    if _kind(result) == "linear exact":
        l2 = f"l2 {settings['l2']:.3g}, given" if known(settings.get("l2")) else ""
        rows = [str(row[0]) for table in result.get("tables") or [] for row in table["rows"]]
        l2 = l2 or next((f"l2 {cell.removesuffix(CHOSEN)}, chosen" for cell in rows if cell.endswith(CHOSEN)), "")
        found += [l2] if l2 else []
    return found


def _counts(result: Record) -> list[str]:
    counts = {what: number for what, number in (result.get("counts") or {}).items() if known(number)}
    return [f"batch {number:,}" if what == "batch" else f"{number:,} {what}" for what, number in counts.items()]


def _step(result: Record) -> str:
    return f"{result['step']:,}" if known(result.get("step")) else "–"


def _when(result: Record) -> str:
    return str(result.get("when", "–"))[:16].replace("T", "\u00a0")
