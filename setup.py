"""Package metadata, and the optional C++/CUDA extension `simclr_fast._C` on torch's stable ABI.

The extension needs g++ and torch's headers; its CUDA half needs nvcc. What is missing or fails is left out,
with one line that says so: without nvcc the extension is for the CPU, without g++ the package is pure Python.

Environment: CXX and NVCC name the compilers; SIMCLR_FAST_CUDA=0 leaves CUDA out, =1 makes its absence an
error; TORCH_CUDA_ARCH_LIST ("8.0;9.0") names the GPU architectures.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there by itself when setup.py is run without its own backend

from build_backend import CXX, TORCH_MIN, torch_include  # noqa: E402

NVCC = os.environ.get("NVCC", "nvcc")
CUDA = os.environ.get("SIMCLR_FAST_CUDA", "auto")
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0")
FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000ULL".format(*TORCH_MIN)]
TIMM, SKLEARN = "timm>=1.0.26", "scikit-learn>=1.9"
EXPORT = [TIMM, "safetensors>=0.8", "onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"]
DALI_WHEELS = "platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'"


class Missing(Exception):
    """A tool or a header that the extension, or its CUDA half, cannot be built without."""


def run(*command: object) -> str:
    """Run a compiler and return what it printed; if it fails, its last line becomes the error."""
    try:
        done = subprocess.run([str(c) for c in command], stdout=-1, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Missing(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        print(done.stdout)
        raise Missing(f"{command[0]} failed: {(done.stdout.strip().splitlines() or ['it said nothing'])[-1]}")
    return done.stdout


def cuda_toolkit() -> tuple[list[str], list[str]]:
    """Flags to compile and to link with, from nvcc itself: the one on PATH may be a wrapper."""
    if CUDA == "0":
        raise Missing("SIMCLR_FAST_CUDA=0")
    told = dict(re.findall(r"^#\$ (TOP|LIBRARIES)=(.*)$", run(NVCC, "--dryrun", "none.cu"), re.M))
    known = {int(code) for code in re.findall(r"sm_(\d+)\b", run(NVCC, "--list-gpu-code"))}
    archs = sorted(known & {int(arch.replace(".", "")) for arch in re.findall(r"\d+\.\d", ARCHS)})
    if not archs or "TOP" not in told:
        raise Missing(f"{NVCC} names no toolkit, or compiles for none of {ARCHS}")
    print(f"simclr_fast: CUDA toolkit {told['TOP']}, architectures {archs}")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX, for GPUs to come
    return codes, [*shlex.split(told.get("LIBRARIES", "")), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]


class BuildExt(build_ext):
    """Compile csrc/ with plain g++ and nvcc commands; leave the extension out where that cannot be done."""

    def build_extensions(self) -> None:
        target = Path(self.get_ext_fullpath("simclr_fast._C"))
        target.unlink(missing_ok=True)  # of an earlier build, perhaps with other tools
        for folder in (target.parent, Path(self.build_temp)):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            host = self.compile_host()
            try:
                cuda, libraries = self.compile_cuda()
                self.link(target, *host, cuda, *libraries)
            except Missing as missing:
                if CUDA == "1":
                    raise SystemExit(f"simclr_fast: SIMCLR_FAST_CUDA=1, but {missing}") from missing
                print(f"simclr_fast: the extension is built for the CPU only: {missing}")
                self.link(target, *host)
        except Missing as missing:
            print(f"simclr_fast: no extension is built, the package is pure Python: {missing}")
            self.extensions = self.distribution.ext_modules = []

    def compile_host(self) -> list[Path]:
        flags = ["-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wno-psabi"]
        return [self.compile(CXX, source, *flags) for source in ("lars.cpp", "lars_cpu.cpp")]

    def compile_cuda(self) -> tuple[Path, list[str]]:
        codes, libraries = cuda_toolkit()
        flags = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-ccbin", CXX]
        return self.compile(NVCC, "lars.cu", *flags, *codes), libraries

    def compile(self, compiler: str, source: str, *flags: str) -> Path:
        include = torch_include()
        if include is None:
            raise Missing("there are no headers of torch >= {}.{}".format(*TORCH_MIN))
        out = Path(self.build_temp, f"{source}.o")
        print(run(compiler, *FLAGS, *flags, f"-I{include}", "-c", HERE / "csrc" / source, "-o", out))
        return out

    def link(self, target: Path, *inputs: Path | str) -> None:
        # An empty library of torch's name is enough to link with, and any torch will do at run time.
        stub = Path(self.build_temp, "libtorch.so")
        run(CXX, "-shared", "-xc", os.devnull, "-Wl,-soname,libtorch.so", "-o", stub)
        needed = ["-Wl,--no-as-needed", stub, "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
        run(CXX, "-shared", "-o", target, *needed, *inputs)


class BdistWheel(bdist_wheel):
    """A wheel that is pure, and tagged so, when no extension could be built."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build, self.root_is_pure = True, not self.distribution.has_ext_modules()
        super().run()


setup(
    name="simclr_fast",
    version=re.search(r'__version__ = "(.+)"', (HERE / "simclr_fast/__init__.py").read_text())[1],
    description="Pretrain image encoders with SimCLR, fast: fused NT-Xent loss, fused LARS, DALI input",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["simclr_fast*"]), "simclr_fast.kernels"],
    package_dir={"simclr_fast.kernels": "kernels"},  # PyPI already has a package called `kernels`
    package_data={"simclr_fast": ["py.typed"]},
    ext_modules=[Extension("simclr_fast._C", ["csrc/lars.cpp", "csrc/lars_cpu.cpp"], py_limited_api=True)],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        f"triton>=3.6; {DALI_WHEELS}",  # torch's CPU builds do not bring it
        f"nvidia-dali-cuda130>=2.4; {DALI_WHEELS}",
        f"numba>=0.66; {DALI_WHEELS}",  # compiles the colour jitter that DALI calls
        "numpy>=2.1",
        "pillow>=11",
        "tyro>=1.0",
        "tensorboard>=2.20",
        "rich>=14",
    ],
    extras_require={
        "dev": [
            *("pytest==9.2.0", "hypothesis>=6.100", "scipy>=1.15", "ruff==0.17.6", "mypy==2.4.1"),
            *(SKLEARN, *EXPORT),
        ],
        "timm": [TIMM],
        "evaluate": [SKLEARN],  # pictures of features
        "export": EXPORT,
        "tf": ["tensorflow>=2.21"],  # reads the original's checkpoint files
        # What tests and bench/ compare with.
        "peers": [
            *("lightly>=1.5.20", "pytorch-metric-learning>=2.8", "open_clip_torch>=3", "kornia>=0.8"),
            "transformers>=5.24",
        ],
        "bench": ["matplotlib>=3.9"],
    },
)
