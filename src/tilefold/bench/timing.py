"""How a scenario is measured: every peer in every round, so that a busy moment hurts all alike; medians.

A short call is repeated until the clock can see it. Each round also multiplies two large matrices: the best of those
is this machine's matmul peak, of the same BLAS in the same minutes, and every share of peak refers to it.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ..dtypes import ROWS
from .budgets import Error
from .peers import NAIVE, PEERS, Peer
from .scenarios import Inputs, Scenario

SHORTEST = 0.02  # seconds that one sample should last at least
MATMUL = 1024


@dataclass(slots=True)
class Measured:
    """One peer on one scenario. `refusal` says why there is nothing else."""

    scenario: Scenario
    peer: Peer
    refusal: str = ""
    seconds: list[float] = field(default_factory=list)
    bytes: int | None = None
    error: Error | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def gflops(self) -> float:
        """Useful GFLOP per second: work on hidden cells counts as none."""
        return self.scenario.gflop / self.median

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error.ok


@dataclass(slots=True)
class Run:
    """Everything that was measured, and the peak that shares refer to."""

    dtype: str
    rounds: int
    measured: list[Measured] = field(default_factory=list)
    peak_seconds: list[float] = field(default_factory=list)

    @property
    def peak_dtype(self) -> str:
        return ROWS[self.dtype].accumulate

    @property
    def peak_gflops(self) -> float:
        return 2 * MATMUL**3 / 1e9 / min(self.peak_seconds)

    def speedup(self, m: Measured) -> float | None:
        """How many times faster than naive; None where either result is wrong, or naive was not measured."""
        base = next((b for b in self.measured if b.scenario is m.scenario and b.peer is NAIVE), None)
        if base is None or not (base.ok and m.ok):
            return None
        return base.median / m.median

    @property
    def wrong(self) -> list[Measured]:
        return [m for m in self.measured if m.error is not None and not m.ok]


def measure(
    scenarios: Sequence[Scenario],
    dtype: str,
    rounds: int,
    done: Callable[[str], None],
    peers: Sequence[Peer] = PEERS,
) -> Run:
    """Measure all scenarios; `done` hears a sentence after each round of each."""
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    run = Run(dtype, rounds)
    present = [peer for peer in peers if peer.available() is None]
    a = np.random.default_rng(0).standard_normal((MATMUL, MATMUL)).astype(run.peak_dtype)
    product = a @ a  # the first call starts BLAS's threads
    for scenario in scenarios:
        run.measured += _one(scenario, present, run, lambda: np.matmul(a, a, out=product), done)
    return run


def steps(scenarios: Sequence[Scenario], rounds: int) -> int:
    """How often `done` will be called."""
    return len(scenarios) * (rounds + 1)


def _one(
    scenario: Scenario,
    peers: Sequence[Peer],
    run: Run,
    matmul: Callable[[], Any],
    done: Callable[[str], None],
) -> list[Measured]:
    inputs = scenario.inputs()
    rows = [Measured(scenario, peer, refusal=peer.why_not(scenario) or "") for peer in peers]
    calls: list[tuple[Measured, Callable[[], Any], int]] = []
    for row in rows:
        if not row.refusal and (call := _prepared(row, inputs)) is not None:
            calls.append((row, call, max(1, ceil(SHORTEST / max(_seconds(call, 1), 1e-9)))))
    done(f"{scenario.name}: checked")
    for number in range(run.rounds):
        run.peak_seconds.append(_seconds(matmul, 1))
        for row, call, times in calls:
            row.seconds.append(_seconds(call, times))
        done(f"{scenario.name}: round {number + 1} of {run.rounds}")
    return rows


def _prepared(row: Measured, inputs: Inputs) -> Callable[[], Any] | None:
    """The call to be timed, after its result was checked and its memory counted. None if another library failed."""
    try:
        call = row.peer.build(row.scenario, inputs)
        out = call()
    except Exception as error:
        if not row.peer.foreign:
            raise
        row.refusal = f"failed: {str(error).partition(chr(10))[0] or type(error).__name__}"
        return None
    row.error = row.scenario.check(inputs, _result(row, out, inputs))
    row.bytes = None if row.peer.foreign else peak_bytes(call)
    return call


def _result(row: Measured, out: Any, inputs: Inputs) -> np.ndarray:
    shape = (*inputs[0].shape[:-1], inputs[2].shape[-1])
    return row.peer.to_numpy(out, row.scenario.case.dtype).reshape(shape)


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - start) / times


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that was allocated at once during a call, its output included; untimed, because counting is slow."""
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
