"""Anything that speaks DLPack: torch, JAX and others, without importing them and without a copy.

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
    if (why := _not_its_memory(x)) is not None:
        raise TypeError(f"{name} is a {kind} that {why}")
    try:
        device = int(x.__dlpack_device__()[0])
        if device == 1:  # kDLCPU
            return np.from_dlpack(x)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise TypeError(f"{name} is a {kind} that cannot be read through DLPack: {error}") from error
    raise TypeError(f"{name} is a {kind} on DLPack device type {device}; only arrays in CPU memory are taken")


def _not_its_memory(x: Any) -> str | None:
    """Why the memory that `x` would export does not hold its values: torch hands it out all the same."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return None
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return "stands for other tensors and has no memory of its own"
    return "is a negated view of other memory; pass tensor.resolve_neg()" if x.is_neg() else None


def leave(like: Any, result: np.ndarray) -> Any:
    """`result` as an array of the framework that `like` came from."""
    namespace = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    if namespace is None:
        namespace = sys.modules[type(like).__module__.partition(".")[0]]
    return namespace.from_dlpack(result)
