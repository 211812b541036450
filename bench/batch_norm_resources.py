"""What the kernels of batch normalisation take of a GPU, compiled for A100, RTX 4090, H100 and B200 without one.

    python bench/batch_norm_resources.py [--arch 80 89 90 100] [--quick] [--json FILE]

Registers a thread, bytes of stack, of local memory and of shared memory a block are read from the binary. --quick
leaves out what does less than another variant. Without --json the lines go to results/batch_norm_resources.jsonl.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from pathlib import Path

import torch
from _resources import POINTERS, SHARED, resources, shown, write

from simclr_fast.kernels import batch_norm

ACTIVATIONS = ("x_ptr", "y_ptr", "residual_ptr", "dy_ptr", "g_ptr", "dx_ptr")
SPLITS = (16, batch_norm.MAX_SPLITS)


def kernels(C: int, quick: bool):
    """Kernel, its constants and options, for all that is launched for C channels."""
    flags = (True,) if quick else (False, True)
    reducing, elementwise = batch_norm.REDUCING, batch_norm.ELEMENTWISE
    tile = batch_norm.block_sizes("statistics", C)
    yield batch_norm.statistics_kernel, tile, reducing
    for splits in SPLITS:
        yield batch_norm.merge_kernel, batch_norm.merge_constants(splits, tile["BLOCK_M"]), elementwise
    for bias, relu in product(flags, flags):
        of_gradient = {"HAS_BIAS": bias, "RELU": relu}
        yield batch_norm.gradient_kernel, batch_norm.block_sizes("elementwise", C) | of_gradient, elementwise
        for residual in (False, True):
            constants = of_gradient | {"RESIDUAL": residual}
            if relu or not residual:
                yield batch_norm.sums_kernel, batch_norm.block_sizes("sums", C) | constants, reducing
            if residual or not quick:
                yield batch_norm.normalise_kernel, batch_norm.block_sizes("elementwise", C) | constants, elementwise


def compiled(job: tuple[int, int, torch.dtype, bool]) -> list[dict]:
    """A line of the results for each kernel of a chip, number of channels and type."""
    (arch, C, dtype, quick), lines = job, []
    for kernel, constants, options in kernels(C, quick):
        types = {"eps": "fp32", "inverse": "fp32", **dict.fromkeys(ACTIVATIONS, POINTERS[dtype])}
        usage = resources(kernel, types, constants, dict(options), arch, ("C",))
        line = {"arch": f"sm_{arch}", "kernel": kernel.__name__, "channels": C, "dtype": str(dtype).split(".")[1]}
        lines.append(line | {"constants": constants, "options": options} | usage)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--quick", action="store_true", help="bf16 and fp32, 256 channels, the variants that do most")
    parser.add_argument("--json", type=Path, help="append the lines to FILE")
    args = parser.parse_args()
    dtypes, channels = list(POINTERS), [64, 256]
    if args.quick:
        dtypes, channels = [torch.bfloat16, torch.float32], [256]
    with ProcessPoolExecutor() as pool:
        for line in chain.from_iterable(pool.map(compiled, product(args.arch, channels, dtypes, [args.quick]))):
            write("batch_norm_resources", line, args.json)
            flags = " ".join(name.lower() for name, value in line["constants"].items() if value is True)
            name = f"{line['arch']:6s} {line['kernel']:18s} {line['channels']:4d} {line['dtype']:8s} {flags:24s}"
            print(shown(name, line), flush=True)


if __name__ == "__main__":
    main()
