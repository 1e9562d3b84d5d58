"""The NumPy backend runs `fold.py` and `replay.py` as they are. It decides only the size of a tile.

Cost of one float32 cell at d = 64, per pass over the tile, on an AVX-512 core: the two products 1.3 ns each, exp 0.5,
subtract 0.2, max 0.15, sum and scale 0.07 each; and 25 us of Python per tile. A tile of 512 x 1024 (2 MiB) makes the
Python 2 % and both products large enough for BLAS; 256 x 512 is 5 % slower, 1024 x 512 loses on causal edges. Tried
without gain: the tile on huge pages, row counts that are no power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np

from ..fold import fold, fold_shapes
from ..layouts import gathered
from ..plan import Plan
from ..problem import Layout, Operands, Problem, Want
from ..replay import Gradient, Grads, replay, replay_shapes
from ..scores import Shapes, Workspace, refuse_infinite
from ..taps import Tapped

ROWS, KEYS = 512, 1024


class NumpyBackend:
    """Everything, on any machine that NumPy runs on; as fast as its BLAS allows."""

    name = "numpy"

    def why_not(self, p: Problem) -> str | None:
        if p.layout is Layout.PAGED and p.want & Want.GRAD:
            return "keys and values in pages have no gradients"
        if p.dropout:
            return "dropout is not offered: exact attention has no random part"
        if p.want & Want.INVARIANT:
            return "invariant=True promises the same bits for any shape, and BLAS rounds differently for each"
        return None

    def plan(self, p: Problem, threads: int) -> Plan:
        block_q = max(1, min(p.q_len, max(16, _rows(p) // max(p.group, 1))))
        return self.resize(Plan(p, self.name, "blas", 1, 1, note="fold.py over BLAS"), block_q, KEYS)

    def resize(self, plan: Plan, block_q: int, block_k: int) -> Plan:
        p = plan.problem
        plan = replace(plan, block_q=min(block_q, max(p.q_len, 1)), block_k=min(block_k, max(p.kv_len, 1)))
        return replace(plan, workspace_bytes=_bytes(fold_shapes(plan)))

    def fold(self, plan: Plan, x: Operands, rows: slice | None = None) -> int:
        refuse_infinite(x.given_bias, plan.problem.accumulate)
        plan, x = _unpaged(plan, x)
        space = Workspace(fold_shapes(plan))
        fold(plan, x, space, rows)
        return space.bytes

    def replay(self, plan: Plan, x: Operands, taps: Sequence[Tapped]) -> int:
        refuse_infinite(x.given_bias, plan.problem.accumulate)
        p, seen = plan.problem, x.seen
        plan, x = _unpaged(plan, x)
        started = {tap: tap.start(p, x) for tap in taps}
        space = Workspace(replay_shapes(plan, gradient=False))
        replay(plan, x, space, list(started.values()))
        seen.update((tap, one.result()) for tap, one in started.items())
        return space.bytes

    def gradient(self, plan: Plan, x: Operands, dout: np.ndarray, dlse: np.ndarray | None) -> Grads:
        refuse_infinite(x.given_bias, plan.problem.accumulate)
        space = Workspace(replay_shapes(plan, gradient=True))
        tap = Gradient(plan, x, space, dout, dlse)
        replay(plan, x, space, [tap])
        return tap.grads()


def _unpaged(plan: Plan, x: Operands) -> tuple[Plan, Operands]:
    """Pages are brought together first: NumPy has no way to fold what lies apart."""
    if plan.problem.layout is not Layout.PAGED:
        return plan, x
    p, x = gathered(plan.problem, x)
    return replace(plan, problem=p), x


def _bytes(shapes: Shapes) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in shapes.values())


def _rows(p: Problem) -> int:
    """Query rows per key head and tile: half as many under a diagonal, whose tiles are cut, and in a narrow band, where
    rows far apart share few keys, a quarter of its width."""
    left, right = p.band.left, p.band.right
    if left is None or right is None:
        return ROWS if left is right else ROWS // 2
    return min(ROWS // 2, max(64, (left + right + 1) // 4))
