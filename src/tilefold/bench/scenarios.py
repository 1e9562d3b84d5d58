"""What the benchmark measures: one problem, as a line of text that `--shapes` takes too.

A scenario is a case string with commas for blanks, and `n2048` for `q2048 k2048`. Only masks that are one band (full,
causal, window) are measured, with a dense bias or without: their visible cells can be counted, and rows checked alone.
The word `grad` asks for the forward and the backward pass together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..dtypes import ROWS, names
from ..problem import Band
from ..tiles import visible_in_band
from .budgets import Error
from .case import Case
from .parity import Parity
from .sets import rows

MEASURED = frozenset({"causal", "window", "bias", "seed"})

Inputs = tuple[np.ndarray, ...]  # q, k, v, and the bias where there is one


@dataclass(frozen=True, slots=True)
class Scenario:
    """One problem to be measured; `name` is how it was written."""

    name: str
    case: Case
    band: Band
    grad: bool = False  # forward and backward

    @classmethod
    def parse(cls, text: str, dtype: str = "float32") -> Scenario:
        """Read `h8,n2048,d64,causal`. A type in the text wins over `dtype`.

        >>> Scenario.parse("h8,n2048,d64,causal").gflop
        4.297064448
        """
        if dtype not in ROWS:
            raise ValueError(f"dtype must be {names()}, got {dtype!r}")
        words = re.split(r",(?=[a-z])", text)
        words = [re.sub(r"^n(\d+)$", r"q\1 k\1", word) for word in words]
        grad = "grad" in words
        words = [word for word in words if word != "grad"]
        case = Case.parse(" ".join(words if set(words) & set(ROWS) else [dtype, *words]))
        if strange := sorted(set(case.words) - MEASURED):
            raise ValueError(
                f"shape {text!r}: {strange[0]} is not measured, only full, causal, window and bias are"
            )
        if not min(case.heads, case.size["q"], case.size["k"], case.size["d"], case.size["v"]):
            raise ValueError(f"shape {text!r} has nothing to compute; a shape looks like h8,n2048,d64,causal")
        if grad and "bias" in case.words:
            raise ValueError(f"shape {text!r}: gradients are not measured with a bias")
        return cls(text, case, _band(case), grad)

    @property
    def dtype(self) -> str:
        return self.case.dtype

    @property
    def has_bias(self) -> bool:
        return "bias" in self.case.words

    @property
    def batch(self) -> int:
        return int(np.prod(self.case.lead)) if self.case.lead else 1

    @property
    def visible(self) -> int:
        """How many cells of one head's matrix are not hidden."""
        return visible_in_band(self.band, self.case.size["q"], self.case.size["k"])

    @property
    def gflop(self) -> float:
        """Work on visible cells only: two products per cell, and five more of a backward pass."""
        n = self.case.size
        products = n["d"] + n["v"] + (3 * n["d"] + 2 * n["v"] if self.grad else 0)
        return 2 * self.visible * self.batch * self.case.heads * products / 1e9

    @property
    def is_decode(self) -> bool:
        """One query: the time is that of reading keys and values, so its rate is bytes."""
        return self.case.size["q"] == 1 and not self.grad

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values that the one query of a decode sees."""
        n = self.case.size
        rows_read = self.visible * self.batch * self.case.kv_heads
        return rows_read * (n["d"] + n["v"]) * ROWS[self.dtype].itemsize

    @property
    def sees_all(self) -> bool:
        """Every query sees every key, whatever the mask is called."""
        return self.visible == self.case.size["q"] * self.case.size["k"]

    @property
    def is_causal(self) -> bool:
        """Exactly causal, which other libraries have a flag for."""
        return self.band.left is None and self.band.right == 0

    @property
    def is_square(self) -> bool:
        """As many queries as keys, so that masks aligned to the top left and to the bottom right are alike."""
        return self.case.size["q"] == self.case.size["k"]

    def inputs(self) -> Inputs:
        built = self.case.build()
        bias = built.options.get("bias")
        return (built.q, built.k, built.v) if bias is None else (built.q, built.k, built.v, bias)

    def dout(self, inputs: Inputs) -> np.ndarray:
        """The gradient that a backward pass begins with, the same in every process."""
        q, _, v = inputs[:3]
        return np.random.default_rng(1).standard_normal((*q.shape[:-1], v.shape[-1])).astype(q.dtype)

    def result(self, out: np.ndarray | tuple[np.ndarray, ...], inputs: Inputs) -> np.ndarray:
        """What is compared: the output, or dq, dk and dv one after the other."""
        q, _, v = inputs[:3]
        if isinstance(out, tuple):
            return np.concatenate([x.reshape(-1) for x in out])
        return out.reshape(*q.shape[:-1], v.shape[-1])

    def check(self, inputs: Inputs, out: np.ndarray) -> Error:
        """The error of `out` against float64, and how much is allowed."""
        return Parity(self, inputs).check(out)


def parse_all(shapes: str | None, dtype: str | None, chosen: str = "default") -> list[Scenario]:
    """The scenarios of a text of shapes, or those of a set. A `dtype` takes the place of the set's own types."""
    if shapes is None:
        return [Scenario.parse(text, dtype or "float32") for text in rows(chosen, dtype)]
    if not shapes.split():
        raise ValueError("--shapes is empty; a shape looks like h8,n2048,d64,causal")
    return [Scenario.parse(text, dtype or "float32") for text in shapes.split()]


def _band(case: Case) -> Band:
    if case.words.get("causal") == "top-left":
        raise ValueError("top-left causal masks are not measured, only full, causal and window are")
    left: int | None = None
    right: int | None = 0 if "causal" in case.words else None
    if "window" in case.words:
        given = [None if x == "-" else int(x) for x in case.words["window"].split(",")]
        left, right = given[0], given[1] if right is None else right
    return Band(left, right)
