"""Which tiles exist, FULL or EDGE. Nobody else knows geometry.

Rows of queries are folded in blocks: `block_q` query rows times the query heads that share a key head, times as many
key heads as fit into a tile. Keys come in blocks on an absolute grid of `block_k`, trimmed to what the rows see: an
empty block is never touched, an EDGE tile alone is tested cell by cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .layouts import Frame, frames
from .masks import Panel, band_panel
from .problem import Band, Operands

if TYPE_CHECKING:
    from .plan import Plan

TILE_CELLS = 2**19  # scores in flight: 2 MiB of float32; small heads share a tile up to this


class Kind(Enum):
    FULL = "full"
    EDGE = "edge"


FULL, EDGE = Kind.FULL, Kind.EDGE


@dataclass(frozen=True, slots=True)
class Tile:
    """Keys k0..k1 of one row block. In an EDGE tile keys outside ``[full0, full1)`` must be tested."""

    k0: int
    k1: int
    kind: Kind
    full0: int
    full1: int

    @property
    def tested(self) -> tuple[slice, ...]:
        """The columns of the tile, counted from k0, where some row may not see a key."""
        if self.full0 == self.full1:
            return (slice(0, self.k1 - self.k0),)
        ends = ((0, self.full0 - self.k0), (self.full1 - self.k0, self.k1 - self.k0))
        return tuple(slice(a, b) for a, b in ends if a < b)


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Query rows of one sequence for some key heads and, of the query heads that share each of them, `group`."""

    frame: Frame
    rows: slice
    kv_heads: slice
    group: slice
    panel: Panel
    group_size: int  # of the problem

    @property
    def heads(self) -> int:
        """Key heads."""
        return int(self.kv_heads.stop - self.kv_heads.start)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(kv_heads, group, rows)."""
        return self.heads, self.group.stop - self.group.start, self.rows.stop - self.rows.start

    @property
    def count(self) -> int:
        """Query rows per key head: the group's heads stand one after the other."""
        return self.shape[1] * self.shape[2]

    def q_tile(self, x: np.ndarray) -> np.ndarray:
        """The block's part of an array ``(*lead, Hq, Sq, D)`` as a view ``(kv_heads, group, rows, D)``."""
        f = self.frame
        by_group = _split_heads(x[f.index], self.group_size, axis=0)
        return by_group[self.kv_heads, self.group, f.q0 + self.rows.start : f.q0 + self.rows.stop]

    def kv_tile(self, x: np.ndarray, tile: Tile) -> np.ndarray:
        """The tile's rows of an array ``(*lead, Hkv, Sk, D)`` as a view ``(kv_heads, keys, D)``."""
        f, sequence = self.frame, np.asarray(x[self.frame.index])
        return sequence[self.kv_heads, f.k0 + tile.k0 : f.k0 + tile.k1]

    def bias_tile(self, x: np.ndarray, tile: Tile) -> np.ndarray:
        """The tile's part of an array ``(*lead, Hq, Sq, Sk)`` as a view ``(kv_heads, group, rows, keys)``."""
        return self.q_tile(x)[..., self.frame.k0 + tile.k0 : self.frame.k0 + tile.k1]

    def per_head(self, x: np.ndarray) -> np.ndarray:
        """The block's part of an array ``(*lead, Hq)`` as a view ``(kv_heads, group)``."""
        return _split_heads(x[self.frame.index], self.group_size, axis=0)[self.kv_heads, self.group]

    def per_row(self, x: np.ndarray) -> np.ndarray:
        """The block's part of an array ``(*lead, Hq, Sq)`` as a view ``(kv_heads, group, rows)``."""
        return self.q_tile(x[..., None])[..., 0]


