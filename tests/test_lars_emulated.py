"""The CUDA kernels of LARS, run thread by thread on the CPU: they step as the CPU kernels do."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from build_backend import TORCH_MIN, torch_include

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")


@pytest.mark.skipif(not shutil.which(CXX), reason="needs a C++ compiler")
def test_cuda_kernels_step_as_the_cpu_kernels(tmp_path: Path) -> None:
    """Random models, dtypes, alignments and rules; all threads of a block wait together, no access is misaligned."""
    source = (ROOT / "csrc" / "lars.cu").read_text()
    launch = re.compile(r"([\w:]+(?:<[^<>;]*>)?)<<<([^;]*?), ([^;]*?), 0, stream>>>\(")
    source, launches = launch.subn(r"emulated::launch(\1, \2, \3, ", source)
    assert launches == 3
    (tmp_path / "lars.cu").write_text(source)
    macros = ["-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000ULL".format(*TORCH_MIN)]
    flags = ["-std=c++20", "-O1", "-g", "-fopenmp-simd", "-Wno-psabi", *macros]
    sanitizers = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    folders = [tmp_path, ROOT / "tests" / "emulated_cuda", ROOT / "csrc", torch_include()]
    libraries = Path(str(torch_include())).parent / "lib"
    program = tmp_path / "program"
    command = [CXX, *flags, *sanitizers, *(f"-I{folder}" for folder in folders), "-o", program]
    command += [ROOT / "tests" / "emulated_cuda" / "main.cpp", ROOT / "csrc" / "lars_cpu.cpp"]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
