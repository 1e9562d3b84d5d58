"""The native core: whether it is there, and what it can do.

The extension `_core` is built at install; where there was no compiler the package works without it, says so once at
import, and `tilefold doctor` repeats it. TILEFOLD_BACKEND=native makes a missing core an error, so that a failed
build can never pass unnoticed.

The core folds any problem in one call, except where a mask must be evaluated in Python: then it is called once per
panel of query rows, so that a mask never takes more than its panel.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from ...dtypes import name_of
from ...layouts import empty_like, fill_padding, frames
from ...masks import Dense, Mask
from ...plan import BackendRefused, Plan
from ...problem import Has, Layout, Operands, Problem, Want
from ...replay import Grads
from ...scores import refuse_infinite
from ...taps import Tapped
from ...tiles import panel_of
from .taps import Pooled, Told, batched

FAR = 2**60  # a band so far off hides, or shows, everything that exists
SPAN_ROWS = 4096  # query rows whose mask is evaluated together
CELL_ROWS = 256  # the same where single cells are looked at: 8 MiB for each 4096 keys that are in hand


class NativeCoreMissing(RuntimeWarning):
    """The native core is not there: it was not built, or cannot be loaded."""


def load() -> tuple[ModuleType | None, str]:
    """The extension module and '', or None and why not."""
    try:
        return import_module("..._core", __package__), ""
    except ImportError as error:
        if os.environ.get("TILEFOLD_BACKEND") == "native":
            raise ImportError(
                f"TILEFOLD_BACKEND=native, but the native core cannot be loaded: {error}"
            ) from error
        return None, str(error)


CORE, WHY_MISSING = load()


def warn_if_missing() -> None:
    """Said once, at import."""
    if CORE is None:
        warnings.warn(
            f"tilefold runs without its native core ({WHY_MISSING}); the NumPy backend is used. "
            "Reinstall with a C++ compiler to build it; `tilefold doctor` shows what was found.",
            NativeCoreMissing,
            stacklevel=3,
        )


class NativeBackend:
    """The C++ core on this machine's CPU."""

    name = "native"

    def why_not(self, p: Problem) -> str | None:
        if CORE is None:
            return "the native core is not installed (`tilefold doctor` says why)"
        if p.layout is Layout.PAGED and p.want & Want.GRAD:
            return "keys and values in pages have no gradients"
        if p.dropout:
            return "dropout is not offered: exact attention has no random part"
        if p.want & Want.SHOWN:
            return "the native core shows its tiles to no Python code"
        return None

    def plan(self, p: Problem, threads: int) -> Plan:
        fold = _fold_of(p)
        return _plan(p, fold, fold.plan(threads))

    def resize(self, plan: Plan, block_q: int, block_k: int) -> Plan:
        fold = _fold_of(plan.problem)
        rows = block_q * max(plan.problem.group, 1)
        return _plan(plan.problem, fold, fold.resize(rows, block_k, plan.splits, plan.workers))

    def fold(self, plan: Plan, x: Operands, rows: slice | None = None) -> int:
        p = plan.problem
        assert x.out is not None
        fill_padding(p, x, rows)
        run, whose = running(plan).run, team()
        out = x.out if x.out.flags.aligned else np.empty(x.out.shape, x.out.dtype)
        arrays = _arrays(p, x, as_crosses(out), x.lse)
        arrays += [x.table, *(None if a is None else _as_core_reads(a) for a in (x.k_scale, x.v_scale))]
        if p.want & Want.ROWS:
            told = Told(CORE, p, x)
            parts = _parts(plan, x, rows, apart=bool(told.regions))
            reports = [run(*arrays, *part, whose, told.of(part)) for part in parts]
            x.seen.update(told.finished())
        else:
            reports = [run(*arrays, *part, whose) for part in _parts(plan, x, rows)]
        if any(infinite for _, infinite in reports):
            refuse_infinite(x.given_bias, p.accumulate)
        if out is not x.out:
            x.out[...] = out
        return max((used for used, _ in reports), default=0)

    def replay(self, plan: Plan, x: Operands, taps: Sequence[Tapped]) -> int:
        p = plan.problem
        assert x.lse is not None
        run, whose = running(plan).tap, team()
        q, k, _, _, lse, bias, cells, alibi, _, q_ends, kv_ends = _arrays(p, x, x.q, x.lse)
        scale = None if x.k_scale is None else _as_core_reads(x.k_scale)
        arrays = (q, k, lse, bias, cells, alibi, q_ends, kv_ends, x.table, scale)
        used = 0
        for some in batched(taps):
            pools = Pooled(CORE, p, x, some)
            for part in _parts(plan, x, None):
                used = max(used, run(*arrays, *part, whose, pools.core))
            x.seen.update(pools.finished())
        return used

    def gradient(self, plan: Plan, x: Operands, dout: np.ndarray, dlse: np.ndarray | None) -> Grads:
        p, acc = plan.problem, plan.problem.accumulate
        assert x.out is not None and x.lse is not None
        add = _evaluated(x.mask) is not None  # then dk and dv grow call by call
        dq = empty_like(x.q, x.q.shape, x.q.dtype)
        dk, dv = (empty_like(a, a.shape, acc if add else a.dtype) for a in (x.k, x.v))
        if add or p.has & Has.LENGTHS:
            for grown in (dq, dk, dv):
                grown[...] = 0
        bias = x.given_bias
        dbias = None if bias is None else np.zeros(bias.shape, acc)
        dsinks = None if x.sinks is None else np.zeros((p.batch, p.heads))
        arrays = _arrays(p, x, _as_core_reads(x.out), _as_core_reads(x.lse)) + [
            _as_core_reads(dout),
            None if dlse is None else _as_core_reads(dlse),
            *(as_crosses(grad) for grad in (dq, dk, dv)),
            None if dbias is None or x.bias is None else _as_written(dbias, x.bias.shape),
            dsinks,
            add,
        ]
        run, whose = running(plan).gradient, team()
        for part in _parts(plan, x, None):
            run(*arrays, *part, whose)
        dk, dv = (grad.astype(a.dtype, copy=False) for grad, a in ((dk, x.k), (dv, x.v)))
        if dbias is not None and bias is not None:
            dbias = dbias.astype(bias.dtype, copy=False)
        if dsinks is not None and x.sinks is not None:
            dsinks = dsinks.sum(axis=0).astype(x.sinks.dtype, copy=False)
        return Grads(dq, dk, dv, dbias, dsinks)

    def _refuse(self, p: Problem) -> NoReturn:
        raise BackendRefused(f"backend 'native' refuses: {self.why_not(p)}")


