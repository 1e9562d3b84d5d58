"""Sweep two: with lse known every weight is rebuilt exactly, tile by tile, and given to taps.

The backward pass is a tap, and so is everything that sums over queries (key mass, heat maps): a tap sees each tile of
weights once and keeps what it wants. Gradients need no second statistic: with ``delta = sum(dout * out) - dlse`` the
gradient of a score is ``p * (dout . v - delta)`` (Dao et al. 2022, arXiv 2205.14135, section 3.1 and appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .fold import seeds
from .layouts import empty_like, rows_of
from .problem import Operands, Problem
from .scores import Scores, ScoreTile, Shapes, Workspace, chain_softcap, score_shapes
from .stats import weigh
from .tiles import RowBlock, Tile, heads_at_once, row_blocks, tiles

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(slots=True)
class Weights:
    """One tile of attention weights, as a tap is given it. The arrays are buffers: copy what is to be kept.

    Attributes:
        p: ``(kv_heads, group * rows, keys)`` the weights; each row of the whole sums to 1 (less what a sink takes).
        block: which rows of which heads; `tile`: which keys; `scored`: what is known of the scores that `p` came from.
        s: those scores themselves, where a tap `wants_scores`.
    """

    p: np.ndarray
    block: RowBlock
    tile: Tile
    scored: ScoreTile
    s: np.ndarray | None = None

    @property
    def index(self) -> tuple[int, ...]:
        """The leading (batch) index."""
        return self.block.frame.index

    @property
    def by_head(self) -> np.ndarray:
        """The weights as ``(kv_heads, group, rows, keys)``."""
        return self.p.reshape(*self.block.shape, self.p.shape[2])

    @property
    def scores_by_head(self) -> np.ndarray:
        """The finished scores, alike; -inf where hidden."""
        assert self.s is not None
        return self.s.reshape(*self.block.shape, self.s.shape[2])

    @property
    def heads(self) -> np.ndarray:
        """The query heads of `by_head`, ``(kv_heads, group)``."""
        b = self.block
        heads = np.arange(b.kv_heads.start, b.kv_heads.stop)[:, None] * b.group_size
        return heads + np.arange(b.group.start, b.group.stop)

    @property
    def rows(self) -> slice:
        """The query rows, as they lie in q."""
        q0 = self.block.frame.q0
        return slice(q0 + self.block.rows.start, q0 + self.block.rows.stop)

    @property
    def keys(self) -> slice:
        """The keys, as they lie in k."""
        k0 = self.block.frame.k0
        return slice(k0 + self.tile.k0, k0 + self.tile.k1)


class Tap:
    """A consumer of the second sweep. Override what you need; `take` is called for each tile that exists."""

    wants_scores = False  # whether it is given scores beside weights

    def open(self, block: RowBlock, live: np.ndarray, scores: Scores) -> None:
        """A block of rows begins; `live` (kv_heads, rows) are those that see a key."""

    def take(self, weights: Weights) -> None:
        """One tile of weights."""

    def close(self, block: RowBlock) -> None:
        """The block is done."""


class Probe(Protocol):
    """A statistic of the weights: `start` makes the tap of one call, whose `result` becomes an attribute `name`."""

    @property
    def name(self) -> str: ...

    def start(self, problem: Problem, lead: tuple[int, ...]) -> ProbeTap: ...


class ProbeTap(Protocol):
    """The tap of one probe in one call."""

    def open(self, block: RowBlock, live: np.ndarray, scores: Scores) -> None: ...
    def take(self, weights: Weights) -> None: ...
    def close(self, block: RowBlock) -> None: ...
    def result(self) -> Any: ...


def replay_shapes(plan: Plan, gradient: bool) -> Shapes:
    """The buffers of a replay; the gradient's own are added where one is wanted."""
    p = plan.problem
    if not gradient:
        return score_shapes(plan)
    acc, h, r, c = p.accumulate, heads_at_once(plan), plan.block_q * p.group, plan.block_k
    shapes = score_shapes(plan) | {
        "values": ((h, c, p.v_dim), acc),
        "douts": ((h, p.v_dim, r), acc),
        "dweights": ((h, c, r), acc),
        "dq": ((h, r, p.dim), acc),
        "dq_part": ((h, r, p.dim), acc),
        "dk_part": ((h, c, p.dim), acc),
        "dv_part": ((h, c, p.v_dim), acc),
    }
    if p.softcap is not None:
        shapes["capped"] = ((h, c, r), acc)
    return shapes


