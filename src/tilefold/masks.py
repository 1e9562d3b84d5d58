"""A mask is a disjoint union of key spans per query row, so kernels never learn new masks.

Every mask, however it was written, answers one question: which keys do these rows see? The answer is a `Panel`:
per row a few spans ``lo <= j < hi``, and only where spans would be too many one packed bit per cell. Masks are
closed under ``& | ~`` and bound to lengths when used; queries stand at the end of the keys (bottom-right), so that
query i has position ``i + kv_len - q_len``. Causal attention for 2 queries and 5 keys, and for 5 and 2:

    1 1 1 1 0        0 0
    1 1 1 1 1        0 0
                     0 0
                     1 0
                     1 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .frameworks import is_traced
from .layouts import Frame
from .problem import Band

MAX_SPANS = 8  # a row with more spans than this is cheaper as bits
CHUNK = 4096  # columns of a predicate or dense array that are looked at together; a multiple of 8

Ints = np.ndarray
Bits = np.ndarray
Recipe = tuple[str, dict[str, object]]


# ---- panels: what some query rows see ------------------------------------------------------------------------


@dataclass(slots=True)
class Panel:
    """The keys ``start <= j < stop`` that R query rows see.

    `lo` and `hi` have shape (R, spans): per row disjoint ascending spans, empty ones last. With `bits` (R, bytes;
    bit 0 is key `start`) a cell is visible if a span covers it *and* its bit is set.
    """

    start: int
    stop: int
    lo: Ints
    hi: Ints
    bits: Bits | None = None

    @classmethod
    def everything(cls, rows: int, start: int, stop: int) -> Panel:
        return cls(start, stop, np.full((rows, 1), start), np.full((rows, 1), max(start, stop)))

    @classmethod
    def nothing(cls, rows: int, start: int, stop: int) -> Panel:
        return cls(start, stop, np.zeros((rows, 0), np.int64), np.zeros((rows, 0), np.int64))

    @classmethod
    def of_spans(cls, lo: Ints, hi: Ints, start: int, stop: int) -> Panel:
        """Disjoint spans in any order, clipped to the window; empty ones are allowed."""
        lo, hi = np.clip(lo, start, stop), np.clip(hi, start, stop)
        if lo.shape[1] > 1:
            lo = np.where(hi > lo, lo, stop)
            order = np.argsort(lo, axis=1, kind="stable")
            lo, hi = np.take_along_axis(lo, order, 1), np.take_along_axis(hi, order, 1)
            used = int((hi > lo).sum(axis=1).max(initial=0))
            lo, hi = lo[:, :used], hi[:, :used]
        return cls(start, stop, lo, np.maximum(hi, lo))

    @classmethod
    def of_cells(cls, rows: int, start: int, stop: int, cells: Callable[[int, int], np.ndarray]) -> Panel:
        """Look at every cell once, `CHUNK` columns at a time: spans if they are few, else bits and their hull."""
        bits = np.zeros((rows, -(-max(stop - start, 0) // 8)), np.uint8)
        before = np.zeros((rows, 1), bool)
        starts: list[np.ndarray] = []
        runs = np.zeros(rows, np.int64)
        ends: list[np.ndarray] = []
        for at in range(start, stop, CHUNK):
            end = min(at + CHUNK, stop)
            seen = cells(at, end)
            bits[:, (at - start) // 8 : -(-(end - start) // 8)] = np.packbits(seen, axis=1, bitorder="little")
            left = np.concatenate([before, seen[:, :-1]], axis=1)
            before = seen[:, -1:].copy()
            rise = seen & ~left
            runs += rise.sum(axis=1)
            if runs.max(initial=0) <= MAX_SPANS:
                starts.append(np.argwhere(rise) + (0, at))
                ends.append(np.argwhere(left & ~seen) + (0, at))
        if runs.max(initial=0) > MAX_SPANS:
            return cls(start, stop, *_hull(bits, start, stop), bits)
        ends.append(np.argwhere(before) * (1, 0) + (0, stop))
        lo = np.full((rows, int(runs.max(initial=0))), stop)
        hi = lo.copy()
        for into, found in ((lo, starts), (hi, ends)):
            points = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
            points = points[np.lexsort((points[:, 1], points[:, 0]))]
            first = np.searchsorted(points[:, 0], points[:, 0])
            into[points[:, 0], np.arange(len(points)) - first] = points[:, 1]
        return cls(start, stop, lo, hi)

    @property
    def rows(self) -> int:
        return len(self.lo)

    @property
    def full(self) -> bool:
        """Whether every row sees every key of the window."""
        covers = self.lo.shape[1] == 1 and bool(
            (self.lo <= self.start).all() and (self.hi >= self.stop).all()
        )
        return self.bits is None and covers

    def cells(
        self, k0: int, k1: int, out: np.ndarray | None = None, scratch: np.ndarray | None = None
    ) -> np.ndarray:
        """The visible cells of keys k0..k1 as booleans (R, k1 - k0), laid out key by key like a tile of scores.

        `out` and `scratch` are optional boolean buffers of shape (k1 - k0, R).
        """
        shape = (k1 - k0, self.rows)
        seen = np.empty(shape, bool) if out is None else out
        part = np.empty(shape, bool) if scratch is None else scratch
        if self.lo.shape[1] == 1:
            self._span(0, k0, seen, part)
        else:
            seen[...] = False
            for n in range(self.lo.shape[1]):
                seen |= self._span(n, k0, np.empty(shape, bool), part)
        if self.bits is not None:
            first = (k0 - self.start) // 8
            last = -(-(k1 - self.start) // 8)
            unpacked = np.unpackbits(self.bits[:, first:last], axis=1, bitorder="little")
            skip = k0 - self.start - 8 * first
            seen &= unpacked[:, skip : skip + k1 - k0].T.view(bool)
        return seen.T

    def _span(self, n: int, k0: int, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
        """The cells of span n, counted from k0: within a tile 16 bits are enough, and four times as fast as 64."""
        keys = len(out)
        small = np.int16 if keys < 2**15 else np.int64
        j = np.arange(keys, dtype=small)[:, None]
        lo, hi = (np.clip(ends[:, n] - k0, 0, keys).astype(small) for ends in (self.lo, self.hi))
        np.less(j, hi, out=out)
        if lo.any():
            out &= np.greater_equal(j, lo, out=scratch)
        return out

    def visible(self) -> Ints:
        """How many keys each row sees."""
        per_span = self.hi - self.lo if self.bits is None else np.bitwise_count(self._packed())
        return np.asarray(per_span.sum(axis=1, dtype=np.int64))

    def __and__(self, other: Panel) -> Panel:
        pairs = self.rows, self.lo.shape[1] * other.lo.shape[1]
        lo = np.maximum(self.lo[:, :, None], other.lo[:, None, :]).reshape(pairs)
        hi = np.minimum(self.hi[:, :, None], other.hi[:, None, :]).reshape(pairs)
        both = Panel.of_spans(lo, hi, self.start, self.stop)
        if self.bits is None or other.bits is None:
            both.bits = self.bits if other.bits is None else other.bits
        else:
            both.bits = self.bits & other.bits
        return both._settled()

    def __or__(self, other: Panel) -> Panel:
        if self.bits is None and other.bits is None:
            return ~(~self & ~other)
        return self._of_bits(self._packed() | other._packed())

    def __invert__(self) -> Panel:
        if self.bits is not None:
            return self._of_bits(~self._packed())
        edge = np.full((self.rows, 1), self.start), np.full((self.rows, 1), self.stop)
        lo = np.concatenate([edge[0], self.hi], axis=1)
        hi = np.concatenate([self.lo, edge[1]], axis=1)
        return Panel.of_spans(lo, hi, self.start, self.stop)._settled()

    def _settled(self) -> Panel:
        """Turn into bits when an expression has grown more spans than are worth having."""
        if self.lo.shape[1] <= 4 * MAX_SPANS:
            return self
        return self._of_bits(self._packed())

    def _packed(self) -> Bits:
        """All visible cells as bits, spans included."""
        bits = np.zeros((self.rows, -(-max(self.stop - self.start, 0) // 8)), np.uint8)
        for at in range(self.start, self.stop, CHUNK):
            end = min(at + CHUNK, self.stop)
            first = (at - self.start) // 8
            bits[:, first : first + -(-(end - at) // 8)] = np.packbits(
                self.cells(at, end), axis=1, bitorder="little"
            )
        return bits

    def _of_bits(self, bits: Bits) -> Panel:
        spare = -(self.stop - self.start) % 8
        if spare and bits.shape[1]:
            bits[:, -1] &= 0xFF >> spare
        return Panel(self.start, self.stop, *_hull(bits, self.start, self.stop), bits)


def _hull(bits: Bits, start: int, stop: int) -> tuple[Ints, Ints]:
    """Per row one span of whole bytes from the first to the last set bit."""
    if not bits.shape[1]:
        return np.full((len(bits), 1), start), np.full((len(bits), 1), start)
    some = bits != 0
    first = some.argmax(axis=1)
    last = bits.shape[1] - some[:, ::-1].argmax(axis=1)
    live = some.any(axis=1)
    lo = np.where(live, start + 8 * first, start)[:, None]
    return lo, np.where(live, np.minimum(start + 8 * last, stop), start)[:, None]


# ---- masks: expressions that yield panels --------------------------------------------------------------------


class Mask:
    """Which keys each query sees; an expression under ``& | ~``, bound to lengths when it is used."""

    by_batch = False  # whether panels differ between batch items
    by_head = False  # whether panels differ between heads
    may_need_bits = False
    arrays: tuple[np.ndarray, ...] = ()  # memory of the caller that is read, not copied
    __array_ufunc__ = None  # ``array & mask`` is for us to refuse, not for NumPy to repeat per element

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        """What queries `rows` see among `keys` (both within the sequence of `frame`)."""
        raise NotImplementedError

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        """ValueError unless the mask's own arrays fit such operands."""

    def recipe(self) -> Recipe:
        """How to make this mask again: a name among `RECIPES` and its arguments."""
        raise TypeError(f"mask {self!r} is made of Python code, which a compiled program cannot hold")

    def __and__(self, other: Mask) -> Mask:
        return _Both(self, _mask(other))

    __rand__ = __and__

    def __or__(self, other: Mask) -> Mask:
        return _Either(self, _mask(other))

    __ror__ = __or__

    def __invert__(self) -> Mask:
        return _Not(self)

    def bind(self, q_len: int, kv_len: int) -> BoundMask:
        """Fix the lengths; the result can be sliced: ``mask.bind(8, 8)[2:4, :6]`` is what queries 2 and 3 see there."""
        return BoundMask(self, q_len, kv_len)

    def dense(self, q_len: int, kv_len: int) -> np.ndarray:
        """The whole mask as a boolean array (q_len, kv_len): for looking at, O(q_len * kv_len)."""
        self.check((), 1, q_len, kv_len)
        return self.panel(Frame.whole(q_len, kv_len), slice(0, q_len), slice(0, kv_len)).cells(0, kv_len)

    def draw(self, q_len: int, kv_len: int) -> str:
        """The mask as ones and zeros, a line per query."""
        return "\n".join(" ".join("01"[int(x)] for x in row) for row in self.dense(q_len, kv_len))


