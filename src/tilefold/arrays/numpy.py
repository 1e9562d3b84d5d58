"""NumPy arrays: which ones are taken. Refused are those whose meaning would be lost without a word."""

from __future__ import annotations

import numpy as np


def enter(name: str, x: np.ndarray) -> np.ndarray:
    """`x` itself, as a plain ndarray."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array: its mask would be ignored; fill it, and pass mask="
        )
    if x.dtype.hasobject or x.dtype.names is not None:
        raise TypeError(f"{name} must hold numbers, got dtype {x.dtype}")
    return x.view(np.ndarray)
