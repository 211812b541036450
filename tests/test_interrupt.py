"""Stopping between steps: signals, what all ranks agree on and when, the end of a step that never ends, the marker."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from simclr_fast.launch import launch
from simclr_fast.training.interrupt import MARKER, SIGNALS, Interrupt, Interrupted, remove_marker, write_marker

CPU = torch.device("cpu")


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_alone_a_signal_is_known_at_the_end_of_the_step(number):
    before = {one: signal.getsignal(one) for one in SIGNALS}
    with Interrupt(None, CPU) as interrupt:
        assert interrupt.wanted() == (0, False)
        assert interrupt.wanted(True) == (0, True)
        send(number)
        assert interrupt.wanted() == (number, False)
        assert interrupt.wanted(True) == (number, True)
    assert {one: signal.getsignal(one) for one in SIGNALS} == before


def test_the_second_ctrl_c_does_not_wait():
    with Interrupt(None, CPU):
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_wakeup_descriptor_is_put_back():
    with Interrupt(None, CPU):
        pass
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_last_step_is_heard_after_it(number):
    heard = []
    before = signal.signal(number, lambda *given: heard.append(given[0]))
    try:
        with Interrupt(None, CPU) as interrupt:
            interrupt.wanted()
            send(number)
            assert heard == []
        assert heard == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_alone_a_signal_ends_an_evaluation(number):
    with Interrupt(None, CPU) as interrupt:
        with interrupt.evaluating(None):
            interrupt.agree()
            assert not interrupt.asked()
            send(number)
            assert interrupt.asked()
            with pytest.raises(Interrupted) as stopped:
                interrupt.agree()
    assert stopped.value.signum == number


SLOW = """
import os, signal, time, torch
from simclr_fast.training.interrupt import Interrupt
with Interrupt(None, torch.device("cpu"), grace_s=0.1) as interrupt:
    time.sleep(1.5)
    interrupt.wanted()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)
    print(interrupt.wanted()[0])
"""


def test_steps_that_are_slow_have_more_time_to_end():
    done = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{int(signal.SIGTERM)}\n"), done.stderr


HANGS = """
import ctypes, os, signal, sys, torch
from simclr_fast.training.interrupt import Interrupt
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with Interrupt(None, torch.device("cpu"), grace_s=float(sys.argv[1])) as interrupt:
    print("ready", flush=True)
    if sys.argv[2] == "hang":
        lock(mutex)
        lock(mutex)  # in C, where no handler of Python's runs
    while not interrupt.wanted()[0]:
        pass
"""


@pytest.mark.parametrize(("what", "status"), [("hang", 1), ("run", 0)])
def test_a_step_that_does_not_end_ends_the_process(what, status):
    run = [sys.executable, "-c", HANGS, "3", what]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, said = process.communicate(timeout=300)
    assert process.returncode == status
    expected = "rank 0: no step ended within 3 s of SIGTERM; ended without a checkpoint\n"
    assert said == (expected if status else "")


EVALUATES = """
import os, signal, sys, time, torch
from pathlib import Path
from simclr_fast.training.interrupt import Interrupt, write_marker
folder, number = Path(sys.argv[1]), getattr(signal, sys.argv[2])
with Interrupt(None, torch.device("cpu"), grace_s=0.3) as interrupt:
    with interrupt.evaluating(lambda: write_marker(folder, 7)):
        time.sleep(0.5)
    interrupt.wanted()
    with interrupt.evaluating(lambda: write_marker(folder, 8)):
        os.kill(os.getpid(), number)
        time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status", "marked"), [("SIGUSR1", 75, True), ("SIGINT", 130, False)])
def test_an_evaluation_that_does_not_end_ends_as_stopped(tmp_path, number, status, marked):
    command = [sys.executable, "-c", EVALUATES, str(tmp_path), number]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["8\n"] * marked
    said = f"rank 0: the evaluation did not end within 0.3 s of {number}; ended, and the same command does it again\n"
    assert (done.stdout, done.stderr) == ("", said)


