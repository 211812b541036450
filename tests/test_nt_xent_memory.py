"""The native losses hold blocks, never the matrix: what they allocate, and what a fresh process takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Largest(TorchDispatchMode):
    """The largest tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


# A process that runs a small loss first, so that all libraries are in place, then measures one of 2N = {rows}.
MEASURE = """
import sys, torch
from simclr_fast.losses import info_nce, nt_xent

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def step(n, which):
    z1, z2 = torch.randn(2, n, 128).unbind()
    z1, z2, tau = z1.clone().requires_grad_(), z2.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
    before = resident("VmRSS")
    loss = nt_xent(z1, z2, tau) if which == "nt_xent" else info_nce(z1, z2, tau, symmetric=True)
    loss.backward()
    return resident("VmHWM") - before - 2 * z1.grad.nbytes

torch.set_num_threads(int(sys.argv[3]))
step(64, sys.argv[2])
print(step(int(sys.argv[1]) // 2, sys.argv[2]))
"""


def extra_bytes(total, which, threads):
    """Peak over forward and backward in a fresh process, less inputs and returned gradients."""
    command = [sys.executable, "-c", MEASURE, str(total), which, str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("which", ["nt_xent", "info_nce"])
@pytest.mark.parametrize("total", [8192, pytest.param(65536, marks=pytest.mark.slow)])
def test_memory_of_a_fresh_process(total, which):
    """2N = 8,192 rows make a matrix of 256 MiB, 65,536 one of 16 GiB."""
    assert extra_bytes(total, which, torch.get_num_threads()) < 64 * MIB + 8 * total * 128
