"""What the loss's kernels take of a GPU, compiled for A100, RTX 4090, H100 and B200 without one.

    python bench/loss_resources.py [--arch 80 89 90 100] [--precision fp16 ...] [--json FILE]

Every entry of the launch table is compiled; registers a thread, bytes of stack, of local memory and of shared memory a
block, and the matrix instructions are read from the binary. Without --json they go to results/loss_resources.jsonl.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from pathlib import Path

from _resources import POINTERS, SHARED, resources, shown, write

from simclr_fast.kernels import contrast, nt_xent, unit_rows

OPERANDS = ("x_ptr", "y_ptr", "w_ptr", "u_ptr")
ALIGNED = ("width", "stride")


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


def compiled(job: tuple[int, str]) -> list[dict]:
    """A line of the results for each kernel of a chip and precision."""
    (arch, precision), lines = job, []
    for kernel, key, launch, constants, options in kernels(precision, arch):
        types = {"eps": "fp32", **dict.fromkeys(OPERANDS, POINTERS[nt_xent.DTYPES[precision]])}
        usage = resources(kernel, types, constants, options, arch, ALIGNED)
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
            write("loss_resources", line, args.json)
            shape = " ".join(f"{value:4d}" for value in line["launch"].values()) if line["launch"] else " " * 24
            name = f"{line['arch']:6s} {line['kernel']:18s} {line['width']:5d} {line['precision']}  {shape} "
            print(shown(name, line), flush=True)


if __name__ == "__main__":
    main()
