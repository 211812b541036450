"""Functions that numba compiles, once for all processes where there is a folder to keep the code in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """numba's njit, without the interpreter's lock and with NumPy's rules for division."""
    if function is None:
        return lambda one: compiled(one, **options)
    how: Any = {"nogil": True, "error_model": "numpy"} | options
    try:
        return njit(cache=True, **how)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(**how)(function)
