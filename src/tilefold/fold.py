"""Sweep one. This is the specification; faster files must agree with it, not with each other.

For each block of query rows: start from empty (or from the sinks), fold the tiles that exist by ascending key,
finalize once. One tile of scores is alive at a time, so memory grows with the tile and not with the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .layouts import fill_padding, rows_of
from .problem import Operands
from .scores import Scores, Shapes, Workspace, score_shapes
from .stats import OnlineStats
from .tiles import RowBlock, heads_at_once, row_blocks, tiles

if TYPE_CHECKING:
    from .plan import Plan


def fold_shapes(plan: Plan) -> Shapes:
    """The buffers of a fold: what the scores take, a tile of values, the accumulator and one tile's product."""
    p = plan.problem
    acc, h, r = p.accumulate, heads_at_once(plan), plan.block_q * p.group
    return score_shapes(plan) | {
        "values": ((h, plan.block_k, p.v_dim), acc),
        "output": ((h, r, p.v_dim), acc),
        "product": ((h, r, p.v_dim), acc),
    }


def fold(plan: Plan, x: Operands, space: Workspace, only: slice | None = None) -> None:
    """Fill ``x.out``, and ``x.lse`` if there is one, for all query rows or the rows `only`."""
    assert x.out is not None
    fill_padding(plan.problem, x, only)
    scores = Scores(plan, x, space)
    with np.errstate(all="ignore"):  # -inf and NaN are values here, with a meaning
        for block in row_blocks(plan, x, only):
            scores.open(block)
            out, lse = _fold_block(plan, x, space, scores, block)
            block.q_tile(x.out)[...] = out.reshape(*block.shape, plan.problem.v_dim)
            if x.lse is not None:
                block.per_row(x.lse)[...] = lse.reshape(block.shape)


def _fold_block(
    plan: Plan, x: Operands, space: Workspace, scores: Scores, block: RowBlock
) -> tuple[np.ndarray, np.ndarray]:
    p = plan.problem
    rows = (block.heads, block.count)
    product = space.take("product", (*rows, p.v_dim))
    stats = OnlineStats.init(
        rows,
        p.v_dim,
        p.accumulate,
        sinks=None if x.sinks is None else seeds(x.sinks, block),
        output=space.take("output", (*rows, p.v_dim)),
    )
    sighted = None if x.bias is None else np.zeros(rows, bool)  # a bias of -inf hides too
    for tile in tiles(block.panel, plan.block_k):
        scored = scores.tile(tile)
        if scored is not None:
            if sighted is not None:
                sighted |= True if scored.seen is None else scored.seen.any(axis=-1)
            shape = (block.heads, tile.k1 - tile.k0, p.v_dim)
            v = rows_of(block.kv_tile(x.v, tile), space.take("values", shape))
            stats.update(scored.s, v, scored.seen, work=product)
    if (empty := np.isneginf(stats.max_val)).any():
        # A row that sees keys and still found only -inf has overflowed: that is NaN, never a silent 0.
        lost = empty & (np.tile(block.panel.visible() > 0, block.shape[1]) if sighted is None else sighted)
        stats.sum_exp[lost] = np.nan
        stats.max_val[lost] = np.nan
    return stats.finalize(work=product)


def seeds(sinks: np.ndarray, block: RowBlock) -> np.ndarray:
    """The sink logit of each row of a block, (kv_heads, rows)."""
    return np.repeat(block.per_head(sinks), block.shape[2], axis=1)
