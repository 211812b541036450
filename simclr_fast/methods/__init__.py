"""Training methods, one file each: `Config` (its flags), `PRESETS`, and `Method` (two views -> loss and statistics)."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from simclr_fast.config import choose


def names() -> list[str]:
    """The methods there are, by listing this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a method."""
    return importlib.import_module(f"{__name__}.{choose('method', name, names())}")
