"""The roofs of this machine, measured in every round beside everyone else: what a share of peak is a share of.

The native core has loops that do nothing but multiply-add, dot products, tile products or reading. Without it NumPy's
best matrix product stands in for the first three, and nothing for reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from ..backends.cpu import CORE
from ..dtypes import ROWS
from .quiet import quiet
from .scenarios import Scenario

MATMUL = 1024
SECONDS = 0.02  # of one sample of one roof

# By type: the roof that shares refer to, and others that are worth knowing.
ROOFS = {
    "float32": ("f32",),
    "float64": ("f64",),
    "float16": ("f32",),
    "bfloat16": ("amx", "bf16_dot", "f32"),
}
WORDS = {
    "f32": "float32 multiply-add",
    "f64": "float64 multiply-add",
    "bf16_dot": "bfloat16 dot products (AVX-512)",
    "amx": "bfloat16 tile products (AMX)",
}


@dataclass(slots=True)
class Peaks:
    """Samples of each roof, in operations or bytes per second. A roof that is not there has none."""

    threads: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    products: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def sample(self, scenario: Scenario) -> None:
        """One more sample of each roof that a scenario can refer to."""
        product = blas(scenario)
        if product not in self.products:
            a = np.random.default_rng(0).standard_normal((MATMUL, MATMUL)).astype(accumulate(scenario))
            out = a @ a  # the first call starts BLAS's threads
            self.products[product] = lambda: np.matmul(a, a, out=out)
        self._add(product, 2 * MATMUL**3 / _seconds(self.products[product]))
        quiet()
        if CORE is None or not has_core():
            return
        if scenario.is_decode:
            self._add(reading(scenario), CORE.peak("read", self.threads, SECONDS, scenario.kv_bytes))
            return
        for name in ROOFS[scenario.dtype]:
            self._add(name, CORE.peak(name, self.threads, SECONDS))

    def _add(self, name: str, rate: float) -> None:
        if rate > 0:
            self.samples.setdefault(name, []).append(rate)

    def best(self, name: str) -> float | None:
        """The best sample: whatever else the machine did only ever took away."""
        return max(self.samples[name]) if name in self.samples else None

    @property
    def spread(self) -> float:
        """How far below its best sample the worst one of a roof is, of the roof that varied most between rounds."""
        loops = [rates for name, rates in self.samples.items() if not name.startswith("blas")]
        return max((1 - min(rates) / max(rates) for rates in loops), default=0.0)

    def roof(self, scenario: Scenario) -> str | None:
        """The name of the roof that shares of a scenario refer to."""
        if scenario.is_decode:
            return reading(scenario) if reading(scenario) in self.samples else None
        names = (*ROOFS[scenario.dtype], blas(scenario))
        return next((name for name in names if name in self.samples), None)


def has_core() -> bool:
    return CORE is not None and hasattr(CORE, "peak")


def accumulate(scenario: Scenario) -> str:
    return ROWS[scenario.dtype].accumulate


def blas(scenario: Scenario) -> str:
    return f"blas {accumulate(scenario)}"


def reading(scenario: Scenario) -> str:
    """Reading as many bytes as the scenario does, again and again as it does: from the same caches, if from any."""
    return f"read {scenario.kv_bytes}"


def words(name: str) -> str:
    """What a roof is, in words."""
    kind, _, what = name.partition(" ")
    if kind == "blas":
        return f"the best {what} matrix product of {MATMUL} x {MATMUL} (NumPy's BLAS)"
    if kind == "read":
        return f"reading {int(what) / 2**20:,.1f} MiB again and again"
    return WORDS[name]


def _seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
