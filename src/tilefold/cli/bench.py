"""`tilefold bench`: measure this machine. Exit 1 if a result of ours was wrong: then its speed means nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..bench.machine import cores
from ..bench.peers import NAMED, Peer, chosen
from ..bench.picture import check_picture, plot
from ..bench.report import as_json, notes, table
from ..bench.scenarios import Scenario, parse_all
from ..bench.sets import SETS
from ..bench.timing import measure, steps
from .console import progress, show, show_table

EXAMPLE = '"h8,n2048,d64 h32/8,q1,k4096,d128,causal"'
NAMES = ", ".join(peer.name for peer in NAMED)


def bench(
    shapes: Annotated[
        str | None,
        typer.Option(help=f"What to measure, e.g. {EXAMPLE}; a type may be part of a shape."),
    ] = None,
    chosen_set: Annotated[
        str,
        typer.Option(
            "--set",
            help="default (about a minute), forward, grad, decode, small, or all four; torch: tensors, beside torch.",
        ),
    ] = "default",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float64, float16 or bfloat16; if not given, the set's own types."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each; medians are shown.")] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Threads for everyone; one per processor if not given.")
    ] = None,
    peers: Annotated[str | None, typer.Option(help=f"Who takes part: some of {NAMES}.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything, raw samples and machine included.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw shares of peak: .svg, .png or .pdf.")
    ] = None,
) -> int:
    """Measure this machine: naive, tilefold and installed peers.

    Everyone takes part in every round. Each row shows its error against float64 beside its speed, and a wrong
    result gets no speed-up.
    """
    scenarios = parse_all(shapes, dtype, chosen_set)
    about = SETS[chosen_set].peers if shapes is None and chosen_set in SETS else None
    asked = chosen(peers if peers is not None else about)
    if plot_file is not None:
        check_picture(plot_file)
    for file in (json_file, plot_file):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: there is no folder {str(file.parent)!r}")
    types = ", ".join(dict.fromkeys(s.dtype for s in scenarios))
    for line in _opening(scenarios, types, rounds, asked, threads):
        show(line, "faint")
    sys.stdout.flush()  # a reader of a pipe should know that it has begun
    with progress("measuring", steps(scenarios, rounds)) as step:
        run = measure(scenarios, types, rounds, step, asked, threads)
    show_table(table(run))
    show("")
    for line in notes(run):
        show(line, "bad" if line.startswith("WRONG") else "faint")
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(run, ["tilefold", *sys.argv[1:]]), indent=1) + "\n")
    if plot_file is not None:
        plot(run, plot_file)
    return 1 if any(not m.peer.foreign for m in run.wrong) else 0


def _opening(
    scenarios: Sequence[Scenario], types: str, rounds: int, asked: Sequence[Peer], threads: int | None
) -> list[str]:
    """What is about to be measured, and who cannot take part."""
    missing = {peer.name: why for peer in asked if (why := peer.available()) is not None}
    present = ", ".join(peer.name for peer in asked if peer.name not in missing)
    count = cores()[0] if threads is None else threads
    first = (
        f"{present}: {len(scenarios)} shapes in {types}, medians of {rounds} rounds in turns, "
        f"{count} thread{'s' if count > 1 else ''}"
    )
    return [first, *(f"without {name}: {why}" for name, why in missing.items())]
