"""A call over a key and value cache: append in place, rotate, attend. Shared by versions 2 and 3.

Everything is checked before a row is written, and what was written is taken back if the call ends in an error, so a
cache never holds half a step. The cache is read where it lies, in pages too. Copies are made of sequences picked by an
index that is no range, up to the longest in use, and of rows in use where packed queries have slopes of each sequence
or left padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...arrays import enter, leave
from ...caches import Rotary
from ...masks import lengths
from . import checks
from .calls import Scores, Side, dense, in_batch, in_pages, in_row, ragged, steps

Tensor = Any


@dataclass(frozen=True, slots=True)
class Tables:
    """Cosines and sines (positions, rotary_dim / 2), and which dimensions make a pair."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def checked(self, q: Tensor, last: int) -> Rotary:
        """The rotation that they are; TypeError or ValueError unless they fit q and reach position `last`."""
        checks.floats(q=q, rotary_cos=self.cos, rotary_sin=self.sin)
        checks.shape("rotary_cos", self.cos, "positions", "rotary_dim / 2")
        checks.shape("rotary_sin", self.sin, *self.cos.shape)
        if 2 * self.cos.shape[1] > q.shape[-1]:
            raise ValueError(
                f"rotary_cos must have at most {q.shape[-1] // 2} columns, half of dim; got {self.cos.shape[1]}"
            )
        if last >= len(self.cos):
            raise ValueError(f"rotary_cos must reach position {last}, got {len(self.cos)} positions")
        return Rotary(self.cos, self.sin, interleaved=self.interleaved)


def tables_of(cos: Any, sin: Any, interleaved: bool) -> Tables | None:
    if (cos is None) != (sin is None):
        raise TypeError("rotary_cos and rotary_sin come together")
    return None if cos is None else Tables(cos, sin, bool(interleaved))


