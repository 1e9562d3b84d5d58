"""Pages of one memory: which are free, and how many sequences hold each of the others.

Stored as ``(pages, kv_heads, page, dim)``, so that the rows of a head lie one after another within a page. Decoding
reads head by head: with the heads of a row together each row would lie in a page of memory of its own, and took 1.7
times as long. Scales of codes lie beside them, ``(pages, kv_heads, page)`` or with a last axis of groups. The lowest
free page is given first. The fact to know: nothing here fails halfway. `reserve` is what may
fail, and it is asked before anything is changed.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from .rows import CacheFull, Rows, bits

LEAST = 4  # pages of the first growth


class Pool:
    """The memory of a paged cache; `limit` is the most pages it may have, None for any number."""

    def __init__(self, rows: Rows, page: int, limit: int | None) -> None:
        self.rows, self.page, self.limit = rows, page, limit
        self.holders: list[int] = []
        self._free: list[int] = []
        self.memory = rows.empty(0, rows.kv_heads, page)
        self._allocate(0 if limit is None else limit)

    @property
    def pages(self) -> int:
        return len(self.holders)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.pages - self.free

    def reserve(self, pages: int) -> None:
        """Make sure that so many more can be taken; CacheFull or MemoryError if they cannot."""
        if pages <= self.free:
            return
        if self.limit is not None:
            raise CacheFull(
                f"the cache has {self.limit} pages of {self.page} rows, {self.free} of them free, and "
                f"{pages} more are needed"
            )
        self._allocate(max(LEAST, 2 * self.pages, self.used + pages))

    def take(self) -> int:
        """The lowest free page, held once."""
        page = heappop(self._free)
        self.holders[page] = 1
        return page

    def share(self, page: int) -> None:
        self.holders[page] += 1

    def drop(self, page: int) -> None:
        """Hold the page once less; it is free where nobody does."""
        self.holders[page] -= 1
        if not self.holders[page]:
            heappush(self._free, page)

    def copied(self, page: int, rows: int) -> int:
        """A page of one's own in exchange for a shared one, with its first rows."""
        own = self.take()
        for x in map(bits, self.memory):
            x[own, :, :rows] = x[page, :, :rows]
        self.drop(page)
        return own

    def write(self, at: np.ndarray, *stored: np.ndarray) -> None:
        """Rows ``(n, kv_heads, ...)`` to the places `at` ``(n,)``: page times size of a page, plus row."""
        pages, places = np.divmod(at, self.page)
        for mine, rows in zip(self.memory, stored, strict=True):
            bits(mine)[pages, :, places] = bits(rows)

    def _allocate(self, pages: int) -> None:
        memory = self.rows.empty(pages, self.rows.kv_heads, self.page)
        had = self.pages
        for old, grown in zip(self.memory, memory, strict=True):
            bits(grown)[:had] = bits(old)
        self.memory = memory
        self.holders += [0] * (pages - had)
        self._free += range(had, pages)  # higher than any page before: still a heap
