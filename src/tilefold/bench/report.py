"""What is said about measurements: a table, a file of everything, a picture.

No speed-up is ever stated for a result that is out of its error budget; its row says so instead. Tables are plain
text here, aligned columns that need no package.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..api import size
from .budgets import FACTOR
from .machine import fingerprint
from .timing import MATMUL, Measured, Run

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


def table(run: Run) -> Table:
    """One row per scenario and peer."""
    made = Table(
        ("scenario", "computed by", "time", "GFLOP/s", "of peak", "memory", "error", "allowed", "vs naive"),
        frozenset(range(2, 9)),
    )
    for m in run.measured:
        if m.error is None:
            made.add(m.scenario.name, m.peer.name, *["–"] * 7, mood="faint")
            continue
        faster = run.speedup(m)
        made.add(
            m.scenario.name,
            m.peer.name,
            seconds(m.median),
            f"{m.gflops:,.1f}",
            f"{m.gflops / run.peak_gflops:.0%}",
            "–" if m.bytes is None else size(m.bytes),
            f"{m.error.error:.1e}",
            f"{m.error.budget:.1e}",
            f"{faster:.2f} x" if faster is not None else ("WRONG" if not m.ok else "–"),
            mood="bad" if not m.ok else ("good" if m.peer.name == "tilefold" else ""),
        )
    return made


def notes(run: Run) -> list[str]:
    """What the table's columns mean, and what it leaves out."""
    said = [
        f"peak      {run.peak_gflops:,.0f} GFLOP/s, the best {run.peak_dtype} matrix product of {MATMUL} x {MATMUL} "
        "in this run (NumPy's BLAS)",
        f"time      median of {run.rounds} rounds, everyone in every round; GFLOP/s counts visible cells only",
        "memory    peak beyond the inputs, output included; – where it is not NumPy's to count",
        f"error     largest, against float64; allowed is {FACTOR:g} x the plain method's own error and one rounding",
    ]
    for scenario, who, why in dict.fromkeys((m.scenario.name, m.peer.name, m.refusal) for m in run.measured):
        if why:
            said.append(f"not run   {who} on {scenario}: {why}")
    if run.wrong:
        said.append(
            f"WRONG     {len(run.wrong)} results are out of their error budget; no speed-up is stated for them"
        )
    return said


def as_json(run: Run, command: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured, raw samples included."""
    return {
        "command": shlex.join(command),
        "machine": fingerprint(),
        "dtype": run.dtype,
        "rounds": run.rounds,
        "peak": {
            "what": f"{run.peak_dtype} matmul {MATMUL}",
            "gflops": run.peak_gflops,
            "seconds": run.peak_seconds,
        },
        "results": [_row(run, m) for m in run.measured],
    }


def _row(run: Run, m: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {"scenario": m.scenario.name, "case": m.scenario.case.text, "by": m.peer.name}
    if m.error is None:
        return row | {"refusal": m.refusal}
    return row | {
        "seconds": m.seconds,
        "median_seconds": m.median,
        "gflop": m.scenario.gflop,
        "gflops": m.gflops,
        "share_of_peak": m.gflops / run.peak_gflops,
        "bytes": m.bytes,
        "error": asdict(m.error) | {"ok": m.ok},
        "times_faster_than_naive": run.speedup(m),
    }


def seconds(t: float) -> str:
    """A duration in the unit that suits it.

    >>> seconds(0.0123), seconds(75), seconds(7200)
    ('12.3 ms', '1.2 min', '2.0 h')
    """
    for unit, length in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if t >= length:
            return f"{t / length:.3g} {unit}" if unit in ("ms", "s") else f"{t / length:.1f} {unit}"
    return f"{t * 1e6:.3g} µs"


COLOURS = {"naive": "#b8b4ac", "tilefold": "#0f6fb5", "torch": "#e07b39", "jax": "#6a9f58"}


def check_picture(path: Path) -> None:
    """ValueError for a file that no picture can be written to, before anything is measured."""
    if path.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--plot must end in .svg, .png or .pdf, got {str(path)!r}")


def plot(run: Run, path: Path) -> None:
    """Share of peak per scenario and peer, as bars with their numbers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [m for m in run.measured if m.error is not None]
    names = list(dict.fromkeys(m.scenario.name for m in rows))
    peers = list(dict.fromkeys(m.peer.name for m in rows))
    with pyplot.rc_context({"font.family": "sans-serif", "svg.fonttype": "none", "font.size": 9}):
        thick = 0.8 / len(peers)
        figure, axes = pyplot.subplots(figsize=(8, 1.3 + 0.28 * len(names) * (len(peers) + 0.6)))
        for m in rows:
            at = names.index(m.scenario.name) + (peers.index(m.peer.name) - (len(peers) - 1) / 2) * thick
            share = 100 * m.gflops / run.peak_gflops
            axes.barh(at, share, thick * 0.88, color=COLOURS.get(m.peer.name, "#888888"))
            label = f"{seconds(m.median)}" if m.ok else "wrong result"
            axes.text(share, at, f"  {share:.0f}%  {label}", va="center", color="#444444", fontsize=7.5)
        _dress(axes, names, run)
        shown = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS.get(p, "#888888")) for p in peers]
        figure.legend(
            shown, peers, frameon=False, ncols=len(peers), loc="upper right", bbox_to_anchor=(0.98, 0.985)
        )
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _dress(axes: Any, names: list[str], run: Run) -> None:
    machine = fingerprint()
    axes.set_yticks(range(len(names)), [re.sub(r",(?=[a-z])", "  ", name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.16, y=0.02)
    axes.xaxis.set_major_formatter("{x:.0f}%")
    axes.set_xlabel(
        f"share of the measured {run.peak_dtype} matmul peak, {run.peak_gflops:,.0f} GFLOP/s   ·   "
        f"{machine['cpu']}, {machine['cores_usable']} cores",
        color="#444444",
    )
    axes.set_title(f"Attention, {run.dtype}", loc="left", fontweight="bold")
    axes.tick_params(length=0)
    axes.grid(axis="x", color="#e8e6e1", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#999999")
