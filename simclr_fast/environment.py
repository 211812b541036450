"""What this machine has: versions, devices and what is slower for want of something."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Name -> version of the packages that a run's result or speed depends on, and of the devices."""
    packages = ("simclr_fast", "torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"device": device_name()}


def device_name() -> str:
    """The GPUs that are visible, or else the processor."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name(0)}" if count > 1 else torch.cuda.get_device_name(0)
    lines = _cpuinfo().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware; elsewhere bf16 is slower than fp32."""
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


def slower_for(loader: str) -> list[str]:
    """A sentence for each thing whose absence makes a run slower here."""
    from simclr_fast.data import engine_name
    from simclr_fast.optim.steps import extension

    reasons = [engine_name(loader)[1]]
    if not extension():
        reasons.append(
            "LARS steps in plain PyTorch, which is slower: simclr_fast._C is not built here (pip install -e .)"
        )
    elif torch.cuda.is_available() and extension() != "cuda":
        reasons.append("LARS steps in plain PyTorch, which is slower: simclr_fast._C was built without CUDA")
    return [reason for reason in reasons if reason]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
