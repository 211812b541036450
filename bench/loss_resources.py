"""What the loss's kernels take of a GPU, compiled for A100, RTX 4090, H100 and B200 without one.

    python bench/loss_resources.py [--arch 80 89 90 100] [--precision fp16 ...] [--json FILE]

Every entry of the launch table is compiled; registers a thread, bytes of stack, of local memory and of shared memory a
block, and the matrix instructions are read from the binary. Without --json they go to results/loss_resources.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no compiler

import torch
import triton
from _harness import append
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simclr_fast.kernels import contrast, nt_xent, unit_rows

# Bytes of shared memory that a block may have (CUDA C++ programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def kernels(precision: str, arch: int):
    """Kernel, its launch, its constants and options, for all that the launcher can start in a precision."""
    low = SHARED[arch] < nt_xent.SHARED  # differs from sm_80 in these entries alone
    for key in [key for key in nt_xent.BLOCK_D if not low or (key, precision) in nt_xent.LOW_SHARED]:
        wide, (first, second) = key == nt_xent.WIDE, nt_xent.launches(key, precision, SHARED[arch])
        last = contrast.weights_kernel if wide else contrast.gradient_kernel
        for kernel, launch, flags in (
            (contrast.statistics_kernel, first, {"WIDE": wide}),
            (contrast.spread_kernel, first, {"WIDE": wide}),
            (last, second, {"SLOPE": False}),
            (last, second, {"SLOPE": True}),
        ):
            constants = nt_xent.constants(launch, key, precision) | flags
            yield kernel, key, launch, constants, nt_xent.options(launch, arch)
    if low:
        return
    for D in (64, 128, 256, 1024):
        for kernel in (unit_rows.normalise_kernel, unit_rows.project_kernel):
            yield kernel, D, None, unit_rows.block_sizes(D), {}
    for paired in (True, False):
        yield contrast.merge_kernel, 0, None, {"PAIRED": paired, "BLOCK_I": 256}, {}


def resources(kernel, operand: str, constants: dict, options: dict, arch: int) -> dict:
    """Registers a thread, bytes of stack, local and shared memory a block, and the matrix instructions."""
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= {name: operand for name in ("x_ptr", "y_ptr", "w_ptr", "u_ptr") if name in types}
    types |= {"eps": "fp32"} if "eps" in types else {}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [k for k, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name in ("width", "stride")]
    source = ASTSource(kernel, types, constants, {(k,): [["tt.divisibility", 16]] for k in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    instructions = sorted(set(re.findall(r"wgmma|tcgen05\.mma|mma\.sync", binary.asm["ptx"])))
    return {
        "registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"],
        "shared": binary.metadata.shared, "instructions": instructions,
    }  # fmt: skip


def compiled(job: tuple[int, str]) -> list[dict]:
    """A line of the results for each kernel of a chip and precision."""
    (arch, precision), lines = job, []
    for kernel, key, launch, constants, options in kernels(precision, arch):
        usage = resources(kernel, POINTERS[nt_xent.DTYPES[precision]], constants, options, arch)
        line = {"arch": f"sm_{arch}", "kernel": kernel.__name__, "width": key, "precision": precision}
        lines.append(line | {"launch": launch and launch._asdict(), "slope": bool(constants.get("SLOPE")), **usage})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--precision", nargs="+", choices=list(nt_xent.DTYPES), default=list(nt_xent.DTYPES))
    parser.add_argument("--json", type=Path, help="append the lines to FILE")
    args = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        for line in chain.from_iterable(pool.map(compiled, product(args.arch, args.precision))):
            if args.json:
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            else:
                append("loss_resources", line)
            shape = " ".join(f"{value:4d}" for value in line["launch"].values()) if line["launch"] else " " * 24
            name = f"{line['arch']:6s} {line['kernel']:18s} {line['width']:5d} {line['precision']}  {shape} "
            used = f"{line['registers']:3d} registers {line['stack']:4d} stack {line['shared']:7d} shared "
            print(name, used, *line["instructions"], flush=True)


if __name__ == "__main__":
    main()
