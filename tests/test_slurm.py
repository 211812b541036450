"""docs/slurm.sh, with programs in place of SLURM's: what is queued again, what is not, and what ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from simclr_fast.record import read_metrics
from simclr_fast.training.interrupt import MARKER
from tests.faults_common import Job, ends
from tests.processes import environment
from tests.train_common import ROOT, images

__all__ = ["images"]  # a fixture is used by its name

SRUN = """#!/bin/bash
# Starts its command once for each host, all of them here.
while [[ $1 == --* ]]; do shift; done
for ((n = 0; n < SLURM_NNODES; n++)); do "$@" & hosts+=($!); done
trap 'kill -USR1 "${hosts[@]}"' USR1
for one in "${hosts[@]}"; do
    wait "$one"
    status=$?
    while kill -0 "$one" 2> /dev/null; do wait "$one"; status=$?; done
    worst=$((status > worst ? status : worst))
done
exit "$worst"
"""
SCONTROL = """#!/bin/sh
case $1 in
    show) echo localhost ;;
    requeue) echo "$2" >> "$QUEUE" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, images):
    """Write the SLURM script and the programs it finds, these ones too; returns its environment."""

    def make(out, **programs):
        script = (ROOT / "docs" / "slurm.sh").read_text().replace("simclr_fast.train", "slowed")
        torchrun = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
        found = {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun, "job.sh": script} | programs
        for name, text in found.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        return {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "QUEUE": tmp_path / "queue", "SLURM_JOB_ID": 7,
            "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[1-2]", "RUN": out, "DATA": images, "GPUS_PER_NODE": 1,
            "PORT": port,
        }  # fmt: skip

    return make


@pytest.fixture
def fails(tmp_path, slurm):
    """Run the SLURM script where it cannot succeed: its status, what it says, and whether it started anything."""

    def run(*flags, **programs):
        srun = f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n"  # as torchrun where the data folder is missing
        variables = slurm(tmp_path / "run", srun=srun, **programs)
        command = ["bash", str(tmp_path / "job.sh"), *flags]
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=300)
        assert not (tmp_path / "queue").exists()
        return done.returncode, done.stderr, (tmp_path / "started").exists()

    return run


def test_the_slurm_script_does_not_queue_a_failure_again_where_an_earlier_start_left_its_marker(tmp_path, fails):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARKER).write_text("5\n")
    assert fails() == (1, "", True)


@pytest.mark.parametrize("flags", [("--resume", "never"), ("--resume=never", "--epochs", "2")])
def test_the_slurm_script_refuses_to_begin_again_at_each_start(fails, flags):
    status, said, started = fails(*flags)
    assert (status, started) == (2, False)
    assert said.startswith("error: each start of this job would begin again")


def test_a_signal_before_the_first_start_ends_the_slurm_script(fails):
    rm = f'#!/bin/sh\nkill -USR1 $PPID\nexec {shutil.which("rm")} "$@"\n'
    assert fails(rm=rm) == (1, "", False)


@pytest.fixture
def stopped(tmp_path, slurm):
    """Run the SLURM script to where a signal comes: its status, whether the job is queued again, and its starts.

    `did` is what the start in whose midst the signal comes has done of: marker, checkpoint.
    """

    def run(signal, *did):
        files = {"marker": f"run/{MARKER}", "checkpoint": "run/checkpoints/last.pt"}
        writes = "".join(f"date +%N > {tmp_path}/{files[one]}\n" for one in did)
        send = f"kill -{signal} $PPID\nsleep 0.2" if signal else ""
        srun = f"#!/bin/sh\ntrap : USR1\necho >> {tmp_path}/starts\n{send}\n{writes}\nexit 1\n"
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        variables = slurm(tmp_path / "run", srun=srun)
        done = subprocess.run(["bash", tmp_path / "job.sh"], env=environment(**variables), timeout=300)
        return done.returncode, (tmp_path / "queue").exists(), len((tmp_path / "starts").read_text())

    return run


@pytest.mark.parametrize("did", [("checkpoint", "marker"), ("marker",), ("checkpoint",)], ids=str)
def test_the_slurm_script_queues_the_job_again_before_its_time_limit(stopped, did):
    assert stopped("USR1", *did) == (0, True, 1)


def test_the_slurm_script_does_not_queue_a_job_again_that_came_to_nothing(stopped):
    assert stopped("USR1") == (1, False, 1)


@pytest.mark.parametrize("did", [("checkpoint", "marker"), ("checkpoint",), ()], ids=str)
def test_the_slurm_script_does_not_queue_a_cancelled_job_again(stopped, did):
    assert stopped("TERM", *did) == (1, False, 1)


def test_the_slurm_script_ends_where_the_run_was_stopped_from_elsewhere(stopped):
    assert stopped("", "checkpoint", "marker") == (1, False, 1)


def test_the_slurm_script_starts_again_only_what_got_on(tmp_path, slurm):
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    os.utime(last, (2**31, 2**31))  # as by the clock of a file server that is ahead
    srun = f"#!/bin/sh\necho >> {tmp_path}/starts\n[ -e {tmp_path}/on ] || touch {last} {tmp_path}/on\nexit 3\n"
    variables = slurm(tmp_path / "run", srun=srun)
    done = subprocess.run(["bash", tmp_path / "job.sh"], env=environment(**variables), timeout=300)
    assert done.returncode == 3
    assert len((tmp_path / "starts").read_text()) == 2


@pytest.mark.slow
def test_the_slurm_script_stops_before_the_time_limit_queues_the_job_again_and_ends(tmp_path, images, slurm):
    job = Job(tmp_path, images, "run")
    variables = slurm(job.out)
    command = ["bash", str(tmp_path / "job.sh"), *job.flags]

    first = job.spawn(command, **variables)
    try:
        job.get_on(first)
        first.send_signal(signal.SIGUSR1)
        ends(first, 0)
        assert job.marked()
        assert (tmp_path / "queue").read_text() == "7\n"
        ends(job.spawn(command, 0, **variables, SLURM_RESTART_COUNT=1), 0)
        assert not job.marked()
        assert read_metrics(job.out)[-1]["finished"]
        assert (tmp_path / "queue").read_text() == "7\n"
    finally:
        for process in job.started:
            process.terminate()
            process.wait(300)
