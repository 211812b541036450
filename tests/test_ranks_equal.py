"""R processes learn what one does: the trainer's own step on a whole ResNet, over real Gloo processes.

float64 to 1e-10 of every tensor's update (weights, temperature, BatchNorm's statistics), for whole batches, chunks and
BatchNorm blocks; fp32 and bf16 as near to float64 as one process is.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_fast.training import equality

ROOT = Path(__file__).resolve().parents[1]


def shown(ranks, *flags, expected=0):
    code = (
        "import sys; from simclr_fast.launch import launch; "
        f"sys.exit(launch('simclr_fast.training.equality', {list(flags)!r}, {ranks}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ()),
        (3, ("--accumulate", "2", "--bn-images", "3")),  # blocks within a rank's chunk
        (4, ("--accumulate", "3", "--bn-images", "8")),  # blocks that two ranks share
    ],
)
def test_updates_are_those_of_one_process_in_float64(ranks, flags):
    out = shown(ranks, "--precisions", "fp64", *flags)
    assert float(re.search(r"differ by (\S+),", out)[1]) < 1e-10


def test_in_lower_precision_they_come_as_near_to_float64_as_one_process():
    assert shown(2, "--precisions", "fp32", "bf16").count("ok ") == 2


def test_a_rank_that_ignores_the_others_is_found():
    """Negatives, BatchNorm and gradients of its own rows alone, as other projects had them."""
    device = torch.device("cpu")
    own, alone = (equality.updates("fp64", device, 0, 1, None, batch) for batch in (2, 4))
    good, text = equality.judged("fp64", own, alone, alone)
    assert not good
    assert "bound 1e-10" in text
    assert equality.judged("fp64", alone, alone, alone)[0]


def test_a_tensor_that_does_not_move_or_is_not_finite_is_found():
    b = {"w": torch.ones(2)}
    assert equality.difference({"w": torch.tensor([1.0, torch.nan])}, b) == torch.inf
    assert equality.difference({"w": torch.ones(2)}, {"w": torch.zeros(2)}) == torch.inf
    assert equality.difference({"w": torch.tensor([1.0, 1.0])}, b) == 0


def test_bad_processes_are_reported_by_the_status(monkeypatch, capsys):
    monkeypatch.setattr(equality, "EXACT", -1.0)
    assert equality.main(["--precisions", "fp64"]) == 2
    assert "BROKEN" in capsys.readouterr().out
