"""What a Triton kernel takes of a GPU, compiled for a chip that need not be there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no compiler; read when the kernels are imported

import torch
import triton
from _harness import append
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a block may have (CUDA C++ programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def resources(
    kernel: Any,
    types: Mapping[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    arch: int,
    aligned: Collection[str] = (),
) -> dict[str, Any]:
    """Registers a thread, bytes of stack, local and shared memory a block, and the matrix instructions.

    Args:
        types: of arguments that are neither pointers to float32, named `..._ptr`, nor int32.
        aligned: arguments beside the pointers that are multiples of 16.
    """
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= {name: kind for name, kind in types.items() if name in signature} | dict.fromkeys(
        constants, "constexpr"
    )
    divisible = [k for k, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in aligned]
    source = ASTSource(kernel, signature, constants, {(k,): [["tt.divisibility", 16]] for k in divisible})
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


def write(name: str, line: dict[str, Any], path: Path | None) -> None:
    """Add a line to `path` as it is, or with date and versions to `NAME.jsonl` of the results."""
    if path is None:
        append(name, line)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def shown(name: str, line: dict[str, Any]) -> str:
    """A row for people: the name and what it takes."""
    used = f"{line['registers']:3d} registers {line['stack']:4d} stack {line['shared']:7d} shared "
    return " ".join([name, used, *line["instructions"]])
