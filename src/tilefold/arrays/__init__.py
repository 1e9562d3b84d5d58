"""Any array in, the same kind out. Below this folder frameworks do not exist.

A door takes an argument to a NumPy view of the same memory and a result back to the caller's kind. NumPy arrays pass
as they are; anything with `__dlpack__` passes without a copy. A framework with a door of its own adds a file here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import known, names
from . import dlpack
from . import numpy as numpy_door


def enter(name: str, x: Any) -> np.ndarray:
    """The argument `name` as a NumPy array over the same memory; TypeError says what is wrong with it."""
    if isinstance(x, np.ndarray):
        return numpy_door.enter(name, x)
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
    return result if isinstance(like, np.ndarray) else dlpack.leave(like, result)
