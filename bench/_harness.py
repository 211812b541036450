"""What every bench writes down: one JSON line a result, with the device, the versions and the commit it was seen on."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from simclr_fast.environment import versions

ROOT = Path(__file__).resolve().parents[1]


def results_folder() -> Path:
    """`$OUT` where it is set, else bench/results."""
    folder = Path(os.environ.get("OUT", ROOT / "bench" / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def commit() -> str:
    """The commit of the checkout, with `+` where files differ from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def append(name: str, result: dict[str, Any]) -> None:
    """Add one line to `NAME.jsonl`."""
    line = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **versions(), **result}
    with open(results_folder() / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
