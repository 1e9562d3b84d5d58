"""Where each sequence lies, and how key row j of a head is brought to where arithmetic can read it.

A `Frame` is one sequence within the arrays: dense batches have one per batch item, padded ones (`LENGTHS`) the same
but shorter, packed ones (`VARLEN`) one per pair of cumulative lengths. After `rows_of` all layouts look alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .problem import Has, Layout, Operands, Problem


@dataclass(frozen=True, slots=True)
class Frame:
    """One sequence: its lengths, its batch index, and where its first query and key lie in arrays of `*_total` rows."""

    q_len: int
    kv_len: int
    index: tuple[int, ...] = ()
    head: int = 0
    q0: int = 0
    k0: int = 0
    q_total: int = 0
    kv_total: int = 0

    @classmethod
    def whole(cls, q_len: int, kv_len: int) -> Frame:
        return cls(q_len, kv_len, q_total=q_len, kv_total=kv_len)

    @property
    def offset(self) -> int:
        """The position of query 0 among the keys: queries stand at the end."""
        return self.kv_len - self.q_len


@dataclass(frozen=True, slots=True)
class Stored:
    """Keys and values as a cache keeps them; what its method `stored` gives.

    k and v ``(B, Hkv, capacity, D or Dv)``, or with a `table` ``(B, n)`` of pages ``(pages, Hkv, page, D or Dv)``;
    `lengths` ``(B,)``: how many keys each sequence has, by position; those before `first` ``(B,)`` are gone, but for
    the first `kept` of all. With `cascade`, pages that all sequences begin with may be folded once for all. The first
    `settled` ``(B,)`` keys are what an eviction left: they come before all later ones, in an order that nobody knows;
    `dropped` ``(B,)`` is how many it took, so that ``lengths + dropped`` is the next position.

    Keys and values may be codes: int8 or float8_e4m3fn, or uint8, which holds two int4 in a byte, the first in its low
    half, so that the last axis is half as long. Then `k_scale` and `v_scale` are float32, the shape of k and v without
    the last axis (a scale per row and head), without the last two (per page and head), or with groups of neighbouring
    dims in the place of the last one; a key is its codes times their scale, rounded to the type of the queries.
    """

    k: Any
    v: Any
    lengths: Any
    table: Any = None
    first: Any = None
    kept: int = 0
    cascade: bool = False
    k_scale: Any = None
    v_scale: Any = None
    settled: Any = None
    dropped: Any = None

    def stored(self) -> Stored:
        """Itself: what a cache holds at one moment stands for keys and values too."""
        return self


def gathered(p: Problem, x: Operands) -> tuple[Problem, Operands]:
    """The same with its pages one after another and its codes decoded, in a copy of what the sequences use."""
    assert x.table is not None and x.kv_ends is not None
    page = x.k.shape[-2]  # arrays over keys keep the capacity that they have, so kv_len stays
    used = -(-int(x.kv_ends.max(initial=0)) // page)
    table = x.table[:, :used]
    dense = []
    for pages, scale in ((x.k, x.k_scale), (x.v, x.v_scale)):
        some = np.maximum(table, 0)
        rows = pages[some]  # (B, used, Hkv, page, dim)
        if scale is not None:
            rows = decoded(rows, scale[some], x.q.dtype)
        rows[table < 0] = 0
        dense.append(rows.swapaxes(1, 2).reshape(len(table), p.kv_heads, used * page, rows.shape[-1]))
    k, v = dense
    p = replace(p, layout=Layout.DENSE, kv_dtype=p.q_dtype)
    return p, replace(x, k=k, v=v, table=None, k_scale=None, v_scale=None)


def decoded(codes: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Codes ``(..., n)`` times their float32 scales ``(..., groups)``, rounded to `dtype`."""
    if (
        codes.dtype == np.uint8
    ):  # two int4 in a byte: either half is moved to the top, and down again with its sign
        halves = np.stack([codes << 4, codes], axis=-1).view(np.int8) >> 4
        codes = halves.reshape(*codes.shape[:-1], 2 * codes.shape[-1])
    numbers = codes.astype(np.float32, order="C")  # or reshaping might copy
    groups = numbers.reshape(*scale.shape, numbers.shape[-1] // max(scale.shape[-1], 1))
    with np.errstate(over="ignore", invalid="ignore"):
        groups *= scale[..., None]
        return numbers.astype(dtype, copy=False)


def frames(p: Problem, x: Operands) -> Iterator[Frame]:
    """Every sequence of the call, in order."""
    if p.layout is Layout.VARLEN:
        assert x.q_ends is not None and x.kv_ends is not None
        for q0, q1, k0, k1 in zip(x.q_ends[:-1], x.q_ends[1:], x.kv_ends[:-1], x.kv_ends[1:], strict=True):
            yield Frame(int(q1 - q0), int(k1 - k0), (), 0, int(q0), int(k0), p.q_len, p.kv_len)
        return
    if x.table is not None and not x.lead:
        yield from packed_frames(x)
        return
    for index in np.ndindex(x.lead):
        q_len = p.q_len if x.q_ends is None else int(x.q_ends[index])
        kv_len = p.kv_len if x.kv_ends is None else int(x.kv_ends[index])
        yield Frame(q_len, kv_len, index, 0, 0, 0, p.q_len, p.kv_len)


def packed_frames(x: Operands, sequences: Iterable[int] | None = None) -> Iterator[Frame]:
    """Every sequence of packed queries over pages, or some: their rows follow one another, while each has its keys from
    0 on."""
    assert x.q_ends is not None and x.kv_ends is not None and x.table is not None
    q_total, kv_total = x.q.shape[-2], x.table.shape[1] * x.k.shape[-2]
    for n in range(len(x.kv_ends)) if sequences is None else sequences:
        q0, q1 = int(x.q_ends[n]), int(x.q_ends[n + 1])
        yield Frame(q1 - q0, int(x.kv_ends[n]), (), 0, q0, 0, q_total, kv_total)


def fill_padding(p: Problem, x: Operands, rows: slice | None) -> None:
    """Fill the query rows `rows` (None: all) where some belong to no sequence; a fold then writes those that do."""
    if p.has & Has.LENGTHS:
        assert x.out is not None
        some = slice(None) if rows is None else rows
        x.out[..., some, :] = 0
        if x.lse is not None:
            x.lse[..., some] = -np.inf


def rows_of(x: np.ndarray, into: np.ndarray) -> np.ndarray:
    """A tile ``(heads, rows, dim)`` in the type of `into`, fit for BLAS: the storage itself if it already is, else
    `into` filled with a converted copy."""
    if x.dtype == into.dtype and _blas_reads(x):
        return x
    np.copyto(into, x, casting="unsafe")
    return into


def _blas_reads(x: np.ndarray) -> bool:
    """Whether a matrix product reads `x` without a copy: contiguous rows (or columns) at a positive, even pace."""
    if not x.flags.aligned:
        return False
    (rows, cols), (far, near), item = x.shape[-2:], x.strides[-2:], x.itemsize
    if near == item and far % item == 0 and far >= cols * item:
        return True
    return far == item and near % item == 0 and near >= rows * item


def order_of(model: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of `model` as they lie in memory, farthest steps first, and the permutation back.

    An axis of step 0 lies nowhere, and stays where it is numbered.
    """
    slots = [axis for axis in range(model.ndim) if model.strides[axis]]
    there = list(range(model.ndim))
    for slot, axis in zip(slots, sorted(slots, key=lambda axis: -abs(model.strides[axis])), strict=True):
        there[slot] = axis
    return tuple(there), tuple(sorted(range(model.ndim), key=there.__getitem__))


def empty_like(model: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array whose axes lie in memory in the same order as those of `model`."""
    there, back = order_of(model)
    return np.empty([shape[axis] for axis in there], dtype).transpose(back)
