"""Checkpoints: whole or not at all, damage found, the one before taken; and a run that goes on without one."""

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from simclr_fast import checkpoint


def state(step):
    return {"step": step, "method": {"weight": torch.full((1000,), float(step))}, "best": -1.5}


def test_last_previous_and_best(tmp_path):
    for step, best in ((1, True), (2, True), (3, False)):
        checkpoint.save(tmp_path, state(step), best=best)
    steps = {name: checkpoint.read(tmp_path / name)["step"] for name in ("last.pt", "previous.pt", "best.pt")}
    assert steps == {"last.pt": 3, "previous.pt": 2, "best.pt": 2}
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "previous.pt"]
    loaded, complaints = checkpoint.load(tmp_path)
    assert loaded["step"] == 3
    assert not complaints
    torch.testing.assert_close(loaded["method"]["weight"], state(3)["method"]["weight"])


def test_nothing_there(tmp_path):
    assert checkpoint.load(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_falls_back_to_the_previous(tmp_path, keep):
    checkpoint.save(tmp_path, state(1), best=True)
    checkpoint.save(tmp_path, state(2), best=False)
    last = tmp_path / "last.pt"
    size = last.stat().st_size
    os.truncate(last, int(keep * size) if isinstance(keep, float) else keep)
    loaded, complaints = checkpoint.load(tmp_path)
    assert loaded["step"] == 1
    assert "last.pt" in complaints[0]


def test_interrupted_between_the_two_renames(tmp_path):
    checkpoint.save(tmp_path, state(1), best=True)
    os.replace(tmp_path / "last.pt", tmp_path / "previous.pt")
    assert checkpoint.load(tmp_path)[0]["step"] == 1


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), best=False)

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(checkpoint.CheckpointError, match="Input/output error"):
        checkpoint.load(tmp_path)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)[0]["step"] == 2


def test_all_damaged_is_an_error(tmp_path):
    checkpoint.save(tmp_path, state(1), best=True)
    os.truncate(tmp_path / "last.pt", 5)
    for _ in range(2):  # a second start must not take the folder for an empty one
        with pytest.raises(checkpoint.CheckpointError, match="--resume never"):
            checkpoint.load(tmp_path)


def test_the_best_is_taken_where_the_last_two_are_damaged(tmp_path):
    for step, best in ((1, True), (2, False), (3, False)):
        checkpoint.save(tmp_path, state(step), best=best)
    for name in ("last.pt", "previous.pt"):
        os.truncate(tmp_path / name, 100)
    loaded, complaints = checkpoint.load(tmp_path)
    assert loaded["step"] == 1
    assert len(complaints) == 2
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt.bad", "previous.pt.bad"]


def test_a_flipped_bit_in_a_weight_is_found(tmp_path):
    """torch.load itself takes it without a word."""
    checkpoint.save(tmp_path, state(1), best=True)
    checkpoint.save(tmp_path, state(2), best=False)
    last = tmp_path / "last.pt"
    content = bytearray(last.read_bytes())
    content[content.index(torch.tensor([2.0, 2.0]).numpy().tobytes()) + 9] ^= 1
    last.write_bytes(content)
    assert torch.load(last)["method"]["weight"].ne(2).any()
    loaded, complaints = checkpoint.load(tmp_path)
    assert loaded["step"] == 1
    assert "checksum" in complaints[0]


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    small = state(1) | {"method": torch.arange(50.0)}
    checkpoint.save(tmp_path, small, best=False)
    content, draw = (tmp_path / "last.pt").read_bytes(), random.Random(0)
    found = 0
    for place in range(0, len(content), 9):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            again = checkpoint.read(tmp_path / "damaged")
        except checkpoint.CheckpointError:
            found += 1
            continue
        assert torch.equal(again.pop("method"), small["method"])
        assert again == {"step": 1, "best": -1.5}
    assert found > len(content) / 9 / 4


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_a_failing_disk_is_no_damage(tmp_path):
    checkpoint.save(tmp_path, state(1), best=True)
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").symlink_to("/proc/self/mem")  # whose first bytes cannot be read
    with pytest.raises(checkpoint.CheckpointError, match="Input/output error"):
        checkpoint.load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"step": os.system}, tmp_path / "last.pt")
    with pytest.raises(checkpoint.CheckpointError, match="cannot read"):
        checkpoint.read(tmp_path / "last.pt")


