"""`benchmark_flash_attention()`: naive against flash over growing n, on NumPy alone, as plain text.

Bytes are those that each method reports for the call that was timed. Only the last table is a projection, and it says
so: naive memory at a million tokens cannot be measured on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from ..api import size
from ..flash import default_config, flash_attention, naive_attention
from .report import aligned, seconds

LENGTHS = (512, 1024, 2048, 4096, 8192)
DIM = 64
PROJECTED = (1024, 4096, 16384, 65536, 262144, 1048576)
HEADS = 32
BUDGET = 1.5  # seconds for each length, or two calls of each


@dataclass(frozen=True, slots=True)
class Row:
    """One length, measured: the best of some calls of each."""

    n: int
    naive_seconds: float
    naive_bytes: int
    flash_seconds: float
    flash_bytes: int


def run() -> None:
    """Measure, print, project."""
    print(f"naive and flash attention, one head, d = {DIM}, float32; best of several calls, taken in turns")
    print("memory is what each allocates beyond its inputs and output\n")
    rows = [_measure(n) for n in LENGTHS]
    for line in _measured(rows):
        print(line)
    print(f"\nprojection, not measured: {HEADS} heads, from the row n = {rows[-1].n:,} (time grows with n²,")
    print("naive memory with n² and heads; flash works in the same memory at any length)\n")
    for line in _projected(rows[-1]):
        print(line)


def _measure(n: int) -> Row:
    q, k, v = np.random.default_rng(n).standard_normal((3, n, DIM)).astype(np.float32)
    config = default_config(DIM)
    naive_best = flash_best = float("inf")
    until, calls = perf_counter() + BUDGET, 0
    while calls < 2 or perf_counter() < until:
        naive_time, (_, naive_bytes) = _timed(lambda: naive_attention(q, k, v, config.scale))
        flash_time, result = _timed(lambda: flash_attention(q, k, v, config))
        naive_best, flash_best = min(naive_best, naive_time), min(flash_best, flash_time)
        calls += 1
    return Row(n, naive_best, naive_bytes, flash_best, result.memory_bytes)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = call()
    return perf_counter() - start, result


def _measured(rows: list[Row]) -> list[str]:
    lines = [
        ("n", "naive time", "naive memory", "flash time", "flash memory", "times faster", "times smaller")
    ]
    for r in rows:
        lines.append(
            (
                f"{r.n:,}",
                seconds(r.naive_seconds),
                size(r.naive_bytes),
                seconds(r.flash_seconds),
                size(r.flash_bytes),
                f"{r.naive_seconds / r.flash_seconds:.2f}",
                f"{r.naive_bytes / r.flash_bytes:,.1f}",
            )
        )
    return aligned(lines, frozenset(range(7)))


def _projected(last: Row) -> list[str]:
    lines = [("n", "naive time", "naive memory", "flash time", "flash memory")]
    for n in PROJECTED:
        grown = HEADS * (n / last.n) ** 2
        naive_time, naive_bytes = last.naive_seconds * grown, last.naive_bytes * grown
        flash_time = last.flash_seconds * grown
        lines.append(
            (f"{n:,}", seconds(naive_time), size(naive_bytes), seconds(flash_time), size(last.flash_bytes))
        )
    return aligned(lines, frozenset(range(5)))
