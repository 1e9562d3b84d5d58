"""Packed queries over a cache: those of sequences that have equally many become a batch, and each batch is one fold.

Pages are found by the place of a sequence in a batch, so packed rows must come to lie in one. Nothing is padded:
decoding steps beside a chunk of a prompt are two batches. Where the sequences of a batch follow one another, as
decoding steps do, their rows are read and written where they lie; else they are copied. The fact to know: a mask or a
bias is one matrix here, its rows packed as the queries are, its columns the positions in a cache, of every sequence
alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..layouts import Frame, packed_frames
from ..masks import Dense, Mask, Panel
from ..problem import Operands


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that have equally many queries: which ones, and their packed rows (batch, q_len), a slice of all where
    they lie in a row."""

    sequences: np.ndarray
    q_len: int
    rows: slice | np.ndarray

    def view(self, x: np.ndarray) -> np.ndarray | None:
        """Rows of ``(heads, total, ...)`` as ``(batch, heads, q_len, ...)``; None where that would be a copy. (To split
        an axis never is one.)"""
        if not isinstance(self.rows, slice):
            return None
        shape = len(x), len(self.sequences), self.q_len, *x.shape[2:]
        return x[:, self.rows].reshape(shape).swapaxes(0, 1)

    def taken(self, x: np.ndarray) -> np.ndarray:
        """The same, copied where it must be; what is broadcast stays so."""
        if not isinstance(self.rows, np.ndarray):
            seen = self.view(x)
            assert seen is not None
            return seen
        stored = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.strides)]
        some = stored[:, self.rows if stored.shape[1] == x.shape[1] else self.rows * 0]
        return np.broadcast_to(some, (len(x), *self.rows.shape, *x.shape[2:])).swapaxes(0, 1)


def batches(ends: np.ndarray) -> Iterator[Batch]:
    """The batches of sequences packed one after another, of those with the fewest queries first; one at least."""
    counts = np.diff(ends)
    for q_len in np.unique(counts).tolist() or [0]:
        sequences = np.flatnonzero(counts == q_len)
        starts = ends[sequences]
        rows: slice | np.ndarray = starts[:, None] + np.arange(q_len)
        if (np.diff(starts) == q_len).all():
            first = int(starts[0]) if len(starts) else 0
            rows = slice(first, first + len(starts) * q_len)
        yield Batch(sequences, q_len, rows)


def operands(x: Operands, batch: Batch) -> Operands:
    """What a batch of the packed call `x` is made of, but for its results."""
    assert x.table is not None and x.kv_ends is not None
    count, heads = len(batch.sequences), len(x.q)
    mask = x.mask
    if isinstance(mask, Dense):
        mask = Dense(batch.taken(mask.cells_of((), heads, x.q.shape[1], x.table.shape[1] * x.k.shape[-2])))
    elif mask is not None:
        mask = _OfPacked(mask, list(packed_frames(x, batch.sequences.tolist())))
    return replace(
        x,
        q=batch.taken(x.q),
        out=None,
        lse=None,
        mask=mask,
        bias=None if x.bias is None else batch.taken(x.bias),
        alibi=None if x.alibi is None else np.broadcast_to(x.alibi, (count, heads)),
        sinks=None if x.sinks is None else np.broadcast_to(x.sinks, (count, heads)),
        q_ends=None,
        kv_ends=x.kv_ends[batch.sequences],
        table=x.table[batch.sequences],
    )


def place(x: Operands, part: Operands, batch: Batch) -> None:
    """Give the fold of a batch arrays for its results: those of the packed call where they can be seen as a batch."""
    assert x.out is not None
    for name, whole in (("out", x.out), ("lse", x.lse)):
        if whole is None:
            continue
        seen = batch.view(whole)
        if seen is None:
            shape = len(whole), len(batch.sequences), batch.q_len, *whole.shape[2:]
            seen = np.empty(shape, whole.dtype).swapaxes(0, 1)
        setattr(part, name, seen)


def give(x: Operands, part: Operands, batch: Batch) -> None:
    """Bring what a batch's fold wrote to where the packed call has it."""
    if isinstance(batch.rows, slice):
        return
    assert x.out is not None and part.out is not None
    x.out[:, batch.rows] = part.out.swapaxes(0, 1)
    if x.lse is not None and part.lse is not None:
        x.lse[:, batch.rows] = part.lse.swapaxes(0, 1)


class _OfPacked(Mask):
    """A mask of packed queries as a batch of some of its sequences sees it."""

    by_batch = True

    def __init__(self, mask: Mask, frames: list[Frame]) -> None:
        self.mask, self.frames = mask, frames
        self.by_head, self.may_need_bits, self.arrays = mask.by_head, mask.may_need_bits, mask.arrays

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        return self.mask.panel(replace(self.frames[frame.index[0]], head=frame.head), rows, keys)
