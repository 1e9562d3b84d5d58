"""Taps as the native core takes them: which arrays it is to fill, and what it must be told for that.

Row taps go along with a fold; regions become spans of keys for the rows of each call of the core. Key taps are pools of
a second sweep, in float64 until a statistic finishes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ...layouts import Frame, frames
from ...problem import Operands, Problem
from ...taps import Cells, Distance, Entropy, Keys, KeyTap, Map, Mass, Peak, RowTap, Tapped, Top, region_spans

LIST_STEP = 16  # lists are whole steps of so many
AT_ONCE = 8  # pools of a kind that the core has room for


class Told:
    """The row taps of a call, and the arrays that a fold fills."""

    def __init__(self, core: ModuleType | None, p: Problem, x: Operands) -> None:
        assert core is not None
        self.core, self.taps = core, [tap for tap in x.taps if isinstance(tap, RowTap)]
        self.frames = list(frames(p, x))
        self.regions = [tap for tap in self.taps if isinstance(tap, Mass)]
        self.seen: dict[Tapped, Any] = {
            tap: tap.allocate(p, x) for tap in self.taps if not isinstance(tap, (Mass, Top))
        }
        self.lists = [tap for tap in self.taps if isinstance(tap, Top)]
        self.top: tuple[Any, Any, int] = (None, None, 0)
        if self.lists:  # the longest one begins with the shorter ones
            longest = max(tap.count for tap in self.lists)
            self.top = (*Top(longest).allocate(p, x, LIST_STEP, as_wide=True), longest)
        self.mass = np.array([tap.allocate(p, x) for tap in self.regions]) if self.regions else None
        if self.mass is not None:
            self.seen.update(zip(self.regions, self.mass, strict=True))  # views of it

    def of(self, part: tuple[Any, ...]) -> Any:
        """What the core is told for the rows of one of its calls."""
        first, last, frame = part[:3]
        lo = hi = None
        if self.regions:
            lo, hi = self._spans(self.frames[frame], slice(first, last))
        named = (self.seen.get(tap) for tap in (Entropy(), Peak(), Distance()))
        return self.core.Rows(*named, self.mass, *self.top, lo, hi)

    def finished(self) -> dict[Tapped, Any]:
        """The arrays by their taps."""
        for tap in self.lists:
            scores, keys, _ = self.top
            self.seen[tap] = scores[..., : tap.count], keys[..., : tap.count].astype(np.int64)
        return self.seen

    def _spans(self, frame: Frame, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The spans of every region in those rows, ``(regions, rows, spans)``; empty ones where one has fewer."""
        found = [region_spans(tap.region, frame, rows) for tap in self.regions]
        shape = (len(found), rows.stop - rows.start, max(lo.shape[1] for lo, _ in found))
        both = np.zeros((2, *shape), np.int64)
        for n, ends in enumerate(found):
            for into, some in zip(both, ends, strict=True):
                into[n, :, : some.shape[1]] = some
        return both[0], both[1]


class Pooled:
    """Key taps of one sweep, few enough for the core."""

    def __init__(self, core: ModuleType | None, p: Problem, x: Operands, taps: Sequence[Tapped]) -> None:
        assert core is not None
        self.core = core.Pools()
        self.seen: dict[Tapped, Any] = {}
        self.held: list[Any] = []  # what the core reads until it is done
        for tap in taps:
            if isinstance(tap, Keys):
                to, factors = tap.allocate(p, x), tap.row_weights(p, x)
                self.core.add_keys(to, factors, tap.pool == "max")
                self.held.append(factors)
                self.seen[tap] = to
            elif isinstance(tap, Map):
                to = tap.allocate(p, x)
                ends = np.array([np.concatenate(tap.edges(f, to.shape)) for f in frames(p, x)], np.int64)
                self.core.add_map(to, ends.reshape(-1, to.shape[-2] + to.shape[-1] + 2), tap.pool == "max")
                self.held.append(ends)
                self.seen[tap] = to
            elif isinstance(tap, Cells):
                to, (rows, again) = tap.allocate(p, x), np.unique(tap.rows_of(p), return_inverse=True)
                slots = np.full(p.q_len, -1, np.int64)
                slots[rows] = np.arange(len(rows))
                some = (
                    to[..., : len(rows), :] if len(rows) == to.shape[-2] else to[..., : len(rows), :].copy()
                )
                self.core.add_cells(some, slots, tap.keys_of(p)[0])
                self.held.append(slots)
                self.seen[tap] = (some, again)

    def finished(self) -> dict[Tapped, Any]:
        """The arrays by their taps."""
        return {
            tap: found[0][..., found[1], :] if isinstance(tap, Cells) else found
            for tap, found in self.seen.items()
        }


def batched(taps: Sequence[Tapped]) -> Iterator[list[KeyTap]]:
    """Key taps, as many at a time as one sweep serves."""
    keys = [tap for tap in taps if isinstance(tap, KeyTap)]
    for n in range(0, len(keys), AT_ONCE):
        yield keys[n : n + AT_ONCE]