class Store:
    """The cache of a call, checked: which sequence or pages of it each query sequence has."""

    def __init__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch_idx: Any, leftpad: Any, table: Any,
        table_name: str, batch: int | None = None,
    ) -> None:  # fmt: skip
        checks.floats(q=q, k_cache=k_cache, v_cache=v_cache)
        words = ("sequences", "capacity") if table is None else ("pages", "page_len")
        if batch is None:
            checks.shape("q", q, "batch", "q_len", "heads", "dim")
        checks.shape("k_cache", k_cache, *words, "kv_heads", q.shape[-1])
        checks.shape("v_cache", v_cache, *k_cache.shape[:3], "v_dim")
        checks.heads(q, k_cache, v_cache)
        for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
            if x.shape[-1] > 1 and x.stride(-1) != 1:
                raise ValueError(f"{name} must have a contiguous last dimension, got strides {x.stride()}")
        self.k, self.v = k_cache, v_cache
        self.batch = len(q) if batch is None else batch
        self.table_name = table_name
        self.table: Any = None
        self.leftpad: Any = None
        self.capacity = k_cache.shape[1]
        self.rows: Any = None  # the cache's sequence for each of q, a slice where they are a range
        if table is not None:
            if batch_idx is not None or leftpad is not None:
                raise ValueError(f"{table_name} excludes cache_batch_idx and cache_leftpad")
            self.table = checks.integers(table_name, table, self.batch, "pages per sequence")
            self.capacity *= self.table.shape[1]
            return
        self.rows = self._rows(batch_idx)
        if leftpad is not None:
            self.leftpad = checks.integers("cache_leftpad", leftpad, self.batch)

    def _rows(self, batch_idx: Any) -> Tensor | slice:
        if batch_idx is None:
            if len(self.k) < self.batch:
                raise ValueError(f"k_cache has {len(self.k)} sequences, q {self.batch}")
            return slice(0, self.batch)
        rows = checks.integers("cache_batch_idx", batch_idx, self.batch)
        checks.within("cache_batch_idx", rows, 0, len(self.k) - 1)
        first, *_ = given = rows.tolist() or [0]
        return slice(first, first + len(rows)) if given == list(range(first, first + len(given))) else rows

    def sequences(self, end: int) -> tuple[Tensor, Tensor]:
        """The first `end` rows of each sequence's keys and values: a view where the sequences are a range."""
        return self.k[:, :end][self.rows], self.v[:, :end][self.rows]

    def places(self, before: Tensor, new: Side) -> tuple[Any, bool]:
        """The index of the rows that are appended, and whether it has the shape of a batch."""
        starts = before.numpy()
        if isinstance(self.rows, slice) and new.batch and len(starts) and (starts == starts[0]).all():
            return (self.rows, slice(int(starts[0]), int(starts[0]) + new.rows[1])), True
        which, place = steps(new.counts)
        at = place + before[which]
        if self.table is None:
            return (which + self.rows.start if isinstance(self.rows, slice) else self.rows[which], at), False
        length = max(self.k.shape[1], 1)
        pages = self.table[which, at // length]
        checks.within(f"{self.table_name}'s entries in use", pages, 0, len(self.k) - 1)
        return (pages, at % length), False


def attend(
    store: Store, q: Tensor, k: Tensor | None, v: Tensor | None, cache_seqlens: Any, scores: Scores,
    rotary: Tables | None, want_lse: bool, q_ends: Tensor | None = None, new_ends: Tensor | None = None,
    rotary_from: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Append, rotate, attend: out, the natural lse, and how many keys each sequence had.

    q may be packed with `q_ends`, k and v with `new_ends`; `rotary_from` replaces cache_seqlens where positions of the
    rotation are counted from.
    """
    import torch

    before = _before(store, cache_seqlens, k is not None)
    queries = in_batch(q, None) if q_ends is None else in_row(q, q_ends, None)
    with torch.no_grad():
        new = _new_rows(store, q, k, v, new_ends)
        after = before if new is None else before + new.counts
        _check_lengths(store, before, after)
        if rotary is not None:
            if new is None:
                raise ValueError("rotary_cos rotates what is appended: give k and v")
            start = before if rotary_from is None else rotary_from
            q, k = _rotated(rotary, scores, q, k, queries, new, start)
        if new is None:
            result = _attended(store, q, queries, q_ends is not None, after, scores, want_lse)
            return *result, _seen(store, after)
        there, in_shape = store.places(before, new)
        kept = store.k[there].clone(), store.v[there].clone()
        try:
            store.k[there], store.v[there] = (k, v) if in_shape else (new.take(k), new.take(v))
            result = _attended(store, q, queries, q_ends is not None, after, scores, want_lse)
        except BaseException:
            store.k[there], store.v[there] = kept
            raise
    return *result, _seen(store, after)


def _before(store: Store, cache_seqlens: Any, appends: bool) -> Tensor:
    """Rows in use before the call (batch,)."""
    import torch

    if cache_seqlens is None:
        if appends:
            raise TypeError("cache_seqlens must say where k and v are appended, got None")
        return torch.full((store.batch,), store.capacity, device="cpu")
    if isinstance(cache_seqlens, int):
        before = torch.full((store.batch,), cache_seqlens, device="cpu")
    else:
        before = checks.integers("cache_seqlens", cache_seqlens, store.batch)
    checks.within("cache_seqlens", before, 0, store.capacity)
    return before


def _new_rows(
    store: Store, q: Tensor, k: Tensor | None, v: Tensor | None, new_ends: Tensor | None
) -> Side | None:
    """What is appended, checked; None if nothing is."""
    if (k is None) != (v is None):
        raise TypeError("k and v come together")
    if k is None or v is None:
        return None
    checks.floats(q=q, k=k, v=v)
    lead = (store.batch, "new") if new_ends is None else ("total_new",)
    checks.shape("k", k, *lead, *store.k.shape[2:])
    checks.shape("v", v, *k.shape[:-1], store.v.shape[-1])
    return in_batch(k, None) if new_ends is None else in_row(k, new_ends, None)


def _check_lengths(store: Store, before: Tensor, after: Tensor) -> None:
    """ValueError unless all that is appended fits and every sequence begins within itself."""
    if after.numpy().max(initial=0) > store.capacity:
        raise ValueError(
            f"cache_seqlens plus the rows of k must be at most the {store.capacity} rows of a sequence's cache, "
            f"got {after.tolist()}"
        )
    if store.leftpad is not None and bool(((store.leftpad < 0) | (store.leftpad > before)).any()):
        raise ValueError(
            f"cache_leftpad must lie between 0 and cache_seqlens, got {store.leftpad.tolist()} and {before.tolist()}"
        )


def _rotated(
    rotary: Tables, scores: Scores, q: Tensor, k: Tensor, queries: Side, new: Side, start: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k turned to their positions, which count from `start`."""
    import torch

    def at(side: Side, steady: bool) -> Tensor:
        if side.batch:
            steps_on = torch.arange(side.rows[1], device="cpu")
            return start[:, None] + (0 * steps_on if steady else steps_on)
        which, place = steps(side.counts)
        return side.give(start[which] if steady else start[which] + place, 0)

    steady = not (scores.sight.causal or scores.sight.local or scores.hidden is not None)
    q_at, k_at = at(queries, steady), at(new, False)
    last = max((int(x.max()) for x in (q_at, k_at) if x.numel()), default=-1)
    turn = rotary.checked(q, last)
    rows = (("q", q, q_at), ("k", k, k_at))
    q, k = (leave(x, turn.turned(name, enter(name, x), to.numpy()[..., None])) for name, x, to in rows)
    return q, k


def _attended(
    store: Store, q: Tensor, queries: Side, q_packed: bool, after: Tensor, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of q over the first `after` rows of each sequence of the cache, from its left padding on."""
    if store.table is not None:
        keys = in_pages(store.k, store.table, after, store.batch, store.table_name)
        return ragged(q, store.k, store.v, queries, keys, scores, want_lse)
    end = int(after.numpy().max(initial=0))
    k, v = store.sequences(end)
    if store.leftpad is not None:
        if not q_packed and scores.hidden is None:
            scores = replace(scores, hidden=~lengths(store.leftpad.numpy()))
        else:  # such a mask counts positions from the first row that is no padding
            which, place = steps(after - store.leftpad)
            keys = Side(after - store.leftpad, (which, place + store.leftpad[which]), tuple(k.shape[:2]))
            return ragged(q, k, v, queries, keys, scores, want_lse)
    elif q_packed:
        return ragged(q, k, v, queries, in_batch(k, after), scores, want_lse)
    all_alike = bool((after.numpy() == end).all())
    return dense(q, k, v, scores, want_lse, kv_lengths=None if all_alike else after)


def _seen(store: Store, after: Tensor) -> Tensor:
    """How many keys each sequence has."""
    return after if store.leftpad is None else after - store.leftpad
