"""Build backend: setuptools', plus torch as a build requirement where no installed torch has the headers.

pip's build isolation hides an installed torch, yet its headers are enough to compile: without this, every
`pip install .` would download torch once more.
"""

import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

TORCH_MIN = (2, 11)
"""Oldest torch that is supported; the extension is built for its stable ABI."""

CXX = os.environ.get("CXX", "g++")


def torch_include() -> Path | None:
    """Headers of a torch >= TORCH_MIN, be it hidden by build isolation; torch is not imported."""
    spec = importlib.util.find_spec("torch")
    visible = [Path(spec.origin).parent] if spec and spec.origin else []
    schemes = [None, sysconfig.get_preferred_scheme("user")]
    hidden = [
        Path(sysconfig.get_path(kind, scheme) if scheme else sysconfig.get_path(kind), "torch")
        for scheme in schemes
        for kind in ("platlib", "purelib")
    ]
    for root in [*visible, *hidden]:
        header = root / "include/torch/headeronly/version.h"
        if header.is_file():
            found = re.findall(r"#define TORCH_VERSION_M(?:AJ|IN)OR (\d+)", header.read_text())
            if tuple(map(int, found)) >= TORCH_MIN:
                return root / "include"
    return None


def _torch() -> list[str]:
    wanted = shutil.which(CXX) and torch_include() is None
    return ["torch>={}.{}".format(*TORCH_MIN)] if wanted else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