def _mask(x: object) -> Mask:
    if isinstance(x, Mask):
        return x
    raise TypeError(
        f"a mask combines with masks under & and |, got {type(x).__name__}; wrap arrays in tilefold.dense()"
    )


class _Pair(Mask):
    def __init__(self, a: Mask, b: Mask) -> None:
        self.a, self.b = a, b
        self.by_batch = a.by_batch or b.by_batch
        self.by_head = a.by_head or b.by_head
        self.arrays = a.arrays + b.arrays
        self.may_need_bits = a.may_need_bits or b.may_need_bits

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        self.a.check(lead, heads, q_len, kv_len)
        self.b.check(lead, heads, q_len, kv_len)


class _Both(_Pair):
    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        return self.a.panel(frame, rows, keys) & self.b.panel(frame, rows, keys)

    def recipe(self) -> Recipe:
        return "and", {"a": self.a, "b": self.b}

    def __repr__(self) -> str:
        return f"({self.a!r} & {self.b!r})"


class _Either(_Pair):
    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        return self.a.panel(frame, rows, keys) | self.b.panel(frame, rows, keys)

    def recipe(self) -> Recipe:
        return "or", {"a": self.a, "b": self.b}

    def __repr__(self) -> str:
        return f"({self.a!r} | {self.b!r})"


