"""What is built with and without compilers, what the archives hold, which symbols the extension needs."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import build_backend

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = ROOT / "simclr_fast/_C.abi3.so"
PARTS = ["setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]
PARTS += ["csrc", "kernels", "simclr_fast", "tests"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, as a fresh checkout has them."""
    for name in filter(lambda name: (ROOT / name).exists(), PARTS):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path)
        else:
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    return tmp_path


def setup(source: Path, *command: str, **environment: str) -> str:
    pytest.importorskip("setuptools", minversion="77")
    arguments = [sys.executable, "setup.py", *command]
    done = subprocess.run(arguments, cwd=source, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_a_compiler_the_wheel_is_pure(source: Path) -> None:
    said = setup(source, "bdist_wheel", CXX="no-such-compiler")
    assert "no extension is built, the package is pure Python: no-such-compiler cannot be run" in said
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    kernels = {f"simclr_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels | {"simclr_fast/py.typed", "simclr_fast/optim/lars.py"} <= set(names)
    assert not [name for name in names if name.endswith(".so") or ".data" in name or name.startswith("kernels")]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_failing_nvcc_leaves_an_extension_for_the_cpu(source: Path) -> None:
    nvcc = source / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: out of order'\nexit 1\n")
    nvcc.chmod(0o755)
    said = setup(source, "bdist_wheel", NVCC=str(nvcc), SIMCLR_FAST_CUDA="auto")
    assert re.search("built for the CPU only: .*nvcc failed: nvcc fatal: out of order", said)
    (wheel,) = (source / "dist").iterdir()
    assert re.search(r"-cp311-abi3-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(source / "installed")
    code = "from simclr_fast.optim import steps; print(steps.extension())"
    command = [sys.executable, "-c", code]
    seen = subprocess.run(command, cwd=source / "installed", capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "cpu"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_cuda_can_be_demanded(source: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    environment = os.environ | {"NVCC": "no-such-nvcc", "SIMCLR_FAST_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode
    assert "SIMCLR_FAST_CUDA=1, but no-such-nvcc cannot be run" in done.stderr


def test_the_sdist_holds_all_sources(source: Path) -> None:
    setup(source, "sdist")
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = [path for folder in ("csrc", "kernels", "tests") for path in (ROOT / folder).glob("*.[cph]*")]
    assert {str(path.relative_to(ROOT)) for path in wanted} | {"build_backend.py", "LICENSE"} <= names
    assert "simclr_fast/py.typed" in names


@pytest.mark.parametrize(
    ("headers", "compiler", "wanted"),
    [(Path("torch"), "sh", []), (None, "sh", ["torch>=2.11"]), (None, "no-such-compiler", [])],
)
def test_torch_is_built_with_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, headers: Path | None, compiler: str, wanted: list[str]
) -> None:
    monkeypatch.setattr(build_backend, "torch_include", lambda: headers)
    monkeypatch.setattr(build_backend, "CXX", compiler)
    assert build_backend._torch() == wanted


@pytest.mark.parametrize(("minor", "found"), [(10, False), (11, True), (15, True)])
def test_headers_hidden_by_build_isolation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minor: int, found: bool
) -> None:
    include = tmp_path / "torch/include"
    (include / "torch/headeronly").mkdir(parents=True)
    text = f"#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR {minor}\n"
    (include / "torch/headeronly/version.h").write_text(text)
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_backend.sysconfig, "get_path", lambda *args: str(tmp_path))
    assert build_backend.torch_include() == (include if found else None)


def tool(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not EXTENSION.exists(), reason="simclr_fast._C was not built in this checkout")
@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_the_extension_keeps_to_the_stable_abi() -> None:
    """No C++ symbol of torch, only its C interface, and no library but torch's and the system's."""
    readable = tool("nm", "-D", "--undefined-only", "-C", EXTENSION)
    assert not re.findall(r"\b(?:at|c10|torch|caffe2)::.*", readable)
    symbols = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", EXTENSION).splitlines()]
    of_torch = [symbol for symbol in symbols if "torch" in symbol]
    assert "aoti_torch_get_data_ptr" in of_torch or "torch_get_mutable_data_ptr" in of_torch
    assert not [symbol for symbol in of_torch if not re.fullmatch(r"(aoti_torch|torch)_[a-z0-9_]+", symbol)]
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "-d", EXTENSION))
    assert "libtorch.so" in needed
    system = r"lib(torch|stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so.*|ld-linux.*"
    assert not [name for name in needed if not re.fullmatch(system, name)]
    defined = tool("nm", "-D", "--defined-only", EXTENSION)
    assert [line.split()[-1] for line in defined.splitlines() if " T " in line] == ["PyInit__C"]


@pytest.mark.skipif(not EXTENSION.exists(), reason="simclr_fast._C was not built in this checkout")
def test_no_cuda_kernel_of_the_extension_spills() -> None:
    """In the binary that is shipped, for every architecture."""
    from simclr_fast.optim import steps

    triton = pytest.importorskip("triton", reason="needs Triton's cuobjdump")
    if steps.extension() != "cuda":
        pytest.skip("the extension was built without CUDA")
    usage = tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", EXTENSION)
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    names = {name for kernel in kernels for name in ("norms", "update", "store") if f"{name}_kernel" in kernel[0]}
    assert names == {"norms", "update", "store"}
    assert [kernel for kernel in kernels if int(kernel[2]) or int(kernel[3])] == []