def replay(plan: Plan, x: Operands, space: Workspace, taps: Sequence[Tap | ProbeTap]) -> None:
    """Rebuild the weights of the problem from ``x.lse`` and show each tile to every tap, in order."""
    assert x.lse is not None
    p = plan.problem
    scores = Scores(plan, x, space)
    keep = p.softcap is not None and any(isinstance(tap, Gradient) for tap in taps)
    with_scores = any(getattr(tap, "wants_scores", False) for tap in taps)
    with np.errstate(all="ignore"):
        for block in row_blocks(plan, x):
            lse = block.per_row(x.lse).reshape(block.heads, block.count).astype(p.accumulate)
            live = _live(plan, x, space, block) & (lse > -np.inf) | np.isnan(lse)
            shift = np.where(live, lse, lse.dtype.type(0))
            lost = bool(np.isnan(shift).any())
            all_live = bool(live.all())
            scores.open(block, None if all_live else live)
            for tap in taps:
                tap.open(block, live, scores)
            for tile in tiles(block.panel, plan.block_k):
                cells = (block.heads, tile.k1 - tile.k0, block.count)
                scored = scores.tile(tile, space.take("capped", cells) if keep else None)
                if scored is None:
                    continue
                raw = scored.s.copy() if with_scores else None
                weights = scored.s
                weights -= shift[..., None]
                np.exp(weights, out=weights)
                if not all_live:
                    np.copyto(weights, 0, where=~live[..., None])
                if lost and scored.seen is not None:  # a row that is NaN has no say over keys it does not see
                    np.copyto(weights, 0, where=~scored.seen)
                given = Weights(weights, block, tile, scored, raw)
                for tap in taps:
                    tap.take(given)
            for tap in taps:
                tap.close(block)


def _live(plan: Plan, x: Operands, space: Workspace, block: RowBlock) -> np.ndarray:
    """Which rows see a key, (1 or kv_heads, rows). A bias of -inf hides too, which only a look at it can tell."""
    live = np.tile(block.panel.visible() > 0, block.shape[1])[None]
    if x.bias is None or x.sinks is None:
        return live  # without a sink a row hidden by its bias has lse -inf, which says it already
    looked = Scores(plan, x, space)
    looked.open(block)
    some = np.zeros((block.heads, block.count), bool)
    for tile in tiles(block.panel, plan.block_k):
        scored = looked.tile(tile)
        if scored is not None:
            some |= True if scored.seen is None else scored.seen.any(axis=-1)
    return live & some


