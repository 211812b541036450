"""Every Triton kernel, compiled for A100, RTX 4090, H100 and B200 without one: no spills, it fits, on tensor cores.

bench/loss_resources.py does it, from the launcher's own table, in processes where Triton does not interpret.
"""

import pytest

from simclr_fast.kernels import nt_xent
from tests.compiled_common import CHIPS, STACK, compiled

MATRIX = {"statistics_kernel", "spread_kernel", "gradient_kernel", "weights_kernel"}


def check(arch: int, usage: dict) -> None:
    shared, instructions = CHIPS[arch]
    assert usage["local"] == 0, usage
    assert usage["stack"] <= STACK, usage
    assert 0 <= usage["shared"] <= shared, usage
    assert 0 < usage["registers"] <= 255, usage
    expected = usage["kernel"] in MATRIX and usage["precision"] != "fp32"
    assert bool(instructions & set(usage["instructions"])) == expected, usage
    # Half-precision tiles that are 64 rows high get Hopper's own instruction, at twice the rate of the older one.
    if arch == 90 and expected and usage["precision"] in ("fp16", "bf16"):
        assert usage["instructions"] == ["wgmma"], usage


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """What bench/loss_resources.py finds for each chip."""
    lines = compiled("loss_resources.py", tmp_path_factory.mktemp("compiled"))
    return {arch: [line for line in lines if line["arch"] == f"sm_{arch}"] for arch in CHIPS}


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
def test_no_spills(found, arch):
    for usage in found[arch]:
        check(arch, usage)
    launched = {(use["width"], use["precision"]) for use in found[arch] if use["kernel"] == "statistics_kernel"}
    if arch == 89:  # else like sm_80, where they must then fit as well
        assert launched == set(nt_xent.LOW_SHARED)
        for usage in found[80]:
            low = (usage["width"], usage["precision"]) in nt_xent.LOW_SHARED
            assert low or usage["shared"] <= CHIPS[89][0], usage
        return
    assert launched == set(nt_xent.LAUNCH)
    assert {use["kernel"] for use in found[arch]} == MATRIX | {"normalise_kernel", "project_kernel", "merge_kernel"}
