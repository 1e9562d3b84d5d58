"""What one row of a cache is, and what may be appended: checked in full before anything is written.

Rows lie in two arrays, of keys and of values, or in four where they are quantised: codes, and a scale for each row and
head, or for each group of dims. So what a row becomes depends on no other row, and nothing is ever quantised again. The
fact to know: memory is always NumPy's. `like` decides only as what it is shown, for a tensor over the same memory costs
nothing; results are of the kind of the queries anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ..arrays import enter, enter_floats, leave
from ..dtypes import Code, known, names
from ..frameworks import is_tensor
from ..masks import check_cu_seqlens, integer
from ..problem import bytes_of
from .quantised import array_type, coded, groups_of, named

LINE = 64  # bytes that come from memory together
ARRAYS = ("k", "v", "k_scale", "v_scale")  # the fields of `layouts.Stored`, as they are kept
Memory = tuple[np.ndarray, ...]


class CacheFull(MemoryError):
    """A cache of fixed size has no room for what is appended; nothing was written."""


@dataclass(frozen=True, slots=True)
class New:
    """Rows that are appended, in one or more arrays ``(batch, kv_heads, S, ...)`` of which the first `counts` of each
    sequence are real, or ``(kv_heads, total, ...)``, where the sequences end at `ends[1:]`."""

    arrays: Memory
    counts: np.ndarray
    ends: np.ndarray | None

    def of(self, x: np.ndarray, n: int) -> np.ndarray:
        """The real rows of sequence n in one of the arrays, ``(kv_heads, count, ...)``."""
        if self.ends is None:
            return x[n, :, : self.counts[n]]
        return x[:, self.ends[n] : self.ends[n + 1]]

    def single(self, x: np.ndarray) -> np.ndarray:
        """Where each sequence has one row at most, these rows ``(n, kv_heads, ...)``."""
        return x[self.counts > 0, :, 0] if self.ends is None else x.swapaxes(0, 1)


@dataclass(frozen=True, slots=True)
class Rows:
    """The shape and type of the rows of a cache: keys ``(kv_heads, dim)``, values ``(kv_heads, v_dim)``."""

    kv_heads: int
    dim: int
    v_dim: int
    dtype: np.dtype  # of what is appended
    kind: Any  # an empty array of the kind that the cache is shown as
    code: Code | None  # what is kept of a number, where rows are quantised
    group: int | None
    kept: tuple[tuple[tuple[int, ...], np.dtype], ...]  # in each array, of a row and head: shape, type

    @classmethod
    def checked(
        cls, kv_heads: Any, dim: Any, v_dim: Any, dtype: Any, like: Any, quantised: Any, group: Any
    ) -> Rows:
        """From the arguments of a cache, which have these names."""
        kv_heads, dim = integer("kv_heads", kv_heads, 1), integer("dim", dim, 1)
        v_dim = dim if v_dim is None else integer("v_dim", v_dim, 1)
        if like is None:
            own = _type("float32" if dtype is None else dtype)
            kind = np.empty(0, own)
        else:
            own, kind = _like(like, dtype)
        if quantised is None:
            if group is not None:
                raise ValueError(f"group must be left out where nothing is quantised, got {group!r}")
            return cls(kv_heads, dim, v_dim, own, kind, None, None, (((dim,), own), ((v_dim,), own)))
        code = named("quantised", quantised)
        if own == np.float64:
            raise TypeError("dtype must be float16, bfloat16 or float32 for a quantised cache, got float64")
        sizes = (("k", dim), ("v", v_dim))
        groups = [groups_of(name, n, code, group)[0] for name, n in sizes]
        codes, scale = array_type(code.array, kind), np.dtype(np.float32)
        kept: list[tuple[tuple[int, ...], np.dtype]] = [((n // code.each,), codes) for _, n in sizes]
        kept += [(() if group is None else (n,), scale) for n in groups]
        return cls(kv_heads, dim, v_dim, own, kind, code, group, tuple(kept))

    @property
    def nbytes(self) -> int:
        """Of one position, keys and values, scales included."""
        return self.kv_heads * sum(prod(shape) * dtype.itemsize for shape, dtype in self.kept)

    @property
    def state(self) -> dict[str, Any]:
        """The arguments of `checked` but for the type, for a file."""
        return {
            "kv_heads": self.kv_heads,
            "dim": self.dim,
            "v_dim": self.v_dim,
            "quantised": None if self.code is None else self.code.name,
            "group": self.group,
        }

    def empty(self, *lead: int) -> Memory:
        """Memory for keys and values, ``(*lead, dim)`` and ``(*lead, v_dim)``, or for codes and scales."""
        return tuple(lined((*lead, *shape), dtype) for shape, dtype in self.kept)

    def enter(self, k: Any, v: Any, batch: int, lengths: Any, cu_seqlens: Any) -> New:
        """New keys and values, checked."""
        arrays = {name: enter_floats(name, x) for name, x in (("k", k), ("v", v))}
        lead = (
            {"kv_heads": self.kv_heads}
            if cu_seqlens is not None
            else {"batch": batch, "kv_heads": self.kv_heads}
        )
        rows = "S" if cu_seqlens is None else "total"
        for (name, x), dim in zip(arrays.items(), (self.dim, self.v_dim), strict=True):
            if x.ndim != len(lead) + 2 or x.shape[:-2] != tuple(lead.values()) or x.shape[-1] != dim:
                raise ValueError(
                    f"{name} must have shape ({', '.join(lead)}, {rows}, dim) = "
                    f"({', '.join(map(str, lead.values()))}, {rows}, {dim}), got {x.shape}"
                )
            if x.dtype != self.dtype:
                raise TypeError(f"{name} must be {self.dtype.name} as the cache is, got {x.dtype.name}")
        k, v = arrays.values()
        if k.shape[-2] != v.shape[-2]:
            raise ValueError(
                f"k and v must have the same number of rows, got {k.shape[-2]} and {v.shape[-2]}"
            )
        if cu_seqlens is None:
            return New((k, v), counted(lengths, batch, k.shape[2]), None)
        if lengths is not None:
            raise TypeError("cu_seqlens and lengths exclude each other: packed rows have no padding")
        ends = ends_of("cu_seqlens", cu_seqlens, k.shape[1], batch)
        return New((k, v), np.diff(ends), ends)

    def stored(self, new: New) -> New:
        """What is written of new rows: they, or their codes and scales. Padding may hold anything, and is left out."""
        if self.code is None:
            return new
        most = int(new.counts.max(initial=0))
        padded = new.ends is None and not (new.counts == most).all()
        real = (np.arange(most) < new.counts[:, None])[:, None, :, None]
        codes, scales = [], []
        for name, x, (_, dtype) in zip("kv", new.arrays, self.kept, strict=False):
            rows = x[:, :, :most] if new.ends is None else x
            rows = np.where(real, rows, x.dtype.type(0)) if padded else rows
            each, scale = coded(name, rows, self.code, self.group, dtype)
            codes.append(each)
            scales.append(scale)
        return replace(new, arrays=(*codes, *scales))

    def shown(self, memory: Memory, name: str) -> Any:
        """An array of the cache in the kind of `like`; None for scales where there are none."""
        at = ARRAYS.index(name)
        return leave(self.kind, memory[at]) if at < len(memory) else None

    def __str__(self) -> str:
        kept = self.dtype.name if self.code is None else f"{self.code.name} of {self.dtype.name}"
        return f"kv_heads={self.kv_heads}, dim={self.dim}, v_dim={self.v_dim}, {kept}"


def by_name(memory: Memory) -> dict[str, Any]:
    """The arrays of a cache as arguments of `layouts.Stored`."""
    return dict(zip(ARRAYS, memory, strict=False))


def _like(like: Any, dtype: Any) -> tuple[np.dtype, Any]:
    """The type of the argument `like`, and an empty array of its kind."""
    if not isinstance(like, np.ndarray) and not is_tensor(like):
        raise TypeError(f"like must be a NumPy array or a tensor, got {type(like).__name__}")
    own = enter_floats("like", like).dtype
    if dtype is not None and _type(dtype) != own:
        raise TypeError(f"dtype must be that of like, {own.name}, or be left out; got {dtype!r}")
    return own, leave(like, np.empty(0, own))


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


def counted(lengths: Any, batch: int, rows: int, *, name: str = "lengths", of: str = "k and v") -> np.ndarray:
    """How many of `rows` rows are real for each sequence: the argument `lengths` of an append, or another one."""
    if lengths is None:
        return np.full(batch, rows, np.int64)
    own = per_sequence(name, lengths, batch)
    if own.size and own.max() > rows:
        raise ValueError(f"{name} must be at most {rows}, the rows of {of}; got {own.max()}")
    return own


def ends_of(name: str, given: Any, total: int, batch: int) -> np.ndarray:
    """Where the sequences of packed rows end: a private copy of the argument `name`, checked."""
    ends = check_cu_seqlens(name, np.asarray(given) if isinstance(given, list) else enter(name, given), total)
    if len(ends) != batch + 1:
        raise ValueError(f"{name} must count the {batch} sequences of the cache, got {len(ends) - 1}")
    return ends


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


def lined(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array that begins with a line of memory: of one that does not, each row takes one line more."""
    size = bytes_of(shape, dtype)
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size].view(dtype).reshape(shape)
