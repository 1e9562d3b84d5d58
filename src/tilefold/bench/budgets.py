"""How much error is allowed: computed, never typed.

The reference is `naive` in a wider type than the problem's accumulator. The budget of a result is `FACTOR` times the
error that the plain method makes in the accumulate type on the very same inputs, plus one rounding to the result's
type: an honest implementation may sum in another order, not be worse in kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..dtypes import ROWS

FACTOR = 4.0


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


def judge(name: str, got: np.ndarray, plain: np.ndarray, reference: np.ndarray, dtype: str) -> Error:
    """Compare `got` with `reference`, allowing what `plain` (the same in the accumulate type) needed.

    `dtype` is the type that results are rounded to.
    """
    wide = reference.dtype
    finite = np.isfinite(reference)
    got, plain = got.astype(wide), plain.astype(wide)
    same = bool(
        np.array_equal(np.where(finite, 0, reference), np.where(np.isfinite(got), 0, got), equal_nan=True)
    )
    if not finite.any():
        return Error(name, 0.0, 0.0, same)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - reference)[finite].max()
        own = np.abs(plain - reference)[finite]
    own = own[np.isfinite(own)].max(initial=0)
    rounding = ROWS[dtype].roundoff * np.abs(reference[finite]).max()
    return Error(name, float(error), float(FACTOR * own + rounding), same)
