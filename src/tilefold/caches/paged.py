"""A cache for sequences that come, fork and go: pages of one memory, and per sequence a list of those that it holds.

A fork holds the pages of its origin and copies one only where it writes into it: the last one, if it is not full. With
a `window` pages are given back once no later query can see them. The fact to know: positions are logical. What was
given back still counts in the length, and asking for it is an error and never a wrong number.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..layouts import Stored
from ..masks import integer
from .kept import chosen, cut, memory, unmoved
from .pool import Pool
from .rotary import Rotary, keys_turned
from .rows import New, Rows, by_name, per_sequence, shortened

NO_PAGE = array("q", [-1])


@dataclass(slots=True)
class _Sequence:
    """Pages in the order of positions, -1 for one given back; keys before `first` are gone, but for anchors.

    Of an eviction: how many rows it `dropped`, and at which length it `settled`.
    """

    pages: array[int] = field(default_factory=lambda: array("q"))
    length: int = 0
    first: int = 0
    dropped: int = 0
    settled: int = 0


class PagedKVCache:
    """Keys and values of any number of sequences, in pages that they take from one memory and may share.

    Args:
        kv_heads, dim, v_dim: key heads, and the sizes of their keys and values (`v_dim` is `dim` if left out).
        page: rows of a page, any number; results have the same bits for each.
        pages: how many pages there are; None grows by doubling.
        dtype: float16, bfloat16, float32 or float64; float32 if neither this nor `like` is given.
        like: a NumPy array or a tensor: the cache has its type, and `k` and `v` are of its kind.
        window: only the last so many positions stay (a query sees itself and ``window - 1`` before it); None keeps all.
        anchors: with a `window`, the first so many positions stay too.
        quantised: "int8", "float8_e4m3fn" or "int4": rows are kept as codes and float32 scales, as `quantise` makes
            them of each (see docs/quantised.md); they must be finite then. None keeps them as they are.
        group: how many neighbouring dims of a row share a scale; None: all of them.

    ``cache[ids]`` stands for the keys and values of these sequences in `tilefold.attention`; queries are ``(batch,
    heads, Sq, dim)`` and stand at the end of each sequence. One thread at a time may change a cache, and none may while
    a call reads it. What is stored carries no gradient.

    >>> k, v = np.random.default_rng(0).normal(size=(2, 1, 2, 300, 8)).astype(np.float32)
    >>> cache = PagedKVCache(kv_heads=2, dim=8, page=64)
    >>> a = cache.open()
    >>> cache.append([a], k, v)
    >>> b = cache.fork(a)
    >>> cache.append([b], k[:, :, :1], v[:, :, :1])
    >>> cache.lengths([a, b]), cache.pages_used
    (array([300, 301]), 6)
    >>> q = np.ones((2, 4, 1, 8), np.float32)
    >>> out = tf.attention(q, cache[a, b], causal=True)
    >>> bool((out[:1] == tf.attention(q[:1], k, v, causal=True)).all())
    True
    """

    def __init__(
        self, kv_heads: int, dim: int, v_dim: int | None = None, *, page: int = 128, pages: int | None = None,
        dtype: Any = None, like: Any = None, window: int | None = None, anchors: int = 0,
        quantised: str | None = None, group: int | None = None,
    ) -> None:  # fmt: skip
        rows = Rows.checked(kv_heads, dim, v_dim, dtype, like, quantised, group)
        self._window = None if window is None else integer("window", window, 1)
        self._anchors = integer("anchors", anchors, 0)
        if self._anchors and self._window is None:
            raise ValueError(f"anchors must be 0 without a window, where everything stays; got {anchors}")
        self._pool = Pool(
            rows, integer("page", page, 1), None if pages is None else integer("pages", pages, 0)
        )
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    # ---- sequences -------------------------------------------------------------------------------------------

    def open(self) -> int:
        """A new empty sequence: its id, which no other sequence of this cache ever has."""
        return self._add(_Sequence())

    def fork(self, id: int) -> int:
        """A new sequence that has all that this one has, and shares its pages."""
        origin = self._of(id)
        for page in origin.pages:
            if page >= 0:
                self._pool.share(page)
        return self._add(replace(origin, pages=origin.pages[:]))

    def free(self, ids: Any) -> None:
        """Forget a sequence, or several; pages that no other one holds are free."""
        named = self._named(ids, distinct=True)
        for id, sequence in named.items():
            self._cut(sequence, 0)
            del self._sequences[id]

    def append(
        self,
        ids: Any,
        k: Any,
        v: Any,
        lengths: Any = None,
        *,
        cu_seqlens: Any = None,
        rotary: Rotary | None = None,
    ) -> None:
        """Add rows to the end of sequences.

        Args:
            ids: one id or several, each at most once.
            k, v: ``(len(ids), kv_heads, S, dim or v_dim)``.
            lengths: how many of the S rows are new, one integer or ``(len(ids),)``; the rest is padding. By default
                all are.
            cu_seqlens: cumulative lengths of sequences whose rows come packed, k and v ``(kv_heads, total, dim or
                v_dim)``, as `tilefold.attention` takes `cu_seqlens_q`.
            rotary: a `Rotary`, which turns the keys to the positions that they take; without one they are stored as
                they come.

        Raises:
            CacheFull: a fixed number of pages does not suffice. As after any other error, nothing was written.

        With a `window`, what no query at these positions or later can see is given back first.
        """
        sequences = list(self._named(ids, distinct=True).values())
        new = self._pool.rows.enter(k, v, len(sequences), lengths, cu_seqlens)
        starts = [sequence.length for sequence in sequences]
        new = self._pool.rows.stored(
            keys_turned(rotary, new, np.array([s.length + s.dropped for s in sequences], np.int64))
        )
        growing = [(s, n) for s, n in zip(sequences, new.counts.tolist(), strict=True) if n]
        self._pool.reserve(self._needed(growing))
        for sequence, _ in growing:
            self._give_back(sequence)
        try:
            for sequence, count in growing:
                self._extend(sequence, count)
            self._write(sequences, starts, new)
        except BaseException:
            for sequence, start in zip(sequences, starts, strict=True):
                self._cut(sequence, start)
            raise

    def pages_needed(self, ids: Any, lengths: Any) -> int:
        """How many free pages an `append` of so many rows to these sequences takes; nothing changes.

        Args:
            ids: one id or several, each at most once.
            lengths: how many rows, one integer or ``(len(ids),)``.

        Copies of shared pages that would be written count, and so do the pages that a `window` gives back: where it
        gives back more than it takes, the result is negative. An append of no more than `pages_free` succeeds.

        >>> cache = PagedKVCache(kv_heads=1, dim=8, page=16, pages=4)
        >>> a = cache.open()
        >>> cache.append(a, *np.zeros((2, 1, 1, 40, 8), np.float32))
        >>> b = cache.fork(a)
        >>> cache.pages_needed(b, 1), cache.pages_needed([a, b], [1, 10]), cache.pages_free
        (1, 2, 1)
        """
        sequences = list(self._named(ids, distinct=True).values())
        new = per_sequence("lengths", lengths, len(sequences)).tolist()
        return self._needed([(s, n) for s, n in zip(sequences, new, strict=True) if n])

    def truncate(self, ids: Any, lengths: Any) -> None:
        """Forget what comes after the first `lengths` positions, of one sequence or several: tokens that were guessed.

        A length within what a `window` has given back is refused: the sequence would have a hole. So is one within what
        `keep` left, which can be forgotten as a whole only.
        """
        named = self._named(ids, distinct=True)
        now = np.array([s.length for s in named.values()], np.int64)
        to = shortened(lengths, now).tolist()
        for n, (id, sequence) in enumerate(named.items()):
            if self._anchors < to[n] < sequence.first:
                raise ValueError(
                    f"lengths must not lie in what was given back, {self._anchors} to {sequence.first} of "
                    f"sequence {id}; got {to[n]}"
                )
        cut(np.array(to, np.int64), np.array([s.settled for s in named.values()], np.int64))
        for sequence, length in zip(named.values(), to, strict=True):
            self._cut(sequence, length)
            sequence.first = sequence.first if length > self._anchors else 0
            if not length:
                sequence.dropped = sequence.settled = 0

    def keep(self, ids: Any, keys: Any) -> None:
        """Forget every row of sequences but these, which move up in their order: see `tilefold.eviction`.

        Args:
            ids: one id or several, each at most once.
            keys: ``(len(ids), kv_heads, n)``, or ``(len(ids), 1, n)`` for all heads: the rows that stay, ascending, as
                many in each head of a sequence; -1 at the end where a sequence keeps fewer than n.

        Raises:
            CacheFull: pages that others share are copied where rows move into them, and a fixed number of pages does
                not suffice. As after any other error, nothing has changed.
            ValueError: for a cache with a `window`, which forgets by itself.

        Lengths and places then count what is left. `seen_tokens` goes on counting what was appended.
        """
        if self._window is not None:
            raise ValueError("keep must not be asked of a cache with a window, which forgets by itself")
        sequences = list(self._named(ids, distinct=True).values())
        lengths = np.array([s.length for s in sequences], np.int64)
        keys, counts = chosen(keys, lengths, self._pool.rows.kv_heads)
        moves = [
            (s, rows[:, :count], unmoved(rows[:, :count]))
            for s, rows, count in zip(sequences, keys, counts.tolist(), strict=True)
            if count < s.length
        ]
        self._pool.reserve(self._copies(moves))
        for move in moves:
            self._pack(*move)

    def __getitem__(self, ids: Any) -> PagedView:
        """Keys and values for `tilefold.attention`: a batch of these sequences, in this order; an id may repeat."""
        return self.view(ids)

    def view(self, ids: Any, *, cascade: bool = False) -> PagedView:
        """The same as ``cache[ids]``. With `cascade`, leading pages that all of these sequences share are read once for
        all where that pays (see `tilefold.caches.cascade`): the result is as exact, but its last bits depend on the
        batch.
        """
        if not isinstance(cascade, bool):
            raise TypeError(f"cascade must be True or False, got {type(cascade).__name__}")
        return PagedView(self, tuple(self._named(ids)), cascade)

    # ---- files -----------------------------------------------------------------------------------------------

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Write all sequences to a file, which is there whole or not at all (see `tilefold.caches.snapshot`).

        Of the pages, only those in use are written, each once however many sequences share it.
        """
        from .snapshot import write

        pool, rows = self._pool, self._pool.rows
        filled = self._filled()
        number = {page: n for n, page in enumerate(filled)}
        state = {
            **rows.state,
            "page": pool.page,
            "pages": pool.limit,
            "window": self._window,
            "anchors": self._anchors,
            "next": self._next,
            "filled": list(filled.values()),
            "sequences": [
                [id, s.length, s.first, [number.get(page, -1) for page in s.pages]]
                for id, s in self._sequences.items()
            ],
            "evicted": [[id, s.dropped, s.settled] for id, s in self._sequences.items() if s.dropped],
        }
        write(
            path, "PagedKVCache", rows.dtype, state, self._pieces(filled), sum(filled.values()) * rows.nbytes
        )

    @classmethod
    def restore(cls, path: str | os.PathLike[str], *, like: Any = None) -> PagedKVCache:
        """The cache of a file that `snapshot` wrote, with the same ids; ValueError says what is wrong with another."""
        from .snapshot import Reader

        with Reader(path, "PagedKVCache") as file:
            kv_heads, dim, v_dim, page, anchors, last = file.integers(
                "kv_heads", "dim", "v_dim", "page", "anchors", "next"
            )
            cache = cls(
                kv_heads, dim, v_dim, page=page, pages=file.limit("pages"), window=file.limit("window"),
                anchors=anchors, **file.rows(like),
            )  # fmt: skip
            filled = file.counts("filled")
            file.expect(all(0 < rows <= page for rows in filled), "a page has more rows than fit, or none")
            cache._pool.reserve(len(filled))
            held = dict(zip((cache._pool.take() for _ in filled), filled, strict=True))
            for id, length, first, pages in file.sequences(last, page, filled):
                cache._sequences[id] = _Sequence(array("q", pages), length, first)
            for id, dropped, settled in file.evicted({id: s.length for id, s in cache._sequences.items()}):
                cache._sequences[id].dropped, cache._sequences[id].settled = dropped, settled
            cache._next = last
            counts = Counter(n for s in cache._sequences.values() for n in s.pages if n >= 0)
            file.expect(len(counts) == len(filled), "a page belongs to no sequence")
            cache._pool.holders[: len(filled)] = [counts[n] for n in range(len(filled))]
            file.fill(cache._pieces(held), sum(filled) * cache._pool.rows.nbytes)
        return cache

    # ---- what there is ---------------------------------------------------------------------------------------

    @property
    def ids(self) -> list[int]:
        """The sequences, in the order in which they were opened."""
        return list(self._sequences)

    def lengths(self, ids: Any) -> np.ndarray:
        """How many positions each of these sequences has, those given back included."""
        return np.array([self._sequences[id].length for id in self._named(ids)], np.int64)

    def seen_tokens(self, ids: Any) -> np.ndarray:
        """How many rows each of these sequences was given, those that `keep` dropped included: the position of the next
        token, where `lengths` is its place."""
        sequences = [self._sequences[id] for id in self._named(ids)]
        return np.array([s.length + s.dropped for s in sequences], np.int64)

    @property
    def page(self) -> int:
        """Rows of a page."""
        return self._pool.page

    @property
    def pages_used(self) -> int:
        """Pages that some sequence holds."""
        return self._pool.used

    @property
    def pages_free(self) -> int:
        """Pages that can be taken without growing."""
        return self._pool.free

    @property
    def nbytes(self) -> int:
        """The memory of all pages, free ones and scales included."""
        return sum(x.nbytes for x in self._pool.memory)

    @property
    def k(self) -> Any:
        """The memory of the keys ``(pages, kv_heads, page, dim)``, or of their codes; rows that no sequence has hold
        anything."""
        return self._pool.rows.shown(self._pool.memory, "k")

    @property
    def v(self) -> Any:
        """The memory of the values ``(pages, kv_heads, page, v_dim)``, or of their codes."""
        return self._pool.rows.shown(self._pool.memory, "v")

    @property
    def k_scale(self) -> Any:
        """The memory of the scales of keys ``(pages, kv_heads, page)``, with a `group` ``(..., dim / group)``; None
        where nothing is quantised."""
        return self._pool.rows.shown(self._pool.memory, "k_scale")

    @property
    def v_scale(self) -> Any:
        """The same of the values."""
        return self._pool.rows.shown(self._pool.memory, "v_scale")

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self._pool.rows}, "
            f"{len(self._sequences)} sequences in {self.pages_used} of {self._pool.pages} pages of {self.page})"
        )

    # ---- inside ----------------------------------------------------------------------------------------------

    def _add(self, sequence: _Sequence) -> int:
        id, self._next = self._next, self._next + 1
        self._sequences[id] = sequence
        return id

    def _of(self, id: Any) -> _Sequence:
        found = self._sequences.get(integer("id", id, None))
        if found is None:
            raise ValueError(f"id must name a sequence of this cache, got {id}")
        return found

    def _named(self, ids: Any, distinct: bool = False) -> Any:
        """The argument `ids`: a list of ids, or where none may repeat a dict of their sequences."""
        if isinstance(ids, (int, np.integer)):
            ids = (ids,)
        elif not isinstance(ids, (list, tuple, range, np.ndarray)):
            raise TypeError(f"ids must be one id or a sequence of them, got {type(ids).__name__}")
        named = [integer("id", id, None) for id in ids]
        sequences = {id: self._sequences.get(id) or self._of(id) for id in named}
        if distinct and len(sequences) < len(named):
            twice = next(id for id, n in Counter(named).items() if n > 1)
            raise ValueError(f"ids must differ, got {twice} twice")
        return sequences if distinct else named

    def _outside(self, s: _Sequence) -> range:
        """The pages of a sequence that no query at its end or later sees."""
        if self._window is None:
            return range(0)
        first = max(s.first, s.length - self._window + 1)
        kept = -(-self._anchors // self.page)
        return range(max(kept, s.first // self.page), max(kept, first // self.page))

    def _needed(self, growing: list[tuple[_Sequence, int]]) -> int:
        """How many free pages an append takes beyond those that it gives back."""
        dropped = Counter(s.pages[n] for s, _ in growing for n in self._outside(s))
        fresh = 0
        for s, count in growing:
            fresh += -(-(s.length + count) // self.page) - len(s.pages)
            if s.length % self.page and self._pool.holders[s.pages[-1]] - dropped[s.pages[-1]] > 1:
                fresh += 1
                dropped[s.pages[-1]] += 1
        return fresh - sum(n == self._pool.holders[page] for page, n in dropped.items())

    def _give_back(self, s: _Sequence) -> None:
        """Drop the pages that are outside of the window."""
        for n in self._outside(s):
            self._pool.drop(s.pages[n])
            s.pages[n] = -1
        if self._window is not None:
            s.first = max(s.first, s.length - self._window + 1)

    def _copies(self, moves: list[tuple[_Sequence, np.ndarray, int]]) -> int:
        """How many free pages the moves take at most at one time, one after the other."""
        dropped: Counter[int] = Counter()
        now = most = 0
        for s, rows, first in moves:
            end = -(-rows.shape[1] // self.page)
            for page in s.pages[end:]:
                dropped[page] += 1
                now -= dropped[page] == self._pool.holders[page]
            for page in s.pages[first // self.page : end]:
                if self._pool.holders[page] - dropped[page] > 1:
                    dropped[page] += 1
                    now += 1
            most = max(most, now)
        return most

    def _pack(self, s: _Sequence, rows: np.ndarray, first: int) -> None:
        """Move these rows ``(kv_heads, n)`` of a sequence up, into pages of its own; those before `first` stay."""
        count, holders = rows.shape[1], self._pool.holders
        pages = np.array(s.pages, np.int64)
        heads, moving = np.arange(len(rows))[:, None], rows[:, first:]
        every = memory(self._stored((), False))
        taken = [x[pages[moving // self.page], heads, moving % self.page] for x in every]
        start = first // self.page
        left = s.length
        self._cut(s, count)
        for n in range(start, len(s.pages)):
            if holders[s.pages[n]] > 1:
                s.pages[n] = self._pool.copied(s.pages[n], max(first - n * self.page, 0))
        to = np.arange(first, count)
        pages = np.array(s.pages, np.int64)
        for x, some in zip(every, taken, strict=True):
            x[pages[to // self.page], heads, to % self.page] = some
        s.dropped += left - count
        s.settled = count

    def _extend(self, s: _Sequence, count: int) -> None:
        """Room for `count` more rows, in pages of its own."""
        if (rows := s.length % self.page) and self._pool.holders[s.pages[-1]] > 1:
            s.pages[-1] = self._pool.copied(s.pages[-1], rows)
        s.length += count
        while len(s.pages) * self.page < s.length:
            s.pages.append(self._pool.take())

    def _write(self, sequences: list[_Sequence], starts: list[int], new: New) -> None:
        if new.counts.max(initial=0) == 1:
            some = np.flatnonzero(new.counts)
            places = [
                sequences[n].pages[starts[n] // self.page] * self.page + starts[n] % self.page for n in some
            ]
            self._pool.write(np.array(places), *(new.single(x) for x in new.arrays))
            return
        for n, (s, start) in enumerate(zip(sequences, starts, strict=True)):
            at = np.arange(start, s.length)
            at = np.asarray(s.pages, np.int64)[at // self.page] * self.page + at % self.page
            self._pool.write(at, *(new.of(x, n).swapaxes(0, 1) for x in new.arrays))

    def _cut(self, s: _Sequence, length: int) -> None:
        """Make a sequence end at `length`, without the pages behind it."""
        keep = -(-length // self.page)
        for page in s.pages[keep:]:
            if page >= 0:
                self._pool.drop(page)
        del s.pages[keep:]
        s.length = length

    def _filled(self) -> dict[int, int]:
        """The pages in use, ascending, and how many rows of each are of some sequence."""
        filled: dict[int, int] = {}
        for s in self._sequences.values():
            for n, page in enumerate(s.pages):
                if page >= 0:
                    filled[page] = max(filled.get(page, 0), min(s.length - n * self.page, self.page))
        return dict(sorted(filled.items()))

    def _pieces(self, filled: dict[int, int]) -> Iterator[np.ndarray]:
        """The rows of these pages, in the order of a file."""
        for x in self._pool.memory:
            for page, rows in filled.items():
                yield from (head[:rows] for head in x[page])

    def _stored(self, ids: tuple[int, ...], cascade: bool) -> Stored:
        sequences = [self._sequences.get(id) or self._of(id) for id in ids]
        width = roomy(max((len(s.pages) for s in sequences), default=0))
        pages = array("q")
        for s in sequences:
            pages += s.pages
            pages += NO_PAGE * (width - len(s.pages))
        table = np.frombuffer(pages, np.int64).reshape(len(ids), width)
        lengths = np.array([s.length for s in sequences], np.int64)
        first = None if self._window is None else np.array([s.first for s in sequences], np.int64)
        evicted: dict[str, Any] = {}
        if any(s.settled for s in sequences):
            evicted = {
                name: np.array([getattr(s, name) for s in sequences], np.int64)
                for name in ("settled", "dropped")
            }
        return Stored(
            lengths=lengths, table=table, first=first, kept=self._anchors, cascade=cascade,
            **by_name(self._pool.memory), **evicted,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PagedView:
    """Sequences of a paged cache as a batch of keys and values. It sees what is appended after it was made."""

    cache: PagedKVCache
    ids: tuple[int, ...]
    cascade: bool = False

    def stored(self) -> Stored:
        """What `tilefold.attention` reads."""
        return self.cache._stored(self.ids, self.cascade)

    @property
    def capacity(self) -> int:
        """The number of keys that arrays over keys (`bias`, boolean masks) must have at present."""
        return self.cache.page * roomy(max((len(self.cache._of(id).pages) for id in self.ids), default=0))


def roomy(n: int) -> int:
    """`n` or up to a quarter more, so that few different numbers occur, and with them few different plans."""
    step = 1 << max((n - 1).bit_length() - 3, 0)
    return -(-n // step) * step
