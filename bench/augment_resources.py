"""What the kernels of `simclr_fast.data.augment` take of a GPU, compiled for A100, RTX 4090, H100 and B200 without one.

    python bench/augment_resources.py [--arch 80 89 90 100] [--quick] [--json FILE]

Both kernels, with crop and without, in both dialects; the one that makes the views also without blur and with 17 taps,
and for views of each dtype. Registers a thread, bytes of stack, of local memory and of shared memory a block, and the
matrix instructions are read from the binary. Without --json they go to results/augment_resources.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from _resources import POINTERS, SHARED, resources, shown, write

from simclr_fast.kernels import augment

SIDE = 224
HALOS = (0, 8)
LOOKS = tuple(product((False, True), repeat=2))  # crop, tf


class Build(NamedTuple):
    """One of the programs that the launcher can start."""

    kernel: str
    crop: bool
    tf: bool
    halo: int = 0
    dtype: torch.dtype = torch.float32


def builds(quick: bool) -> Iterator[Build]:
    """All of them; or the plainest and the one that does most, in what the dtypes differ."""
    dtypes = (torch.bfloat16, torch.float32) if quick else tuple(POINTERS)
    for crop, tf in ((False, False), (True, True)) if quick else LOOKS:
        yield Build("mean_kernel", crop, tf)
        for halo, dtype in product(HALOS, dtypes):
            if halo or not quick or dtype == torch.bfloat16:
                yield Build("view_kernel", crop, tf, halo, dtype)


def compiled(job: tuple[int, Build]) -> dict[str, Any]:
    """A line of the results."""
    arch, build = job
    kernel, crop, tf, halo, dtype = build
    types = {"image_ptr": "*u8", "index_ptr": "*i64", "out_ptr": POINTERS[dtype]}
    if kernel == "mean_kernel":
        constants, warps = augment.mean_constants(crop, tf), 8
    else:
        chunks = triton.cdiv(SIDE * SIDE, augment.CHUNK)
        constants, warps = augment.view_constants(crop, tf, halo, dtype, chunks), augment.warps(dtype, halo)
    usage = resources(getattr(augment, kernel), types, constants, {"num_warps": warps}, arch)
    about = {"arch": f"sm_{arch}", **build._asdict(), "dtype": str(dtype).removeprefix("torch."), "warps": warps}
    return about | usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--quick", action="store_true", help="a third of them, among these the largest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the lines to FILE")
    args = parser.parse_args()
    jobs = product(args.arch, builds(args.quick))
    with ProcessPoolExecutor() as pool:
        for line in pool.map(compiled, jobs):
            write("augment_resources", line, args.json)
            look = f"{'crop' if line['crop'] else '':4s} {'tf' if line['tf'] else '':2s} halo {line['halo']}"
            print(shown(f"{line['arch']:6s} {line['kernel']:11s} {look} {line['dtype']:8s}", line), flush=True)


if __name__ == "__main__":
    main()
