"""Imports run one way; see "Layout" in the README."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "simclr_fast"
COMMANDS = {"train", "evaluate", "embed", "export", "import_tf", "doctor"}
ALLOWED = {
    "kernels": {"kernels"},
    "config": set(),
    "cli": {"methods", "config", "data"},
    "data": {"data", "kernels", "_C", "config", "compiled"},
    "models": {"models", "kernels", "_C", "distributed", "config"},
    "losses": {"losses", "kernels", "_C", "distributed"},
    "optim": {"optim", "kernels", "_C"},
    "distributed": {"config", "launch"},
    "launch": {"config"},
    "training": {
        *("training", "models", "losses", "optim", "methods", "distributed", "launch", "config", "record"),
        "environment",
    },
    "run": {
        *("training", "models", "optim", "methods", "distributed", "config", "record", "environment", "data", "probe"),
        *("checkpoint", "report"),
    },
    "methods": {"methods", "models", "losses", "config", "distributed"},
    "checkpoint": set(),
    "record": set(),
    "pages": {"pages", "record"},
    "report": {"record", "pages"},
    "knn": {"nearest"},
    "nearest": {"environment", "nearest_bf16"},
    "nearest_bf16": {"compiled"},
    "compiled": set(),
    "environment": {"data", "optim"},
    "probe": {"data", "knn"},
    "resume": {"checkpoint", "cli", "record", "training"},
    "pretrained": {"checkpoint", "methods", "config", "data", "models"},
    "features": {"config", "data", "distributed", "pretrained", "training"},
    "evaluation": {
        *("evaluation", "features", "pretrained", "knn", "data", "models", "optim", "distributed", "training"),
        *("config", "cli", "record", "report", "pages", "environment", "checkpoint", "methods", "probe"),
        "exporting",
    },
    "command": {"checkpoint", "config", "data", "distributed", "launch", "record"},
    "exporting": {"exporting", "pretrained", "models", "data", "config", "record", "environment", "checkpoint"},
    "__init__": {"losses", "optim", "data", "pretrained"},
}


def imported(source: str) -> set[str]:
    """Parts of `simclr_fast`, and `bench`, `tests` or a top-level `kernels`, that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "simclr_fast" and rest and rest[0] != "__version__":
                found.add(rest[0])
            elif first in ("bench", "tests", "kernels"):
                found.add(f"top-level {first}")
    return found


def violations(part: str, source: str) -> set[str]:
    found = imported(source)
    if part in COMMANDS:
        return found & COMMANDS - {part} | {name for name in found if name.startswith("top-level")}
    return found - ALLOWED[part]


def sources() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    inside = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).parts
    part = inside[0].removesuffix(".py")
    assert not violations(part, path.read_text())


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("methods", "from simclr_fast import train"),
        ("methods", "from simclr_fast.optim import LARS"),
        ("data", "import simclr_fast.models.resnet"),
        ("record", "from simclr_fast.checkpoint import save"),
        ("train", "from simclr_fast import evaluate"),
        ("losses", "from kernels import nt_xent"),
        ("losses", "def f():\n    from simclr_fast.data import Policy"),
    ],
)
def test_a_wrong_direction_is_found(part, line):
    assert violations(part, line)


def test_a_method_does_not_import_another():
    files = [path for path in (PACKAGE / "methods").glob("*.py") if path.stem != "__init__"]
    for path in files:
        others = {f"simclr_fast.methods.{other.stem}" for other in files if other != path}
        assert not any(name in path.read_text() for name in others)


def test_importing_the_package_brings_neither_pipeline_nor_command_line():
    code = "import sys, simclr_fast; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"nvidia", "tyro", "matplotlib", "rich", "tensorboard", "numba", "PIL"} & set(done.stdout.split())
