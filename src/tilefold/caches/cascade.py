"""Sequences that share their first pages: those keys are folded once for the queries of all, the rest for each.

Asked for, never on by itself: the two parts are joined by their log-sum-exp, so a row rounds differently than alone,
and in half types each part is rounded once. It is done where every query sees all of the shared keys (no mask but a
causal one, no window, bias or ALiBi, whose positions would differ between the sequences) and where it pays: bytes of
shared keys and values that are not read again, against a second call and the joining. Sinks belong to the rest, so that
they count once. (Ye et al. 2024, "Cascade Inference", flashinfer.ai; Juravsky et al. 2024, arXiv 2402.05099.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..plan import backend_of, choose
from ..problem import Band, Has, Operands, Problem, Want
from ..stats import OnlineStats

PAYS = 2**23  # bytes: fewer come from a cache of the processor sooner than a second call takes
PASSES = 16  # over the output, in which two parts are joined


def shared_pages(p: Problem, x: Operands, backend: str) -> int:
    """How many leading pages a cascade folds once for all; 0 where it cannot, or does not pay."""
    assert x.table is not None and x.kv_ends is not None
    plain = x.mask is None and x.bias is None and x.alibi is None and p.band.left is None
    if not plain or p.batch < 2 or p.want & (Want.INVARIANT | Want.GRAD):
        return 0
    seen = x.kv_ends
    if p.band.right is not None:
        begins = x.kv_ends - (p.q_len if x.q_ends is None else x.q_ends)
        seen = np.minimum(seen, begins + p.band.right + 1)
    page = x.k.shape[-2]
    most = min(max(int(seen.min()), 0) // page, x.table.shape[1])
    leading = x.table[:, :most]
    same = (leading == leading[0]).all(axis=0) & (leading[0] >= 0)
    pages = most if same.all() else int(same.argmin())
    joined = PASSES * p.batch * p.heads * p.q_len * p.v_dim * p.accumulate.itemsize
    return pages if pages and _saved(p, x, pages, backend) >= PAYS + joined else 0


def _saved(p: Problem, x: Operands, pages: int, backend: str) -> int:
    """The bytes of shared keys and values that need not be read again: once per tile of query rows."""
    keys = pages * x.k.shape[-2]
    row = p.kv_heads * (x.k.shape[-1] + x.v.shape[-1]) * x.k.itemsize
    whole, once = (choose(problem, backend)[0] for problem in (p, _shared(p, keys)))
    apart = p.batch * -(-p.q_len // whole.block_q)
    return int(keys * row * (apart - -(-p.batch * p.q_len // once.block_q)))


def _shared(p: Problem, keys: int) -> Problem:
    """The queries of all sequences as rows of one, over the shared keys."""
    return replace(
        p, batch=1, q_len=p.batch * p.q_len, kv_len=keys, band=Band(), has=Has.LENGTHS, want=p.want | Want.LSE
    )


def fold(p: Problem, x: Operands, pages: int, backend: str) -> None:
    """Fill ``x.out`` and ``x.lse`` by two folds, the first over so many shared pages."""
    assert x.table is not None and x.kv_ends is not None and x.out is not None
    keys = pages * x.k.shape[-2]
    rows = x.q.swapaxes(0, 1).reshape(1, p.heads, -1, p.dim)
    once = Operands(
        rows, x.k, x.v, table=x.table[:1, :pages].copy(), kv_ends=np.array([keys]),
        k_scale=x.k_scale, v_scale=x.v_scale,
    )  # fmt: skip
    rest = replace(x, table=x.table[:, pages:].copy(), kv_ends=x.kv_ends - keys, out=None, lse=None)
    states = []
    for problem, part in (
        (_shared(p, keys), once),
        (replace(p, kv_len=p.kv_len - keys, want=p.want | Want.LSE), rest),
    ):
        part.out = np.empty((*part.q.shape[:-1], p.v_dim), x.out.dtype)
        part.lse = np.empty(part.q.shape[:-1], p.accumulate)
        plan, _ = choose(problem, backend)
        backend_of(plan).fold(plan, part)
        shape = (p.heads, p.batch, p.q_len) if part is once else (p.batch, p.heads, p.q_len)
        out, lse = part.out.reshape(*shape, p.v_dim), part.lse.reshape(shape)
        if part is once:
            out, lse = out.swapaxes(0, 1), lse.swapaxes(0, 1)
        states.append(OnlineStats.closed(out.astype(p.accumulate), lse))
    with np.errstate(all="ignore"):
        out, lse = states[0].merge(states[1]).finalize()
    for n, end in enumerate(() if x.q_ends is None else x.q_ends.tolist()):
        out[n, :, end:], lse[n, :, end:] = 0, -np.inf
    x.out[...] = out
    if x.lse is not None:
        x.lse[...] = lse
