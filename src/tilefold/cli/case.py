"""`tilefold case "…"`: replay one case string. A failure found anywhere is reported as such a line."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bench.case import Case
from .console import show


def case(
    text: Annotated[str, typer.Argument(help='E.g. "float32 h4/2 q37 k53 d8 causal softcap=20 seed=7".')],
) -> int:
    """Replay one case string and judge its errors.

    Its problem, its errors forward and backward against a wider type, and what is allowed.
    """
    parsed = Case.parse(text)
    show(f"case     {text}")
    show(f"problem  {parsed.describe()}\n")
    report = parsed.replay()
    for error in report.errors:
        show(str(error), "good" if error.ok else "bad")
    if not report.ok:
        show("\nout of budget: this is a bug; please report the case line and `tilefold doctor`", "bad")
    return 0 if report.ok else 1
