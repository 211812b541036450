"""What commands share: exit statuses, errors in one sentence, and that the group is left."""

import os
import subprocess
import sys

import pytest

from simclr_fast import command
from simclr_fast.checkpoint import CheckpointError
from simclr_fast.command import ended, over_ranks
from simclr_fast.config import ConfigError
from simclr_fast.data import DataError
from simclr_fast.record import RunError
from tests.processes import environment
from tests.train_common import ROOT


class Group:
    """Of ranks, whose main one ends with the same error, or not."""

    rank, closed = 3, 0

    def __init__(self, alike: bool = True) -> None:
        self.alike = alike

    def ends_alike(self, text: str) -> bool:
        return self.alike

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((kind("it is red"), 2) for kind in (ConfigError, DataError, RunError, CheckpointError)),
        (OSError("it is red"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors(capsys, error, status):
    group = Group()

    def work(joined):
        joined.append(group)
        raise error

    assert ended(work) == status
    assert capsys.readouterr().err == ("stopped before the end\n" if status == 130 else "error: it is red\n")
    assert group.closed == 1


def test_other_errors_are_not_hidden():
    group = Group()

    def work(joined):
        joined.append(group)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ended(work)
    assert group.closed == 1


@pytest.mark.parametrize(
    ("joins", "said"),
    [([], ""), ([Group(True)], ""), ([Group(False)], "error: rank 3: it is red\n")],
    ids=["before the group", "of all ranks", "of this rank"],
)
def test_one_rank_of_a_host_speaks_but_of_its_own_errors_each(capsys, monkeypatch, joins, said):
    def work(joined):
        joined.extend(joins)
        raise ConfigError("it is red")

    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ended(work) == 2
    assert capsys.readouterr().err == said


OWN = """
import sys
import torch
from simclr_fast.command import ended, over_ranks
from simclr_fast.data import DataError

class Settings:
    gpus, ranks, timeout = 0, 2, 60.0

def work(ranks):
    if ranks.rank == 1:
        raise DataError("it is red")
    ranks.mean(torch.ones(1))

sys.exit(ended(lambda joined: over_ranks("own", [], Settings, joined, lambda: None, work)))
"""


def test_an_error_of_one_rank_is_told(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    done = subprocess.run(
        [sys.executable, "-m", "own"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
    )  # fmt: skip
    assert done.returncode == 2
    own, lost = sorted(done.stderr.splitlines())
    assert own == "error: rank 1: it is red"
    assert lost.startswith("rank 0: the other ranks cannot be reached (")


class Settings:
    gpus, timeout = 0, 60.0

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


def test_one_process_works_itself():
    joined, seen = [], []
    assert over_ranks("none", [], Settings(1), joined, lambda: seen.append("checked"), seen.append) == 0
    assert seen == joined
    assert joined[0].world == 1


def test_several_are_started_when_all_is_well(monkeypatch):
    started = []
    monkeypatch.setattr(command, "launch", lambda *what: started.append(what) or 7)

    def refuse():
        raise ConfigError("it is red")

    with pytest.raises(ConfigError, match="it is red"):
        over_ranks("a.module", ["--x"], Settings(3), [], refuse, print)
    assert not started
    assert over_ranks("a.module", ["--x"], Settings(3), [], lambda: None, print) == 7
    assert started == [("a.module", ["--x"], 3)]
