"""Anything that speaks DLPack: JAX and others, without importing them and without a copy.

The framework that made an array is found by the module of its type, which is loaded already since the array exists.
NumPy has no bfloat16 in DLPack, so such arrays cannot pass this door.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def speaks(x: Any) -> bool:
    return hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")


def enter(name: str, x: Any) -> np.ndarray:
    """A NumPy view of `x`."""
    kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
    try:
        device = int(x.__dlpack_device__()[0])
        if device == 1:  # kDLCPU
            return np.from_dlpack(x)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise TypeError(f"{name} is a {kind} that cannot be read through DLPack: {error}") from error
    raise TypeError(f"{name} is a {kind} on DLPack device type {device}; only arrays in CPU memory are taken")


def leave(like: Any, result: np.ndarray) -> Any:
    """`result` as an array of the framework that `like` came from."""
    namespace = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    if namespace is None:
        namespace = sys.modules[type(like).__module__.partition(".")[0]]
    return namespace.from_dlpack(result)