def test_an_evaluation_is_no_step_whose_length_gives_steps_more_time(monkeypatch):
    now = iter((0, 1, 3, 1000, 1002))
    monkeypatch.setattr("simclr_fast.training.interrupt.time.monotonic", lambda: next(now))
    with Interrupt(None, CPU) as interrupt:  # at 0 s
        interrupt.wanted()
        with interrupt.evaluating(None):  # from 3 s to 1000 s
            pass
        interrupt.wanted()
        assert interrupt._longest_s == 2


RANKS = """
import os, pathlib, signal, sys, time
from simclr_fast.distributed import Ranks
from simclr_fast.training.interrupt import Interrupt
folder, ranks = pathlib.Path(sys.argv[1]), Ranks(use_gpu=False)
answers = []
with Interrupt(ranks.group, ranks.device) as interrupt:
    due = False
    for step in range(20):
        time.sleep(0.02 * (ranks.rank == step % 3))  # one of them is late
        if (ranks.rank, step) in ((1, 9), (2, 10)):
            os.kill(os.getpid(), signal.SIGUSR1 if ranks.rank == 1 else signal.SIGTERM)
        due = due or (ranks.main and step in (2, 6))
        answers.append(interrupt.wanted(due))
        due = due and not answers[-1][1]
        if answers[-1][0]:
            break
(folder / str(ranks.rank)).write_text(repr(answers))
ranks.close()
"""


def test_all_ranks_agree_one_step_later_on_one_signal_and_on_each_checkpoint_once(tmp_path, monkeypatch):
    (tmp_path / "agreeing.py").write_text(textwrap.dedent(RANKS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch("agreeing", [str(tmp_path)], 3, tmp_path / "last.pt") == 0
    expected = [(0, step in (3, 7)) for step in range(10)] + [(int(signal.SIGUSR1), False)]
    for rank in range(3):
        assert eval((tmp_path / str(rank)).read_text()) == expected


RANKS_EVALUATE = """
import os, pathlib, signal, sys, time
from simclr_fast.distributed import Ranks
from simclr_fast.training.interrupt import Interrupt, Interrupted
folder, ranks = pathlib.Path(sys.argv[1]), Ranks(use_gpu=False)
answers = []
with Interrupt(ranks.group, ranks.device) as interrupt:
    for step in range(4):
        answers.append(interrupt.wanted(ranks.main))
        try:
            with interrupt.evaluating(None):
                if (ranks.rank, step) == (1, 2):
                    os.kill(os.getpid(), signal.SIGUSR1)
                interrupt.agree()
        except Interrupted as stopped:
            answers.append(stopped.signum)
            break
(folder / str(ranks.rank)).write_text(repr(answers))
ranks.close()
"""


def test_all_ranks_end_an_evaluation_together(tmp_path, monkeypatch):
    (tmp_path / "evaluating.py").write_text(RANKS_EVALUATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch("evaluating", [str(tmp_path)], 3, tmp_path / "last.pt") == 0
    expected = [(0, False)] * 3 + [int(signal.SIGUSR1)]
    for rank in range(3):
        assert eval((tmp_path / str(rank)).read_text()) == expected


@pytest.mark.gpu
def test_on_a_gpu_the_answer_comes_one_step_later_and_the_host_does_not_wait(tmp_path):
    import torch.distributed as dist

    device = torch.device("cuda", 0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        with Interrupt(dist.group.WORLD, device) as interrupt:
            assert interrupt.wanted(True) == (0, False)
            torch.cuda._sleep(10**9)
            busy = torch.cuda.Event()
            busy.record()
            send(signal.SIGTERM)
            assert interrupt.wanted() == (0, True)
            assert not busy.query()
            assert interrupt.wanted() == (signal.SIGTERM, False)
    finally:
        dist.destroy_process_group()


def test_the_marker_names_the_step_and_can_be_taken_back(tmp_path):
    remove_marker(tmp_path)
    write_marker(tmp_path, 123)
    assert (tmp_path / MARKER).read_text() == "123\n"
    remove_marker(tmp_path)
    assert os.listdir(tmp_path) == []
