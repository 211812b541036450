import pytest

from simclr_fast import doctor


def test_all_that_is_here_works(capsys):
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    for name in doctor.CHECKS:
        assert name in shown
    assert "relative error" in shown


def test_something_broken_is_named_and_gives_status_1(monkeypatch, capsys):
    def fails():
        raise OSError("no such library")

    monkeypatch.setitem(doctor.CHECKS, "LARS", fails)
    assert doctor.main([]) == 1
    assert "BROKEN  LARS              OSError: no such library" in capsys.readouterr().out


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_an_error_over_its_bound_is_broken(error):
    assert doctor._judged(error, 1e-6, "x").state == doctor.BROKEN


def test_wrong_numbers_are_seen(monkeypatch):
    from simclr_fast.optim import lars

    right = lars.LARS.step
    monkeypatch.setattr(lars.LARS, "step", lambda self: (right(self), right(self)))
    assert doctor.lars_step().state == doctor.BROKEN


@pytest.mark.parametrize("flags", [["--ranks", "0"], ["--ranks", "-3"], ["--gpus", "-1"]])
def test_no_processes_are_no_comparison(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(flags)
    assert "gpus must be 0 or more and ranks at least 1, got gpus=" in capsys.readouterr().err
