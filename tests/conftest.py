"""Shared fixtures: the reference material beside the repository; and Triton's interpreter where there is no GPU."""

import os
import signal
from pathlib import Path

# Read when torch is imported: threads that spin while they wait for others take minutes on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what is in its background so
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"

if not torch.cuda.is_available():  # read when the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference texts, test vectors and data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"reference material not found at ../{SHARED.name}")
    return SHARED


@pytest.fixture(scope="session")
def vectors(shared: Path) -> Path:
    """The folder of numeric test vectors."""
    return shared / "vectors"


@pytest.fixture(params=["fused", "foreach", "reference"])
def lars_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with LARS's fused step and with the others in its place."""
    from simclr_fast.optim import LARS, steps

    if request.param == "fused" and not steps.extension():
        pytest.skip("simclr_fast._C is not built: `python setup.py build_ext --inplace`")
    if request.param != "fused":
        monkeypatch.setattr(LARS, "_step_function", lambda self, device: getattr(steps, f"lars_{request.param}"))
    return request.param
