"""Faults that a run survives: ranks and parents that die, signals, readers that stall, writes that are cut short."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from random import Random

import pytest

from simclr_fast import checkpoint
from simclr_fast.record import read_metrics
from simclr_fast.training.interrupt import EXIT_REQUEUE, MARKER
from simclr_fast.training.stall import watched
from tests.faults_common import SLOWED, ends, new_job
from tests.processes import children, running, until
from tests.train_common import assert_same_bits, images

__all__ = ["images", "new_job"]  # fixtures are used by their names


def late(*pauses):
    for number, pause in enumerate(pauses):
        time.sleep(pause)
        yield number


def test_a_reader_that_stalls_is_reported_once_and_when_it_goes_on():
    said = []
    assert list(watched(late(0, 1, 0, 1), 60, 0.4, said.append)) == [0, 1, 2, 3]
    assert [" ".join(line.split()[:2]) for line in said] == ["waiting for", "data came"] * 2


def test_only_the_wait_counts_and_not_the_work_between():
    said = []
    for _ in watched(late(0, 0), 60, 0.4, said.append):
        time.sleep(0.8)
    assert said == []


def test_an_error_of_the_reader_comes_through():
    def broken():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(watched(broken(), 60))


def test_a_reader_that_hangs_ends_the_process(tmp_path):
    code = """
import os, sys
from simclr_fast.training.stall import watched
os.mkfifo(sys.argv[1])
list(watched((open(name) for name in sys.argv[1:]), 0.4, 0.1))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "fifo")], capture_output=True, text=True)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("rank 0: waiting for data for ")
    assert second.endswith(" s (--timeout): a reader hangs, so this process ends")


@pytest.mark.slow
def test_a_run_that_meets_every_fault_ends_with_the_same_bits_as_one_that_meets_none(new_job):
    random = Random()
    calm, job = new_job("calm"), new_job("met")
    reference = calm.start(pause=0)

    run = job.start()
    job.get_on(run)
    os.kill(random.choice(children(run)), signal.SIGKILL)  # a rank
    job.get_on(run)
    assert "was ended by SIGKILL" in job.log.read_text()
    ranks = children(run)
    run.send_signal(signal.SIGUSR1)
    ends(run, EXIT_REQUEUE)
    assert job.marked()
    until(lambda: not running(ranks), seconds=10)

    run = job.start(torchrun=True)
    job.get_on(run)
    assert not job.marked()
    ranks = children(run)
    time.sleep(random.random())
    run.kill()
    ends(run, -signal.SIGKILL)
    until(lambda: not running(ranks))

    run = job.start(pause=0)
    ends(run, 0)
    assert not job.marked()
    ends(reference, 0)
    assert_same_bits(calm.out, job.out)
    assert [record["step"] for record in read_metrics(job.out)] == [record["step"] for record in read_metrics(calm.out)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_alone_a_signal_stops_with_a_checkpoint_of_the_step(new_job, number):
    job = new_job("alone")
    run = job.start(ranks=1)
    job.get_on(run)
    run.send_signal(number)
    ends(run, EXIT_REQUEUE)
    state = checkpoint.read(job.out / "checkpoints" / "last.pt")
    assert (job.out / MARKER).read_text() == f"{state['step']}\n"
    assert state["step"] >= job.step()


@pytest.mark.slow
def test_a_rank_whose_reader_stalls_ends_and_the_run_goes_on(tmp_path, new_job):
    job = new_job("stalled")
    run = job.start("--timeout", "8")
    job.get_on(run)
    (tmp_path / "stall").touch()
    job.get_on(run, 12)
    assert "rank 1: no data for " in job.log.read_text()
    run.terminate()
    ends(run, EXIT_REQUEUE)


DIES_ONCE = """
import os, sys
from pathlib import Path
mark = Path(sys.argv[sys.argv.index("--out") + 1]).with_suffix(".died")
if os.environ.get("RANK") == "1" and not mark.exists():
    mark.touch()
    sys.exit(7)
"""


@pytest.mark.slow
def test_a_run_is_deleted_though_a_rank_dies_before_that_and_once_though_one_dies_after(tmp_path, new_job):
    job = new_job("afresh")
    run = job.start(ranks=1)
    job.get_on(run)
    run.terminate()
    ends(run, EXIT_REQUEUE)
    (tmp_path / "slowed.py").write_text(DIES_ONCE + SLOWED)
    run = job.start("--epochs", "400", "--resume", "never")
    until(lambda: "rank 1 ended with status 7" in job.log.read_text(), seconds=60)
    until(lambda: "1,001 steps" in job.log.read_text(), job.log.read_text, 60)
    job.get_on(run, 10)
    began = os.stat(job.out / "config.json").st_mtime_ns
    os.kill(children(run)[1], signal.SIGKILL)
    job.get_on(run, 10)
    assert "Going on after" in job.log.read_text()
    assert os.stat(job.out / "config.json").st_mtime_ns == began
    run.terminate()
    ends(run, EXIT_REQUEUE)


@pytest.mark.slow
def test_a_host_that_joins_deletes_nothing_of_what_the_job_began_afresh(new_job):
    job = new_job("joined")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=R"),
        "--rdzv-conf=read_timeout=60,last_call_timeout=2",
    ]
    command = [*torchrun, "-m", "slowed", *job.flags, "--epochs", "400", "--resume", "never"]
    first = job.spawn(command)
    job.get_on(first, 10)
    began = os.stat(job.out / "config.json").st_mtime_ns
    second = job.spawn(command)
    until(lambda: "(2 processes" in job.log.read_text(), job.log.read_text, 120)
    job.get_on(first, 3)
    assert "Going on after" in job.log.read_text()
    assert read_metrics(job.out)[0]["step"] == 1
    assert os.stat(job.out / "config.json").st_mtime_ns == began
    for host in (second, first):
        host.kill()
        host.wait()
    steps = job.step()
    ends(job.spawn(command), 1)  # as a new host of the same job would be, for all that it knows
    assert "--resume never would delete the run" in job.log.read_text()
    assert job.step() >= steps


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_ranks_are_started_leaves_the_marker_too(new_job, number):
    job = new_job("starting")
    run = job.start()
    job.get_on(run)
    run.send_signal(number)
    ends(run, EXIT_REQUEUE)
    (job.out / MARKER).unlink()
    run = job.start()
    until(lambda: len(children(run)) == 2)
    time.sleep(0.3)  # they import
    run.send_signal(number)
    ends(run, EXIT_REQUEUE)
    assert job.marked()
    shutil.rmtree(job.out)
    run = job.start()
    until(lambda: len(children(run)) == 2)
    time.sleep(0.3)
    run.send_signal(number)
    ends(run, 128 + number)
    assert not job.marked()


@pytest.mark.slow
def test_a_signal_between_two_starts_leaves_the_marker_and_starts_nothing(new_job):
    job = new_job("between")
    run = job.start()
    job.get_on(run)
    run.terminate()
    ends(run, EXIT_REQUEUE)
    run = job.start()
    job.get_on(run)
    os.kill(children(run)[1], signal.SIGKILL)
    until(lambda: not children(run))
    run.terminate()
    ends(run, EXIT_REQUEUE)
    assert job.marked()
    assert job.log.read_text().count("Going on after") == 1
