"""The result of an evaluation: what it holds, and its file, RUN/evaluations/NAME.json."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simclr_fast.data import fingerprint
from simclr_fast.data.sources.samples import alone
from simclr_fast.environment import versions
from simclr_fast.evaluation.job import NEUTRAL, Job, results_folder
from simclr_fast.record import RunError, write_text

LOCK = ".results.lock"  # not that of a run, which the trainer holds


@dataclass(kw_only=True)
class Result:
    """What a protocol found. What is empty is not shown."""

    protocol: str
    data: str
    figures: dict[str, float]
    """By the name shown, the main one first; accuracies are fractions."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of images, by what they were for: training images, test images, ..."""
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    """[true class, class that was said, test images], of the pairs that there are; see `measures.confusion`."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    """Each {"title": str, "columns": [str], "rows": [[cell]]}; a cell is text, or a fraction, shown as per cent."""
    scatters: list[dict[str, Any]] = field(default_factory=list)
    """Each {"title": str, "points": [[x, y]], "labels": [class]}."""
    pictures: list[dict[str, Any]] = field(default_factory=list)
    """Sheets, each {"title": str, "rows": [[picture]]}, the first of a row beside the others. A picture is
    {"image": a data URI, "text": str, "right": whether it is of the first one's class, or None}."""
    notes: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)
    """What settings came to that were left to the protocol, so that giving the same makes no other result."""
    data_digest: str = ""
    """Which images those of `data` were; "" for those of the job's data set."""


def save(result: Result, job: Job, seconds: float) -> Path:
    """Write a result whole, and return its file; in one's `turn`.

    The same evaluation of the same images takes the place of the one before.

    Raises:
        RunError: the folder cannot be written.
    """
    settings = {k: v for k, v in (dataclasses.asdict(job.settings) | result.resolved).items() if k not in NEUTRAL}
    encoder = job.encoder
    about = {"checkpoint": encoder.origin, "step": encoder.step, "weights": encoder.digest()}
    images = {"data_digest": result.data_digest or fingerprint(job.dataset)}
    key = json.dumps([result.protocol, result.data, images, settings, about["weights"]], sort_keys=True)
    name = f"{result.protocol}-{result.data.replace('/', '-')}-{short(key)}"
    found = {k: v for k, v in vars(result).items() if k != "resolved"}
    known = {
        "name": name, **about, "settings": settings, **found, **images, "seconds": round(seconds, 2),
        "when": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"), "versions": versions(),
        "precision": job.extractor.precision,
    }  # fmt: skip
    path = results_folder(job.settings) / f"{name}.json"
    with writing(path.parent):
        write_text(path, "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items()) + "\n}\n")
    return path


def short(text: str) -> str:
    """A digest for a file's name."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def turn(settings: Any) -> Iterator[None]:
    """Write into the folder of the results, and into the report, after others that do so now.

    Raises:
        RunError: the folder cannot be made.
    """
    folder = results_folder(settings)
    with ExitStack() as held:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(folder / LOCK))
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, an error of the disk is the user's: it is said which folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"out must be a folder that can be written, got {folder}: {error.strerror}") from error


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, oldest first; what is no result is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            result = json.loads(path.read_text(encoding="utf-8"))
            found.append((str(result["when"]), result["name"], result))
    return [result for _, _, result in sorted(found, key=lambda one: one[:2])]


def in_training(run: Path) -> bool:
    """Whether a trainer holds the run's folder."""
    try:
        with open(run / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


def lines(result: Result) -> list[str]:
    """A result as the user reads it."""
    shown = [" · ".join(f"{name} {value:.2%}" for name, value in result.figures.items())]
    for table in result.tables:
        shown += ["", table["title"], *aligned([table["columns"], *table["rows"]])]
    return shown + result.notes


def aligned(rows: list[list[Any]]) -> list[str]:
    """Rows of a table as lines of text."""
    cells = [[f"{cell:.1%}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
