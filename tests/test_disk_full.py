"""A disk that is really full, and processes that are really killed while they write."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_fast import checkpoint, report
from simclr_fast.record import Recorder, read_metrics

MIB = 2**20


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.splitlines()[0]}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Leave `leave` bytes, whole pages of them; returns the file to remove."""
    filler, free = disk / "filler", os.statvfs(disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - leave))
    return filler


def state(step: int) -> dict[str, object]:
    return {"step": step, "weight": torch.full((MIB // 4,), float(step))}


@pytest.mark.parametrize("told", [True, False])
def test_checkpoints_outlive_a_full_disk(disk, monkeypatch, told):
    """Whether or not the file system tells before that it is full."""
    if not told:
        monkeypatch.setattr(checkpoint, "_require_space", lambda folder, needed: None)
    folder = disk / "checkpoints"
    checkpoints = checkpoint.Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(state(step), best=step == 1)
    filler = fill(disk, leave=MIB // 2)
    said = checkpoints.save(state(3), best=True)
    needed = r": it needs about 1\.0 MiB, and 0\.5 MiB are free" if told else ""
    assert re.search(
        f"No space left on device{needed}; still good there: last.pt, previous.pt, best.pt. The run goes on", said
    )
    assert sorted(os.listdir(folder)) == ["best.pt", "last.pt", "previous.pt"]
    steps = {name: checkpoint.read(folder / f"{name}.pt")["step"] for name in ("last", "previous", "best")}
    assert steps == {"last": 2, "previous": 1, "best": 1}
    filler.unlink()
    assert "can be written again" in checkpoints.save(state(4), best=True, final=True)
    assert checkpoint.load(folder)[0]["step"] == 4


def test_a_write_that_stops_anywhere_leaves_the_old_checkpoint(tmp_path):
    """A bound on the size of files, which needs no rights: every part of the file is once the first that fails."""
    script = """
import resource, sys
from pathlib import Path
import torch
from simclr_fast import checkpoint
folder, state = Path(sys.argv[1]), {"step": 2, "weights": [torch.ones(500) for _ in range(4)]}
checkpoint.save(folder, state | {"step": 1}, best=False)
size = (folder / "last.pt").stat().st_size
for bound in range(0, size, 503):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bound, resource.RLIM_INFINITY))
    try:
        checkpoint.save(folder, state, best=True)
    except checkpoint.CheckpointError as error:
        assert "File too large; still good there: last.pt" in str(error), error
    else:
        raise AssertionError(bound)
    assert [path.name for path in folder.iterdir()] == ["last.pt"]
    assert checkpoint.read(folder / "last.pt")["step"] == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, resource.RLIM_INFINITY))
checkpoint.save(folder, state, best=True)
assert checkpoint.load(folder)[0]["step"] == 2
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "checkpoints"], check=True)


def test_metrics_outlive_a_full_disk(disk, capfd):
    recorder = Recorder(disk, 0)
    written = 0
    filler = fill(disk, leave=8192)
    while not (complaint := capfd.readouterr().err):
        written += 1
        recorder.write({"step": written, "loss": 1 / written, "note": "x" * 100})
    assert "No space left on device; the run goes on" in complaint
    for _ in range(50):
        written += 1
        recorder.write({"step": written, "loss": 1 / written, "note": "x" * 100})
    held = [record["step"] for record in read_metrics(disk)]
    assert held == list(range(1, len(held) + 1))
    assert len(held) < written
    assert capfd.readouterr().err == ""
    filler.unlink()
    recorder.write({"step": written + 1, "loss": 0.0})
    recorder.close()
    assert "written again" in capfd.readouterr().err
    assert read_metrics(disk) == recorder.records
    assert len(recorder.records) == written + 1


def test_the_report_is_whole_or_as_it_was(disk):
    path = disk / "report.html"
    page = {"settings": {}, "versions": {}, "metrics": [], "chance_loss": 1.0}
    report.write_report(path, report.Run(title="old", **page))
    old = path.read_bytes()
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(path, report.Run(title="new", **page))
    assert path.read_bytes() == old
    assert sorted(os.listdir(disk)) == ["filler", "report.html"]


def test_killed_at_any_moment(tmp_path):
    """Children write checkpoints and metrics until they are killed; each takes up what the one before it left."""
    script = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from simclr_fast import checkpoint
from simclr_fast.record import Recorder, read_metrics

def work(folder, told):
    step = (checkpoint.load(folder)[0] or {"step": 0})["step"]
    recorder = Recorder(folder, step)
    while True:
        step += 1
        recorder.write({"step": step, "loss": 1.0})
        checkpoint.save(folder, {"step": step, "weight": torch.full((25_000,), float(step))}, best=step % 3 == 0)
        os.write(told, step.to_bytes(8, "little"))

folder, draw, killed, within, last = Path(sys.argv[1]), random.Random(0), 0, 0, 0
folder.mkdir()
Recorder(folder, 0)  # what it imports, and what torch.load does, is then there in all children
end = time.monotonic() + 6
while time.monotonic() < end or killed < 10:
    hear, told = os.pipe()
    child = os.fork()
    if not child:
        work(folder, told)
    os.close(told)
    time.sleep(draw.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(hear, "rb") as pipe:
        last = max(last, int.from_bytes(pipe.read()[-8:], "little"))
    killed += 1
    within += bool(list(folder.glob("*.new")))
    state, complaints = checkpoint.load(folder)
    assert not complaints, complaints
    if state is None:
        assert last == 0
        continue
    assert state["step"] >= last  # what a child was told that it had written is there
    last = state["step"]
    assert state["weight"].eq(state["step"]).all()
    steps = [record["step"] for record in read_metrics(folder)]
    assert steps[: state["step"]] == list(range(1, state["step"] + 1))
print(killed, within, last)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, tmp_path / "run"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, within, last = map(int, done.stdout.split())
    assert killed >= 10
    assert within > 0
    assert last > 0
    print(f"{killed} killed, {within} of them within a write, {last} checkpoints")
