"""What the benchmark measures: one row per scenario, as text that `--shapes` takes too.

A scenario is a case string with commas for blanks, and `n2048` for `q2048 k2048`. Only masks that are one band (full,
causal, window) are measured: their visible cells can be counted, and rows of them can be checked alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..dtypes import ROWS, names
from ..masks import band
from ..naive import naive
from ..problem import Band
from ..tiles import visible_in_band
from .budgets import Error, judge, reference_type
from .case import Case

DEFAULT = (
    "h1,n512,d64",
    "h1,n512,d64,causal",
    "h8,n512,d64,causal",
    "h8,n2048,d64",
    "h8,n2048,d64,causal",
    "h8,n2048,d128,causal",
    "h1,n4096,d64",
    "h1,n4096,d64,causal",
    "h1,n4096,d128",
    "h8,n4096,d64,causal,window=255,0",
    "h32/8,q1,k4096,d128",
)

CHECKED = 48  # rows of a panel that is compared with float64; short problems are compared as a whole
BANDS = frozenset({"causal", "window", "seed"})

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One problem to be measured; `name` is how it was written."""

    name: str
    case: Case
    band: Band

    @classmethod
    def parse(cls, text: str, dtype: str = "float32") -> Scenario:
        """Read `h8,n2048,d64,causal`.

        >>> Scenario.parse("h8,n2048,d64,causal").gflop
        4.297064448
        """
        if dtype not in ROWS:
            raise ValueError(f"dtype must be {names()}, got {dtype!r}")
        words = re.split(r",(?=[a-z])", text)
        words = [re.sub(r"^n(\d+)$", r"q\1 k\1", word) for word in words]
        case = Case.parse(" ".join([dtype, *words]))
        if strange := sorted(set(case.words) - BANDS):
            raise ValueError(
                f"shape {text!r}: {strange[0]} is not measured, only full, causal and window are"
            )
        if not min(case.heads, case.size["q"], case.size["k"], case.size["d"], case.size["v"]):
            raise ValueError(f"shape {text!r} has nothing to compute; a shape looks like h8,n2048,d64,causal")
        return cls(text, case, _band(case))

    @property
    def gflop(self) -> float:
        """Work on visible cells only: two products per cell."""
        n = self.case.size
        batch = int(np.prod(self.case.lead)) if self.case.lead else 1
        cells = visible_in_band(self.band, n["q"], n["k"]) * batch * self.case.heads
        return 2 * cells * (n["d"] + n["v"]) / 1e9

    @property
    def is_causal(self) -> bool:
        """Exactly causal, which other libraries have a flag for."""
        return self.band.left is None and self.band.right == 0

    def inputs(self) -> Inputs:
        built = self.case.build()
        return built.q, built.k, built.v

    def check(self, inputs: Inputs, out: np.ndarray) -> Error:
        """The error of `out` against float64 in its first, middle and last rows, within the computed budget."""
        errors = [self._check_rows(inputs, out, rows) for rows in _panels(self.case.size["q"])]
        return Error(
            "out",
            max(e.error for e in errors),
            max(e.budget for e in errors),
            all(e.same_specials for e in errors),
        )

    def _check_rows(self, inputs: Inputs, out: np.ndarray, rows: slice) -> Error:
        q, k, v = inputs
        mask = None
        if not self.band.unlimited:
            offset = k.shape[-2] - q.shape[-2] + rows.start
            mask = band(self.band.left, self.band.right, offset)
        acc = ROWS[self.case.dtype].accumulate
        plain, right = (naive(q[..., rows, :], k, v, mask, dtype=t)[0] for t in (acc, reference_type(acc)))
        return judge("out", out[..., rows, :], [plain], right, self.case.dtype)


def parse_all(shapes: str | None, dtype: str) -> list[Scenario]:
    """The scenarios of a text of shapes, or the default ones."""
    texts = list(DEFAULT) if shapes is None else shapes.split()
    if not texts:
        raise ValueError("--shapes is empty; a shape looks like h8,n2048,d64,causal")
    return [Scenario.parse(text, dtype) for text in texts]


def _band(case: Case) -> Band:
    if case.words.get("causal") == "top-left":
        raise ValueError("top-left causal masks are not measured, only full, causal and window are")
    left: int | None = None
    right: int | None = 0 if "causal" in case.words else None
    if "window" in case.words:
        given = [None if x == "-" else int(x) for x in case.words["window"].split(",")]
        left, right = given[0], given[1] if right is None else right
    return Band(left, right)


def _panels(q_len: int) -> Iterator[slice]:
    if q_len <= 3 * CHECKED:
        yield slice(0, q_len)
        return
    for start in (0, (q_len - CHECKED) // 2, q_len - CHECKED):
        yield slice(start, start + CHECKED)
