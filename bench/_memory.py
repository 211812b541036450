"""Peak extra memory of a loss: over one forward and backward pass in a fresh process, less inputs and gradients.

    CPU   the resident set's high-water mark (VmHWM) over the pass, less the resident set just before it, less
          files (code, mapped as it is first run) that became resident meanwhile; right to about half a MiB
    CUDA  torch.cuda.max_memory_allocated over the pass, less what was allocated just before it

The process first makes its inputs and runs the same pass at 2N = 64 (a compiled loss: at full size), so that thread
stacks, lazily loaded libraries and the GPU libraries' workspaces are there before; freed memory is handed back.
Each process is forked from one that has imported everything and computed nothing: as fresh as a new one, in less time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _contenders import EVERY, Contender
from torch import Tensor

STATUS = Path("/proc/self/status")
OUT_OF_MEMORY = "out of memory"


class Server:
    """The process that forks the others."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> Server:
        env = os.environ | {
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking CUDA itself whether there is a GPU would spoil the forks
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compilers would be forked too
        }
        command = [sys.executable, str(Path(__file__).resolve()), self.device]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, env=env, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def extra_bytes(self, name: str, cases: list[tuple[int, int]], tau: float) -> list[int | str]:
        """For each (2N, D), in one process: bytes, or a sentence that says why there are none.

        Several cases at once are for CUDA, whose allocator can be emptied in between.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, cases, tau]), file=self.process.stdin, flush=True)
        told = json.loads(self.process.stdout.readline())
        return told + [f"{OUT_OF_MEMORY}: the process was killed"] * (len(cases) - len(told))


def inputs(n: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    """Two views, [n / 2, D], whose pairs have a cosine of about 0.7."""
    generator = torch.Generator().manual_seed(n + D)
    z1 = torch.randn(n // 2, D, generator=generator)
    z2 = z1 + torch.randn(n // 2, D, generator=generator)
    return z1.to(device).requires_grad_(), z2.to(device).requires_grad_()


def failure(error: Exception) -> str:
    """What an exception means for a contender, in one line."""
    told = re.sub(r"(?:/[\w.+-]+)+/", "", str(error).strip()) or type(error).__name__  # folders of this machine
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in told:
        return OUT_OF_MEMORY
    return f"failed: {type(error).__name__}: {told.splitlines()[0]}"[:200]


def _measure(contender: Contender, n: int, D: int, tau: float, device: str) -> int | str:
    def step(rows: int) -> Callable[[], tuple[Tensor, ...]]:
        views = inputs(rows, D, device)
        return lambda: torch.autograd.grad(loss(*views), views)

    if device == "cpu" and not STATUS.exists():
        return "no /proc here"
    try:
        loss = contender.build(tau)
        with contender.context():
            step(n if contender.compiles else 64)()
            run = step(n)
            peak, gradients = (_peak_cpu if device == "cpu" else _peak_cuda)(run)
        return peak - sum(g.nbytes for g in gradients)
    except Exception as error:
        return failure(error)


def _peak_cpu(run: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    except OSError:
        pass  # then the mark also covers the warm-up at 2N = 64: an upper bound
    before = _status()
    gradients = run()
    after = _status()
    return after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"]), gradients


def _status() -> dict[str, int]:
    return {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", STATUS.read_text(), re.M)}


def _peak_cuda(run: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, gradients


def _serve(device: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    for contender in EVERY if device == "cpu" else ():
        contender.missing(0.1, device)  # imports its package; some may look for a GPU then, which no fork survives
    for line in sys.stdin:
        name, cases, tau = json.loads(line)
        contender = next(c for c in EVERY if c.name == name)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            for n, D in cases:
                os.write(write, json.dumps(_measure(contender, n, D, tau, device)).encode() + b"\n")
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            told = [json.loads(line) for line in pipe]
        os.waitpid(child, 0)
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
