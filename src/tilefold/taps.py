"""What a sweep can tell about the weights while it passes them: the few sums that every statistic is made of.

A row tap is one number, or a short list, per query row; it rides in sweep one, where `lse` is not known yet, as one
more monoid. A key tap sums over queries, so it needs finished weights: sweep two. A tap is a value: two statistics that
need the same one share it. The fact to know: a learned sink is an outcome of the softmax like a key, so it counts in
the entropy; it is no key, so no mass, no distance and no list ever holds it. A row that sees no key gives 0, a maximum
of -inf, and the key -1.

Here each tap says what it fills and, for the NumPy backend, how (`start`); native/taps.h is its twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .layouts import Frame, frames
from .masks import Mask
from .problem import Layout, Operands, Problem, Want, bytes_of
from .replay import ProbeTap, Tap, Weights
from .scores import Scores
from .tiles import RowBlock

ROW_REGIONS = 8  # masks whose mass one call adds up: what a tile has room for


@dataclass(frozen=True, slots=True)
class RowTap:
    """Something about each query row: arrays ``(*lead, Hq, Sq)`` in the accumulate type."""

    def allocate(self, p: Problem, x: Operands) -> Any:
        """The array, or arrays, to fill."""
        return np.zeros(x.q.shape[:-1], p.accumulate)

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        """What fills them from tiles of weights."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Entropy(RowTap):
    """``-sum(w * log(w))`` over the keys and the sink of a row, in nats."""

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Entropy(self.allocate(p, x), x)


@dataclass(frozen=True, slots=True)
class Peak(RowTap):
    """The largest finished score of a row; -inf where it sees no key."""

    def allocate(self, p: Problem, x: Operands) -> Any:
        return np.full(x.q.shape[:-1], -np.inf, p.accumulate)

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Peak(self.allocate(p, x), x)


@dataclass(frozen=True, slots=True)
class Distance(RowTap):
    """``sum(w * |i + offset - j|)``: how far away a row looks, in positions."""

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Distance(self.allocate(p, x), x)


@dataclass(frozen=True, slots=True)
class Mass(RowTap):
    """The weight of a row on the keys that another mask, `region`, shows it."""

    region: Mask

    def allocate(self, p: Problem, x: Operands) -> Any:
        self.region.check(x.lead, p.heads, p.q_len, p.kv_len)
        return RowTap.allocate(self, p, x)

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Mass(self.allocate(p, x), x, self.region)


