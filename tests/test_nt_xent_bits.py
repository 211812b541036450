"""The same call gives the same bits: again, in a new process, under deterministic algorithms."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.losses_common import EVERY, OURS, few, pairs, rows, run, run_info_nce

ROOT = Path(__file__).resolve().parents[1]


def results(backend):
    z1, z2 = pairs(9, 33)
    yield from run(z1, z2, 0.1, backend)
    yield from run(z1, z2, 0.1, backend, reduction="none", upstream=torch.linspace(-1, 2, 18))
    yield from run_info_nce(z1, z2, 0.1, backend, negatives=rows(7, 33), symmetric=True)


def digest(backend):
    found = hashlib.sha256()
    for x in results(backend):
        found.update(x.contiguous().view(torch.uint8).numpy().tobytes() if x.ndim else repr(x.item()).encode())
    return found.hexdigest()


@EVERY
def test_twenty_times(backend):
    z1, z2 = pairs(9, 33)
    once = run(z1, z2, 0.1, backend)
    for _ in range(few(4, 19) if backend == "triton" else 19):
        noise = torch.randn(1000)  # memory is handed out anew
        assert all(torch.equal(a, b) for a, b in zip(once, run(z1, z2, 0.1, backend), strict=True))
        del noise


@OURS
def test_large_enough_for_several_blocks(backend):
    n = 1500 if backend == "native" else few(66, 5000)
    z1, z2 = pairs(n, 33)
    once = run(z1, z2, 0.1, backend)
    assert all(torch.equal(a, b) for a, b in zip(once, run(z1, z2, 0.1, backend), strict=True))


@EVERY
def test_deterministic_algorithms(backend):
    wanted = digest(backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert digest(backend) == wanted
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def elsewhere():
    """Digests of every backend from a process of its own, with as many threads."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from tests.test_nt_xent_bits import digest\n"
        "for backend in ('reference', 'native', 'triton'): print(digest(backend))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return dict(zip(("reference", "native", "triton"), done.stdout.split(), strict=True))


@EVERY
def test_in_a_new_process(backend, elsewhere):
    assert digest(backend) == elsewhere[backend]
