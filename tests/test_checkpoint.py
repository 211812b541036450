import errno
import os

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


def test_all_damaged_is_an_error(tmp_path):
    checkpoint.save(tmp_path, state(1), best=True)
    os.truncate(tmp_path / "last.pt", 5)
    with pytest.raises(checkpoint.CheckpointError, match="--resume never"):
        checkpoint.load(tmp_path)


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_device_by_torch_itself(tmp_path):
    (tmp_path / "last.pt.new").symlink_to("/dev/full")
    with pytest.raises(checkpoint.CheckpointError, match="could not write"):
        checkpoint.save(tmp_path, state(1), best=False)
