"""The kernels of batch normalisation, compiled for A100, H100 and B200 without one: no spills, as many as meant to fit.

bench/batch_norm_resources.py does it, with the launcher's own constants, in processes where Triton does not interpret.
"""

from pathlib import Path

import pytest

from tests.compiled_common import compiled

ARCHS = (80, 90, 100)
REGISTERS, SHARED = 65536, 163 * 1024  # of a multiprocessor; bytes on the smallest of the three
PROGRAMS = {"statistics_kernel": 4, "sums_kernel": 4, "merge_kernel": 1, "normalise_kernel": 3, "gradient_kernel": 3}


def check(usage: dict) -> None:
    assert usage["stack"] == usage["local"] == 0, usage
    threads = PROGRAMS[usage["kernel"]] * usage["options"]["num_warps"] * 32
    assert 0 < usage["registers"] * threads <= REGISTERS, usage
    assert 0 <= usage["shared"] * PROGRAMS[usage["kernel"]] <= SHARED, usage


@pytest.mark.slow
def test_no_spills(tmp_path: Path) -> None:
    lines = compiled("batch_norm_resources.py", tmp_path, "--quick", "--arch", *ARCHS)
    for usage in lines:
        check(usage)
    for arch in ARCHS:
        assert {usage["kernel"] for usage in lines if usage["arch"] == f"sm_{arch}"} == PROGRAMS.keys()


def test_a_spill_is_found() -> None:
    usage = {"stack": 0, "local": 0, "shared": 0, "registers": 64, "options": {"num_warps": 8}}
    usage |= {"kernel": "sums_kernel"}
    check(usage)
    for wrong in ({"stack": 8}, {"local": 8}, {"shared": 200 * 1024}, {"registers": 65}, {"registers": 0}):
        with pytest.raises(AssertionError):
            check(usage | wrong)