def _fold_of(p: Problem) -> Any:
    assert CORE is not None
    facts = {field.name: getattr(p, field.name) for field in fields(Problem)}
    facts["band"] = tuple(None if x is None else min(max(x, -FAR), FAR) for x in p.band)
    return CORE.Fold(**facts)


def _plan(p: Problem, fold: Any, settings: tuple[int, int, int, int, int]) -> Plan:
    tile_rows, block_k, splits, workers, workspace = settings
    note = f"tiles of {tile_rows} query rows, {workers} threads"
    if not fold.steady:
        note += ", numbers as sums of bfloat16"
    block_q = -(-tile_rows // max(p.group, 1))
    return Plan(p, "native", fold.isa, block_q, block_k, splits, workers, workspace, note)


@lru_cache(maxsize=1024)
def running(plan: Plan) -> Any:
    """The core's own form of a plan, made once."""
    fold = _fold_of(plan.problem)
    p = plan.problem
    fold.resize(plan.block_q * max(p.group, 1), plan.block_k, plan.splits, plan.workers)
    return fold


def team() -> int:
    """Threads of our own, or torch's where it is loaded: its idle workers would fight ours for the cores."""
    return 2 if "torch" in sys.modules else 1


def _as_core_reads(x: np.ndarray) -> np.ndarray:
    """`x` itself, or a copy where its addresses are no multiples of its item size; what is broadcast stays so."""
    if not x.flags.aligned or any(step % x.itemsize for step in x.strides):
        stored = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.strides)]
        x = np.broadcast_to(stored.copy(), x.shape)
    return as_crosses(x)


def as_crosses(x: np.ndarray) -> np.ndarray:
    """Types that NumPy's buffers do not know as the integers that they are made of."""
    return x.view(f"u{x.itemsize}") if name_of(x.dtype) in ("bfloat16", "float8_e4m3fn") else x


def _as_written(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`x` broadcast to `shape`, as a view that may be written through."""
    strides = np.broadcast_to(x, shape).strides
    return np.lib.stride_tricks.as_strided(x, shape, strides)


def _arrays(p: Problem, x: Operands, out: np.ndarray, lse: np.ndarray | None) -> list[np.ndarray | None]:
    """The arrays of a call, in the core's order."""
    cells = x.mask.cells_of(x.lead, p.heads, p.q_len, p.kv_len) if isinstance(x.mask, Dense) else None
    return [
        *(_as_core_reads(a) for a in (x.q, x.k, x.v)),
        out,
        lse,
        None if x.bias is None else _as_core_reads(x.bias),
        None if cells is None else cells.view(np.uint8),
        None if x.alibi is None else np.ascontiguousarray(x.alibi, np.float64),
        None if x.sinks is None else np.ascontiguousarray(x.sinks, np.float64),
        x.q_ends,
        x.kv_ends,
    ]


def _evaluated(mask: Mask | None) -> Mask | None:
    """The mask, where it must be evaluated here, panel by panel; the core reads arrays itself."""
    return None if isinstance(mask, Dense) else mask


def _parts(plan: Plan, x: Operands, rows: slice | None, apart: bool = False) -> Iterator[tuple[Any, ...]]:
    """The calls that a sweep falls into: one, unless a mask must be evaluated panel by panel, or each sequence has what
    is its own: regions."""
    p = plan.problem
    every = (0, p.q_len) if rows is None else (rows.start, rows.stop)
    mask = _evaluated(x.mask)
    if mask is None:
        if not apart and (rows is None or p.layout is not Layout.VARLEN):
            yield (*every, -1, -1, None, None, None, 0)
            return
        for n, frame in enumerate(frames(p, x)):
            first, last = max(every[0] - frame.q0, 0), min(every[1] - frame.q0, frame.q_len)
            if first < last:
                yield (first, last, n, -1, None, None, None, 0)
        return
    heads = range(p.heads) if mask.by_head else (-1,)
    for n, frame in enumerate(frames(p, x)):
        first, last = max(every[0] - frame.q0, 0), min(every[1] - frame.q0, frame.q_len)
        step = CELL_ROWS if mask.may_need_bits else SPAN_ROWS
        for row in range(first, last, step):
            some = slice(row, min(row + step, last))
            for head in heads:
                panel = panel_of(plan, x, replace(frame, head=max(head, 0)), some)
                lo, hi = panel.lo, panel.hi
                if not lo.shape[1]:
                    lo = hi = np.zeros((len(lo), 1), np.int64)
                lo, hi = (np.ascontiguousarray(ends, np.int64) for ends in (lo, hi))
                yield (some.start, some.stop, n, head, lo, hi, panel.bits, panel.start)