@dataclass(frozen=True, slots=True)
class Top(RowTap):
    """The `count` largest scores of a row and their keys, ``(*lead, Hq, Sq, count)``, largest first, of equal ones the
    lower key first; -inf and -1 beyond the keys that it sees."""

    count: int

    def allocate(self, p: Problem, x: Operands, up_to: int = 1, as_wide: bool = False) -> Any:
        """Scores and keys; room for a multiple of `up_to`; keys in integers as wide as scores, or in int64."""
        shape = (*x.q.shape[:-1], -(-self.count // up_to) * up_to)
        if self.count > p.kv_len:
            raise ValueError(f"topk: k must be at most the number of keys, {p.kv_len}; got {self.count}")
        bytes_of(shape, np.dtype(np.int64))
        keys = np.dtype(f"i{p.accumulate.itemsize}" if as_wide else "i8")
        if p.kv_len > np.iinfo(keys).max:
            raise ValueError(
                f"topk: among {p.kv_len:,} keys lists are kept of float64 scores only, or by backend='numpy'"
            )
        return np.full(shape, -np.inf, p.accumulate), np.full(shape, -1, keys)

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Top(self.allocate(p, x), x)


@dataclass(frozen=True, slots=True)
class KeyTap:
    """Something that is pooled over query rows."""

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        """What fills it from tiles of weights."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Keys(KeyTap):
    """Per key, ``(*lead, Hq, Sk)``: the sum of its weights over queries, or their maximum.

    With `last` only the last so many queries of each sequence count; with `discount` a query's weights count
    ``discount ** age``, the last one's age being 0.
    """

    pool: str = "sum"
    last: int | None = None
    discount: float | None = None

    def allocate(self, p: Problem, x: Operands) -> np.ndarray:
        """Sums are kept in float64 until they are finished."""
        if self.last is not None and self.last > p.q_len:
            raise ValueError(
                f"key_mass: last must be at most the number of queries, {p.q_len}; got {self.last}"
            )
        return np.zeros((*x.lead, p.heads, p.kv_len))

    def row_weights(self, p: Problem, x: Operands) -> np.ndarray | None:
        """How much each query row counts, ``(*lead, Sq)``; None for all alike."""
        if self.last is None and self.discount is None:
            return None
        factors = np.zeros((*x.lead, p.q_len))
        for f in frames(p, x):
            age = np.arange(f.q_len)[::-1]
            some = np.ones(f.q_len) if self.discount is None else self.discount ** age.astype(float)
            if self.last is not None:
                some[age >= self.last] = 0
            factors[f.index][f.q0 : f.q0 + f.q_len] = some
        return factors

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Keys(self.allocate(p, x), x, self.pool, self.row_weights(p, x))


@dataclass(frozen=True, slots=True)
class Map(KeyTap):
    """The matrix of weights pooled to ``(*sequences, Hq, R, C)`` bins; packed sequences have the axis in front.

    Either `rows` x `cols` bins over each sequence, bin r of which starts at ``r * length // rows``, or bins of `block`
    rows and keys. `pool` is "sum" or "max"; a bin that is empty, or that nobody sees, is 0.
    """

    rows: int = 0
    cols: int = 0
    block: int = 0
    pool: str = "sum"

    def shape(self, p: Problem, x: Operands) -> tuple[int, ...]:
        """Of what it fills."""
        rows, cols = self.rows, self.cols
        if self.block:
            longest = [(f.q_len, f.kv_len) for f in frames(p, x)] if p.layout is Layout.VARLEN else []
            q_len, kv_len = (
                (max(n, default=0) for n in zip(*longest, strict=True)) if longest else (p.q_len, p.kv_len)
            )
            rows, cols = -(-q_len // self.block), -(-kv_len // self.block)
        sequences = (p.batch,) if p.layout is Layout.VARLEN else x.lead
        return (*sequences, p.heads, rows, cols)

    def edges(self, f: Frame, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Where the bins of a sequence begin, and where the last one ends, in its rows and keys."""
        return tuple(  # type: ignore[return-value]
            np.minimum(np.arange(n + 1) * self.block, length)
            if self.block
            else np.arange(n + 1) * length // n
            for n, length in zip(shape[-2:], (f.q_len, f.kv_len), strict=True)
        )

    def allocate(self, p: Problem, x: Operands) -> np.ndarray:
        shape = self.shape(p, x)
        bytes_of(shape, np.dtype(np.float64))
        return np.zeros(shape)

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Map(self.allocate(p, x), x, self, p)


@dataclass(frozen=True, slots=True)
class Cells(KeyTap):
    """Some weights as they are, ``(*lead, Hq, rows, keys)``, for the statistic `name`: rows of the q array, listed or
    from one to before another, and a range of keys of the k array. Keys of another packed sequence have weight 0.
    """

    name: str
    asked: tuple[Any, ...]
    ranged: bool
    keys: tuple[Any, Any]
    limit: int

    def rows_of(self, p: Problem) -> np.ndarray:
        """The numbers of its rows; ValueError for one that does not exist."""
        if self.ranged:
            return np.arange(*slice(*self.asked).indices(p.q_len))
        rows = np.array(self.asked, np.int64)
        wrong = rows[(rows < -p.q_len) | (rows >= p.q_len)]
        if len(wrong):
            raise ValueError(f"{self.name}: there are {p.q_len} rows, got {wrong[0]}")
        return rows % max(p.q_len, 1)

    def keys_of(self, p: Problem) -> tuple[int, int]:
        """Its first key, and the one after the last."""
        start, stop, _ = slice(*self.keys).indices(p.kv_len)
        return start, max(start, stop)

    def allocate(self, p: Problem, x: Operands) -> np.ndarray:
        start, stop = self.keys_of(p)
        shape = (*x.lead, p.heads, len(self.rows_of(p)), stop - start)
        size = bytes_of(shape, p.accumulate)
        if size > self.limit:
            raise ValueError(
                f"{self.name}: {shape} weights would take {size:,} bytes, more than limit={self.limit:,}; ask for "
                "fewer, or for a heatmap"
            )
        return np.zeros(shape, p.accumulate)

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        return _Cells(self.allocate(p, x), x, self, p)


@dataclass(frozen=True, slots=True)
class Shown:
    """A tap that is written in Python: anything with a `name` and ``start(problem, lead)`` that makes a `ProbeTap`."""

    probe: Any

    def start(self, p: Problem, x: Operands) -> ProbeTap:
        made: ProbeTap = self.probe.start(p, x.lead)
        return made


Tapped = RowTap | KeyTap | Shown


def wanted(taps: tuple[Tapped, ...]) -> Want:
    """What a problem says of its taps, so that backends may refuse them and plan for them."""
    want = Want.LSE if taps else Want(0)
    for kind, flag in ((RowTap, Want.ROWS), (KeyTap, Want.KEYS), (Shown, Want.SHOWN)):
        if any(isinstance(tap, kind) for tap in taps):
            want |= flag
    return want


def region_spans(region: Mask, frame: Frame, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """The spans of keys that `region` shows some rows of a sequence, ``lo`` and ``hi`` (rows, spans)."""
    panel = region.panel(frame, rows, slice(0, frame.kv_len))
    if panel.bits is not None:
        raise ValueError(
            f"mass_in: a region must be few spans of keys per row, and {region!r} is single cells"
        )
    return panel.lo, panel.hi


# ---- how NumPy fills them: shown every tile of weights of sweep two -------------------------------------------


class _Filling(Tap):
    """A tap that fills arrays."""

    def __init__(self, into: Any, x: Operands) -> None:
        self.into, self.x = into, x

    def per_row(self, w: Weights, into: np.ndarray) -> np.ndarray:
        """The tile's rows of an array ``(*lead, Hq, Sq)``, as a view in the shape of `by_head` without its keys."""
        return w.block.per_row(into)

    def result(self) -> Any:
        return self.into


class _Entropy(_Filling):
    def take(self, w: Weights) -> None:
        some = np.where(w.by_head > 0, w.by_head, 1)
        self.per_row(w, self.into)[...] -= (some * np.log(some)).sum(axis=-1, dtype=np.float64)

    def close(self, block: RowBlock) -> None:
        if self.x.sinks is None or self.x.lse is None:
            return
        lse = block.per_row(self.x.lse)
        sink = block.per_head(self.x.sinks)[..., None].astype(lse.dtype) - np.where(np.isneginf(lse), 0, lse)
        block.per_row(self.into)[...] -= np.where(np.isneginf(sink), 0, np.exp(sink) * sink)


class _Peak(_Filling):
    wants_scores = True

    def take(self, w: Weights) -> None:
        here = self.per_row(w, self.into)
        np.maximum(here, w.scores_by_head.max(axis=-1), out=here)


class _Distance(_Filling):
    def take(self, w: Weights) -> None:
        rows, keys = np.arange(w.block.rows.start, w.block.rows.stop), np.arange(w.tile.k0, w.tile.k1)
        far = np.abs(rows[:, None] + w.block.frame.offset - keys).astype(self.into.dtype)
        self.per_row(w, self.into)[...] += (w.by_head * far).sum(axis=-1, dtype=np.float64)


class _Mass(_Filling):
    def __init__(self, into: Any, x: Operands, region: Mask) -> None:
        super().__init__(into, x)
        self.region = region

    def take(self, w: Weights) -> None:
        lo, hi = region_spans(self.region, w.block.frame, w.block.rows)
        at = np.arange(w.tile.k0, w.tile.k1)
        inside = ((lo[:, :, None] <= at) & (at < hi[:, :, None])).any(axis=1)
        self.per_row(w, self.into)[...] += np.where(inside, w.by_head, 0).sum(axis=-1, dtype=np.float64)


class _Top(_Filling):
    wants_scores = True

    def take(self, w: Weights) -> None:
        scores, keys = self.into
        best, which = w.block.q_tile(scores), w.block.q_tile(keys)
        here = w.scores_by_head
        at = np.broadcast_to(np.arange(w.keys.start, w.keys.stop), here.shape)
        every, names = np.concatenate([best, here], axis=-1), np.concatenate([which, at], axis=-1)
        # Stable, and earlier tiles hold lower keys: of equal scores the lower key comes first.
        order = np.argsort(-every, axis=-1, kind="stable")[..., : best.shape[-1]]
        best[...] = np.take_along_axis(every, order, -1)
        found = np.take_along_axis(names, order, -1)
        which[...] = np.where(np.isneginf(best), -1, found)


class _Keys(_Filling):
    def __init__(self, into: Any, x: Operands, pool: str, factors: np.ndarray | None) -> None:
        super().__init__(into, x)
        self.pool, self.factors = pool, factors

    def take(self, w: Weights) -> None:
        p = w.by_head.astype(np.float64)
        if self.factors is not None:
            p = p * self.factors[w.index][w.rows, None]
        into = self.into[w.index]
        for pooled, head in zip(p.reshape(-1, *p.shape[2:]), w.heads.ravel(), strict=True):
            target = into[head, w.keys]
            if self.pool == "sum":
                target += pooled.sum(axis=0)
            else:
                np.maximum(target, pooled.max(axis=0), out=target)


class _Map(_Filling):
    def __init__(self, into: Any, x: Operands, tap: Map, p: Problem) -> None:
        super().__init__(into, x)
        self.tap = tap
        packed = p.layout is Layout.VARLEN
        self.place: dict[Frame, Any] = {f: n if packed else f.index for n, f in enumerate(frames(p, x))}

    def open(self, block: RowBlock, live: np.ndarray, scores: Scores) -> None:
        self.rows, self.cols = self.tap.edges(block.frame, self.into.shape)

    def take(self, w: Weights) -> None:
        rows, cols, into = w.block.rows, w.tile, self.into[self.place[w.block.frame]]
        r = np.searchsorted(self.rows, np.arange(rows.start, rows.stop), side="right") - 1
        c = np.searchsorted(self.cols, np.arange(cols.k0, cols.k1), side="right") - 1
        pool = np.add if self.tap.pool == "sum" else np.maximum
        p = w.by_head.astype(np.float64)
        for cells, head in zip(p.reshape(-1, *p.shape[2:]), w.heads.ravel(), strict=True):
            for n in np.unique(r):
                pool.at(into[head, n], c, pool.reduce(cells[r == n], axis=0))


class _Cells(_Filling):
    def __init__(self, into: Any, x: Operands, tap: Cells, p: Problem) -> None:
        super().__init__(into, x)
        self.rows, (self.k0, self.k1) = tap.rows_of(p), tap.keys_of(p)

    def take(self, w: Weights) -> None:
        lo, hi = max(w.keys.start, self.k0), min(w.keys.stop, self.k1)
        if lo >= hi:
            return
        some = w.by_head[..., lo - w.keys.start : hi - w.keys.start]
        for n, row in enumerate(self.rows):
            if w.rows.start <= row < w.rows.stop:
                at = (*w.index, w.heads, n, slice(lo - self.k0, hi - self.k0))
                self.into[at] = some[:, :, row - w.rows.start]
