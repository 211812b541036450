"""Triton kernels compiled for GPUs that are not here, by a script of bench/, where Triton does not interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).parents[1]
# Shared memory that one block may have, in bytes, and the matrix instructions of which one is to be expected.
CHIPS = {
    80: (163 * 1024, {"mma.sync"}),
    89: (99 * 1024, {"mma.sync"}),
    90: (227 * 1024, {"wgmma", "mma.sync"}),
    100: (227 * 1024, {"tcgen05.mma", "mma.sync"}),
}
# Bytes of stack a thread: none with the Triton that the figures are of; the compilers of older ones spill a little.
STACK = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64


def compiled(script: str, folder: Path, *flags: object) -> list[dict]:
    """What a script of bench/ finds, a line for each kernel that it compiles; in a folder of the test's own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, ROOT / "bench" / script, "--json", folder / "lines", *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "lines").read_text().splitlines()]
