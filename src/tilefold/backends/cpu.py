"""The native core: whether it is there, and what it can do.

The extension `_core` is built at install; where there was no compiler the package works without it, says so once at
import, and `tilefold doctor` repeats it. TILEFOLD_BACKEND=native makes a missing core an error, so that a failed
build can never pass unnoticed. This version's core knows the machine but holds no attention kernels, so it refuses
every problem.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from ..plan import BackendRefused, Plan
from ..problem import Operands, Problem
from ..replay import Grads, Probe


class NativeCoreMissing(RuntimeWarning):
    """The native core is not there: it was not built, or cannot be loaded."""


def load() -> tuple[ModuleType | None, str]:
    """The extension module and '', or None and why not."""
    try:
        return import_module("tilefold._core"), ""
    except ImportError as error:
        if os.environ.get("TILEFOLD_BACKEND") == "native":
            raise ImportError(
                f"TILEFOLD_BACKEND=native, but the native core cannot be loaded: {error}"
            ) from error
        return None, str(error)


CORE, WHY_MISSING = load()


def warn_if_missing() -> None:
    """Said once, at import."""
    if CORE is None:
        warnings.warn(
            f"tilefold runs without its native core ({WHY_MISSING}); the NumPy backend is used. "
            "Reinstall with a C++ compiler to build it; `tilefold doctor` shows what was found.",
            NativeCoreMissing,
            stacklevel=3,
        )


class NativeBackend:
    """The C++ core on this machine's CPU."""

    name = "native"

    def why_not(self, p: Problem) -> str | None:
        if CORE is None:
            return "the native core is not installed (`tilefold doctor` says why)"
        return "this version's native core has no attention kernels"

    def _refuse(self, p: Problem) -> NoReturn:
        raise BackendRefused(f"backend 'native' refuses: {self.why_not(p)}")

    def plan(self, p: Problem) -> Plan:
        self._refuse(p)

    def resize(self, plan: Plan, block_q: int, block_k: int) -> Plan:
        self._refuse(plan.problem)

    def fold(self, plan: Plan, x: Operands, rows: slice | None = None) -> int:
        self._refuse(plan.problem)

    def replay(self, plan: Plan, x: Operands, probes: Sequence[Probe]) -> dict[str, Any]:
        self._refuse(plan.problem)

    def gradient(self, plan: Plan, x: Operands, dout: np.ndarray, dlse: np.ndarray | None) -> Grads:
        self._refuse(plan.problem)
