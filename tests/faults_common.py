"""A training that takes its time, so that something can happen to it; and what is looked at afterwards."""

import subprocess
import sys

import pytest

from simclr_fast.record import read_metrics
from simclr_fast.training.interrupt import MARKER
from tests.processes import environment, until
from tests.train_common import SMALL

SLOWED = """
import os, sys, time
from pathlib import Path
from simclr_fast import run, train

made, pause, stall = run.train_views, Path(os.environ["PAUSE"]), Path(os.environ["STALL"])

def slowed(*args, **kwargs):
    for views in made(*args, **kwargs):
        time.sleep(float(pause.read_text()))
        if stall.exists() and os.environ.get("RANK") == "1":
            stall.unlink()
            time.sleep(600)
        yield views

run.train_views, train.MODULE = slowed, "slowed"
sys.exit(train.main())
"""


class Job:
    """A run of 2 ranks in a folder, to be started again and again, slowly enough to be met by a fault."""

    def __init__(self, root, images, name):
        self.root, self.out = root, root / name
        (root / "slowed.py").write_text(SLOWED)
        self.flags = ["--data", str(images), "--out", str(self.out), *SMALL, "--evaluations", "1", "--epochs", "30"]
        self.log = root / f"{name}.log"
        self.started = []

    def start(self, *flags, ranks=2, pause=0.1, torchrun=False):
        """Start it in a new process; with `torchrun` under that, else under our own parent or, alone, under none."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
        how = [] if torchrun else ["--ranks", str(ranks)]
        prefix = [sys.executable, *(launcher if torchrun else []), "-m", "slowed"]
        return self.spawn([*prefix, *self.flags, *how, *flags], pause)

    def spawn(self, command, pause=0.1, **variables):
        """Start a command that knows the script, with these environment variables."""
        pause_file = self.out.with_suffix(".pause")
        pause_file.write_text(str(pause))
        own = {"PYTHONPATH": self.root, "PAUSE": pause_file, "STALL": self.root / "stall"}
        env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, **own, **variables)
        with open(self.log, "a") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def step(self):
        """The last step that was recorded."""
        records = read_metrics(self.out)
        return records[-1]["step"] if records else 0

    def get_on(self, process, steps=2):
        """Wait until so many more steps are recorded."""
        goal = self.step() + steps
        until(lambda: self.step() >= goal or process.poll() is not None, self.log.read_text)
        assert process.poll() is None, self.log.read_text()

    def marked(self):
        return (self.out / MARKER).exists()


@pytest.fixture
def new_job(tmp_path, images):
    """Make a `Job` by its name; what it has started and what still runs at the end of the test is killed."""
    jobs = []

    def make(name):
        jobs.append(Job(tmp_path, images, name))
        return jobs[-1]

    yield make
    for process in (process for job in jobs for process in job.started):
        process.kill()  # its ranks end with it
        process.wait()


def ends(process, status):
    assert process.wait(300) == status