class _Not(Mask):
    def __init__(self, a: Mask) -> None:
        self.a = a
        self.by_batch, self.by_head, self.may_need_bits = a.by_batch, a.by_head, a.may_need_bits
        self.arrays = a.arrays

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        self.a.check(lead, heads, q_len, kv_len)

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        return ~self.a.panel(frame, rows, keys)

    def recipe(self) -> Recipe:
        return "not", {"a": self.a}

    def __repr__(self) -> str:
        return f"~{self.a!r}"


class BoundMask(Mask):
    """A mask fixed to lengths, or a rectangle of one: rows and keys keep the positions they had in the whole."""

    def __init__(self, mask: Mask, q_len: int, kv_len: int) -> None:
        for name, n in (("q_len", q_len), ("kv_len", kv_len)):
            if not isinstance(n, (int, np.integer)) or n < 0:
                raise ValueError(f"{name} must be a length >= 0, got {n!r}")
        self.mask, self.shape = mask, (int(q_len), int(kv_len))
        self.rows, self.keys = slice(0, self.shape[0]), slice(0, self.shape[1])
        self.by_batch, self.by_head, self.may_need_bits = mask.by_batch, mask.by_head, mask.may_need_bits
        self.arrays = mask.arrays

    @property
    def q_len(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def kv_len(self) -> int:
        return self.keys.stop - self.keys.start

    def __getitem__(self, ranges: tuple[slice, slice] | slice) -> BoundMask:
        both = ranges if isinstance(ranges, tuple) else (ranges, slice(None))
        if len(both) != 2 or not all(isinstance(part, slice) for part in both):
            words = ", ".join(type(part).__name__ for part in both)
            raise TypeError(f"a mask is sliced by two ranges, [queries, keys]; got {words}")
        rows, keys = both
        part = BoundMask(self.mask, *self.shape)
        part.rows = _within(self.rows, rows, "query")
        part.keys = _within(self.keys, keys, "key")
        return part

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        if (q_len, kv_len) != (self.q_len, self.kv_len):
            raise ValueError(
                f"mask is bound to {self.q_len} queries and {self.kv_len} keys, "
                f"the operands have {q_len} and {kv_len}"
            )
        self.mask.check(lead, heads, *self.shape)

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        whole = replace(
            frame, q_len=self.shape[0], kv_len=self.shape[1], q_total=self.shape[0], kv_total=self.shape[1]
        )
        shift = self.keys.start
        inner = self.mask.panel(
            whole,
            slice(rows.start + self.rows.start, rows.stop + self.rows.start),
            slice(keys.start + shift, keys.stop + shift),
        )
        return Panel(keys.start, keys.stop, inner.lo - shift, inner.hi - shift, inner.bits)

    def recipe(self) -> Recipe:
        return "bound", {
            "mask": self.mask,
            "q_len": self.shape[0],
            "kv_len": self.shape[1],
            "q0": self.rows.start,
            "q1": self.rows.stop,
            "k0": self.keys.start,
            "k1": self.keys.stop,
        }

    def __repr__(self) -> str:
        return f"{self.mask!r}[{self.rows.start}:{self.rows.stop}, {self.keys.start}:{self.keys.stop}]"


def _within(outer: slice, inner: slice, name: str) -> slice:
    start, stop, step = inner.indices(outer.stop - outer.start)
    if step != 1:
        raise ValueError(f"a mask is sliced with step 1, got a {name} slice of step {step}")
    return slice(outer.start + start, outer.start + max(start, stop))


class BandMask(Mask):
    """The affine mask: a diagonal stripe. It needs no array and becomes facts of the `Problem`."""

    def __init__(self, left: int | None, right: int | None, offset: int | Literal["bottom-right"]) -> None:
        self.left, self.right, self.offset = left, right, offset

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        offset = frame.offset if isinstance(self.offset, str) else self.offset
        return band_panel(Band(self.left, self.right, offset), rows, keys)

    def recipe(self) -> Recipe:
        return "band", {"left": self.left, "right": self.right, "offset": self.offset}

    def __repr__(self) -> str:
        return f"band(left={self.left}, right={self.right}, offset={self.offset!r})"


def band_panel(band: Band, rows: slice, keys: slice) -> Panel:
    """What `rows` see of `keys` through a band whose offset is known."""
    if band.unlimited:
        return Panel.everything(rows.stop - rows.start, keys.start, keys.stop)
    at = np.arange(rows.start, rows.stop)[:, None]
    # Limits are any integers: those beyond the panel's own size are clipped before they meet a machine integer.
    least, most = keys.start - rows.stop, keys.stop - rows.start
    offset = band.offset or 0
    lo, hi = np.full_like(at, keys.start), np.full_like(at, keys.stop)
    if band.left is not None:
        lo = at + min(max(offset - band.left, least), most)
    if band.right is not None:
        hi = at + min(max(offset + band.right + 1, least), most)
    return Panel.of_spans(lo, hi, keys.start, keys.stop)


class _Spans(Mask):
    def __init__(self, lo: Ints, hi: Ints) -> None:
        self.lo, self.hi = lo, hi

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        if len(self.lo) != q_len:
            raise ValueError(f"spans: lo and hi must have {q_len} rows, one per query; got {len(self.lo)}")
        if self.hi.size and self.hi.max() > kv_len:
            raise ValueError(f"spans: hi must be at most {kv_len}, the number of keys; got {self.hi.max()}")

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        mine = slice(rows.start + frame.q0, rows.stop + frame.q0)
        return Panel.of_spans(self.lo[mine] - frame.k0, self.hi[mine] - frame.k0, keys.start, keys.stop)

    def recipe(self) -> Recipe:
        return "spans", {"lo": self.lo, "hi": self.hi}

    def __repr__(self) -> str:
        return f"spans(<{self.lo.shape[1]} for each of {len(self.lo)} rows>)"


class _Prefix(Mask):
    def __init__(self, length: int) -> None:
        self.length = length

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        shape = (rows.stop - rows.start, 1)
        ends = np.full(shape, min(self.length, keys.stop))
        return Panel.of_spans(np.zeros_like(ends), ends, keys.start, keys.stop)

    def recipe(self) -> Recipe:
        return "prefix", {"length": self.length}

    def __repr__(self) -> str:
        return f"prefix({self.length})"


class _Chunked(Mask):
    def __init__(self, size: int) -> None:
        self.size = size

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        at = np.arange(rows.start, rows.stop)[:, None] + frame.offset
        size = min(self.size, 2**62)
        lo = at // size * size
        return Panel.of_spans(lo, lo + size, keys.start, keys.stop)

    def recipe(self) -> Recipe:
        return "chunked", {"size": self.size}

    def __repr__(self) -> str:
        return f"chunked({self.size})"


class _Lengths(Mask):
    by_batch = True

    def __init__(self, kv_lengths: Ints | None, q_lengths: Ints | None) -> None:
        self.kv_lengths, self.q_lengths = kv_lengths, q_lengths

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        for name, ends, most in (
            ("kv_lengths", self.kv_lengths, kv_len),
            ("q_lengths", self.q_lengths, q_len),
        ):
            if ends is None:
                continue
            if ends.shape not in ((), lead):
                raise ValueError(f"{name} must have the leading shape {lead} of q, got {ends.shape}")
            if ends.size and ends.max() > most:
                raise ValueError(
                    f"{name} must be at most {most}, the length of its operand; got {ends.max()}"
                )

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        kv_end = frame.kv_len if self.kv_lengths is None else _item(self.kv_lengths, frame.index) - frame.k0
        q_end = frame.q_len if self.q_lengths is None else _item(self.q_lengths, frame.index) - frame.q0
        at = np.arange(rows.start, rows.stop)[:, None]
        return Panel.of_spans(np.zeros_like(at), np.where(at < q_end, kv_end, 0), keys.start, keys.stop)

    def recipe(self) -> Recipe:
        return "lengths", {"kv_lengths": self.kv_lengths, "q_lengths": self.q_lengths}

    def __repr__(self) -> str:
        return f"lengths({self.kv_lengths!r}, q_lengths={self.q_lengths!r})"


def _item(x: np.ndarray, index: tuple[int, ...]) -> int:
    return int(x[index] if x.ndim else x)


class _Cells(Mask):
    """A mask that can only be looked at cell by cell."""

    may_need_bits = True

    def cells(self, frame: Frame, rows: slice, k0: int, k1: int) -> np.ndarray:
        raise NotImplementedError

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        return Panel.of_cells(
            rows.stop - rows.start, keys.start, keys.stop, lambda k0, k1: self.cells(frame, rows, k0, k1)
        )


class _Documents(_Cells):
    def __init__(self, ids: Ints, q_ids: Ints | None) -> None:
        self.ids, self.q_ids = ids, q_ids
        self.by_batch = ids.ndim > 1 or (q_ids is not None and q_ids.ndim > 1)

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        for name, ids, n in (("ids", self.ids, kv_len), ("q_ids", self.q_ids, q_len)):
            if ids is not None and ids.shape not in ((n,), (*lead, n)):
                raise ValueError(f"documents: {name} must have shape ({n},) or {(*lead, n)}, got {ids.shape}")
        if self.q_ids is None and q_len > kv_len:
            raise ValueError(f"documents: {q_len} queries stand before {kv_len} keys; give q_ids")

    def _rows(self, frame: Frame, rows: slice) -> tuple[Ints, Ints]:
        ids = self.ids[frame.index] if self.ids.ndim > 1 else self.ids
        ids = ids[frame.k0 : frame.k0 + frame.kv_len]
        if self.q_ids is None:
            return ids[rows.start + frame.offset : rows.stop + frame.offset], ids
        q_ids = self.q_ids[frame.index] if self.q_ids.ndim > 1 else self.q_ids
        return q_ids[frame.q0 + rows.start : frame.q0 + rows.stop], ids

    def cells(self, frame: Frame, rows: slice, k0: int, k1: int) -> np.ndarray:
        mine, ids = self._rows(frame, rows)
        return np.asarray(mine[:, None] == ids[k0:k1])

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        mine, ids = self._rows(frame, rows)
        first = (
            np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
            if len(ids)
            else np.zeros(0, np.int64)
        )
        if len(np.unique(ids[first])) < len(first):  # a document in several pieces
            return super().panel(frame, rows, keys)
        order = np.argsort(ids[first], kind="stable")
        at = np.searchsorted(ids[first], mine, sorter=order)
        run = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros_like(at)
        ends = np.append(first[1:], len(ids))
        known = ids[first[run]] == mine if len(order) else np.zeros(len(mine), bool)
        lo = np.where(known, first[run], 0)[:, None] if len(order) else np.zeros((len(mine), 1), np.int64)
        hi = np.where(known, ends[run], 0)[:, None] if len(order) else lo
        return Panel.of_spans(lo, hi, keys.start, keys.stop)

    def recipe(self) -> Recipe:
        return "documents", {"ids": self.ids, "q_ids": self.q_ids}

    def __repr__(self) -> str:
        return f"documents({self.ids!r})"


class _Tree(_Cells):
    def __init__(self, parents: Ints) -> None:
        self.parents, self.by_batch = parents, parents.ndim > 1

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        if self.parents.shape not in ((q_len,), (*lead, q_len)):
            raise ValueError(
                f"tree: parents must have shape ({q_len},) or {(*lead, q_len)}, one for each query; "
                f"got {tuple(self.parents.shape)}"
            )

    def _lineage(self, frame: Frame, rows: slice) -> np.ndarray:
        """Which queries of the sequence are themselves or an ancestor, for `rows`: booleans (R, q_len)."""
        parents = self.parents[frame.index] if self.parents.ndim > 1 else self.parents
        parents = parents[frame.q0 : frame.q0 + frame.q_len]
        seen = np.zeros((rows.stop - rows.start, frame.q_len), bool)
        row, at = np.arange(len(seen)), np.arange(rows.start, rows.stop)
        while len(at):
            seen[row, at] = True
            up = parents[at]
            if (up >= at).any():
                raise ValueError("tree: parents of packed sequences count within their own, from 0")
            row, at = row[up >= 0], up[up >= 0]
        return seen

    def cells(self, frame: Frame, rows: slice, k0: int, k1: int) -> np.ndarray:
        seen = np.ones((rows.stop - rows.start, k1 - k0), bool)
        start, stop = max(frame.offset, k0), max(min(frame.kv_len, k1), k0)
        if start < stop:
            lineage = self._lineage(frame, rows)
            seen[:, start - k0 : stop - k0] = lineage[:, start - frame.offset : stop - frame.offset]
        return seen

    def panel(self, frame: Frame, rows: slice, keys: slice) -> Panel:
        first = max(frame.offset, 0)
        tail = Panel.of_cells(
            rows.stop - rows.start, first, frame.kv_len, lambda k0, k1: self.cells(frame, rows, k0, k1)
        )
        if tail.bits is not None:
            return super().panel(frame, rows, keys)
        # The keys before all queries, and what of the queries follows them at once, are one span.
        joined = tail.lo == first
        lo, hi = np.where(joined, 0, tail.lo), tail.hi
        rest = np.where(joined.any(axis=1, keepdims=True), 0, first)
        return Panel.of_spans(
            np.concatenate([np.zeros_like(rest), lo], axis=1),
            np.concatenate([rest, hi], axis=1),
            keys.start,
            keys.stop,
        )

    def recipe(self) -> Recipe:
        return "tree", {"parents": self.parents}

    def __repr__(self) -> str:
        return f"tree({self.parents!r})"


class Dense(_Cells):
    """An array of booleans, which a backend may also read where it lies."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.arrays = array, (array,)
        self.by_head = array.ndim > 2 and array.shape[-3] > 1
        self.by_batch = any(n > 1 for n in array.shape[:-3])

    def check(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> None:
        shape = (*lead, heads, q_len, kv_len)
        try:
            np.broadcast_to(self.array, shape)
        except ValueError:
            raise ValueError(
                f"mask of shape {self.array.shape} does not broadcast to (..., heads, q_len, kv_len) = {shape}"
            ) from None

    def cells_of(self, lead: tuple[int, ...], heads: int, q_len: int, kv_len: int) -> np.ndarray:
        """The array as a view of shape (*lead, heads, q_len, kv_len)."""
        return np.broadcast_to(self.array, (*lead, heads, q_len, kv_len))

    def cells(self, frame: Frame, rows: slice, k0: int, k1: int) -> np.ndarray:
        where = (*frame.index, frame.head)[-max(self.array.ndim - 2, 0) :] if self.array.ndim > 2 else ()
        lead = self.array.shape[:-2]
        plane = self.array[tuple(i if n > 1 else 0 for i, n in zip(where, lead, strict=True))]
        plane = np.broadcast_to(plane, (frame.q_total, frame.kv_total))
        rows = slice(rows.start + frame.q0, rows.stop + frame.q0)
        return plane[rows, k0 + frame.k0 : k1 + frame.k0]

    def recipe(self) -> Recipe:
        return "dense", {"array": self.array}

    def __repr__(self) -> str:
        return f"dense(<bool array {self.array.shape}>)"


class _Predicate(_Cells):
    def __init__(self, fn: Callable[..., object], per_head: bool) -> None:
        self.fn, self.by_head, self.by_batch = fn, per_head, per_head

    def cells(self, frame: Frame, rows: slice, k0: int, k1: int) -> np.ndarray:
        i = np.arange(rows.start, rows.stop)[:, None]
        j = np.arange(k0, k1)[None, :]
        shape = (rows.stop - rows.start, k1 - k0)
        seen = np.asarray(self.fn(frame.index, frame.head, i, j) if self.by_head else self.fn(i, j))
        if seen.dtype != np.bool_:
            raise TypeError(f"from_predicate: fn must return booleans, got {seen.dtype}")
        try:
            return np.broadcast_to(seen, shape)
        except ValueError:
            raise ValueError(f"from_predicate: fn returned shape {seen.shape}, expected {shape}") from None

    def __repr__(self) -> str:
        return f"from_predicate({getattr(self.fn, '__name__', self.fn)!s})"


# ---- constructors: the public names --------------------------------------------------------------------------


def band(
    left: int | None = None, right: int | None = None, offset: int | Literal["bottom-right"] = "bottom-right"
) -> Mask:
    """The general affine mask: key j is visible to query i iff ``i + offset - left <= j <= i + offset + right``.

    `left`, `right` and `offset` are any integers; ``None`` is unlimited on that side. The default offset is
    ``kv_len - q_len``. Shards of a long sequence use it with their own offset.

    >>> print(band(left=1, right=0, offset=1).draw(3, 5))
    1 1 0 0 0
    0 1 1 0 0
    0 0 1 1 0
    """
    for name, x in (("left", left), ("right", right)):
        if x is not None:
            integer(f"band: {name}", x, None)
    if offset != "bottom-right":
        offset = integer("band: offset", offset, None)
    return BandMask(left, right, offset)


def causal(align: Literal["bottom-right", "top-left"] = "bottom-right") -> Mask:
    """No query sees a later key: key j is visible to query i iff ``j <= i + kv_len - q_len``.

    The last query stands at the last key (bottom-right, as in flash-attn 2.1 and later); ``align="top-left"`` puts
    the first query at the first key, as torch's ``is_causal`` does.

    >>> print(causal().draw(2, 5))
    1 1 1 1 0
    1 1 1 1 1
    >>> print(causal(align="top-left").draw(2, 5))
    1 0 0 0 0
    1 1 0 0 0
    """
    if align not in ("bottom-right", "top-left"):
        raise ValueError(f"causal: align must be 'bottom-right' or 'top-left', got {align!r}")
    return BandMask(None, 0, "bottom-right" if align == "bottom-right" else 0)


def window(left: int | None, right: int | None = None) -> Mask:
    """A sliding window: `left` other keys before and `right` after a query's own position, itself included always.

    ``None`` is unlimited. Positions are aligned as in `causal`. A model card's "window of W tokens" counts the
    query itself: that is ``window(W - 1, 0)``.

    >>> print(window(1, 0).draw(4, 4))
    1 0 0 0
    1 1 0 0
    0 1 1 0
    0 0 1 1
    """
    for name, x in (("left", left), ("right", right)):
        if x is not None:
            integer(f"window: {name}", x, 0)
    return BandMask(left, right, "bottom-right")


def spans(lo: object, hi: object) -> Mask:
    """What every mask becomes, given outright: query i sees keys ``lo[i] <= j < hi[i]``.

    Integers ``(q_len,)``, or ``(q_len, n)`` for n spans per query, ascending and disjoint; an empty one has lo == hi.

    >>> print(spans([[0, 3], [1, 2], [0, 5]], [[1, 5], [2, 2], [2, 5]]).draw(3, 5))
    1 0 0 1 1
    0 1 0 0 0
    1 1 0 0 0
    """
    first = _integers("spans: lo", lo, at_least=0)
    last = _integers("spans: hi", hi, at_least=0)
    if first.shape != last.shape or first.ndim not in (1, 2):
        raise ValueError(
            f"spans: lo and hi must both be (q_len,) or (q_len, n), got {first.shape} and {last.shape}"
        )
    if first.ndim == 1:
        first, last = first[:, None], last[:, None]
    if (last < first).any():
        raise ValueError("spans: hi must not be less than lo in any span")
    if (first[:, 1:] < last[:, :-1]).any():
        raise ValueError("spans: the spans of a row must ascend and be disjoint")
    return _Spans(first, last)


def prefix(length: int) -> Mask:
    """The first `length` keys, for every query. A prefix language model is ``causal() | prefix(length)``.

    >>> print((causal() | prefix(2)).draw(4, 4))
    1 1 0 0
    1 1 0 0
    1 1 1 0
    1 1 1 1
    """
    return _Prefix(integer("prefix: length", length, 0))


def documents(ids: object = None, *, q_ids: object = None, cu_seqlens: object = None) -> Mask:
    """Packed documents: a query sees the keys of its own document only.

    Either `ids`, integers ``(kv_len,)`` or ``(..., kv_len)`` naming each key's document, or `cu_seqlens`, the
    boundaries ``[0, end of first, ..., kv_len]``. Queries are the last positions unless `q_ids` names theirs.

    >>> print(documents(cu_seqlens=[0, 2, 5]).draw(5, 5))
    1 1 0 0 0
    1 1 0 0 0
    0 0 1 1 1
    0 0 1 1 1
    0 0 1 1 1
    """
    if (ids is None) == (cu_seqlens is None):
        raise TypeError("documents: give either ids or cu_seqlens")
    if cu_seqlens is not None:
        ends = check_cu_seqlens("documents: cu_seqlens", cu_seqlens)
        ids = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    return _Documents(
        _integers("documents: ids", ids, at_least=None),
        None if q_ids is None else _integers("documents: q_ids", q_ids, at_least=None),
    )


def chunked(size: int) -> Mask:
    """Positions in chunks of `size` that see only their own chunk, as in chunked attention layers.

    >>> print(chunked(2).draw(4, 4))
    1 1 0 0
    1 1 0 0
    0 0 1 1
    0 0 1 1
    """
    return _Chunked(integer("chunked: size", size, 1))


def lengths(kv_lengths: object = None, q_lengths: object = None) -> Mask:
    """Padding: only the first `kv_lengths` keys are visible, and only the first `q_lengths` queries see anything.

    One length, or one per batch item. As a mask this hides cells and moves no position; the arguments
    ``kv_lengths=`` and ``q_lengths=`` of `attention` say instead where each sequence ends, and align to that.

    >>> print(lengths(3, q_lengths=2).draw(3, 5))
    1 1 1 0 0
    1 1 1 0 0
    0 0 0 0 0
    """
    if kv_lengths is None and q_lengths is None:
        raise TypeError("lengths: give kv_lengths, q_lengths or both")
    return _Lengths(
        None if kv_lengths is None else _integers("lengths: kv_lengths", kv_lengths, at_least=0),
        None if q_lengths is None else _integers("lengths: q_lengths", q_lengths, at_least=0),
    )


def anchors(count: int, left: int, right: int = 0) -> Mask:
    """The first `count` keys and a sliding window: what a streaming model keeps. (Learned sinks are `sinks=`.)

    >>> print(anchors(1, left=1).draw(5, 5))
    1 0 0 0 0
    1 1 0 0 0
    1 1 1 0 0
    1 0 1 1 0
    1 0 0 1 1
    """
    integer("anchors: count", count, 0)
    return (prefix(count) & window(None, right)) | window(left, right)


def tree(parents: object) -> Mask:
    """The queries are a tree of guessed tokens at the end of the keys: each sees all keys before them, and of their
    own only its ancestors and itself, as in speculative decoding (Miao et al. 2023, arXiv 2305.09781).

    `parents`, integers ``(q_len,)`` or ``(..., q_len)``: the query (an earlier one) from which each follows, -1 for a
    first one.

    >>> print(tree([-1, 0, 0, 1]).draw(4, 6))
    1 1 1 0 0 0
    1 1 1 1 0 0
    1 1 1 0 1 0
    1 1 1 1 0 1
    """
    given = _integers("tree: parents", parents, at_least=-1)
    if given.ndim < 1:
        raise ValueError(f"tree: parents must have shape (q_len,) or (..., q_len), got {given.shape}")
    if not is_traced(given) and (late := np.argwhere(given >= np.arange(given.shape[-1]))).size:
        at = tuple(late[0].tolist())
        raise ValueError(
            f"tree: each of parents must be an earlier query, got {given[at]} for query {at[-1]}"
        )
    return _Tree(given)


def dense(array: object) -> Mask:
    """A boolean array broadcastable to ``(..., heads, q_len, kv_len)``; True means visible. It is not copied.

    >>> print(dense(np.eye(3, dtype=bool)).draw(3, 3))
    1 0 0
    0 1 0
    0 0 1
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("mask must not be a masked array: its own mask would be ignored")
    if is_traced(array):
        return Dense(array)  # type: ignore[arg-type]  # looked at when the program runs
    cells = np.asarray(array)
    if cells.dtype != np.bool_:
        raise TypeError(
            f"mask must be boolean (True = visible), got {cells.dtype}; additive masks go to bias="
        )
    return Dense(np.broadcast_to(cells, (1,) * max(2 - cells.ndim, 0) + cells.shape))


def from_predicate(fn: Callable[..., object], *, per_head: bool = False) -> Mask:
    """Any rule: ``fn(i, j)`` gets query rows (R, 1) and key columns (1, C) as integers and returns booleans.

    It is asked for one panel of query rows at a time, never for the whole matrix. With ``per_head=True`` it is
    called as ``fn(index, head, i, j)``, where `index` is the tuple of leading (batch) indices.

    >>> print(from_predicate(lambda i, j: (i + j) % 2 == 0).draw(3, 4))
    1 0 1 0
    0 1 0 1
    1 0 1 0
    """
    if not callable(fn):
        raise TypeError(f"from_predicate: fn must be callable, got {type(fn).__name__}")
    return _Predicate(fn, per_head)


def _bound(mask: Mask, q_len: int, kv_len: int, q0: int, q1: int, k0: int, k1: int) -> Mask:
    return mask.bind(q_len, kv_len)[q0:q1, k0:k1]


# What recipes name.
RECIPES: dict[str, Callable[..., Mask]] = {
    **{make.__name__: make for make in (band, spans, prefix, chunked, lengths, documents, tree, dense)},
    "and": _Both,
    "or": _Either,
    "not": _Not,
    "bound": _bound,
}


# ---- the affine part -----------------------------------------------------------------------------------------


def split(mask: Mask | None, offset: int | None) -> tuple[Band, Mask | None]:
    """Take the affine part out of a conjunction: ``(band, rest)`` with ``mask == band & rest``.

    `offset` is the position of query 0, or None where sequences differ: then bands of a fixed offset stay in the rest.
    """
    left: int | None = None
    right: int | None = None
    rest: Mask | None = None
    todo = [] if mask is None else [mask]
    while todo:
        part = todo.pop()
        if isinstance(part, _Both):
            todo += [part.b, part.a]
        elif isinstance(part, BandMask) and (isinstance(part.offset, str) or offset is not None):
            shift = 0 if isinstance(part.offset, str) or offset is None else part.offset - offset
            if part.left is not None:
                left = part.left - shift if left is None else min(left, part.left - shift)
            if part.right is not None:
                right = part.right + shift if right is None else min(right, part.right + shift)
        else:
            rest = part if rest is None else _Both(rest, part)
    return Band(left, right, offset), rest


# ---- checks of index metadata: always made, always on a private copy -----------------------------------------


def integer(name: str, x: object, at_least: int | None) -> int:
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {x!r}")
    if at_least is not None and x < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {x}")
    return int(x)


def _integers(name: str, x: object, at_least: int | None) -> Ints:
    if is_traced(x):
        return x  # type: ignore[return-value]  # looked at when the program runs
    array = np.asarray(x).copy()  # a private one: the caller may change its own while we run
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    array = array.astype(np.int64)
    if at_least is not None and array.size and array.min() < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {array.min()}")
    return array


def check_cu_seqlens(name: str, x: object, total: int | None = None) -> Ints:
    """Cumulative lengths ``[0, ..., total]`` as a private int64 copy; int32 or int64, never decreasing."""
    given = np.asarray(x)
    if given.dtype not in (np.int32, np.int64) or given.ndim != 1 or not len(given):
        raise TypeError(
            f"{name} must be a 1-D int32 or int64 array of cumulative lengths, got {given.dtype} of shape {given.shape}"
        )
    ends = np.array(given, np.int64)
    if ends[0] != 0:
        raise ValueError(f"{name} must start at 0, got {ends[0]}")
    if (drop := np.flatnonzero(np.diff(ends) < 0)).size:
        at = int(drop[0])
        raise ValueError(f"{name} must not decrease, got {ends[at + 1]} after {ends[at]} at index {at + 1}")
    if total is not None and ends[-1] != total:
        raise ValueError(f"{name} must end at {total}, the number of packed rows; got {ends[-1]}")
    return ends
