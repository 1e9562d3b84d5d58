"""One row per storage type: how wide it is, what it accumulates in, how finely it rounds.

A dtype is recognised by its name, so that bfloat16 works without `ml_dtypes` being imported here. Scores and
sums are never narrower than float32: a product of two float16 numbers may not fit into float16. What keys and values
are quantised to has rows of its own (`CODES`): nothing is computed in those types.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True, slots=True)
class Code:
    """A type that only keys and values of a cache are stored in: float32 scales make numbers of its codes.

    Codes lie within +-`largest`, the smallest but 0 is `least`; `array` is the NumPy type of their arrays, in which a
    byte holds `each` of them, the first one in its lowest bits.
    """

    name: str
    array: str
    each: int
    largest: float
    least: float


CODES = {
    code.name: code
    for code in (
        Code("int8", "int8", 1, 127.0, 1.0),
        Code("float8_e4m3fn", "float8_e4m3fn", 1, 448.0, 2.0**-9),
        Code("int4", "uint8", 2, 7.0, 1.0),
    )
}


@cache
def name_of(dtype: np.dtype) -> str:
    """``dtype.name``, which NumPy makes up anew each time."""
    return str(dtype.name)


def code_of(dtype: np.dtype) -> Code | None:
    """The codes that arrays of `dtype` hold; None where they hold none."""
    return next((code for code in CODES.values() if code.array == name_of(dtype)), None)


def known(dtype: np.dtype) -> bool:
    """Whether `dtype` has a row and lies in this machine's byte order."""
    return name_of(dtype) in ROWS and dtype.isnative


def names() -> str:
    """The supported types as a phrase for error messages."""
    *most, last = ROWS
    return f"{', '.join(most)} or {last}"
