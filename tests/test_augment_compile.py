"""The kernels of augment, compiled for A100, RTX 4090, H100 and B200 without one: no spills, it fits, on tensor cores.

bench/augment_resources.py does it, with the launcher's own constants, in processes where Triton does not interpret.
"""

import pytest

from tests.compiled_common import CHIPS, STACK, compiled

KERNELS = {"mean_kernel", "view_kernel"}


def check(arch: int, usage: dict) -> None:
    shared, instructions = CHIPS[arch]
    assert usage["local"] == 0, usage
    assert usage["stack"] <= STACK, usage
    assert 0 <= usage["shared"] <= shared, usage
    assert 0 < usage["registers"] <= 255, usage
    assert usage["registers"] * 32 * usage["warps"] <= 65536, usage
    blurred = usage["halo"] > 0
    assert bool(usage["instructions"]) == blurred, usage
    assert set(usage["instructions"]) <= instructions, usage


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What bench/augment_resources.py finds for each chip."""
    lines = compiled("augment_resources.py", tmp_path_factory.mktemp("compiled"), "--quick")
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
    more = {"stack": STACK + 8}, {"local": 8}, {"shared": 200 * 1024}, {"registers": 256}, {"halo": 8}, {"warps": 33}
    for wrong in more:
        with pytest.raises(AssertionError):
            check(80, usage | wrong)
