"""Metrics of a run that is taken up, or whose disk fails for a while; the run's folder; the progress line."""

import errno
import fcntl
import json
import math
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simclr_fast import record
from simclr_fast.evaluation.results import in_training
from simclr_fast.record import Progress, Recorder, RunError, claimed, read_metrics, try_folder, write_text


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder):
    """What TensorBoard shows of the loss: step -> value."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes `left` bytes of a piece and then is full; None is no bound."""

    class Disk:
        left = None

    class File:
        def __init__(self, path, mode):
            self.file = real(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if Disk.left is not None and len(data) > Disk.left:
                self.file.write(data[: Disk.left])
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

    real = open
    monkeypatch.setattr(record, "open", lambda path, mode="r", **how: File(path, mode), raising=False)
    return Disk


def test_resume_cuts_the_records_back(tmp_path):
    recorder = Recorder(tmp_path, 0)
    for step in (10, 20, 30):
        recorder.write({"step": step, "loss": 1.0 / step})
    recorder.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    recorder = Recorder(tmp_path, 20)
    recorder.write({"step": 25, "loss": 0.1})
    recorder.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10, 20, 25]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 25]
    assert board(tmp_path) == pytest.approx({10: 0.1, 20: 0.05, 25: 0.1})


@pytest.mark.parametrize("left", [0, 1, 20])
def test_what_a_full_disk_did_not_take_is_written_later(tmp_path, disk, capsys, left):
    recorder = Recorder(tmp_path, 0)
    recorder.write({"step": 1, "loss": 1.0})
    disk.left = left
    for step in (2, 3, 4):
        recorder.write({"step": step, "loss": 1.0 / step})
        assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "metrics.jsonl: No space left on device; the run goes on" in complaint
    disk.left = None
    recorder.write({"step": 5, "loss": 0.2})
    assert capsys.readouterr().err == f"metrics are written again, and {tmp_path}/metrics.jsonl is complete\n"
    recorder.write({"step": 6, "loss": 0.1})
    recorder.close()
    assert steps(tmp_path) == [entry["step"] for entry in recorder.records] == [1, 2, 3, 4, 5, 6]
    assert board(tmp_path) == pytest.approx({1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4, 5: 0.2, 6: 0.1})
    assert capsys.readouterr().err == ""


def test_what_is_lost_in_the_end_is_said(tmp_path, disk, capsys):
    recorder = Recorder(tmp_path, 0)
    recorder.write({"step": 1, "loss": 1.0})
    disk.left = 10
    recorder.write({"step": 2, "loss": 0.5})
    recorder.write({"step": 3, "loss": 0.4})
    capsys.readouterr()
    recorder.close()
    assert "metrics.jsonl lacks its last 2 records" in capsys.readouterr().err
    disk.left = None
    taken_up = Recorder(tmp_path, 3)
    assert [entry["step"] for entry in taken_up.records] == steps(tmp_path) == [1]


def test_closing_writes_what_still_waits(tmp_path, disk):
    recorder = Recorder(tmp_path, 0)
    disk.left = 0
    recorder.write({"step": 1, "loss": 1.0})
    disk.left = None
    recorder.close()
    assert steps(tmp_path) == [1]


