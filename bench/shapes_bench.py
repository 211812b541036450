"""The main job, seed by seed: kNN accuracies and seconds of `python -m simclr_fast.train`, and the control.

The control trains without augmentation: what it reaches is what the task gives away without SimCLR's views.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _harness import append

from simclr_fast.record import read_metrics

CONTROL = (
    "import functools, sys; from simclr_fast import run, train; "
    "run.Policy = functools.partial(run.Policy, flip=0.0, jitter_p=0.0, gray_p=0.0); "
    "sys.exit(train.main(sys.argv[1:] + ['--min-area', '1']))"
)


def measure(seed: int, control: bool, flags: list[str]) -> dict[str, object]:
    start = ["-c", CONTROL] if control else ["-m", "simclr_fast.train"]
    with tempfile.TemporaryDirectory() as folder:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, *start, "--gpus", "0", "--seed", str(seed), "--out", f"{folder}/run", *flags]
        subprocess.run(command, check=True)
        seconds = time.monotonic() - began
        after, records = resource.getrusage(resource.RUSAGE_CHILDREN), read_metrics(Path(folder, "run"))
    rates, waits = ([r[key] for r in records if "finished" not in r] for key in ("images_per_s", "data_wait"))
    return {
        "job": "control without augmentation" if control else "python -m simclr_fast.train",
        "seed": seed,
        "flags": flags,
        "knn": records[-1]["knn"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime")), 1),
        "images_per_s_median": sorted(rates)[len(rates) // 2],
        "data_wait_mean": sum(waits) / len(waits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="train with seeds 0 ... SEEDS - 1")
    parser.add_argument("--no-control", action="store_true", help="leave out the control")
    args, flags = parser.parse_known_args()
    for seed in range(args.seeds):
        append("shapes", measure(seed, control=False, flags=flags))
    if not args.no_control:
        append("shapes", measure(0, control=True, flags=flags))


if __name__ == "__main__":
    main()
