"""Rotary positions: pairs of dims of a query or key, turned by angles that grow with its position.

    (a, b) -> (a cos - b sin, a sin + b cos)        (Su et al. 2021, arXiv 2104.09864)

It decides the arithmetic: float32, or float64 for float64, and one rounding to the type of the rows, as flash-attn's
kernels do; models that multiply in half precision round each product too. Which dims are a pair is the one choice:
neighbours (GPT-J), or the first half with the second (GPT-NeoX, Llama and most others). The fact to know: keys are
turned before they are stored, and never again; so a row's position must be known when it is appended, which it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import enter, enter_floats, leave
from ..dtypes import ROWS, name_of
from .rows import New, counted, ends_of


class Rotary:
    """Cosines and sines for each position, and which dims they turn.

    Args:
        cos, sin: ``(positions, rotary_dim / 2)``, arrays or tensors. Where `rotary_dim` is less than the dims of a row,
            the rest stays as it is.
        interleaved: pairs are dims (0, 1), (2, 3), ...; else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ... The
            default is that of Hugging Face's Llama and of flash-attn's `apply_rotary_emb`.

    ``rotary(x, positions)`` turns any rows, `queries` those that stand at the end of a cache's sequences, and
    ``cache.append(..., rotary=rotary)`` keys as they are stored. Rows are turned in float32 or wider and rounded once.

    >>> angles = np.outer(np.arange(500), 10000.0 ** (-np.arange(0, 64, 2) / 64))
    >>> rotary = Rotary(np.cos(angles), np.sin(angles))
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 100, 64)).astype(np.float32)
    >>> cache = tf.KVCache(batch=1, kv_heads=2, dim=64)
    >>> cache.append(k, v, rotary=rotary)
    >>> out = tf.attention(rotary.queries(q, cache), cache, causal=True)
    >>> at = np.arange(100)
    >>> bool((out == tf.attention(rotary(q, at), rotary(k, at), v, causal=True)).all())
    True
    """

    def __init__(self, cos: Any, sin: Any, *, interleaved: bool = False) -> None:
        tables = {name: enter_floats(name, x) for name, x in (("cos", cos), ("sin", sin))}
        for name, table in tables.items():
            if table.ndim != 2 or table.shape != tables["cos"].shape:
                shape = "(positions, rotary_dim / 2)" if name == "cos" else tables["cos"].shape
                raise ValueError(f"{name} must have shape {shape}, got {table.shape}")
        if not isinstance(interleaved, (bool, np.bool_)):
            raise TypeError(f"interleaved must be True or False, got {type(interleaved).__name__}")
        self._tables = tables["cos"], tables["sin"]
        self.interleaved = bool(interleaved)

    @property
    def positions(self) -> int:
        """How many positions the tables have."""
        return len(self._tables[0])

    @property
    def dim(self) -> int:
        """How many dims of a row are turned."""
        return 2 * int(self._tables[0].shape[1])

    def __call__(self, x: Any, positions: Any) -> Any:
        """Rows turned to their positions, in a copy of their own kind.

        Args:
            x: ``(..., heads, S, dim)``.
            positions: integers ``(S,)``, or ``(batch, S)`` for x ``(batch, heads, S, dim)``.

        Raises:
            TypeError: x is no array of a supported type, or positions no integers.
            ValueError: a shape that does not fit, or a position that the tables do not have.
        """
        rows, at = enter_floats("x", x), enter("positions", positions)
        if rows.ndim < 2:
            raise ValueError(f"x must have shape (..., heads, S, dim), got {rows.shape}")
        if at.dtype.kind not in "iu":
            raise TypeError(f"positions must be integers, got {at.dtype}")
        shapes = [rows.shape[-2:-1]] + ([(len(rows), rows.shape[2])] if rows.ndim == 4 else [])
        if at.shape not in shapes:
            raise ValueError(f"positions must have shape {' or '.join(map(str, shapes))}, got {at.shape}")
        return leave(x, self.turned("x", rows, at[:, None] if at.ndim == 2 else at))

    def queries(self, q: Any, cache: Any, *, q_lengths: Any = None, cu_seqlens_q: Any = None) -> Any:
        """Queries turned to where they stand: at the end of each sequence of a cache that has their keys already.

        Args:
            q: as `tilefold.attention` takes it with this cache: ``(batch, heads, Sq, dim)``, or ``(heads, total, dim)``
                with `cu_seqlens_q`.
            cache: a `KVCache`, or sequences ``cache[ids]`` of a `PagedKVCache`.
            q_lengths: of padded queries, how many are real; the rest comes back as it is.
        """
        rows, stored = enter_floats("q", q), cache.stored()
        lengths = np.asarray(stored.lengths, np.int64) + (0 if stored.dropped is None else stored.dropped)
        batch = len(lengths)
        if cu_seqlens_q is not None:
            if q_lengths is not None:
                raise TypeError(
                    "cu_seqlens_q and q_lengths exclude each other: packed queries have no padding"
                )
            if rows.ndim != 3:
                raise ValueError(f"with cu_seqlens_q q must be (heads, total, dim), got {rows.shape}")
            ends = ends_of("cu_seqlens_q", cu_seqlens_q, rows.shape[1], batch)
            return leave(q, self.placed("q", New((rows,), np.diff(ends), ends), lengths - np.diff(ends)))
        if rows.ndim != 4 or len(rows) != batch:
            raise ValueError(
                f"q must have shape (batch, heads, Sq, dim) with batch {batch}, got {rows.shape}"
            )
        counts = counted(q_lengths, batch, rows.shape[2], name="q_lengths", of="q")
        turned = self.placed("q", New((rows,), counts, None), lengths - counts)
        real = np.arange(rows.shape[2]) < counts[:, None]
        return leave(q, turned if real.all() else np.where(real[:, None, :, None], turned, rows))

    def placed(self, name: str, new: New, starts: np.ndarray) -> np.ndarray:
        """The first array of new rows, the argument `name`, turned to the positions from `starts` on; padding to 0."""
        x, *_ = new.arrays
        if new.ends is not None:
            at = np.arange(x.shape[1]) + np.repeat(starts - new.ends[:-1], new.counts)
            return self.turned(name, x, at)
        steps = np.arange(x.shape[2])
        at = np.where(steps < new.counts[:, None], starts[:, None] + steps, 0)
        return self.turned(name, x, at[:, None])

    def turned(self, name: str, x: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Rows ``(..., dim)`` of the argument `name` at positions that broadcast to ``(...)``, in a copy."""
        if self.dim > x.shape[-1]:
            raise ValueError(
                f"cos must have at most {x.shape[-1] // 2} columns, half of {name}'s dims; got {self.dim // 2}"
            )
        if x.size and at.size and not (at.min() >= 0 and at.max() < self.positions):
            raise ValueError(
                f"cos must have a row for each position of {name}, {at.min()} to {at.max()}; got {self.positions} rows"
            )
        if not x.size:
            return x.copy()
        wide = ROWS[name_of(x.dtype)].accumulate
        cos, sin = (table[at].astype(wide) for table in self._tables)
        half = self.dim // 2
        first, second = slice(0, half), slice(half, 2 * half)
        if self.interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        a, b = (x[..., part].astype(wide) for part in (first, second))
        turned = x.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            turned[..., first] = a * cos - b * sin
            turned[..., second] = a * sin + b * cos
        return turned

    def __repr__(self) -> str:
        pairs = "neighbours" if self.interleaved else "halves"
        return f"Rotary(<{self.positions} positions>, dim={self.dim}, pairs of {pairs})"


def keys_turned(rotary: Rotary | None, new: New, starts: np.ndarray) -> New:
    """New keys and values, the keys turned to the positions from `starts` on."""
    if rotary is None:
        return new
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a tilefold.caches.Rotary, got {type(rotary).__name__}")
    return replace(new, arrays=(rotary.placed("k", new, starts), *new.arrays[1:]))
