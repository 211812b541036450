"""Every Triton kernel, compiled for A100, H100 and B200 without a GPU: no spills, and it fits.

The launch table is that of the launcher itself. Run as a script, with a chip and precisions as its arguments, this
file compiles and prints one JSON object a kernel; the tests do so in processes where Triton does not interpret.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Shared memory that one block may have, in bytes, and the tensor-core instruction to expect in the PTX.
CHIPS = {80: (163 * 1024, "mma.sync"), 90: (227 * 1024, "mma"), 100: (227 * 1024, "mma")}


def main(arch: int, precisions: list[str]) -> None:
    from simclr_fast.kernels import nt_xent

    for (width, precision), launches in nt_xent.LAUNCH.items():
        if precision in precisions:
            for kernel, launch in zip((nt_xent.statistics_kernel, nt_xent.gradient_kernel), launches, strict=True):
                constants, options = nt_xent.constants(launch, width, precision), nt_xent.options(launch)
                z_type = {"fp16": "*fp16", "bf16": "*bf16"}.get(precision, "*fp32")
                usage = compiled(kernel, z_type, constants, options, arch)
                usage |= {"kernel": kernel.__name__, "width": width, "precision": precision, "launch": launch}
                print(json.dumps(usage), flush=True)


def compiled(kernel, z_type: str, constants: dict, options: dict, arch: int) -> dict:
    """Registers a thread, bytes of stack and of shared memory a block, and the matrix instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= {"z_ptr": z_type} | dict.fromkeys(constants, "constexpr")
    aligned = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    instructions = sorted(set(re.findall(r"wgmma|tcgen05\.mma|mma\.sync", binary.asm["ptx"])))
    return usage | {"SHARED": binary.metadata.shared, "instructions": instructions}


def compile_all(folder: Path, precisions: list[str]) -> dict[int, list[dict]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])}
    running = {
        arch: subprocess.Popen(
            [sys.executable, __file__, str(arch), *precisions],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for arch in CHIPS
    }  # fmt: skip
    found = {}
    for arch, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        found[arch] = [json.loads(line) for line in out.splitlines()]
    return found


PRECISIONS = ["fp16", "bf16", "tf32", "fp32"]


def check(found: dict[int, list[dict]], precisions: list[str]) -> None:
    from simclr_fast.kernels import nt_xent

    for arch, usages in found.items():
        shared, instruction = CHIPS[arch]
        assert len(usages) == 2 * sum(precision in precisions for _, precision in nt_xent.LAUNCH)
        for usage in usages:
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, usage)
            assert 0 < usage["SHARED"] <= shared, (arch, usage)
            assert 0 < usage["REG"] <= 255, (arch, usage)
            expected = usage["precision"] != "fp32"
            assert any(instruction in found for found in usage["instructions"]) == expected, (arch, usage)


@pytest.mark.slow
def test_no_spills(tmp_path):
    check(compile_all(tmp_path, PRECISIONS), PRECISIONS)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
