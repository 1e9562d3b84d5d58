"""`tilefold doctor`: what was found and what is missing, ready to paste into a report. It always succeeds."""

from __future__ import annotations

import platform

import numpy as np

from .. import __version__
from ..backends import BACKENDS
from ..backends.cpu import CORE
from ..bench import machine
from .console import show_facts


def doctor() -> None:
    """Show what was found on this machine and what is missing."""
    usable, there = machine.cores()
    features = machine.cpu_features()
    facts = [
        ("tilefold", __version__),
        ("native core", machine.native_core()),
        ("backends", ", ".join(_backends())),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", platform.platform()),
        ("cpu", machine.cpu_model()),
        (
            "cpu features",
            " ".join(features) or ("none" if CORE is not None else "unknown without the native core"),
        ),
        ("cores", f"{usable} usable of {there}"),
        ("numpy", np.__version__),
        ("blas", machine.blas()),
        *((name, found or "missing (optional)") for name, found in machine.packages().items()),
        *(machine.environment().items() or [("environment", "no variable of tilefold or of threads is set")]),
    ]
    show_facts(facts)


def _backends() -> list[str]:
    return [b.name if b.name != "native" or CORE is not None else "native (missing)" for b in BACKENDS]
