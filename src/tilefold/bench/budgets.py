"""How much error is allowed: computed, never typed.

The reference is `naive` in a wider type than the problem's accumulator. How far an honest implementation may be off is
measured twice on the very same inputs: by the plain method in the accumulate type, and by the reference itself after
every input was moved by one rounding, which shows how well-conditioned the question is (on few rows BLAS is exact by
luck, and a sum that cancels is not); more than once where a result is few numbers. The budget is `FACTOR` times the
largest, plus one rounding to the result's type, or to the accumulate type where that is the coarser one: a gradient
of float64 sinks has been through float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..dtypes import ROWS

ROUNDED = 2.0  # times the error of weights rounded to bfloat16: two such roundings, one in another place
FEW = 8  # fewer numbers than these may be right by luck: then inputs are moved so many times
FACTOR = 8.0  # 4 between summing in one chain and in the 16 of a wide BLAS, 2 for everything else


@dataclass(frozen=True, slots=True)
class Error:
    """The largest error of one result, and how much is allowed. `ok` also demands NaN and inf in the same places."""

    name: str
    error: float
    budget: float
    same_specials: bool

    @property
    def ok(self) -> bool:
        return self.same_specials and self.error <= self.budget

    def __str__(self) -> str:
        verdict = "ok" if self.ok else ("TOO LARGE" if self.same_specials else "NaN or inf in other places")
        return f"{self.name:<7} error {self.error:.2e}  budget {self.budget:.2e}  {verdict}"


def reference_type(acc_dtype: str) -> np.dtype:
    """A type wider than the accumulator: float64, and for float64 the machine's long double."""
    return np.dtype(np.longdouble if acc_dtype == "float64" else np.float64)


def judge(
    name: str, got: np.ndarray, honest: Sequence[np.ndarray], reference: np.ndarray, dtype: str,
    rounded: np.ndarray | None = None,
) -> Error:  # fmt: skip
    """Compare `got` with `reference`, allowing a multiple of what the `honest` evaluations were off.

    `dtype` is the type that results are rounded to. `rounded` is an evaluation whose weights were rounded to a narrow
    type, as every kernel does that multiplies bfloat16: twice its error may take the place of the others'.
    """
    wide = reference.dtype
    finite = np.isfinite(reference)
    got = got.astype(wide)
    same = bool(
        np.array_equal(np.where(finite, 0, reference), np.where(np.isfinite(got), 0, got), equal_nan=True)
    )
    if not finite.any():
        return Error(name, 0.0, 0.0, same)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - reference)[finite].max()
        off = [np.abs(h.astype(wide) - reference)[finite] for h in honest]
    own = max(float(o[np.isfinite(o)].max(initial=0)) for o in off)
    own *= FACTOR
    if rounded is not None:
        own = max(
            own, ROUNDED * float(np.nanmax(np.abs(rounded.astype(wide) - reference)[finite], initial=0))
        )
    rounding = max(ROWS[dtype].roundoff * np.abs(reference[finite]).max(), ROWS[dtype].least)
    return Error(name, float(error), float(own + rounding), same)


def coarser(*dtypes: str) -> str:
    """The type that rounds most."""
    return max(dtypes, key=lambda name: ROWS[name].roundoff)


def rounds_weights(dtype: str) -> str | None:
    """The type that kernels may round weights to where q, k and v have `dtype`; None where they may not."""
    return dtype if dtype == "bfloat16" else None


def nudged(x: np.ndarray, acc_dtype: str, rng: np.random.Generator) -> np.ndarray:
    """`x` with every element moved by up to one rounding of the accumulate type, in float64."""
    step = 2 * ROWS[acc_dtype].roundoff
    return x.astype(np.float64) * (1 + step * rng.uniform(-1, 1, x.shape))