def _split_heads(x: np.ndarray, group: int, axis: int) -> np.ndarray:
    """(Hq, ...) as (Hkv, group, ...): splitting an axis never copies."""
    return x.reshape(x.shape[:axis] + (x.shape[axis] // group, group) + x.shape[axis + 1 :])


def heads_at_once(plan: Plan) -> int:
    """How many key heads share a tile, so that small problems do not pay per head."""
    p = plan.problem
    cells = max(1, plan.block_q * p.group * plan.block_k)
    return max(1, min(p.kv_heads, TILE_CELLS // cells))


def row_blocks(plan: Plan, x: Operands, only: slice | None = None) -> Iterator[RowBlock]:
    """Every block of query rows, or those within the rows `only` of the q array."""
    p = plan.problem
    if not p.heads:
        return
    step = heads_at_once(plan)
    whole = slice(0, p.group)
    for frame in frames(p, x):
        first, last = 0, frame.q_len
        if only is not None:
            first, last = max(first, only.start - frame.q0), min(last, only.stop - frame.q0)
        for row in range(first, last, plan.block_q):
            rows = slice(row, min(row + plan.block_q, last))
            if x.mask is not None and x.mask.by_head:
                for head in range(p.heads):
                    panel = panel_of(plan, x, replace(frame, head=head), rows)
                    h, g = divmod(head, p.group)
                    yield RowBlock(frame, rows, slice(h, h + 1), slice(g, g + 1), panel, p.group)
                continue
            panel = panel_of(plan, x, frame, rows)
            for h in range(0, p.kv_heads, step):
                yield RowBlock(frame, rows, slice(h, min(h + step, p.kv_heads)), whole, panel, p.group)


def panel_of(plan: Plan, x: Operands, frame: Frame, rows: slice) -> Panel:
    """What the rows see: the band, and within the keys it leaves, the mask."""
    band = plan.problem.band
    if band.offset is None:
        band = band._replace(offset=frame.offset)
    panel = band_panel(band, rows, slice(0, frame.kv_len))
    if x.mask is None:
        return panel
    live = panel.hi > panel.lo
    if not live.any():
        return panel
    keys = slice(int(panel.lo[live].min()), int(panel.hi[live].max()))
    return band_panel(band, rows, keys) & x.mask.panel(frame, rows, keys)


def tiles(panel: Panel, block_k: int) -> Iterator[Tile]:
    """The tiles that some row of the panel sees, by ascending key."""
    live = panel.hi > panel.lo
    if not live.any():
        return
    one = panel.lo.shape[1] == 1
    covered = bool(live.all()) and panel.bits is None
    blocks: set[int] = set()
    for n in range(panel.lo.shape[1]):
        some = live[:, n]
        blocks.update(
            range(int(panel.lo[some, n].min()) // block_k, -(-int(panel.hi[some, n].max()) // block_k))
        )
    lo_min, lo_max = int(panel.lo[live].min()), int(panel.lo[live].max())
    hi_min, hi_max = int(panel.hi[live].min()), int(panel.hi[live].max())
    for block in sorted(blocks):
        k0, k1 = block * block_k, (block + 1) * block_k
        if one:
            k0, k1 = max(k0, lo_min), min(k1, hi_max)
            full0, full1 = max(k0, lo_max), min(k1, hi_min)
        else:
            touch = live & (panel.lo < k1) & (panel.hi > k0)
            if not touch.any():
                continue
            k0, k1 = max(k0, int(panel.lo[touch].min())), min(k1, int(panel.hi[touch].max()))
            whole = bool(((panel.lo <= k0) & (panel.hi >= k1)).any(axis=1).all())
            full0, full1 = (k0, k1) if whole else (k1, k1)
        if (not covered and one) or full1 < full0 or panel.bits is not None:
            full0 = full1 = k1
        kind = FULL if (full0, full1) == (k0, k1) else EDGE
        yield Tile(k0, k1, kind, full0, full1)


@lru_cache(maxsize=1024)
def visible_in_band(band: Band, q_len: int, kv_len: int) -> int:
    """How many cells a band leaves visible; ``offset=None`` stands for ``kv_len - q_len``."""
    if band.unlimited:
        return q_len * kv_len
    offset = kv_len - q_len if band.offset is None else band.offset
    panel = band_panel(band._replace(offset=offset), slice(0, q_len), slice(0, kv_len))
    return int(panel.visible().sum())
