"""scale -> softcap -> bias and ALiBi -> mask: the one order of score transforms, written once.

A tile of scores lies in memory key by key (S transposed, lanes are queries): the product of a key tile with packed
queries is the faster orientation in every BLAS tried, and maximum, sum and rescale become plain vertical operations.
Scaling happens after the product, on a tile in cache: one rounding less than scaling q. A scale that is a power of two
rounds nothing, so there it moves to the queries and a pass over the tile is saved (4 % of the time at dim 64).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, prod
from typing import TYPE_CHECKING

import numpy as np

from .layouts import rows_of
from .problem import Has, Operands, Problem
from .tiles import EDGE, RowBlock, Tile, heads_at_once

if TYPE_CHECKING:
    from .plan import Plan

Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class Workspace:
    """The buffers of one call, allocated when first taken and counted; the plan predicts the same sum."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self._shapes = shapes
        self._flat: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The buffer `name` as an array of `shape`, its old contents in it."""
        if name not in self._flat:
            most, dtype = self._shapes[name]
            self._flat[name] = np.empty(prod(most), dtype)
        return self._flat[name][: prod(shape)].reshape(shape)

    @property
    def bytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())


def score_shapes(plan: Plan) -> Shapes:
    """The buffers that `Scores` takes."""
    p = plan.problem
    acc, h, r, c = p.accumulate, heads_at_once(plan), plan.block_q * p.group, plan.block_k
    shapes: Shapes = {
        "queries": ((h, p.dim, r), acc),
        "scores": ((h, c, r), acc),
        "keys": ((h, c, p.dim), acc),
    }
    if _scale_is_exact(p):
        shapes["scaled"] = shapes["queries"]
    if not p.band.unlimited or p.has & (Has.SPANS | Has.BITS):
        shapes["seen"] = shapes["hidden"] = ((c, r), np.dtype(bool))
    if p.has & Has.ALIBI:
        shapes["distance"] = shapes["slanted"] = ((c, plan.block_q), acc)
    return shapes


def _scale_is_exact(p: Problem) -> bool:
    """Whether multiplying by the scale rounds nothing: it is a power of two."""
    return abs(frexp(p.scale)[0]) == 0.5


def refuse_infinite(bias: np.ndarray | None, sums: np.dtype) -> None:
    """ValueError for a bias that is +inf in the type `sums`. A whole pass over the largest operand: ask where it is
    cheap, or late."""
    if bias is None:
        return
    most = bias.max(initial=-np.inf)
    if np.isposinf(most):
        raise ValueError("bias must not be +inf; -inf hides a key, a finite value shifts its score")
    with np.errstate(over="ignore"):
        if np.isposinf(most.astype(sums)):
            raise ValueError(f"bias must be finite in {sums}, where scores are summed; got {most}")


@dataclass(slots=True)
class ScoreTile:
    """Finished scores ``s (kv_heads, rows, keys)`` of one tile; hidden cells are -inf.

    `seen` is None where every cell is visible, else booleans broadcastable to `s`. `k` is the key tile that was
    read. `capped` holds the scores right after the softcap if they were asked for.
    """

    s: np.ndarray
    seen: np.ndarray | None
    k: np.ndarray
    capped: np.ndarray | None = None


class Scores:
    """Computes the score tiles of a call, one row block at a time."""

    def __init__(self, plan: Plan, x: Operands, space: Workspace) -> None:
        self.plan, self.p, self.x, self.space = plan, plan.problem, x, space
        self.exact_scale = _scale_is_exact(self.p)

    def open(self, block: RowBlock, live: np.ndarray | None = None) -> None:
        """Pack the block's queries, dim by dim. Rows that are not `live` count as 0."""
        p, self.block = self.p, block
        self.queries = self.space.take("queries", (block.heads, p.dim, block.count))
        packed = self.queries.reshape(block.heads, p.dim, *block.shape[1:])
        np.copyto(packed, block.q_tile(self.x.q).transpose(0, 3, 1, 2), casting="unsafe")
        if live is not None:
            np.copyto(self.queries, 0, where=~live[:, None, :])
        if self.exact_scale:
            self.scaled = np.multiply(
                self.queries, p.scale, out=self.space.take("scaled", self.queries.shape)
            )
        else:
            self.scaled = self.queries

    def tile(self, tile: Tile, keep_capped: np.ndarray | None = None) -> ScoreTile | None:
        """The finished tile, or None if it turns out that nobody sees any of it."""
        p, block = self.p, self.block
        keys = tile.k1 - tile.k0
        seen = self._seen(tile)
        if seen is not None and block.panel.bits is not None and not seen.any():
            return None
        k = rows_of(block.kv_tile(self.x.k, tile), self.space.take("keys", (block.heads, keys, p.dim)))
        raw = self.space.take("scores", (block.heads, keys, block.count))
        np.matmul(k, self.scaled, out=raw)
        if not self.exact_scale:
            raw *= p.scale
        if p.softcap is not None:
            raw /= p.softcap
            np.tanh(raw, out=raw)
            raw *= p.softcap
        if keep_capped is not None:
            np.copyto(keep_capped, raw)
        s = raw.swapaxes(1, 2)
        if p.has & Has.ALIBI:
            self._slant(raw, tile)
        if p.has & Has.BIAS:
            seen = self._add_bias(raw, tile, seen)
        if seen is not None:
            self._hide(s, seen, tile)
        return ScoreTile(s, seen, k, None if keep_capped is None else keep_capped.swapaxes(1, 2))

    def _seen(self, tile: Tile) -> np.ndarray | None:
        """The visible cells (rows, keys) of an EDGE tile, repeated for each head of the group."""
        if tile.kind is not EDGE:
            return None
        block = self.block
        (_, group, rows), keys = block.shape, tile.k1 - tile.k0
        into = self.space.take("seen", (keys, block.count))
        scratch = self.space.take("hidden", (keys, rows))
        into[tile.full0 - tile.k0 : tile.full1 - tile.k0] = True
        for part in tile.tested:
            k0, k1 = tile.k0 + part.start, tile.k0 + part.stop
            if group == 1:
                block.panel.cells(k0, k1, into[part], scratch[part])
            else:
                one = block.panel.cells(k0, k1, None, scratch[part])
                into.reshape(keys, group, rows)[part] = one.T[:, None, :]
        return into.T

    def _slant(self, raw: np.ndarray, tile: Tile) -> None:
        """ALiBi: subtract slope * |distance|, head by head."""
        assert self.x.alibi is not None
        block, offset = self.block, self.p.band.offset
        (_, group, rows), keys = block.shape, tile.k1 - tile.k0
        at = np.arange(block.rows.start, block.rows.stop) + (block.frame.offset if offset is None else offset)
        distance = self.space.take("distance", (keys, rows))
        np.abs(
            np.subtract(at, np.arange(tile.k0, tile.k1)[:, None], out=distance, casting="unsafe"),
            out=distance,
        )
        slanted = self.space.take("slanted", (keys, rows))
        by_head = raw.reshape(block.heads, keys, group, rows)
        for (h, g), slope in np.ndenumerate(block.per_head(self.x.alibi)):
            by_head[h, :, g] -= np.multiply(distance, slope, out=slanted)

    def _add_bias(self, raw: np.ndarray, tile: Tile, seen: np.ndarray | None) -> np.ndarray | None:
        """Add the bias; where it is -inf the cell is hidden as by a mask, whatever the score was."""
        assert self.x.bias is not None
        block = self.block
        bias = block.bias_tile(self.x.bias, tile).transpose(0, 3, 1, 2)
        by_head = raw.reshape(block.heads, tile.k1 - tile.k0, *block.shape[1:])
        np.add(by_head, bias, out=by_head, casting="unsafe")
        stored = bias[tuple(slice(0, 1) if step == 0 else slice(None) for step in bias.strides)]
        hidden = stored.astype(self.p.accumulate, copy=False) == -np.inf  # or so low that it becomes that
        if not hidden.any():
            return seen
        visible = np.broadcast_to(~hidden, by_head.shape).reshape(raw.shape).swapaxes(1, 2)
        return visible if seen is None else visible & seen

    def _hide(self, s: np.ndarray, seen: np.ndarray, tile: Tile) -> None:
        """Scores of hidden cells become -inf, even where they were NaN."""
        if seen.ndim > 2:  # a bias hides cells anywhere
            np.copyto(s, -np.inf, where=~seen)
            return
        for part in tile.tested:
            hidden = self.space.take("hidden", (part.stop - part.start, s.shape[1]))
            np.logical_not(seen[:, part], out=hidden.T)
            np.copyto(s[:, :, part], -np.inf, where=hidden.T)


def chain_softcap(ds: np.ndarray, capped: np.ndarray, p: Problem) -> None:
    """Turn the gradient after the softcap into the one before it, in place: 1 - tanh^2 of the same argument."""
    assert p.softcap is not None
    capped /= p.softcap
    np.multiply(capped, capped, out=capped)
    np.subtract(1, capped, out=capped)
    ds *= capped
