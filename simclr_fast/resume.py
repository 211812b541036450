"""What a run's folder says when a command meets it: nothing yet, a run to go on with, a finished one, or another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simclr_fast import checkpoint
from simclr_fast.cli import saved_settings
from simclr_fast.record import METRICS, RunError, read_metrics, write_text
from simclr_fast.training.interrupt import remove_marker

AFRESH = "To start it afresh, give --resume never."
CONFIG, JOB = "config.json", ".job"
"""Files in a run's folder: its settings; the job that began it or went on with it last, its name, then its launchers'
numbers."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the processes are started for: its name, "" if it has none, and the numbers of its launchers.

    Launchers come and go with their hosts, so two starts are of one job if they have any of them in common.
    """

    name: str = ""
    launchers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, folder: Path) -> Job:
        """The one that had the run in this folder last."""
        if not (folder / JOB).exists():
            return cls()
        name, *launchers = (folder / JOB).read_text(encoding="utf-8").splitlines() or [""]
        return cls(name, frozenset(launchers))

    def write(self, folder: Path) -> None:
        """Say in a run's folder that this one has it."""
        write_text(folder / JOB, "\n".join([self.name, *sorted(self.launchers)]) + "\n")


def results(folder: Path, last: dict[str, Any]) -> str:
    """The results of a finished run, as the user reads them; `last` is its last record."""
    figures = " · ".join(f"{name} {value:.1%}" for name, value in last["knn"].items())
    shown = f"kNN accuracy: {figures}\n" if figures else ""
    return f"{shown}checkpoint {folder}/checkpoints/{checkpoint.LAST}\nreport {folder}/report.html"


def begun(cfg: Any, folder: Path) -> bool:
    """Whether the folder holds a run with these settings.

    Raises:
        RunError: it holds one with others.
    """
    path = folder / CONFIG
    if not path.exists():
        if (folder / "checkpoints").exists():
            raise RunError(f"{folder} holds checkpoints and no config.json. Choose another --out, or --resume never")
        return False
    differing = cfg.differences(saved_settings(path))
    if differing:
        raise RunError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}). Choose another --out, or delete "
            "that run with --resume never"
        )
    return True


def suits(
    cfg: Any, folder: Path, state: dict[str, Any] | None, data: str, changes: Callable[[], str], finished: bool
) -> list[str]:
    """What there is to say of going on from a checkpoint's state, or of showing the results of a run that is finished,
    with these images; `data` and `changes` as `take_up`.

    Raises:
        RunError: that cannot be done, or is not what the user asked for.
    """
    if state and "bn_images" not in state and not finished:
        raise RunError(
            f"{folder} holds a run of an earlier version, which cannot be gone on with. Its weights can start another: "
            f"--init {folder} --out OTHER"
        )
    if not state or state.get("data", data) == data:  # an earlier version did not say
        return []
    named = changes()
    changed = f"{folder} holds a run on {state['data']}, and {cfg.data} now has {data}{': ' * bool(named)}{named}"
    if not cfg.accept_changed_data:
        raise RunError(
            f"{changed}. Put back what was there, or go on with --accept-changed-data, or choose another --out, or "
            "delete that run with --resume never"
        )
    return [f"{changed}; {'it was finished before' if finished else 'the steps to come take their images from these'}"]


@dataclasses.dataclass(frozen=True)
class Found:
    """What `take_up` found in a run's folder."""

    state: dict[str, Any] | None = None
    """Of the checkpoint to go on from."""
    lines: tuple[str, ...] = ()
    """To be shown."""
    finished: bool = False
    new: bool = False
    """Whether `begin` is to be called before anything is written."""


def take_up(cfg: Any, folder: Path, data: str, changes: Callable[[], str], job: Job) -> Found:
    """What the run folder says. Its run stays; one that is gone on with loses its marker and gets this job's name, and
    damaged checkpoints get other names.

    Args:
        data: what the images are now, their fingerprint.
        changes: how they differ from those that the folder lists; "" if that is not known.
        job: that this start is of: what it has begun afresh it goes on with, whatever `resume` says.
    Raises:
        RunError: the folder holds a run with other settings or other data, or one that is to be deleted and may be that
            of this job.
        CheckpointError: it has checkpoints, and none can be read.
    """
    before = Job.of(folder)
    if cfg.resume == "never" and not job.launchers & before.launchers:
        there = (folder / CONFIG).exists() or (folder / "checkpoints").exists()
        if job.name and job.name == before.name and there:
            raise RunError(
                f"--resume never would delete the run in {folder}, and it may be this job's own: its torchrun had the "
                f"same --rdzv-id, {job.name}. Delete that folder, or give another --rdzv-id, or another --out"
            )
        return Found(new=True)
    remove_marker(folder)
    if not begun(cfg, folder):
        return Found(new=True)
    records = read_metrics(folder)
    state, lines = checkpoint.load(folder / "checkpoints")
    finished = bool(records and records[-1].get("finished"))
    lines += suits(cfg, folder, state, data, changes, finished)
    if finished:
        again = [] if job.launchers & before.launchers else [f"This run is finished. {AFRESH}"]
        return Found(None, (*lines, results(folder, records[-1]), *again), finished=True)
    if (signed := _signed(job, before)) != before:
        signed.write(folder)
    if state:
        epoch = min(state["step"] * cfg.batch / state["images"], cfg.epochs)
        lines.append(f"Going on after epoch {epoch:.3g} of {cfg.epochs}, step {state['step']:,}, from {folder}")
    return Found(state, tuple(lines))


def begin(cfg: Any, folder: Path, job: Job) -> None:
    """Begin a run of this job; with `--resume never` the one that is there is deleted."""
    before = Job.of(folder)
    remove_marker(folder)
    if cfg.resume == "never" and not job.launchers & before.launchers:
        _delete(folder)
    _signed(job, before).write(folder)  # before the run is one that can be gone on with
    write_text(folder / CONFIG, json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")


def _signed(job: Job, before: Job) -> Job:
    """The job, with the launchers that it had before if it is still the same."""
    return Job(job.name, job.launchers | before.launchers) if job.launchers & before.launchers else job


def _delete(folder: Path) -> None:
    """Delete the run in this folder."""
    for past in (folder / "checkpoints", folder / "evaluations"):
        if past.exists():
            shutil.rmtree(past)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    for name in (METRICS, "report.html", CONFIG):  # the last one says whose the rest is
        (folder / name).unlink(missing_ok=True)
