"""The matrix itself, made small or in pieces: pooled maps, blocks, rows. Large pieces are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..layouts import frames
from ..masks import integer
from ..taps import Cells, Map
from .statistic import Filled, Heads, PerSequence, Statistic

LIMIT = 2**30  # bytes of a piece of the matrix that nobody asks for by mistake


def heatmap(
    rows: int, cols: int, *, pool: Literal["mean", "sum", "max"] = "mean", heads: Heads = "each"
) -> Statistic:
    """The matrix of weights pooled to `rows` x `cols` bins, ``(..., Hq, rows, cols)``.

    Bin r holds the queries from ``r * Sq // rows`` on, and keys alike; a hidden cell counts as 0. "mean" is the mean of
    all cells of a bin, "sum" their sum, "max" their largest. Each sequence of a padded or packed batch has a map over
    its own lengths, packed ones ``(sequences, Hq, rows, cols)``.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.heatmap(2, 2, pool="sum"), causal=True).heatmap.round(3)
    array([[[2.   , 0.   ],
            [1.167, 0.833]]])
    """
    if pool not in ("mean", "sum", "max"):
        raise ValueError(f"heatmap: pool must be 'mean', 'sum' or 'max', got {pool!r}")
    bins = integer("heatmap: rows", rows, 1), integer("heatmap: cols", cols, 1)
    tap = Map(*bins, pool="max" if pool == "max" else "sum")

    def finish(filled: Filled) -> PerSequence:
        found = filled[tap]
        if pool == "mean":
            found = found / _cells(filled, tap, found.shape)
        return PerSequence(found.astype(filled.problem.accumulate, copy=False))

    return Statistic("heatmap", (tap,), finish, heads, "max" if pool == "max" else "mean")


def block_mass(block: int, *, heads: Heads = "each") -> Statistic:
    """The weight in each block of `block` queries and `block` keys, ``(..., Hq, rows, cols)``: which blocks a sparse
    kernel must keep. The last blocks may be smaller; sums of a row of blocks are its number of queries that see a key.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.block_mass(3), causal=True).block_mass.round(3)
    array([[[3.  , 0.  ],
            [0.75, 0.25]]])
    """
    tap = Map(block=integer("block_mass: block", block, 1))
    return Statistic("block_mass", (tap,), lambda filled: PerSequence(filled[tap]), heads)


def _cells(filled: Filled, tap: Map, shape: tuple[int, ...]) -> np.ndarray:
    """How many cells each bin has, at least 1, per sequence and for any head."""
    p, x = filled.problem, filled.operands
    sequences = []
    for f in frames(p, x):
        rows, cols = (np.diff(ends) for ends in tap.edges(f, shape))
        sequences.append(np.maximum(rows[:, None] * cols, 1))
    return np.reshape(sequences, (*shape[:-3], 1, *shape[-2:]))


def rows(which: Sequence[int], *, limit: int = LIMIT) -> Statistic:
    """Whole rows of the matrix of weights, ``(..., Hq, len(which), Sk)``, exact; `which` counts rows of q, negative
    ones from the end. ValueError where the result takes more than `limit` bytes.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.rows([1, -1]), causal=True).rows
    array([[[0.5 , 0.5 , 0.  , 0.  ],
            [0.25, 0.25, 0.25, 0.25]]])
    """
    try:
        if isinstance(which, (str, bytes)):
            raise TypeError
        given = [integer("rows: a row", int(n), None) for n in which]
    except TypeError:
        raise TypeError(f"rows: which must be a list of row numbers, got {which!r}") from None
    return _piece("rows", given, slice(None), limit)


def block(q: slice, k: slice, *, limit: int = LIMIT) -> Statistic:
    """The weights of some rows on some keys, ``(..., Hq, rows, keys)``, exact; slices as of the arrays q and k.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.block(slice(1, 3), slice(0, 3)), causal=True).block.round(3)
    array([[[0.5  , 0.5  , 0.   ],
            [0.333, 0.333, 0.333]]])
    """
    for name, part in (("q", q), ("k", k)):
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"block: {name} must be a slice without steps, got {part!r}")
    return _piece("block", q, k, limit)


def _piece(name: str, which: Sequence[int] | slice, keys: slice, limit: int) -> Statistic:
    asked = (which.start, which.stop) if isinstance(which, slice) else tuple(which)
    tap = Cells(
        name, asked, isinstance(which, slice), (keys.start, keys.stop), integer(f"{name}: limit", limit, 0)
    )
    return Statistic(name, (tap,), lambda filled: filled[tap])
