"""`tilefold run`: attention on arrays in files, in little memory.

Query rows are folded panel by panel, straight into the mapped output. Panels begin on the plan's own blocks of rows,
so the result has the same bits as one call; only packed sequences, whose blocks begin with each of them, may be cut
elsewhere and round differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from ..bench.report import seconds
from ..call import Call, understand
from ..problem import Want
from .console import progress, show
from .files import Output, read_all, split
from .options import Asked, takes_options

PANELS = 100

Files = Annotated[
    str, typer.Argument(metavar="Q", help="Queries: .npy, file.npz:name or file.safetensors:name.")
]
Keys = Annotated[
    str | None, typer.Argument(metavar="K", help="Keys; not needed if Q's file holds q, k and v.")
]
Values = Annotated[str | None, typer.Argument(metavar="V", help="Values.")]


@takes_options
def run(
    asked: Asked,
    q: Files,
    k: Keys = None,
    v: Values = None,
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the result goes: .npy or .safetensors.")],
    lse: Annotated[Path | None, typer.Option(help="Where the log-sum-exp of the scores goes.")] = None,
) -> None:
    """Compute attention on arrays in files, in little memory.

    Inputs are mapped, not read; the result appears in its place only when it is complete.
    """
    began = perf_counter()
    _check_places(out, lse, [q, k, v])
    arrays = read_all(q, k, v)
    want = Want.LSE if lse is not None else Want(0)
    call = understand(*arrays, asked.read(), want=want, backend=asked.backend)
    shape, dtype = (*arrays[0].shape[:-1], arrays[2].shape[-1]), arrays[0].dtype
    with ExitStack() as files:
        result = files.enter_context(Output(out, shape, dtype, "out"))
        logs = None
        if lse is not None:
            logs = files.enter_context(Output(lse, shape[:-1], call.problem.accumulate, "lse"))
        call.allocate(result.array)
        _fold(call)
        if logs is not None:
            logs.array[...] = call.lse
    show(f"{out}: {dtype.name} {shape}, {seconds(perf_counter() - began)}")


def _check_places(out: Path, lse: Path | None, inputs: list[str | None]) -> None:
    """Two results in one place, or one in the place of an input, is a mistake of typing."""
    taken = {split(spec)[0].resolve() for spec in inputs if spec is not None}
    if out.resolve() in taken or (lse is not None and lse.resolve() in taken):
        raise ValueError("a result would replace one of the inputs")
    if lse is not None and lse.resolve() == out.resolve():
        raise ValueError("--out and --lse are one file")


def _fold(call: Call) -> None:
    rows = call.problem.q_len
    with progress("folding", max(rows, 1)) as step:
        for panel in _panels(rows, call.plan.block_q):
            call.fold(panel)
            step(f"{panel.stop:,} of {rows:,} query rows", panel.stop - panel.start)


def _panels(rows: int, block: int) -> Iterator[slice]:
    size = max(1, -(-rows // (PANELS * block))) * block
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))
