"""Every Triton kernel, compiled for A100, RTX 4090, H100 and B200 without one: no spills, it fits, on tensor cores.

bench/loss_resources.py does it, from the launcher's own table, in processes where Triton does not interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_fast.kernels import nt_xent

ROOT = Path(__file__).parents[1]
# Shared memory that one block may have, in bytes, and the matrix instructions to expect.
CHIPS = {
    80: (163 * 1024, {"mma.sync"}),
    89: (99 * 1024, {"mma.sync"}),
    90: (227 * 1024, {"wgmma", "mma.sync"}),
    100: (227 * 1024, {"tcgen05.mma", "mma.sync"}),
}
MATRIX = {"statistics_kernel", "spread_kernel", "gradient_kernel", "weights_kernel"}


def check(arch: int, usage: dict) -> None:
    shared, instructions = CHIPS[arch]
    assert usage["stack"] == usage["local"] == 0, usage
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
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    script = [sys.executable, ROOT / "bench" / "loss_resources.py", "--json", folder / "lines"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "lines").read_text().splitlines()]
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
