"""Evaluate an encoder: `python -m simclr_fast.evaluate knn|linear|finetune|transfer|probe --checkpoint RUN`.

Also `compare RUN RUN ...`: several runs side by side.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import tyro

from simclr_fast.command import ended, over_ranks
from simclr_fast.config import choose
from simclr_fast.distributed import Ranks
from simclr_fast.evaluation.job import Job, results_folder
from simclr_fast.evaluation.page import add_evaluations
from simclr_fast.evaluation.results import in_training, lines, read_all, save, turn, writing
from simclr_fast.record import try_folder

MODULE = "simclr_fast.evaluate"
PROTOCOLS = {
    "knn": "nearest neighbours vote; nothing is trained",
    "linear": "a linear classifier on frozen features: the paper's recipe, or exact on kept features",
    "finetune": "semi-supervised: all weights, on 1 %, 10 % or all of the labels",
    "transfer": "the paper's 12 data sets, linear or fine-tuned",
    "probe": "what the features h keep and the embeddings g(h) lose; t-SNE and PCA pictures",
    "compare": "several runs side by side, with the settings that differ",
}


def usage() -> str:
    """What there is, a line each."""
    rows = [f"  {name:<9} {text}" for name, text in PROTOCOLS.items()]
    return "\n".join([f"usage: python -m {MODULE} PROTOCOL --checkpoint RUN [--data DIR] ...", "", *rows, "",
                      f"flags of each: python -m {MODULE} PROTOCOL --help"])  # fmt: skip


def evaluate(protocol: Any, settings: Any, ranks: Ranks) -> None:
    """One protocol on one rank: its result is printed, written, and shown in the run's report."""
    began, say = time.monotonic(), ranks.say
    job = Job(settings, ranks, say)
    ranks.from_main(lambda: _check_folder(settings))
    training = ranks.from_main(lambda: job.run is not None and in_training(job.run))
    at = f", step {job.encoder.step:,}" if job.encoder.step is not None else ""
    say(f"{job.encoder.recipe.arch} from {job.encoder.origin}{at}")
    if training:
        say(f"{job.run} is still being trained: this is of that file as it is, and its report is left to the trainer")
    result = protocol.run(settings, job)
    if not ranks.main:
        return
    result.notes += job.notes
    say("\n".join(lines(result)))
    with turn(settings):
        path = save(result, job, time.monotonic() - began)
        say(f"result {path}")
        report = job.run / "report.html" if job.run is not None and not in_training(job.run) else None
        if report is not None and report.exists() and settings.out is None:
            add_evaluations(report, read_all(path.parent))
            say(f"report {report}")


def _check_folder(settings: Any) -> None:
    """
    Raises:
        RunError: results cannot be written, which should be known before hours are spent on one.
    """
    folder = results_folder(settings)
    with writing(folder):
        try_folder(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, start the processes that are asked for, and evaluate; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return ended(lambda joined: _main(argv, joined))


def _main(argv: list[str], joined: list[Ranks]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name = choose("protocol", argv[0], PROTOCOLS)
    protocol = importlib.import_module(f"simclr_fast.evaluation.{name}")
    settings = tyro.cli(protocol.Settings, prog=f"python -m {MODULE} {name}", args=argv[1:])
    if name == "compare":
        return protocol.main(settings)
    return over_ranks(
        MODULE, argv, settings, joined, settings.encoder, lambda ranks: evaluate(protocol, settings, ranks)
    )


if __name__ == "__main__":
    sys.exit(main())
