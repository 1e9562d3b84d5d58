"""What is said about measurements: a table, notes to it, a file of everything.

No speed-up is ever stated for a result that is out of its error budget; its row says so instead. Tables are plain
text here, aligned columns that need no package.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..api import size
from .budgets import FACTOR
from .machine import fingerprint
from .peaks import ROOFS, blas, words
from .timing import Measured, Run

BUSY = 0.2  # a roof that varies more than that was not alone on this machine

Mood = Literal["", "good", "bad", "faint"]


@dataclass(slots=True)
class Table:
    """Rows of text; numbers stand right. A mood colours a whole row where there is colour."""

    header: tuple[str, ...]
    right: frozenset[int]
    rows: list[tuple[tuple[str, ...], Mood]] = field(default_factory=list)

    def add(self, *cells: str, mood: Mood = "") -> None:
        self.rows.append((cells, mood))

    def plain(self) -> list[str]:
        """Lines of aligned columns."""
        return aligned([self.header, *(cells for cells, _ in self.rows)], self.right)


def aligned(rows: Sequence[Sequence[str]], right: frozenset[int]) -> list[str]:
    """Columns as wide as their widest cell, two blanks between them.

    >>> aligned([("name", "n"), ("a", "10")], frozenset({1}))
    ['name   n', 'a     10']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            x.rjust(w) if i in right else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


HEADER = (
    "scenario",
    "computed by",
    "time",
    "rate",
    "of peak",
    "memory",
    "error",
    "allowed",
    "tilefold is",
    "vs naive",
)


def table(run: Run) -> Table:
    """One row per scenario and peer. `tilefold is` says how many times faster tilefold is than the row."""
    made = Table(HEADER, frozenset(range(2, len(HEADER))))
    for m in run.measured:
        if m.error is None:
            made.add(m.scenario.name, m.peer.name, *["–"] * (len(HEADER) - 2), mood="faint")
            continue
        ours = run.of(m.scenario, "tilefold")
        made.add(
            m.scenario.name,
            m.peer.name,
            seconds(m.median),
            rate(m.rate, m.scenario.is_decode),
            share(run.share(m)),
            "–" if m.bytes is None else size(m.bytes),
            f"{m.error.error:.1e}",
            f"{m.error.budget:.1e}",
            "–" if ours is None or ours is m else times(run.ahead(ours, m.peer.name)),
            times(run.speedup(m)) if m.ok else "WRONG",
            mood="bad" if not m.ok else ("good" if m.peer.name == "tilefold" else ""),
        )
    return made


def notes(run: Run) -> list[str]:
    """What the table's columns mean, and what it leaves out."""
    said = [*_about_peaks(run)]
    said += [
        f"time      median of {run.rounds} rounds, everyone in every round, with {_threads(run)}",
        "rate      GFLOP/s counts visible cells only; of a decode, GB/s of the keys and values that are read",
        "memory    peak beyond the inputs, output included; – where it is not NumPy's to count",
        f"error     largest, against float64; allowed is {FACTOR:g} x the plain method's own error and one rounding",
    ]
    here = {m.peer for m in run.measured if m.peer.note and m.error is not None}
    said += [f"how       {p.name} {p.version or ''}: {p.note}" for p in sorted(here, key=lambda p: p.name)]
    said += _refusals(run)
    if run.peaks.spread > BUSY:
        said.append(
            f"busy      a roof varied by {run.peaks.spread:.0%} between rounds: this machine had other work, and whose "
            "threads wait for one another suffers most"
        )
    if run.wrong:
        said.append(
            f"WRONG     {len(run.wrong)} results are out of their error budget; no speed-up is stated for them"
        )
    return said


def _refusals(run: Run) -> Iterator[str]:
    """Who was not measured and why, each reason once."""
    where: dict[tuple[str, str], list[str]] = {}
    for m in run.measured:
        if m.refusal:
            where.setdefault((m.peer.name, m.refusal), []).append(m.scenario.name)
    for (who, why), names in where.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        yield f"not run   {who} on {' '.join(names[:2])}{more}: {why}"


def _threads(run: Run) -> str:
    return "1 thread" if run.peaks.threads == 1 else f"{run.peaks.threads} threads"


BEYOND = "float32 and float16 are multiplied as sums of bfloat16 numbers, in tiles"