def test_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), best=True)

    def full(obj, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left.*still good there: last.pt, best.pt"):
        checkpoint.save(tmp_path, state(2), best=True)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]
    assert checkpoint.load(tmp_path)[0]["step"] == 1


def test_what_a_killed_write_left_is_removed(tmp_path):
    for name in ("last.pt.new", "best.pt.new", "previous.pt.new"):
        (tmp_path / name).write_text("half")
    checkpoint.save(tmp_path, state(1), best=False)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_killed_while_last_and_previous_were_one_file(tmp_path):
    checkpoint.save(tmp_path, state(1), best=True)
    os.link(tmp_path / "last.pt", tmp_path / "previous.pt")
    checkpoint.save(tmp_path, state(2), best=True)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "previous.pt"]
    assert [checkpoint.read(tmp_path / name)["step"] for name in ("previous.pt", "last.pt", "best.pt")] == [1, 2, 2]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_last_previous_and_best(tmp_path)


def test_a_file_system_that_does_not_sync_folders(tmp_path, monkeypatch):
    real = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    test_last_previous_and_best(tmp_path)


def test_names_are_synced_after_the_last_rename(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def watched(descriptor):
        synced.append((os.path.isdir(f"/proc/self/fd/{descriptor}"), sorted(os.listdir(tmp_path))))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    checkpoint.save(tmp_path, state(1), best=True)
    assert synced == [(False, ["last.pt.new"]), (True, ["best.pt", "last.pt"])]


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    class Disk:
        f_frsize, f_blocks, f_bavail, f_bfree = 4096, 1000, 2, 2

    checkpoint.save(tmp_path, state(1), best=False)
    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    monkeypatch.setattr(torch, "save", lambda *args: pytest.fail("written"))
    half = {"whole": torch.zeros(2**20), "view": torch.zeros(2**20)[:10], "again": [torch.zeros(0)]}
    half["same"] = half["whole"]
    with pytest.raises(checkpoint.CheckpointError, match=r"needs about 8\.0 MiB, and 0\.0 MiB are free; still good"):
        checkpoint.save(tmp_path, half, best=False)
    monkeypatch.undo()
    Disk.f_blocks = 0  # a file system that does not tell
    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    checkpoint.save(tmp_path, half, best=False)


@pytest.fixture
def broken(monkeypatch):
    """A function that breaks the disk or mends it, and a clock that it sets."""
    clock, real = [1000.0], checkpoint.save

    def save(folder, state, *, best):
        if broken.now:
            raise checkpoint.CheckpointError("could not write; still good there: last.pt")
        real(folder, state, best=best)

    def broken(now, after=0.0):
        broken.now = now
        clock[0] += after

    broken(False)
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    return broken


def test_a_run_goes_on_after_a_failure_and_tries_again(tmp_path, broken):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.save(state(1), best=True) == ""
    assert not checkpoints.due()
    broken(True)
    said = checkpoints.save(state(2), best=False)
    assert "still good there: last.pt. The run goes on, and tries 2 more times, in 5 minutes" in said
    assert checkpoints.failures == 1
    assert not checkpoints.due()
    broken(True, after=299)
    assert checkpoints.save(state(3), best=False) == ""
    assert checkpoints.failures == 1
    broken(True, after=1)
    assert checkpoints.due()
    assert "tries once more" in checkpoints.save(state(4), best=False)
    broken(False, after=300)
    assert "can be written again" in checkpoints.save(state(5), best=False)
    assert checkpoints.failures == 0
    assert not checkpoints.due()
    assert checkpoint.load(tmp_path)[0]["step"] == 5


def test_three_failures_in_a_row_end_the_run(tmp_path, broken):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for _ in range(2):
        broken(True, after=300)
        assert checkpoints.save(state(1), best=False)
    broken(True, after=300)
    with pytest.raises(checkpoint.CheckpointError, match="could not write"):
        checkpoints.save(state(2), best=False)


def test_the_final_checkpoint_is_tried_at_once_and_its_failure_raised(tmp_path, broken):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    broken(True)
    with pytest.raises(checkpoint.CheckpointError, match="could not write"):
        checkpoints.save(state(1), best=False, final=True)
    broken(False)
    assert "can be written again" in checkpoints.save(state(2), best=False, final=True)
    assert checkpoint.load(tmp_path)[0]["step"] == 2
