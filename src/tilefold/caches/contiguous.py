"""A cache for a batch that starts and ends together: every sequence has its own stretch of `capacity` rows.

The fact to know: the shape that a call sees is the capacity, and lengths are data. So the plan of a decoding step is
made once and not at each step; only growing, which doubles the capacity, makes another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..layouts import Stored
from ..masks import integer
from .rows import CacheFull, Rows, bits, counted, shortened

LEAST = 16  # rows of the first growth


class KVCache:
    """Keys and values of a batch of sequences, ``(batch, kv_heads, capacity, dim)``.

    Args:
        batch: how many sequences.
        kv_heads, dim, v_dim: key heads, and the sizes of their keys and values (`v_dim` is `dim` if left out).
        capacity: the most rows that each sequence can have; None grows by doubling.
        dtype: float16, bfloat16, float32 or float64; float32 if neither this nor `like` is given.
        like: a NumPy array or a tensor: the cache has its type, and `k` and `v` are of its kind.

    In `tilefold.attention` it stands for keys and values at once; queries are ``(batch, heads, Sq, dim)`` and stand at
    the end of each sequence. The result has the bits that plain arrays give. One thread at a time may change a cache,
    and none may while a call reads it. What is stored carries no gradient.

    >>> k, v = np.random.default_rng(0).normal(size=(2, 1, 2, 5, 8)).astype(np.float32)
    >>> cache = KVCache(batch=1, kv_heads=2, dim=8)
    >>> cache.append(k[:, :, :4], v[:, :, :4])
    >>> cache.append(k[:, :, 4:], v[:, :, 4:])
    >>> q = np.ones((1, 4, 1, 8), np.float32)
    >>> bool((tf.attention(q, cache, causal=True) == tf.attention(q, k, v, causal=True)).all())
    True
    """

    def __init__(
        self, batch: int, kv_heads: int, dim: int, v_dim: int | None = None, *,
        capacity: int | None = None, dtype: Any = None, like: Any = None,
    ) -> None:  # fmt: skip
        self._rows = Rows.checked(kv_heads, dim, v_dim, dtype, like)
        self._batch = integer("batch", batch, 1)
        self._grows = capacity is None
        room = 0 if capacity is None else integer("capacity", capacity, 0)
        self._k, self._v = self._rows.empty(self._batch, self._rows.kv_heads, room)
        self._lengths = np.zeros(self._batch, np.int64)

    def append(self, k: Any, v: Any, lengths: Any = None) -> None:
        """Add rows to the end of every sequence.

        Args:
            k, v: ``(batch, kv_heads, S, dim or v_dim)``.
            lengths: how many of the S rows are new, one integer or ``(batch,)``; the rest is padding. By default
                all are.

        Raises:
            CacheFull: beyond a fixed capacity. As after any other error, nothing was written.
        """
        k, v = self._rows.enter(k, v, self._batch)
        new = counted(lengths, self._batch, k.shape[2])
        ends = self._lengths + new
        if (most := max(ends.tolist())) > self.capacity:
            if not self._grows:
                raise CacheFull(f"the capacity of the cache is {self.capacity} rows, and {most} are needed")
            self._grow(most)
        starts, counts = self._lengths.tolist(), new.tolist()
        for mine, rows in ((self._k, k), (self._v, v)):
            _write(bits(mine), bits(rows), starts, counts)
        self._lengths = ends

    def truncate(self, lengths: Any) -> None:
        """Forget what comes after the first `lengths` rows, one integer or ``(batch,)``: tokens that were guessed."""
        self._lengths = shortened(lengths, self._lengths)

    def reset(self) -> None:
        """Forget every row, and keep the memory."""
        self._lengths = np.zeros(self._batch, np.int64)

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write the rows in use to a file, which is there whole or not at all (see `tilefold.caches.snapshot`)."""
        from .snapshot import write

        rows = self._rows
        state = {
            "batch": self._batch,
            "kv_heads": rows.kv_heads,
            "dim": rows.dim,
            "v_dim": rows.v_dim,
            "capacity": None if self._grows else self.capacity,
            "lengths": self._lengths.tolist(),
        }
        write(path, "KVCache", rows.dtype, state, self._pieces(), int(self._lengths.sum()) * rows.nbytes)

    @classmethod
    def restore(cls, path: str | os.PathLike[str], *, like: Any = None) -> KVCache:
        """The cache of a file that `snapshot` wrote; ValueError says what is wrong with one that it did not."""
        from .snapshot import Reader

        with Reader(path, "KVCache") as file:
            cache = cls(
                *file.integers("batch", "kv_heads", "dim", "v_dim"),
                capacity=file.limit("capacity"),
                dtype=file.dtype(like),
                like=like,
            )
            lengths = np.array(file.counts("lengths", cache._batch), np.int64)
            if (most := int(lengths.max())) > cache.capacity:
                file.expect(cache._grows, "its sequences are longer than its capacity")
                cache._grow(most)
            cache._lengths = lengths
            file.fill(cache._pieces(), int(lengths.sum()) * cache._rows.nbytes)
        return cache

    def stored(self) -> Stored:
        """What `tilefold.attention` reads."""
        return Stored(self._k, self._v, self._lengths)

    @property
    def k(self) -> Any:
        """The memory of the keys ``(batch, kv_heads, capacity, dim)``; rows from each length on hold anything."""
        return self._rows.shown(self._k)

    @property
    def v(self) -> Any:
        """The memory of the values ``(batch, kv_heads, capacity, v_dim)``."""
        return self._rows.shown(self._v)

    @property
    def lengths(self) -> np.ndarray:
        """How many rows each sequence has, ``(batch,)``; a copy."""
        return self._lengths.copy()

    @property
    def capacity(self) -> int:
        """How many rows there is memory for, per sequence."""
        return int(self._k.shape[2])

    @property
    def nbytes(self) -> int:
        """The memory of keys and values."""
        return self._k.nbytes + self._v.nbytes

    def __repr__(self) -> str:
        r = self._rows
        return (
            f"KVCache(batch={self._batch}, kv_heads={r.kv_heads}, dim={r.dim}, v_dim={r.v_dim}, "
            f"{r.dtype.name}, rows {self._lengths.min()} to {self._lengths.max()} of {self.capacity})"
        )

    def _grow(self, rows: int) -> None:
        k, v = self._rows.empty(self._batch, self._rows.kv_heads, max(LEAST, 1 << (rows - 1).bit_length()))
        used = int(self._lengths.max())
        for old, grown in ((self._k, k), (self._v, v)):
            bits(grown)[:, :, :used] = bits(old)[:, :, :used]
        self._k, self._v = k, v

    def _pieces(self) -> Iterator[np.ndarray]:
        """The memory in use, in the order of a file."""
        for mine in (self._k, self._v):
            for n, length in enumerate(self._lengths.tolist()):
                yield from mine[n, :, :length]


def _write(mine: np.ndarray, rows: np.ndarray, starts: list[int], counts: list[int]) -> None:
    """So many rows of each sequence to where it ends."""
    start, most = starts[0], max(counts)
    if min(counts) == most and starts.count(start) == len(starts):
        mine[:, :, start : start + most] = rows[:, :, :most]
    elif most == 1:
        some = np.flatnonzero(counts)
        mine[some, :, np.array(starts)[some]] = rows[some, :, 0]
    else:
        for n, (start, count) in enumerate(zip(starts, counts, strict=True)):
            mine[n, :, start : start + count] = rows[n, :, :count]
