"""Which rows of a cache stay when others are evicted: what may be asked for, and how rows move up.

Rows are moved as they are, so what was encoded or quantised stays what it was. The fact to know: after it, a row's
place in the cache is no position any more, and each head may hold other positions than its neighbour. So a sequence
remembers how many rows it lost (`dropped`) and how long the eviction left it (`settled`): below that it cannot be
truncated, and above it rows are in order again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import enter
from ..layouts import Stored
from .rows import bits


def chosen(keys: Any, lengths: np.ndarray, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """The argument `keys` of a cache's `keep`: rows ``(batch, kv_heads, n)``, and how many of each sequence stay."""
    given = enter("keys", keys)
    batch = len(lengths)
    if given.dtype.kind not in "iu":
        raise TypeError(f"keys must be integers, got {given.dtype}")
    if given.ndim != 3 or given.shape[0] != batch or given.shape[1] not in (1, kv_heads):
        raise ValueError(
            f"keys must have shape ({batch}, {kv_heads}, n), or ({batch}, 1, n) for all heads; got {given.shape}"
        )
    own = np.array(np.broadcast_to(given, (batch, kv_heads, given.shape[2])), np.int64)
    counts = (own >= 0).sum(axis=-1)
    for n, length in enumerate(lengths.tolist()):
        of_heads = counts[n]
        if (of_heads != of_heads[0]).any():
            raise ValueError(
                f"keys must keep as many in each head of a sequence, got {of_heads.tolist()} in sequence {n}"
            )
        if length and not of_heads[0]:
            raise ValueError(
                f"keys must keep something of sequence {n}; truncate and reset forget everything"
            )
        rows = own[n, :, : of_heads[0]]
        if (own[n, :, of_heads[0] :] != -1).any() or (rows < 0).any() or (np.diff(rows, axis=-1) < 1).any():
            raise ValueError(f"keys must ascend, with -1 only at the end, but do not in sequence {n}")
        if rows.size and rows.max() >= length:
            raise ValueError(f"keys must lie within the {length} of sequence {n}, got {rows.max()}")
    return own, counts[:, 0]


def unmoved(rows: np.ndarray) -> int:
    """How many rows ``(kv_heads, n)`` at the start stay where they are, in every head."""
    still = (rows == np.arange(rows.shape[1])).all(axis=0)
    return len(still) if still.all() else int(still.argmin())


def cut(to: np.ndarray, settled: np.ndarray) -> None:
    """ValueError where a truncation would end within what an eviction left, whose order nobody knows."""
    if (inside := np.flatnonzero((to > 0) & (to < settled))).size:
        n = int(inside[0])
        raise ValueError(
            f"lengths must not lie within what an eviction left, 1 to {settled[n] - 1} at index {n}; got {to[n]}"
        )


def memory(stored: Stored) -> list[np.ndarray]:
    """Every array that has rows, as bits."""
    arrays = (stored.k, stored.v, stored.k_scale, stored.v_scale)
    return [bits(x) for x in arrays if x is not None]
