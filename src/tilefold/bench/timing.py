"""How a scenario is measured: every peer in every round, so that a busy moment hurts all alike; medians.

A short call is repeated until the clock can see it. Before each sample everyone's idle threads have gone to sleep, the
order changes from round to round, and the machine's roofs are measured in the same rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np

from . import exchange
from .apart import Company, Refused
from .budgets import Error
from .here import Here, peak_bytes
from .parity import Parity
from .peaks import Peaks
from .peers import PEERS, Peer
from .quiet import quiet
from .scenarios import Inputs, Scenario
from .threads import limited
from .worker import sentence

SHORTEST = 0.02  # seconds that one sample should last at least


class Timed(Protocol):
    """A call that is ready: the result it gave, how long it took then, and how long it takes when repeated."""

    result: np.ndarray
    once: float

    def seconds(self, times: int) -> float: ...


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
    def rate(self) -> float:
        """What the scenario's roof counts, per second: operations, or bytes of a decode."""
        return (
            self.scenario.kv_bytes if self.scenario.is_decode else 1e9 * self.scenario.gflop
        ) / self.median

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error.ok

    def refuse(self, why: str) -> None:
        """Take back whatever was measured."""
        self.refusal, self.error, self.bytes = why, None, None
        self.seconds.clear()


@dataclass(slots=True)
class Run:
    """Everything that was measured, and the roofs that shares refer to."""

    dtype: str  # or a phrase, where each scenario has its own
    rounds: int
    peaks: Peaks
    measured: list[Measured] = field(default_factory=list)

    def share(self, m: Measured) -> float | None:
        """Of the scenario's roof; None where nothing measured it."""
        name = self.peaks.roof(m.scenario)
        best = None if name is None else self.peaks.best(name)
        return None if best is None else m.rate / best

    def of(self, scenario: Scenario, name: str) -> Measured | None:
        """What a peer did on a scenario."""
        rows = (m for m in self.measured if m.scenario is scenario and m.peer.name == name)
        return next(rows, None)

    def ahead(self, m: Measured, base: str) -> float | None:
        """How many times faster than the peer `base`; None where either result is wrong, or not there."""
        other = self.of(m.scenario, base)
        return other.median / m.median if other is not None and other.ok and m.ok else None

    def speedup(self, m: Measured) -> float | None:
        """How many times faster than naive."""
        return self.ahead(m, "naive")

    @property
    def wrong(self) -> list[Measured]:
        return [m for m in self.measured if m.error is not None and not m.ok]


def measure(
    scenarios: Sequence[Scenario],
    dtype: str,
    rounds: int,
    done: Callable[[str], None],
    peers: Sequence[Peer] = PEERS,
    threads: int | None = None,
) -> Run:
    """Measure all scenarios; `done` hears a sentence after each round of each. `dtype` is for the report to say."""
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    present = [peer for peer in peers if peer.available() is None]
    with limited(threads) as count, Company(count) as company:
        run = Run(dtype, rounds, Peaks(count))
        for scenario in scenarios:
            run.measured += _one(scenario, present, run, company, done)
    return run


def steps(scenarios: Sequence[Scenario], rounds: int) -> int:
    """How often `done` will be called."""
    return len(scenarios) * (rounds + 1)


def _one(
    scenario: Scenario, peers: Sequence[Peer], run: Run, company: Company, done: Callable[[str], None]
) -> list[Measured]:
    rows = [Measured(scenario, peer, refusal=peer.refusal(scenario) or "") for peer in peers]
    with tempfile.TemporaryDirectory(prefix="tilefold-bench-") as folder:
        stage = _Stage(scenario, scenario.inputs(), Path(folder), company)
        calls = [(row, timed) for row in rows if (timed := stage.prepare(row)) is not None]
    quiet()
    done(f"{scenario.name}: checked")
    for number in range(run.rounds):
        run.peaks.sample(scenario)
        turn = number % max(len(calls), 1)
        for row, timed in calls[turn:] + calls[:turn]:
            _sample(row, timed)
        done(f"{scenario.name}: round {number + 1} of {run.rounds}")
    return rows


def _sample(row: Measured, timed: Timed) -> None:
    if row.error is None:  # an earlier round was refused
        return
    try:
        row.seconds.append(timed.seconds(max(1, ceil(SHORTEST / max(timed.once, 1e-9)))))
    except Refused as refused:
        row.refuse(str(refused))


@dataclass(slots=True)
class _Stage:
    """A scenario's arrays, handed to whoever takes part."""

    scenario: Scenario
    inputs: Inputs
    folder: Path
    company: Company
    handed_over: bool = False
    parity: Parity | None = None

    def prepare(self, row: Measured) -> Timed | None:
        """The call to be timed, its result checked and its memory counted. None if the peer refuses, or fails."""
        if row.refusal:
            return None
        try:
            timed = self._ready(row.peer)
        except Refused as refused:
            row.refusal = str(refused)
            return None
        except Exception as error:
            if not row.peer.foreign:
                raise
            row.refusal = f"failed: {sentence(error)}"
            return None
        self.parity = self.parity or Parity(self.scenario, self.inputs)
        row.error = self.parity.check(timed.result)
        if isinstance(timed, Here) and not row.peer.foreign:
            unseen = row.peer.unseen(self.scenario, self.inputs) if row.peer.unseen else 0
            row.bytes = peak_bytes(timed.call) + unseen
        return timed

    def _ready(self, peer: Peer) -> Timed:
        if not peer.apart:
            return Here(peer, self.scenario, self.inputs)
        if not self.handed_over:
            exchange.put_inputs(self.folder, self.inputs)
            self.handed_over = True
        return self.company.invite(peer, self.folder, self.scenario)
