"""Any array in, the same kind out. Below this folder frameworks do not exist.

A door takes an argument to a NumPy view of the same memory and a result back to the caller's kind. NumPy arrays pass
as they are; anything with `__dlpack__` passes without a copy. A framework with a door of its own has a folder here,
imported when its first array comes: see `torch`, which differentiates and compiles too.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ..dtypes import known, names
from ..frameworks import is_tensor
from . import dlpack
from . import numpy as numpy_door

_torch: ModuleType | None = None


def door_of(x: Any) -> ModuleType | None:
    """The framework's own door for `x`, with `known` and `attention` of its own; None where there is none."""
    global _torch
    if not is_tensor(x):
        return None
    if _torch is None:
        from . import torch as _torch
    return _torch


def enter(name: str, x: Any) -> np.ndarray:
    """The argument `name` as a NumPy array over the same memory; TypeError says what is wrong with it."""
    if isinstance(x, np.ndarray):
        return numpy_door.enter(name, x)
    if (door := door_of(x)) is not None:
        array: np.ndarray = door.tensors.enter(name, x)
        return array
    if dlpack.speaks(x):
        return numpy_door.enter(name, dlpack.enter(name, x))
    raise TypeError(
        f"{name} must be an array (NumPy, or anything with __dlpack__), got {type(x).__name__}; "
        "lists become arrays with numpy.asarray"
    )


def enter_floats(name: str, x: Any) -> np.ndarray:
    """Like `enter`, for arrays whose type must have a row in `dtypes`."""
    array = enter(name, x)
    if not known(array.dtype):
        order = " in another byte order" if not array.dtype.isnative else ""
        raise TypeError(f"{name} must be {names()}, got {array.dtype.name}{order}")
    return array


def leave(like: Any, result: np.ndarray) -> Any:
    """`result` in the kind of the argument `like`."""
    if isinstance(like, np.ndarray):
        return result
    if (door := door_of(like)) is not None:
        return door.tensors.leave(result)
    return dlpack.leave(like, result)
