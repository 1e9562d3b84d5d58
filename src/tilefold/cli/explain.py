"""`tilefold explain`: the plan in words and numbers, before anything runs, for files or for a shape alone."""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
import typer

from ..api import Explanation
from ..api import explain as explain_call
from ..bench.case import Case
from .console import show, show_facts
from .files import dtype_of, read_all
from .options import Asked, takes_options

Q = Annotated[
    str | None, typer.Argument(metavar="Q", help="Queries: .npy, file.npz:name or file.safetensors:name.")
]
K = Annotated[str | None, typer.Argument(metavar="K", help="Keys; not needed if Q's file holds q, k and v.")]
V = Annotated[str | None, typer.Argument(metavar="V", help="Values.")]


@takes_options
def explain(
    asked: Asked,
    q: Q = None,
    k: K = None,
    v: V = None,
    *,
    shape: Annotated[
        str | None, typer.Option(help='Instead of files: "b1 h8/2 q4096 k4096 d64 float16".', metavar="WORDS")
    ] = None,
) -> None:
    """Say what would be computed, how and why; nothing runs."""
    if (q is None) == (shape is None):
        raise ValueError("give either files, Q K V, or --shape")
    arrays = _imagined(shape) if shape is not None else read_all(q or "", k, v)
    _print(explain_call(*arrays, backend=asked.backend, **asked.as_keywords()))


def _imagined(shape: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of that shape and type, of one element's memory."""
    case = Case.parse(re.sub(r"\bn(\d+)", r"q\1 k\1", shape))
    if case.words:
        raise ValueError(
            f"--shape holds sizes only; {next(iter(case.words))!r} is an option of its own, or needs files"
        )
    lead, n, one = case.lead or (), case.size, np.zeros((), dtype_of(case.dtype))
    shapes = [
        (*lead, case.heads, n["q"], n["d"]),
        (*lead, case.kv_heads, n["k"], n["d"]),
        (*lead, case.kv_heads, n["k"], n["v"]),
    ]
    q, k, v = (np.broadcast_to(one, s if case.lead is not None else s[1:]) for s in shapes)
    return q, k, v


def _print(explanation: Explanation) -> None:
    first, *lines = str(explanation).splitlines()
    show(first + "\n")
    show_facts([_fact(line) for line in lines])


def _fact(line: str) -> tuple[str, str]:
    """A line of an explanation as a name and what is said about it."""
    match = re.match(r"(passed over) (.*)|(\S+) {2,}(.*)", line)
    return ("", line) if match is None else (match[1] or match[3], match[2] or match[4])
