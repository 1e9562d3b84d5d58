"""Statistics of the whole matrix of weights, by the textbook: what probes must find without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tilefold.layouts import frames
from tilefold.naive import _heads, _understood


class Oracle:
    """The matrices of one call in `dtype`, head by head; each method is a statistic over all of them.

    `rebuilt`: weights come from the scores and the rounded log-sum-exp, as in a second sweep.
    """

    def __init__(
        self, q: Any, k: Any, options: dict[str, Any], dtype: Any = None, rebuilt: bool = False
    ) -> None:
        options = dict(options)
        self.call, self.acc = _understood(q, k, k, options.pop("mask", None), dtype, options)
        self.heads = list(_heads(self.call, self.acc))
        for h in self.heads if rebuilt else ():
            with np.errstate(all="ignore"):
                lse = np.where(np.isneginf(h.lse), 0, h.lse)[:, None]
                h.weights = np.where(h.seen, np.exp(h.s - lse), 0).astype(self.acc)
        self.frames = list(frames(self.call.problem, self.call.operands))
        self.lead = self.call.operands.q.shape[:-1]

    def _per_row(self, fn: Any, empty: float = 0) -> np.ndarray:
        found = np.full(self.lead, empty, self.acc)
        with np.errstate(all="ignore"):
            for n, h in enumerate(self.heads):
                found[h.where] = fn(h, self.frames[n // self.call.problem.heads])
        return found

    def entropy(self) -> np.ndarray:
        def one(h: Any, f: Any) -> Any:
            w = h.weights
            whole = -np.where(w > 0, w * np.log(np.where(w > 0, w, 1)), 0).sum(axis=1)
            whole = np.where(np.isnan(w).any(axis=1), np.nan, whole)
            if self.call.operands.sinks is not None:
                gap = self.call.operands.sinks[(*h.where[:-1],)].astype(self.acc) - h.lse
                whole = whole - np.where(np.exp(gap) > 0, np.exp(gap) * gap, 0)
            return whole

        return self._per_row(one)

    def lse(self) -> np.ndarray:
        return self._per_row(lambda h, f: h.lse, -np.inf)

    def max_logit(self) -> np.ndarray:
        return self._per_row(lambda h, f: h.s.max(axis=1, initial=-np.inf), -np.inf)

    def max_weight(self) -> np.ndarray:
        return self._per_row(lambda h, f: h.weights.max(axis=1, initial=0))

    def mean_distance(self) -> np.ndarray:
        def one(h: Any, f: Any) -> Any:
            far = np.abs(np.arange(f.q_len)[:, None] + f.offset - np.arange(f.kv_len))
            return (h.weights * far.astype(self.acc)).sum(axis=1)

        return self._per_row(one)

    def mass_in(self, region: Any) -> np.ndarray:
        def one(h: Any, f: Any) -> Any:
            inside = region.panel(f, slice(0, f.q_len), slice(0, f.kv_len)).cells(0, f.kv_len)
            return np.where(inside, h.weights, 0).sum(axis=1)

        return self._per_row(one)

    def topk(self, k: int) -> SimpleNamespace:
        """The weights; keys are checked by the weights that lie there."""
        found = np.zeros((*self.lead, k), self.acc)
        for h in self.heads:
            best = -np.sort(-h.weights, axis=1)[:, :k]
            found[(*h.where, slice(0, best.shape[1]))] = best
        return found

    def weights(self) -> np.ndarray:
        whole = np.zeros((*self.lead, self.call.problem.kv_len), self.acc)
        for h in self.heads:
            whole[h.bias_where] = h.weights
        return whole

    def seen(self) -> np.ndarray:
        whole = np.zeros((*self.lead, self.call.problem.kv_len), bool)
        for h in self.heads:
            whole[h.bias_where] = h.seen
        return whole

    def _per_key(self, fn: Any) -> np.ndarray:
        x, p = self.call.operands, self.call.problem
        found = np.zeros((*x.lead, p.heads, p.kv_len), self.acc)
        for h in self.heads:
            if h.weights.size:
                found[(*h.where[:-1], h.kv_where[-1])] = fn(h)
        return found

    def key_mass(self, last: int | None = None, discount: float = 1.0) -> np.ndarray:
        def one(h: Any) -> Any:
            age = np.arange(len(h.weights))[::-1].astype(float)
            counts = discount**age * (True if last is None else age < last)
            return (h.weights * counts.astype(self.acc)[:, None]).sum(axis=0)

        return self._per_key(one)

    def key_max(self) -> np.ndarray:
        return self._per_key(lambda h: h.weights.max(axis=0))

    def bins(self, rows: int, cols: int, pool: str) -> np.ndarray:
        """A map over each sequence, (sequences, heads, rows, cols)."""
        p = self.call.problem
        found = np.zeros((len(self.frames), p.heads, rows, cols), self.acc)
        for n, h in enumerate(self.heads):
            f = self.frames[n // p.heads]
            for r in range(rows):
                for c in range(cols):
                    some = h.weights[
                        r * f.q_len // rows : (r + 1) * f.q_len // rows,
                        c * f.kv_len // cols : (c + 1) * f.kv_len // cols,
                    ]
                    if some.size:
                        found[n // p.heads, h.head, r, c] = getattr(some, pool)()
        return found

    def blocks(self, block: int, rows: int, cols: int) -> np.ndarray:
        p = self.call.problem
        found = np.zeros((len(self.frames), p.heads, rows, cols), self.acc)
        for n, h in enumerate(self.heads):
            for r in range(rows):
                for c in range(cols):
                    some = h.weights[r * block : (r + 1) * block, c * block : (c + 1) * block]
                    found[n // p.heads, h.head, r, c] = some.sum()
        return found
