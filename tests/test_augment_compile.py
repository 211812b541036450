"""The kernels of augment, compiled for A100, RTX 4090, H100 and B200 without one: no spills, it fits, on tensor cores.

bench/augment_resources.py does it, with the launcher's own constants, in processes where Triton does not interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Shared memory that one block may have, in bytes, and the matrix instructions of which one is to be expected.
CHIPS = {
    80: (163 * 1024, {"mma.sync"}),
    89: (99 * 1024, {"mma.sync"}),
    90: (227 * 1024, {"wgmma", "mma.sync"}),
    100: (227 * 1024, {"tcgen05.mma", "mma.sync"}),
}
KERNELS = {"mean_kernel", "view_kernel"}


def check(arch: int, usage: dict) -> None:
    shared, instructions = CHIPS[arch]
    assert usage["stack"] == usage["local"] == 0, usage
    assert 0 <= usage["shared"] <= shared, usage
    assert 0 < usage["registers"] <= 255, usage
    assert usage["registers"] * 32 * usage["warps"] <= 65536, usage
    blurred = usage["halo"] > 0
    assert bool(usage["instructions"]) == blurred, usage
    assert set(usage["instructions"]) <= instructions, usage


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What bench/augment_resources.py finds for each chip."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    script = [sys.executable, ROOT / "bench" / "augment_resources.py", "--quick", "--json", folder / "lines"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "lines").read_text().splitlines()]
    return {arch: [line for line in lines if line["arch"] == f"sm_{arch}"] for arch in CHIPS}


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
def test_no_spills(found: dict[int, list[dict]], arch: int) -> None:
    for usage in found[arch]:
        check(arch, usage)
    assert {usage["kernel"] for usage in found[arch]} == KERNELS
    views = [usage for usage in found[arch] if usage["kernel"] == "view_kernel"]
    for look in ((False, False), (True, True)):
        of_look = [usage for usage in views if (usage["crop"], usage["tf"]) == look]
        assert {(usage["halo"], usage["dtype"]) for usage in of_look} == {
            (0, "bfloat16"),
            (8, "bfloat16"),
            (8, "float32"),
        }


def test_a_spill_is_found() -> None:
    usage = {"stack": 0, "local": 0, "shared": 0, "registers": 64, "warps": 8, "halo": 0, "instructions": []}
    check(80, usage)
    for wrong in ({"stack": 8}, {"local": 8}, {"shared": 200 * 1024}, {"registers": 256}, {"halo": 8}, {"warps": 33}):
        with pytest.raises(AssertionError):
            check(80, usage | wrong)
