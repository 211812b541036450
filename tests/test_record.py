import json

import pytest

from simclr_fast.record import Progress, Recorder, RunError, claimed, read_metrics


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
    assert list(tmp_path.glob("events.out.tfevents.*"))


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
