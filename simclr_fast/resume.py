"""What a run's folder says when a command meets it: nothing yet, a run to go on with, a finished one, or another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from simclr_fast import checkpoint
from simclr_fast.cli import saved_settings
from simclr_fast.record import METRICS, RunError, read_metrics, write_text


def results(folder: Path) -> str:
    """The results of a finished run, as the user reads them."""
    last = read_metrics(folder)[-1]
    figures = " · ".join(f"{name} {value:.1%}" for name, value in last["knn"].items())
    shown = f"kNN accuracy: {figures}\n" if figures else ""
    return f"{shown}checkpoint {folder}/checkpoints/{checkpoint.LAST}\nreport {folder}/report.html"


def take_up(cfg: Any, folder: Path, images: int) -> tuple[dict[str, Any] | None, list[str], bool]:
    """What the run folder says: (state to go on from or None, lines to show, whether the run is finished).

    Raises:
        RunError: the folder holds a run with other settings or other data.
        CheckpointError: it has checkpoints, and none can be read.
    """
    path, checkpoints = folder / "config.json", folder / "checkpoints"
    if cfg.resume == "never":
        if checkpoints.exists():
            shutil.rmtree(checkpoints)
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
        for name in (METRICS, "report.html", "config.json"):  # the last one says whose the rest is
            (folder / name).unlink(missing_ok=True)
    if not path.exists():
        if checkpoints.exists():
            raise RunError(f"{folder} holds checkpoints and no config.json. Choose another --out, or --resume never")
        write_text(path, json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        return None, [], False
    differing = cfg.differences(saved_settings(path))
    if differing:
        raise RunError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}). Choose another --out, or delete "
            "that run with --resume never"
        )
    records = read_metrics(folder)
    state, complaints = checkpoint.load(checkpoints)
    if records and records[-1].get("finished"):
        afresh = "This run is finished. To start it afresh, give --resume never."
        return None, [*complaints, results(folder), afresh], True
    if state and state["images"] != images:
        raise RunError(
            f"{folder} holds a run on {state['images']} images, and {cfg.data} now has {images}. Put "
            "back what is missing, or choose another --out, or delete that run with --resume never"
        )
    if state:
        complaints.append(f"Going on after epoch {state['epoch']} of {cfg.epochs}, from {folder}")
    return state, complaints, False