class Grads(NamedTuple):
    """Gradients in the shapes, types and memory orders of what they belong to; None for what was not given."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None
    dsinks: np.ndarray | None


class Gradient(Tap):
    """The backward pass as a tap. dk and dv are summed over the heads of a group, dbias over broadcast dimensions."""

    def __init__(
        self,
        plan: Plan,
        x: Operands,
        space: Workspace,
        dout: np.ndarray,
        dlse: np.ndarray | None,
    ) -> None:
        p = plan.problem
        self.p, self.x, self.space, self.dout, self.dlse = p, x, space, dout, dlse
        acc = p.accumulate
        self.dq = empty_like(x.q, x.q.shape, x.q.dtype)
        self.dq[...] = 0
        self.dk = empty_like(x.k, x.k.shape, acc)
        self.dk[...] = 0
        self.dv = empty_like(x.v, x.v.shape, acc)
        self.dv[...] = 0
        self.dbias = None
        if x.bias is not None and x.given_bias is not None:
            stored = x.given_bias.shape
            self.dbias = np.zeros((1,) * (x.bias.ndim - len(stored)) + stored, acc)
        self.dsinks = None if x.sinks is None else np.zeros(x.sinks.shape, acc)

    def open(self, block: RowBlock, live: np.ndarray, scores: Scores) -> None:
        p, x = self.p, self.x
        assert x.out is not None and x.lse is not None
        self.q = scores.queries
        self.dq_block = self.space.take("dq", (block.heads, block.count, p.dim))
        self.dq_block[...] = 0
        self.douts = self.space.take("douts", (block.heads, p.v_dim, block.count))
        packed = self.douts.reshape(block.heads, p.v_dim, *block.shape[1:])
        np.copyto(packed, block.q_tile(self.dout).transpose(0, 3, 1, 2), casting="unsafe")
        out = block.q_tile(x.out).reshape(block.heads, block.count, p.v_dim).astype(p.accumulate)
        if not live.all():
            np.copyto(self.douts, 0, where=~live[:, None, :])
        delta = np.einsum("hdr,hrd->hr", self.douts, out)
        if self.dlse is not None:
            lse = block.per_row(x.lse).reshape(delta.shape)
            dlse = block.per_row(self.dlse).reshape(delta.shape).astype(delta.dtype)
            delta -= np.where(np.isneginf(lse), dlse.dtype.type(0), dlse)
        self.delta = delta
        if self.dsinks is not None:
            assert x.sinks is not None
            lse = block.per_row(x.lse).reshape(delta.shape).astype(delta.dtype)
            weight = np.exp(seeds(x.sinks, block) - np.where(np.isneginf(lse), np.inf, lse))
            part = -np.where(weight == 0, 0, weight * delta)
            block.per_head(self.dsinks)[...] += part.reshape(block.shape).sum(axis=-1)

    def take(self, weights: Weights) -> None:
        p, block, tile, seen = self.p, weights.block, weights.tile, weights.scored.seen
        keys = tile.k1 - tile.k0
        v = rows_of(block.kv_tile(self.x.v, tile), self.space.take("values", (block.heads, keys, p.v_dim)))
        raw = self.space.take("dweights", (block.heads, keys, block.count))
        np.matmul(v, self.douts, out=raw)
        ds = raw.swapaxes(1, 2)
        ds -= self.delta[..., None]
        ds *= weights.p
        back = None
        if seen is not None:
            np.copyto(ds, 0, where=~seen)
            back = seen.swapaxes(-1, -2)
        dv = self.space.take("dv_part", (block.heads, keys, p.v_dim))
        block.kv_tile(self.dv, tile)[...] += weigh(
            weights.p.swapaxes(1, 2), self.douts.swapaxes(1, 2), back, dv
        )
        if self.dbias is not None:
            self._add_dbias(self.dbias, raw, block, tile)
        if weights.scored.capped is not None:
            chain_softcap(ds, weights.scored.capped, p)
            if seen is not None:
                np.copyto(ds, 0, where=~seen)  # a hidden score may have been NaN
        ds *= p.scale
        dk = self.space.take("dk_part", (block.heads, keys, p.dim))
        block.kv_tile(self.dk, tile)[...] += weigh(raw, self.q.swapaxes(1, 2), back, dk)
        dq = self.space.take("dq_part", (block.heads, block.count, p.dim))
        self.dq_block += weigh(ds, weights.scored.k, seen, dq)

    def close(self, block: RowBlock) -> None:
        block.q_tile(self.dq)[...] = self.dq_block.reshape(*block.shape, self.p.dim)

    def _add_dbias(self, dbias: np.ndarray, raw: np.ndarray, block: RowBlock, tile: Tile) -> None:
        """Add a tile to the part of dbias it came from, summed over the dimensions that the bias does not have."""
        f, rows = block.frame, block.rows
        part = raw.reshape(block.heads, tile.k1 - tile.k0, *block.shape[1:]).transpose(0, 2, 3, 1)
        *lead, heads, q_len, kv_len = dbias.shape
        into = dbias[tuple(0 if n == 1 else i for n, i in zip(lead, f.index, strict=True))]
        into = (
            into.reshape(1, 1, q_len, kv_len)
            if heads == 1
            else into.reshape(-1, block.group_size, q_len, kv_len)
        )
        where = [slice(0, 1)] * 4
        if heads > 1:
            where[:2] = block.kv_heads, block.group
        if q_len > 1 or f.q_total == 1:
            where[2] = slice(f.q0 + rows.start, f.q0 + rows.stop)
        if kv_len > 1 or f.kv_total == 1:
            where[3] = slice(f.k0 + tile.k0, f.k0 + tile.k1)
        target = into[tuple(where)]
        over = tuple(axis for axis in range(4) if target.shape[axis] == 1 and part.shape[axis] > 1)
        if 3 in over:  # NumPy's sums are pairwise along what is contiguous, else one chain
            part = np.ascontiguousarray(part)
        for axis in reversed(over):
            part = part.sum(axis=axis, keepdims=True)
        target += part

    def grads(self) -> Grads:
        """What was gathered, each in the shape and type of what it belongs to."""
        x, dbias, dsinks = self.x, None, None
        if self.dbias is not None and x.given_bias is not None:
            dbias = self.dbias.reshape(x.given_bias.shape).astype(x.given_bias.dtype, copy=False)
        if self.dsinks is not None and x.sinks is not None:
            over = tuple(range(self.dsinks.ndim - 1))
            dsinks = self.dsinks.sum(axis=over).astype(x.sinks.dtype, copy=False)
        dk, dv = (g.astype(a.dtype, copy=False) for g, a in ((self.dk, x.k), (self.dv, x.v)))
        return Grads(self.dq, dk, dv, dbias, dsinks)
