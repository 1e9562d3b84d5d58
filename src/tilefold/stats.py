"""The monoid. Running maximum, sum of e^(s - m), accumulator. Empty is neutral; merge associates; finalize divides
once.

(Milakov & Gimelshein 2018, arXiv 1805.02867; Rabe & Staats 2021, arXiv 2112.05682; Dao et al. 2022, arXiv 2205.14135.)
The fact to know: a row that has seen nothing has maximum -inf, and -inf - (-inf) is NaN. `shift` below is the only
place that looks after it. `(out, lse)` is a closed form of the same state: maximum lse, sum 1, accumulator out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHAIN = 32  # terms that are added one after another: about the square root of a tile's keys


@dataclass(slots=True, eq=False)
class OnlineStats:
    """Softmax statistics of rows of attention over the keys seen so far.

    Attributes:
        max_val: ``(..., rows)`` the largest score, -inf for a row that has seen nothing.
        sum_exp: ``(..., rows)`` the sum of ``exp(score - max_val)``.
        output: ``(..., rows, v_dim)`` the sum of ``exp(score - max_val) * value``, not normalised before `finalize`.

    >>> s, v = np.log([[1.0, 3.0]]), np.array([[10.0], [20.0]])
    >>> out, lse = OnlineStats.init((1,), 1).update(s, v).finalize()
    >>> print(out, np.exp(lse))
    [[17.5]] [4.]
    """

    max_val: np.ndarray
    sum_exp: np.ndarray
    output: np.ndarray

    @classmethod
    def init(
        cls,
        rows: tuple[int, ...],
        v_dim: int,
        dtype: np.typing.DTypeLike = np.float64,
        *,
        sinks: np.ndarray | None = None,
        output: np.ndarray | None = None,
    ) -> OnlineStats:
        """The neutral element for `rows`, or with `sinks` (broadcastable to `rows`) rows that have already seen one
        key of that score and without a value. `output` may be given as the buffer to use."""
        max_val = np.full(rows, -np.inf, dtype)
        if sinks is not None:
            max_val[...] = sinks
        sum_exp = (max_val > -np.inf).astype(dtype)
        if output is None:
            output = np.empty((*rows, v_dim), dtype)
        output[...] = 0
        return cls(max_val, sum_exp, output)

    @classmethod
    def closed(cls, out: np.ndarray, lse: np.ndarray) -> OnlineStats:
        """The state that finalizes to ``(out, lse)``."""
        return cls(lse, np.where(np.isneginf(lse), lse.dtype.type(0), lse.dtype.type(1)), out)

    def update(
        self, s: np.ndarray, v: np.ndarray, seen: np.ndarray | None = None, *, work: np.ndarray | None = None
    ) -> OnlineStats:
        """Fold one tile of scores ``s (..., rows, keys)`` with values ``v (..., keys, v_dim)``, in place.

        A hidden cell has score -inf; `seen` (booleans, broadcastable to `s`) says which cells are visible, so that
        a NaN in a value reaches only rows that see it. With `work` (a buffer like `output`) the weights
        overwrite `s` and nothing of the tile's size is allocated.
        """
        top = np.maximum(self.max_val, s.max(axis=-1, initial=-np.inf))
        shift = np.where(np.isneginf(top), top.dtype.type(0), top)
        p = np.subtract(s, shift[..., None], out=None if work is None else s)
        np.exp(p, out=p)
        keep = np.exp(self.max_val - shift)
        self.max_val = top
        self.sum_exp = self.sum_exp * keep + row_sums(p)
        self.output *= keep[..., None]
        self.output += weigh(p, v, seen, work)
        return self

    def merge(self, other: OnlineStats) -> OnlineStats:
        """The state of having seen the keys of both; the two must not share a key."""
        top = np.maximum(self.max_val, other.max_val)
        shift = np.where(np.isneginf(top), top.dtype.type(0), top)
        a, b = np.exp(self.max_val - shift), np.exp(other.max_val - shift)
        output = self._weighted(a)
        output += other._weighted(b)
        return OnlineStats(top, a * self.sum_exp + b * other.sum_exp, output)

    def _weighted(self, factor: np.ndarray) -> np.ndarray:
        """The accumulator times a factor per row; that of an empty row counts as 0, whatever it holds."""
        weighted: np.ndarray = factor[..., None] * self.output
        if (empty := np.isneginf(self.max_val)).any():
            weighted[np.broadcast_to(empty, factor.shape)] = 0
        return weighted

    def finalize(self, *, work: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``(out, lse)``: the weighted mean of the values and the log-sum-exp. An empty row gives 0 and -inf."""
        none = self.sum_exp == 0
        total = np.where(none, self.sum_exp.dtype.type(1), self.sum_exp)
        lse = np.where(none, self.max_val.dtype.type(-np.inf), self.max_val + np.log(total))
        return np.divide(self.output, total[..., None], out=work), lse


def row_sums(p: np.ndarray) -> np.ndarray:
    """``p.sum(axis=-1)`` for any memory order, in chains of `CHAIN` by BLAS, which are then added.

    One chain over a tile would not do: where scores are equal each addition errs in the same direction, so that a
    thousand of them are off by a hundred roundings.
    """
    *lead, rows, keys = p.shape
    whole = keys - keys % CHAIN
    chains = p[..., :whole].reshape(*lead, rows, whole // CHAIN, CHAIN).swapaxes(-3, -2)
    rest = p[..., whole:] @ np.ones(keys - whole, p.dtype)
    return np.asarray((chains @ np.ones(CHAIN, p.dtype)).sum(axis=-2) + rest)


def weigh(p: np.ndarray, x: np.ndarray, seen: np.ndarray | None, out: np.ndarray | None = None) -> np.ndarray:
    """``p @ x``, in which a pair that does not see each other contributes nothing, not even 0 * NaN.

    Runs at full speed and looks at the result; only where that is not finite and cells are hidden is the product
    done again with the rows of `x` that hold NaN or infinity kept away from the rows of `p` that do not see them.
    """
    out = np.matmul(p, x, out=out)
    if seen is None or np.isfinite(out.sum()):
        return out
    seen = np.broadcast_to(seen, p.shape)
    bad = ~np.isfinite(x).all(axis=-1)
    np.matmul(p, np.where(bad[..., None], x.dtype.type(0), x), out=out)
    for *at, j in np.argwhere(np.broadcast_to(bad, p.shape[:-2] + bad.shape[-1:])):
        lead = tuple(at)
        rows = np.flatnonzero(seen[(*lead, slice(None), j)])
        row = np.broadcast_to(x, p.shape[:-2] + x.shape[-2:])[(*lead, j)]
        out[(*lead, rows)] += p[(*lead, rows, j)][:, None] * row
    return out
