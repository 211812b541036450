"""The CPU kernels of LARS under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CXX), reason="needs a C++ compiler")
def test_no_fault_is_found(tmp_path: Path) -> None:
    """A copy of the package with an instrumented extension passes the tests of the step."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {CXX} {flags} "$@"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "SIMCLR_FAST_CUDA": "0"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path / "built", "-t", tmp_path / "objects"]
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    (library,) = (tmp_path / "built").rglob("_C*.so")
    assert "__asan_report" in subprocess.run(["nm", "-D", library], capture_output=True, text=True).stdout

    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "simclr_fast", tmp_path / "copy" / "simclr_fast", ignore=ignored)
    shutil.copytree(ROOT / "tests", tmp_path / "copy" / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "copy")
    shutil.copy(library, tmp_path / "copy" / "simclr_fast")

    def runtime(name: str) -> str:
        return subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()

    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    tests = [f"tests/test_lars{part}.py" for part in ("", "_operator", "_optimizer", "_precision")]
    tests += ["-k", "not network and not vectors"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tmp_path / "copy", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "sanitizer" not in done.stderr.lower(), done.stderr[-3000:]
