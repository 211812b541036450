"""`--dry-run` in a folder that holds a run: it plans what the same command would do there, and changes nothing."""

import shutil
import signal

import pytest

from simclr_fast import checkpoint
from simclr_fast import run as run_module
from tests.train_common import images, jpeg, run

__all__ = ["images"]  # a fixture is used by its name


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory):
    """A run that a signal stopped after its second step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    asked = iter((0, signal.SIGUSR1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Interrupt, "wanted", lambda *_: (next(asked), False))
        assert run(images, out) == 75
    return out


@pytest.fixture
def planned(images, stopped, capsys):
    """Plan in a folder: (status, the page, the error); what the folder holds stays as it is."""

    def plan(*flags, out=stopped, data=images):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        status = run(data, out, "--dry-run", *flags)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        return status, *capsys.readouterr()

    return plan


def test_a_run_is_gone_on_with_from_its_checkpoint_at_its_own_speed(planned):
    status, page, _ = planned()
    assert status == 0
    assert "; from step 2 on" in page
    assert "the median of this run so far" in page
    assert "for 6 steps of" in page


def test_one_that_is_to_be_deleted_is_planned_from_the_start(planned):
    for flags in ((), ("--seed", "9")):
        status, page, _ = planned("--resume", "never", *flags)
        assert status == 0
        assert "from step" not in page
        assert "this run so far" not in page


def test_gpus_that_are_not_here_are_not_as_fast_as_the_run_on_this_device(planned):
    status, page, _ = planned("--gpus", "4")
    assert (status, "GPUs that are not here" in page, "this run so far" in page) == (0, True, False)


def test_a_finished_run_is_said_to_be_so(images, planned, tmp_path):
    assert run(images, tmp_path / "run", "--epochs", "1") == 0
    status, page, _ = planned("--epochs", "1", out=tmp_path / "run")
    assert status == 0
    assert page.splitlines()[-1].endswith("is finished: the same command shows its results. To start it afresh, give "
                                          "--resume never.")  # fmt: skip
    assert "from step" not in planned("--epochs", "1", "--resume", "never", out=tmp_path / "run")[1]


def test_what_the_run_would_refuse_is_refused(images, stopped, planned, tmp_path):
    status, page, error = planned("--seed", "9")
    assert (status, page) == (2, "")
    assert "holds a run with other settings (seed: 0 -> 9)" in error
    changed = shutil.copytree(images, tmp_path / "changed")
    own = shutil.copytree(stopped, tmp_path / "run")
    config = (own / "config.json").read_text()
    (own / "config.json").write_text(config.replace(str(images), str(changed)))
    (changed / "train" / "ant" / "0.jpg").write_bytes(jpeg(4321))
    status, page, error = planned(out=own, data=changed)
    assert (status, page) == (2, "")
    assert "1 has changed (ant/0.jpg). Put back" in error
    assert planned("--accept-changed-data", out=own, data=changed)[0] == 0
    (own / "config.json").unlink()
    assert "holds checkpoints and no config.json" in planned(out=own)[2]


def test_a_damaged_checkpoint_is_passed_over_and_left_where_it_is(stopped, planned, tmp_path):
    own = shutil.copytree(stopped, tmp_path / "run")
    folder = own / "checkpoints"
    checkpoint.save(folder, checkpoint.read(folder / "last.pt") | {"step": 5}, best=False)
    (folder / "last.pt").write_bytes(b"no checkpoint")
    assert "from step 2 on" in planned(out=own)[1]
    (folder / "previous.pt").write_bytes(b"no checkpoint")
    status, _, error = planned(out=own)
    assert status == 2
    assert "cannot read" in error


def test_the_blocks_of_batchnorm_are_those_that_the_run_began_with(stopped, planned, tmp_path):
    own = shutil.copytree(stopped, tmp_path / "run")
    folder = own / "checkpoints"
    checkpoint.save(folder, checkpoint.read(folder / "last.pt") | {"bn_images": 4}, best=False)
    assert "over 16 images" in planned()[1]
    assert "over 4 images" in planned(out=own)[1]