def test_an_interruption_within_a_write_leaves_nothing_twice(tmp_path, monkeypatch, capsys):
    recorder = Recorder(tmp_path, 0)

    def interrupt(name):
        real(name)
        raise KeyboardInterrupt

    real = record._Appended.put
    monkeypatch.setattr(record._Appended, "put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        recorder.write({"step": 1, "loss": 1.0})
    monkeypatch.undo()
    recorder.close()
    assert steps(tmp_path) == [1]
    assert board(tmp_path) == {1: 1.0}
    assert capsys.readouterr().err == ""


def test_a_disk_that_is_away_at_the_start(tmp_path, capsys):
    recorder = Recorder(tmp_path / "away", 0)
    recorder.write({"step": 1, "loss": 1.0})
    assert "No such file or directory; the run goes on" in capsys.readouterr().err
    (tmp_path / "away").mkdir()
    recorder.write({"step": 2, "loss": 0.5})
    assert steps(tmp_path / "away") == [1, 2]
    assert board(tmp_path / "away") == {1: 1.0, 2: 0.5}


def test_records_that_were_removed_do_not_stop_the_run(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.write({"step": 1, "loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    recorder.write({"step": 2, "loss": 0.5})
    assert steps(tmp_path) == [2]


def test_records_are_on_disk_at_once(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.write({"step": 1, "loss": 0.5})
    assert steps(tmp_path) == [1]
    assert board(tmp_path) == {1: 0.5}


@pytest.mark.parametrize("cut", range(1, 45, 4))
def test_a_last_line_that_is_cut_short_is_left_out_and_cut_off(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n'
    path.write_text(text[:-cut])
    whole = [10] if cut <= len('{"step": 20, "loss": 0.25}\n') else []
    assert [entry["step"] for entry in read_metrics(tmp_path)] == whole
    Recorder(tmp_path, 99).write({"step": 30, "loss": 0.1})
    assert steps(tmp_path) == [*whole, 30]


def test_bytes_that_are_no_text_end_the_records(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10}\n\xff\x00\x00\n{"step": 30}\n')
    assert read_metrics(tmp_path) == [{"step": 10}]


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.write({"step": 1, "loss": 0.5})
    recorder.write({"step": 2, "loss": math.nan, "lr": 0.1})
    assert read_metrics(tmp_path)[1] == {"step": 2, "loss": None, "lr": 0.1}
    assert math.isnan(recorder.records[1]["loss"])
    assert board(tmp_path) == {1: 0.5}


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "page", "old")
    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "page", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page": "old"}


def test_two_that_write_one_text_at_once(tmp_path, monkeypatch):
    """Another process writes the same file between the first one's last byte and its rename."""

    def meanwhile(descriptor):
        monkeypatch.undo()
        with monkeypatch.context() as other:
            other.setattr(record.os, "getpid", lambda: 1)
            write_text(tmp_path / "page", "theirs")

    monkeypatch.setattr(record.os, "fsync", meanwhile)
    write_text(tmp_path / "page", "ours")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page": "ours"}


def test_a_folder_is_tried(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "deep" / "er", Path("deep")):
        try_folder(folder)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="Not a directory"):
            try_folder(folder)
    monkeypatch.setattr(record.tempfile, "TemporaryFile", lambda dir, buffering: open("/dev/full", "wb", buffering))
    with pytest.raises(OSError, match="No space left"):
        try_folder(tmp_path)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(None, 0)
    recorder.write({"step": 1})
    recorder.close()
    assert recorder.records == [{"step": 1}]
    assert not list(tmp_path.iterdir())


def test_a_folder_is_claimed_once(tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(RunError, match="another process"):
            with claimed(tmp_path / "run"):
                pass
    with claimed(tmp_path / "run"):
        pass


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_that_was_forked_off_does_not_hold_the_folder(tmp_path):
    def fork():
        hear, told = os.pipe()
        child = os.fork()
        if not child:
            os.close(told)
            os.read(hear, 1)  # until the test has ended
            os._exit(0)
        os.close(hear)
        return child, told

    with claimed(tmp_path):
        child, told = fork()
        with pytest.raises(RunError, match="another process"), claimed(tmp_path):  # this one still does
            pass
    try:
        with claimed(tmp_path):
            pass
    finally:
        os.close(told)
        os.waitpid(child, 0)


def test_one_that_only_looks_is_waited_for(tmp_path, monkeypatch):
    with claimed(tmp_path):
        pass
    looking, waits = open(tmp_path / ".lock", "rb"), []
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("simclr_fast.record.time.sleep", lambda seconds: waits.append(seconds) or looking.close())
    with claimed(tmp_path):
        assert in_training(tmp_path)
    assert len(waits) == 1
    assert waits[0] <= 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"out must be .*file/run"):
        with claimed(tmp_path / "file" / "run"):
            pass


def test_plain_lines_where_there_is_no_terminal(capsys):
    progress = Progress(speak=True)
    with progress.running(0, 10):
        progress.show(1, "first", always=True)
        progress.show(2, "too soon")
    progress.say("done [not markup]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("first · 0:0")
    assert lines[1:] == ["done [not markup]"]


def test_other_ranks_are_silent(capsys):
    progress = Progress(speak=False)
    progress.say("nothing")
    assert capsys.readouterr().out == ""


def test_output_to_a_full_disk_does_not_stop_the_run(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        Progress(speak=True).say("a line")
        patch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()
