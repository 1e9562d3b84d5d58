"""`tilefold bench`: measure this machine. Exit 1 if any result was wrong: then its speed means nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..bench.peers import PEERS
from ..bench.report import as_json, check_picture, notes, plot, table
from ..bench.scenarios import parse_all
from ..bench.timing import measure, steps
from .console import progress, show, show_table

EXAMPLE = '"h8,n2048,d64 h32/8,q1,k4096,d128,causal"'


def bench(
    shapes: Annotated[
        str | None,
        typer.Option(help=f"What to measure, e.g. {EXAMPLE}; about a minute's worth if not given."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, float16 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Samples of each; medians are shown.")] = 5,
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
    scenarios = parse_all(shapes, dtype)
    if plot_file is not None:
        check_picture(plot_file)
    for file in (json_file, plot_file):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: there is no folder {str(file.parent)!r}")
    for line in _opening(len(scenarios), dtype, rounds):
        show(line, "faint")
    sys.stdout.flush()  # a reader of a pipe should know that it has begun
    with progress("measuring", steps(scenarios, rounds)) as step:
        run = measure(scenarios, dtype, rounds, step)
    show_table(table(run))
    show("")
    for line in notes(run):
        show(line, "bad" if line.startswith("WRONG") else "faint")
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(run, ["tilefold", *sys.argv[1:]]), indent=1) + "\n")
    if plot_file is not None:
        plot(run, plot_file)
    return 1 if run.wrong else 0


def _opening(scenarios: int, dtype: str, rounds: int) -> list[str]:
    """What is about to be measured, and who cannot take part."""
    missing = {peer.name: why for peer in PEERS if (why := peer.available()) is not None}
    present = ", ".join(peer.name for peer in PEERS if peer.name not in missing)
    first = f"{present}: {scenarios} shapes in {dtype}, medians of {rounds} rounds in turns"
    return [first, *(f"without {name}: {why}" for name, why in missing.items())]
