"""One row per storage type: how wide it is, what it accumulates in, how finely it rounds.

A dtype is recognised by its name, so that bfloat16 works without `ml_dtypes` being imported here. Scores and
sums are never narrower than float32: a product of two float16 numbers may not fit into float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """A storage type: `roundoff` is the largest relative error of one rounding, `least` its largest absolute error near
    0, where steps do not shrink any further (float16), or where smaller numbers count as 0 (the others)."""

    name: str
    itemsize: int
    accumulate: str
    roundoff: float
    least: float


ROWS = {
    row.name: row
    for row in (
        DType("float16", 2, "float32", 2.0**-11, 2.0**-25),
        DType("bfloat16", 2, "float32", 2.0**-8, 2.0**-126),
        DType("float32", 4, "float32", 2.0**-24, 2.0**-126),
        DType("float64", 8, "float64", 2.0**-53, 2.0**-1022),
    )
}


def known(dtype: np.dtype) -> bool:
    """Whether `dtype` has a row and lies in this machine's byte order."""
    return dtype.name in ROWS and dtype.isnative


def names() -> str:
    """The supported types as a phrase for error messages."""
    *most, last = ROWS
    return f"{', '.join(most)} or {last}"
