"""What one row of a cache is, and what may be appended: checked in full before anything is written.

The fact to know: memory is always NumPy's. `like` decides only as what it is shown, for a tensor over the same memory
costs nothing; results are of the kind of the queries anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import enter, enter_floats, leave
from ..dtypes import known, names
from ..frameworks import is_tensor
from ..masks import integer
from ..problem import bytes_of


class CacheFull(MemoryError):
    """A cache of fixed size has no room for what is appended; nothing was written."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The shape and type of the rows of a cache: keys ``(kv_heads, dim)``, values ``(kv_heads, v_dim)``."""

    kv_heads: int
    dim: int
    v_dim: int
    dtype: np.dtype
    kind: Any  # an empty array of the kind that the cache is shown as

    @classmethod
    def checked(cls, kv_heads: Any, dim: Any, v_dim: Any, dtype: Any, like: Any) -> Rows:
        """From the arguments of a cache, which have these names."""
        kv_heads, dim = integer("kv_heads", kv_heads, 1), integer("dim", dim, 1)
        v_dim = dim if v_dim is None else integer("v_dim", v_dim, 1)
        if like is None:
            own = _type("float32" if dtype is None else dtype)
            return cls(kv_heads, dim, v_dim, own, np.empty(0, own))
        if not isinstance(like, np.ndarray) and not is_tensor(like):
            raise TypeError(f"like must be a NumPy array or a tensor, got {type(like).__name__}")
        own = enter_floats("like", like).dtype
        if dtype is not None and _type(dtype) != own:
            raise TypeError(f"dtype must be that of like, {own.name}, or be left out; got {dtype!r}")
        return cls(kv_heads, dim, v_dim, own, leave(like, np.empty(0, own)))

    @property
    def nbytes(self) -> int:
        """Of one position, keys and values."""
        return self.kv_heads * (self.dim + self.v_dim) * self.dtype.itemsize

    def empty(self, *lead: int) -> tuple[np.ndarray, np.ndarray]:
        """Memory for keys and values, ``(*lead, dim)`` and ``(*lead, v_dim)``."""
        shapes = (*lead, self.dim), (*lead, self.v_dim)
        for shape in shapes:
            bytes_of(shape, self.dtype)
        return np.empty(shapes[0], self.dtype), np.empty(shapes[1], self.dtype)

    def enter(self, k: Any, v: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """New keys and values ``(batch, kv_heads, S, dim or v_dim)``, checked."""
        arrays = {name: enter_floats(name, x) for name, x in (("k", k), ("v", v))}
        for (name, x), dim in zip(arrays.items(), (self.dim, self.v_dim), strict=True):
            if x.ndim != 4 or x.shape[:2] != (batch, self.kv_heads) or x.shape[3] != dim:
                raise ValueError(
                    f"{name} must have shape (batch, kv_heads, S, dim) = ({batch}, {self.kv_heads}, S, {dim}), "
                    f"got {x.shape}"
                )
            if x.dtype != self.dtype:
                raise TypeError(f"{name} must be {self.dtype.name} as the cache is, got {x.dtype.name}")
        k, v = arrays.values()
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"k and v must have the same number of rows, got {k.shape[2]} and {v.shape[2]}")
        return k, v

    def shown(self, x: np.ndarray) -> Any:
        """Memory of the cache in the kind of `like`."""
        return leave(self.kind, x)


def _type(dtype: Any) -> np.dtype:
    """A NumPy type from a type, a name or a tensor's type."""
    asked = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
    try:
        own: np.dtype = np.dtype(asked)
    except TypeError:
        hint = "; bfloat16 is known once ml_dtypes is imported" if asked == "bfloat16" else ""
        raise TypeError(f"dtype must be {names()}, got {dtype!r}{hint}") from None
    if not known(own):
        raise TypeError(f"dtype must be {names()}, got {own}")
    return own


def per_sequence(name: str, given: Any, batch: int) -> np.ndarray:
    """Integers >= 0, one for each of `batch` sequences or one for all, as a private copy."""
    array = np.asarray(given) if isinstance(given, (int, list, tuple, np.integer)) else enter(name, given)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.shape not in ((), (batch,)):
        raise ValueError(f"{name} must be one integer or have shape ({batch},), got {array.shape}")
    own = np.empty(batch, np.int64)
    own[...] = array
    if own.size and own.min() < 0:
        raise ValueError(f"{name} must be >= 0, got {own.min()}")
    return own


def counted(lengths: Any, batch: int, rows: int) -> np.ndarray:
    """How many of `rows` rows are new for each sequence: the argument `lengths` of an append."""
    if lengths is None:
        return np.full(batch, rows, np.int64)
    own = per_sequence("lengths", lengths, batch)
    if own.size and own.max() > rows:
        raise ValueError(f"lengths must be at most {rows}, the rows of k and v; got {own.max()}")
    return own


def shortened(lengths: Any, now: np.ndarray) -> np.ndarray:
    """The argument `lengths` of a truncation: none of them longer than `now`."""
    own = per_sequence("lengths", lengths, len(now))
    if (longer := own > now).any():
        n = int(longer.argmax())
        raise ValueError(f"lengths must not exceed what is stored: {own[n]} for {now[n]} at index {n}")
    return own


def bits(x: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, which are copied as they are, and fast in any type."""
    return x.view(f"u{x.itemsize}")
