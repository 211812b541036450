"""The parent of the ranks of one host: what it starts, passes on, starts again and leaves behind; on small scripts."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from simclr_fast import launch as launching
from simclr_fast.config import ConfigError
from simclr_fast.launch import launch, launched, world_size
from tests.processes import environment, running, until
from tests.train_common import SMALL, images

__all__ = ["images"]  # a fixture is used by its name


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Run a script as so many ranks; what it writes with `note(text)` comes back, in the order of the ranks' starts."""
    monkeypatch.setattr(launching, "PAUSE_S", 0.1)
    monkeypatch.setattr(launching, "SETTLE_S", 1.5)
    monkeypatch.setattr(launching, "PATIENCE_S", 8.0)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(script, ranks=2):
        (tmp_path / "rank_script.py").write_text(HEAD + textwrap.dedent(script))
        status = launch("rank_script", [str(tmp_path)], ranks, tmp_path / "last.pt")
        until(lambda: not alive(tmp_path), seconds=10)
        return status, notes(tmp_path)

    return run


HEAD = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
def note(text):
    with open(folder / "notes", "a") as file:
        file.write(f"{rank} {os.getpid()} {text}\\n")
"""


def notes(folder):
    path = folder / "notes"
    rows = [line.split(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted((int(rank), text) for rank, _, text in rows)


def alive(folder):
    """Processes that have written a note and still run."""
    return running({int(line.split()[1]) for line in (folder / "notes").read_text().splitlines()})


def test_every_rank_knows_its_place(job):
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR TORCHELASTIC_RESTART_COUNT"
    status, seen = job(f"note([os.environ[name] for name in {names.split()!r}])", 3)
    assert status == 0
    assert seen == [(rank, f"['{rank}', '3', '{rank}', '3', 'localhost', '0']") for rank in range(3)]


@pytest.mark.parametrize("status", [2, 3, 75, 130])
def test_what_would_come_again_or_was_asked_for_is_final(job, status):
    assert job(f"note('started'); sys.exit({status} * (rank == 1))") == (status, [(0, "started"), (1, "started")])


def test_a_killed_rank_is_named_and_all_start_again(job, capfd):
    status, seen = job("""
        again = (folder / "again").exists()
        note("started")
        if rank == 1 and not again:
            while len((folder / "notes").read_text().splitlines()) < 2:
                time.sleep(0.01)
            (folder / "again").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0 if again else 60)  # as in a collective without the other
    """)
    assert status == 0
    assert seen == [(0, "started")] * 2 + [(1, "started")] * 2
    said = capfd.readouterr().err
    assert said.startswith("rank 1 was ended by SIGKILL (as the kernel does when memory runs out); starting again")


def test_the_user_error_of_a_rank_counts_more_than_what_it_does_to_another(job):
    status, seen = job("""
        note("started")
        while len((folder / "notes").read_text().splitlines()) < 2:
            time.sleep(0.01)
        if rank == 1:
            time.sleep(0.2)
        sys.exit(2 if rank == 1 else 1)
    """)
    assert (status, len(seen)) == (2, 2)


def test_what_a_killed_rank_has_started_ends_with_it(job):
    status, seen = job(
        """
        if (folder / "notes").exists():
            sys.exit(0)
        if not os.fork():
            note("child")
            time.sleep(600)
        while not (folder / "notes").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """,
        1,
    )
    assert (status, seen) == (0, [(0, "child")])


def test_a_log_on_a_full_disk_does_not_end_the_job(tmp_path):
    (tmp_path / "rank_script.py").write_text("import sys; sys.exit(7)")
    code = "import sys; from simclr_fast.launch import launch; sys.exit(launch('rank_script', [], 1))"
    with open("/dev/full", "w") as log:
        done = subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=tmp_path), stderr=log)
    assert done.returncode == 7


def test_three_restarts_without_a_newer_checkpoint_are_the_last(job, capfd):
    status, seen = job("note(os.environ['TORCHELASTIC_RESTART_COUNT']); sys.exit(7)", 1)
    assert (status, seen) == (7, [(0, str(attempt)) for attempt in range(4)])
    assert re.findall("(ended with status 7|giving up)", capfd.readouterr().err)[-2:] == [
        "ended with status 7",
        "giving up",
    ]


def test_without_a_checkpoint_nothing_is_started_again(tmp_path, monkeypatch):
    (tmp_path / "rank_script.py").write_text("open('notes', 'a').write('started'); 1 / 0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert launch("rank_script", [], 1) == 1
    assert (tmp_path / "notes").read_text() == "started"


def test_a_newer_checkpoint_gives_three_restarts_more(job):
    status, seen = job(
        """
        note("started")
        if len((folder / "notes").read_text().splitlines()) == 3:
            (folder / "last.pt").touch()
        os.kill(os.getpid(), signal.SIGSEGV)
        """,
        1,
    )
    assert (status, len(seen)) == (128 + signal.SIGSEGV, 3 + 3)


@pytest.fixture
def send(tmp_path):
    """Send signals to this process once so many ranks are ready for them."""

    def later(*numbers, ranks=2):
        def wait():
            until(lambda: len(notes(tmp_path)) >= ranks)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.5)

        threading.Thread(target=wait, daemon=True).start()

    return later


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda one: str(one)
)
def test_signals_are_passed_on_and_the_ranks_end_by_themselves(job, send, number, status):
    before = [signal.getsignal(one) for one in launching.SIGNALS]
    send(number)
    found, seen = job(f"""
        def stop(number, frame):
            time.sleep(1)  # for the checkpoint
            note(number)
            sys.exit({status})
        signal.signal({int(number)}, stop)
        note("ready")
        time.sleep(60)
    """)
    assert found == status
    assert seen == [(rank, text) for rank in (0, 1) for text in (str(int(number)), "ready")]
    assert [signal.getsignal(one) for one in launching.SIGNALS] == before


@pytest.fixture
def heard(tmp_path):
    """Signals that are sent to this process again, in their order."""
    numbers = []
    before = {one: signal.signal(one, lambda number, _: numbers.append(number)) for one in launching.SIGNALS}
    yield numbers
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_ends_ranks_which_are_not_ready_for_it_is_the_parents(job, send, heard, number):
    send(number)
    status, seen = job("note('importing'); time.sleep(60)")
    assert (status, len(seen), heard) == (128 + number, 2, [number])


@pytest.mark.usefixtures("heard")  # which puts back what a training in this process has left
def test_where_the_parent_has_no_handler_the_status_says_the_signal(job, send):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    send(signal.SIGUSR1)
    assert job("note('importing'); time.sleep(60)")[0] == 128 + signal.SIGUSR1


def test_no_rank_is_started_after_a_signal_between_two_starts(job, tmp_path, heard, monkeypatch):
    sleep = time.sleep

    def pause(seconds):
        if seconds == 0.25:
            signal.raise_signal(signal.SIGTERM)
        sleep(seconds)

    monkeypatch.setattr(launching, "PAUSE_S", 0.25)
    monkeypatch.setattr(time, "sleep", pause)
    status, seen = job("note('started'); sys.exit(7)")
    assert (status, len(seen), heard) == (128 + signal.SIGTERM, 2, [signal.SIGTERM])


def test_a_signal_after_a_rank_has_died_is_the_parents(job, tmp_path, heard, monkeypatch):
    monkeypatch.setattr(launching, "SETTLE_S", 2.0)

    def wait():
        until(lambda: len(notes(tmp_path)) == 2 and len(alive(tmp_path)) == 1)
        time.sleep(5 * launching.POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
    status, seen = job("""
        signal.signal(signal.SIGTERM, lambda *_: note("passed on"))
        note("started")
        while len((folder / "notes").read_text().splitlines()) < 2:
            time.sleep(0.01)
        time.sleep(60 * (1 - rank))  # as in a collective without the other
        sys.exit(7 * rank)
    """)
    assert (status, heard) == (128 + signal.SIGTERM, [signal.SIGTERM])
    assert seen == [(0, "started"), (1, "started")]


def test_a_job_is_the_same_at_every_start_and_another_for_another_command(job, monkeypatch):
    script = f"note(os.environ[{launching._JOB!r}]); sys.exit(7)"
    numbers = [{text for _, text in job(script, 1)[1]} for _ in range(2)]
    assert len(numbers[0]) == 1
    assert len(numbers[1]) == 2  # the notes of the first too
    monkeypatch.setenv(launching._JOB, *numbers[0])
    assert launching.job() == ("", int(*numbers[0]))


def test_a_job_of_torchrun_is_its_name_and_the_process_that_started_this_one(monkeypatch):
    assert launching.job() == ("", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    name, number = launching.job()
    assert (name, number) == ("none", launching.job()[1])
    with subprocess.Popen(["sleep", "60"]) as other:
        assert 0 < launching._process(os.getpid()) != launching._process(other.pid)
        other.kill()
    assert launching._process(other.pid) == 0


def test_ranks_that_ignore_a_signal_are_killed(job, send):
    send(signal.SIGTERM)
    status, _ = job("signal.signal(signal.SIGTERM, signal.SIG_IGN); note('ready'); time.sleep(60)")
    assert status == 128 + signal.SIGKILL


def test_after_a_second_ctrl_c_nobody_waits_for_a_rank(job, send, monkeypatch):
    monkeypatch.setattr(launching, "PATIENCE_S", 300.0)
    send(signal.SIGINT, signal.SIGINT)
    status, _ = job("signal.signal(signal.SIGINT, signal.SIG_IGN); note('ready'); time.sleep(60)")
    assert status == 128 + signal.SIGKILL


def test_ranks_meet_in_the_parents_store(job):
    status, seen = job("""
        from simclr_fast.distributed import Ranks
        ranks = Ranks(use_gpu=False)
        note(ranks.from_main(lambda: "met"))
        ranks.close()
    """)
    assert (status, seen) == (0, [(0, "met"), (1, "met")])


DIVERGING = "--base-lr", "1e38", "--warmup-epochs", "0", "--epochs", "9"
GLOO_THREADS = """
def gloo():
    names = (path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm"))
    return [name for name in names if "gloo" in name]
"""


def test_no_thread_of_gloo_is_left_when_python_is_torn_down(job):
    status, seen = job(
        GLOO_THREADS
        + textwrap.dedent("""
        from simclr_fast.distributed import Ranks
        ranks = Ranks(use_gpu=False)
        ranks.from_main(lambda: "met")
        assert gloo()
        ranks.close()
        note(gloo())
        """)
    )
    assert (status, seen) == (0, [(0, "[]"), (1, "[]")])


@pytest.mark.parametrize(
    ("flags", "status"),
    [((), 0), (("--batch", "15"), 2), (("--compile", "reduce-overhead", "--accumulate", "2"), 2), (DIVERGING, 3)],
    ids=["trained", "refused before", "refused by the step", "stopped"],
)
def test_nor_after_a_training_or_its_error(job, images, tmp_path, monkeypatch, flags, status):
    monkeypatch.setenv("PYTHONWARNINGS", "error::FutureWarning")  # of what torch is about to drop
    arguments = ["--data", str(images), "--out", str(tmp_path / "run"), *SMALL, "--epochs", "1", *flags]
    script = GLOO_THREADS + f"from simclr_fast import train\nstatus = train.main({arguments})\n"
    assert job(script + "note(gloo())\nsys.exit(status)\n") == (status, [(0, "[]"), (1, "[]")])


def test_nor_after_an_error_that_nobody_expects(job, images, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "RESTARTS", 0)
    arguments = ["--data", str(images), "--out", str(tmp_path / "run"), *SMALL]
    script = GLOO_THREADS + textwrap.dedent(f"""
        import atexit
        from simclr_fast import run, train
        run.train_views = lambda *args, **kwargs: 1 / 0
        atexit.register(lambda: note(gloo()))
        sys.exit(train.main({arguments}))
        """)
    assert job(script) == (1, [(0, "[]"), (1, "[]")])


def test_no_rank_outlives_a_killed_parent(tmp_path):
    (tmp_path / "rank_script.py").write_text(
        HEAD + "from simclr_fast.launch import end_with_parent\nend_with_parent()\nnote('ready')\ntime.sleep(60)\n"
    )
    code = (
        "import pathlib, sys; from simclr_fast.launch import launch; folder = pathlib.Path(sys.argv[1]);"
        "launch('rank_script', [str(folder)], 2, folder / 'last.pt')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment(PYTHONPATH=tmp_path)) as parent:
        until(lambda: len(notes(tmp_path)) == 2)
        parent.kill()
    until(lambda: not alive(tmp_path), seconds=10)


def test_a_rank_whose_parent_is_gone_already_does_not_start():
    code = "from simclr_fast.launch import end_with_parent; end_with_parent()"
    env = environment(SIMCLR_FAST_PARENT=1)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the launcher was killed" in done.stderr


def test_more_gpus_than_visible_names_both_numbers():
    visible = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"{visible}, got gpus={visible + 2}"):
        world_size(visible + 2, 1)


def test_processes_that_the_flags_ask_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert world_size(None, 1) == 4
    assert world_size(2, 1) == 2
    assert world_size(0, 3) == 3
    with pytest.raises(ConfigError, match="ranks counts CPU processes and needs gpus=0, got ranks=2"):
        world_size(None, 2)
    assert not launched()
