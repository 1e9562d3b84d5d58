"""`tilefold verify`: is this installation right? Every dtype and feature, forward and backward, against a wider type.

The cases are small, so that it takes seconds; each line of the table can be given to `tilefold case`.
"""

from __future__ import annotations

from importlib.util import find_spec

from ..bench.budgets import Error
from ..bench.case import Case, Report
from ..bench.report import Table
from .console import progress, show, show_table

DTYPES = ("float32", "float64", "float16", "bfloat16")

FEATURES = """
b2 h4/2 q130 k130 d64
h2 q300 k300 d64 causal
h2 q70 k130 d32 window=40,7
h2 q70 k90 d16 prefix=21 causal
h2 q90 k90 d16 chunked=16 causal
h2 q90 k90 d16 anchors=4,20
h2 q53 k53 d16 documents=11,30,12 causal
h4/2 q40 k53 d16 dense=0.5
h2 q40 k53 d16 predicate=3
b3 h2 q40 k53 d16 q_lengths=40,3,0 kv_lengths=53,7,9 causal
h4/2 d16 packed=3,0,9,30/5,2,0,41 causal
h2 q40 k53 d16 softcap=5 scale=0.3
h4/2 q40 k53 d16 bias=1hq1 hide=0.4 sinks
b2 h4/2 q40 k53 d16 alibi=b causal
h2 q60 k200 d16 window=20,0 nan
b2 h4/2 q50 k50 d16 order=bshd causal
h8/2 q1 k300 d64 causal
""".strip().splitlines()


def verify() -> int:
    """Check this installation: every dtype with every feature.

    Forward and backward, against a wider type; the gradient shown is the one nearest to its limit.
    """
    dtypes = [d for d in DTYPES if d != "bfloat16" or find_spec("ml_dtypes")]
    texts = [f"{dtype} {feature}" for dtype in dtypes for feature in FEATURES]
    table = Table(
        ("case", "out", "allowed", "lse", "allowed", "gradient", "error", "allowed", ""),
        frozenset((1, 2, 3, 4, 6, 7)),
    )
    wrong = 0
    with progress("checking", len(texts)) as step:
        for text in texts:
            report = Case.parse(text).replay()
            wrong += not report.ok
            table.add(text, *_cells(report), mood="" if report.ok else "bad")
            step(text)
    show_table(table)
    if len(dtypes) < len(DTYPES):
        show("bfloat16 was not checked: ml_dtypes is not installed", "faint")
    if wrong:
        show(f"\n{wrong} of {len(texts)} cases are WRONG: please report them with `tilefold doctor`", "bad")
        return 1
    show(f"\nall {len(texts)} cases are right", "good")
    return 0


def _cells(report: Report) -> list[str]:
    """Errors and what is allowed: of the output, of the log-sum-exp, and of the gradient nearest to its limit."""
    out, lse, *grads = report.errors
    worst = max(grads, key=_share)
    numbers = [f"{x:.1e}" for e in (out, lse, worst) for x in (e.error, e.budget)]
    return [*numbers[:4], worst.name, *numbers[4:], "ok" if report.ok else "WRONG"]


def _share(e: Error) -> float:
    return float("inf") if not e.ok else e.error / e.budget if e.budget else 0.0