def _about_peaks(run: Run) -> Iterator[str]:
    """The roofs that shares refer to, then what else this machine can do in the same types."""
    scenarios = list({id(m.scenario): m.scenario for m in run.measured}.values())
    roofs = [*dict.fromkeys(name for s in scenarios if (name := run.peaks.roof(s)) is not None)]
    others = [*dict.fromkeys(name for s in scenarios for name in (*ROOFS[s.dtype], blas(s)))]
    for name in roofs:
        yield f"peak      {_best(run, name)}: what shares refer to"
    if any((run.share(m) or 0) > 1 for m in run.measured if m.peer.name == "tilefold"):
        yield f"          more than 100%: {BEYOND}"
    for name in others:
        if name not in roofs and run.peaks.best(name) is not None:
            yield f"          {_best(run, name)}"
    if (amx := run.peaks.best("amx")) is not None:
        yield f"          of the tile products {_reach(run, amx)}"


def _best(run: Run, name: str) -> str:
    best = run.peaks.best(name)
    return f"{rate(best or 0.0, name.startswith('read'))}, {words(name)}"


def _reach(run: Run, amx: float) -> str:
    """How much of AMX each peer gets, at best; whoever computes in float32 cannot get much."""
    best: dict[str, float] = {}
    for m in run.measured:
        if m.error is not None and m.scenario.dtype == "bfloat16" and not m.scenario.is_decode:
            best[m.peer.name] = max(best.get(m.peer.name, 0.0), m.rate / amx)
    return "at best: " + ", ".join(f"{who} {got:.1%}" for who, got in best.items())


def as_json(run: Run, command: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured, raw samples included."""
    peers = {m.peer.name: m.peer for m in run.measured}
    product = blas(run.measured[0].scenario)
    return {
        "command": shlex.join(command),
        "machine": fingerprint(),
        "threads": run.peaks.threads,
        "dtype": run.dtype,
        "rounds": run.rounds,
        "peers": {name: {"version": peer.version, "note": peer.note} for name, peer in peers.items()},
        "peak": {"what": words(product), "gflops": (run.peaks.best(product) or 0.0) / 1e9},
        "peaks": {
            name: {"what": words(name), "per_second": max(samples), "samples": samples}
            for name, samples in run.peaks.samples.items()
        },
        "results": [_row(run, m) for m in run.measured],
    }


def _row(run: Run, m: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {
        "scenario": m.scenario.name,
        "case": m.scenario.case.text,
        "grad": m.scenario.grad,
        "by": m.peer.name,
    }
    if m.error is None:
        return row | {"refusal": m.refusal}
    amx = run.peaks.best("amx") if m.scenario.dtype == "bfloat16" else None
    return row | {
        "seconds": m.seconds,
        "median_seconds": m.median,
        "gflop": m.scenario.gflop,
        "gflops": m.gflops,
        "bytes_read": m.scenario.kv_bytes if m.scenario.is_decode else None,
        "roof": run.peaks.roof(m.scenario),
        "share_of_peak": run.share(m),
        "share_of_amx": None if amx is None else 1e9 * m.gflops / amx,
        "bytes": m.bytes,
        "error": asdict(m.error) | {"ok": m.ok},
        "times_faster_than_naive": run.speedup(m),
    }


def rate(per_second: float, of_bytes: bool) -> str:
    """Operations or bytes per second.

    >>> rate(2.5e11, False), rate(2.5e11, True)
    ('250.0 GFLOP/s', '250.0 GB/s')
    """
    return f"{per_second / 1e9:,.1f} {'GB/s' if of_bytes else 'GFLOP/s'}"


def share(part: float | None) -> str:
    return "–" if part is None else f"{part:.0%}"


def times(faster: float | None) -> str:
    return "–" if faster is None else f"{faster:.2f} x"


def seconds(t: float) -> str:
    """A duration in the unit that suits it.

    >>> seconds(0.0123), seconds(75), seconds(7200)
    ('12.3 ms', '1.2 min', '2.0 h')
    """
    for unit, length in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if t >= length:
            return f"{t / length:.3g} {unit}" if unit in ("ms", "s") else f"{t / length:.1f} {unit}"
    return f"{t * 1e6:.3g} µs"
