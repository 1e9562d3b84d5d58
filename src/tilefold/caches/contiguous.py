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
from .kept import chosen, cut, memory, unmoved
from .rotary import Rotary, keys_turned
from .rows import CacheFull, New, Rows, bits, by_name, shortened

LEAST = 16  # rows of the first growth


class KVCache:
    """Keys and values of a batch of sequences, ``(batch, kv_heads, capacity, dim)``.

    Args:
        batch: how many sequences.
        kv_heads, dim, v_dim: key heads, and the sizes of their keys and values (`v_dim` is `dim` if left out).
        capacity: the most rows that each sequence can have; None grows by doubling.
        dtype: float16, bfloat16, float32 or float64; float32 if neither this nor `like` is given.
        like: a NumPy array or a tensor: the cache has its type, and `k` and `v` are of its kind.
        quantised: "int8", "float8_e4m3fn" or "int4": rows are kept as codes and float32 scales, as `quantise` makes
            them of each (see docs/quantised.md); they must be finite then. None keeps them as they are.
        group: how many neighbouring dims of a row share a scale; None: all of them.

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
        capacity: int | None = None, dtype: Any = None, like: Any = None, quantised: str | None = None,
        group: int | None = None,
    ) -> None:  # fmt: skip
        self._rows = Rows.checked(kv_heads, dim, v_dim, dtype, like, quantised, group)
        self._batch = integer("batch", batch, 1)
        self._grows = capacity is None
        room = 0 if capacity is None else integer("capacity", capacity, 0)
        self._memory = self._rows.empty(self._batch, self._rows.kv_heads, room)
        self._lengths, self._dropped, self._settled = np.zeros((3, self._batch), np.int64)
        self._evicted = False

    def append(
        self, k: Any, v: Any, lengths: Any = None, *, cu_seqlens: Any = None, rotary: Rotary | None = None
    ) -> None:
        """Add rows to the end of every sequence.

        Args:
            k, v: ``(batch, kv_heads, S, dim or v_dim)``.
            lengths: how many of the S rows are new, one integer or ``(batch,)``; the rest is padding. By default
                all are.
            cu_seqlens: cumulative lengths of sequences whose rows come packed, k and v ``(kv_heads, total, dim or
                v_dim)``, as `tilefold.attention` takes `cu_seqlens_q`.
            rotary: a `Rotary`, which turns the keys to the positions that they take; without one they are stored as
                they come.

        Raises:
            CacheFull: beyond a fixed capacity. As after any other error, nothing was written.
        """
        new = self._rows.enter(k, v, self._batch, lengths, cu_seqlens)
        new = self._rows.stored(keys_turned(rotary, new, self.seen_tokens))
        ends = self._lengths + new.counts
        if (most := max(ends.tolist())) > self.capacity:
            if not self._grows:
                raise CacheFull(f"the capacity of the cache is {self.capacity} rows, and {most} are needed")
            self._grow(most)
        for mine, rows in zip(self._memory, new.arrays, strict=True):
            self._write(bits(mine), bits(rows), new)
        self._lengths = ends

    def truncate(self, lengths: Any) -> None:
        """Forget what comes after the first `lengths` rows, one integer or ``(batch,)``: tokens that were guessed.

        What `keep` left can be forgotten as a whole only: ValueError for a length within it.
        """
        to = shortened(lengths, self._lengths)
        cut(to, self._settled)
        self._lengths = to
        self._dropped, self._settled = (np.where(to > 0, x, 0) for x in (self._dropped, self._settled))

    def keep(self, keys: Any) -> None:
        """Forget every row but these, which move up in their order: see `tilefold.eviction`, which chooses them.

        Args:
            keys: ``(batch, kv_heads, n)``, or ``(batch, 1, n)`` for all heads: the rows that stay, ascending, as many
                in each head of a sequence; -1 at the end where a sequence keeps fewer than n.

        Lengths and places then count what is left. `seen_tokens` goes on counting what was appended.
        """
        keys, counts = chosen(keys, self._lengths, self._rows.kv_heads)
        heads = np.arange(self._rows.kv_heads)[:, None]
        for mine in memory(self.stored()):
            for rows, own, count in zip(mine, keys, counts.tolist(), strict=True):
                first = unmoved(own[:, :count])
                rows[:, first:count] = rows[heads, own[:, first:count]]
        fewer = counts < self._lengths
        self._dropped = self._dropped + self._lengths - counts
        self._settled = np.where(fewer, counts, self._settled)
        self._lengths, self._evicted = counts, bool(self._settled.any())

    def reset(self) -> None:
        """Forget every row, and keep the memory."""
        self._lengths, self._dropped, self._settled = np.zeros((3, self._batch), np.int64)
        self._evicted = False

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write the rows in use to a file, which is there whole or not at all (see `tilefold.caches.snapshot`)."""
        from .snapshot import write

        rows = self._rows
        state = {
            "batch": self._batch,
            **rows.state,
            "capacity": None if self._grows else self.capacity,
            "lengths": self._lengths.tolist(),
            "dropped": self._dropped.tolist(),
            "settled": self._settled.tolist(),
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
                **file.rows(like),
            )
            lengths = np.array(file.counts("lengths", cache._batch), np.int64)
            if (most := int(lengths.max())) > cache.capacity:
                file.expect(cache._grows, "its sequences are longer than its capacity")
                cache._grow(most)
            cache._lengths = lengths
            if "dropped" in file.state:
                cache._dropped, cache._settled = (
                    np.array(file.counts(name, cache._batch), np.int64) for name in ("dropped", "settled")
                )
                file.expect(bool((cache._settled <= lengths).all()), "more rows were kept than there are")
                cache._evicted = bool(cache._settled.any())
            file.fill(cache._pieces(), int(lengths.sum()) * cache._rows.nbytes)
        return cache

    def stored(self) -> Stored:
        """What `tilefold.attention` reads."""
        evicted: dict[str, Any] = (
            {"settled": self._settled, "dropped": self._dropped} if self._evicted else {}
        )
        return Stored(lengths=self._lengths, **by_name(self._memory), **evicted)

    @property
    def k(self) -> Any:
        """The memory of the keys ``(batch, kv_heads, capacity, dim)``, or of their codes; rows from each length on hold
        anything."""
        return self._rows.shown(self._memory, "k")

    @property
    def v(self) -> Any:
        """The memory of the values ``(batch, kv_heads, capacity, v_dim)``, or of their codes."""
        return self._rows.shown(self._memory, "v")

    @property
    def k_scale(self) -> Any:
        """The memory of the scales of keys ``(batch, kv_heads, capacity)``, with a `group` ``(..., dim / group)``; None
        where nothing is quantised."""
        return self._rows.shown(self._memory, "k_scale")

    @property
    def v_scale(self) -> Any:
        """The same of the values."""
        return self._rows.shown(self._memory, "v_scale")

    @property
    def lengths(self) -> np.ndarray:
        """How many rows each sequence has, ``(batch,)``; a copy."""
        return self._lengths.copy()

    @property
    def seen_tokens(self) -> np.ndarray:
        """How many rows each sequence was given, ``(batch,)``, those that `keep` dropped included: the position of the
        next token, where `lengths` is its place."""
        return self._lengths + self._dropped

    @property
    def capacity(self) -> int:
        """How many rows there is memory for, per sequence."""
        return int(self._memory[0].shape[2])

    @property
    def nbytes(self) -> int:
        """The memory of keys and values, scales included."""
        return sum(x.nbytes for x in self._memory)

    def __repr__(self) -> str:
        lengths = f"rows {self._lengths.min()} to {self._lengths.max()} of {self.capacity}"
        return f"KVCache(batch={self._batch}, {self._rows}, {lengths})"

    def _grow(self, rows: int) -> None:
        memory = self._rows.empty(self._batch, self._rows.kv_heads, max(LEAST, 1 << (rows - 1).bit_length()))
        used = int(self._lengths.max())
        for old, grown in zip(self._memory, memory, strict=True):
            bits(grown)[:, :, :used] = bits(old)[:, :, :used]
        self._memory = memory

    def _write(self, mine: np.ndarray, rows: np.ndarray, new: New) -> None:
        at, most = self._lengths, int(new.counts.max())
        if new.ends is None and (at == at[0]).all() and (new.counts == most).all():
            mine[:, :, at[0] : at[0] + most] = rows[:, :, :most]
        elif most == 1:
            some = np.flatnonzero(new.counts)
            mine[some, :, at[some]] = new.single(rows)
        else:
            for n, (start, count) in enumerate(zip(at.tolist(), new.counts.tolist(), strict=True)):
                mine[n, :, start : start + count] = new.of(rows, n)

    def _pieces(self) -> Iterator[np.ndarray]:
        """The memory in use, in the order of a file."""
        for mine in self._memory:
            for n, length in enumerate(self._lengths.tolist()):
                yield from mine[n, :, :length]
