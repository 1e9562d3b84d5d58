"""The oracle: attention by the textbook, with the whole matrix, O(n^2) and obvious. Nothing clever may live here.

Masks become whole boolean matrices, each sequence and head is done alone, and `dtype=float64` computes everything in
float64 whatever came in. Tests, benchmarks, `tilefold verify` and docs import it; nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .call import Options, understand
from .layouts import Frame, frames
from .masks import band_panel
from .replay import Grads


@dataclass(slots=True)
class _Head:
    """One head of one sequence with its whole matrices."""

    where: tuple[Any, ...]  # of its rows in q, out, lse
    kv_where: tuple[Any, ...]
    head: int
    bias_where: tuple[Any, ...]
    seen: np.ndarray  # (rows, keys)
    capped: np.ndarray  # scores right after the softcap
    s: np.ndarray  # finished scores, -inf where hidden
    weights: np.ndarray
    lse: np.ndarray


def naive(
    q: Any, k: Any, v: Any, mask: Any = None, *, dtype: np.typing.DTypeLike | None = None,
    weights_dtype: np.typing.DTypeLike | None = None, **options: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """``(out, lse)`` of the same call of `tilefold.attention`, computed with the whole matrix in `dtype`.

    With `weights_dtype` the weights are rounded to it before they meet the values.

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> out, lse = naive(q, k, v, causal=True)
    >>> out.shape, lse.shape
    ((2, 5, 4), (2, 5))
    """
    call, acc = _understood(q, k, v, mask, dtype, options)
    x, p = call.operands, call.problem
    out = np.zeros((*x.q.shape[:-1], p.v_dim), acc)
    lse = np.full(x.q.shape[:-1], -np.inf, acc)
    for h in _heads(call, acc):
        values = x.v[h.kv_where].astype(acc)
        with np.errstate(all="ignore"):
            weights = h.weights if weights_dtype is None else h.weights.astype(weights_dtype).astype(acc)
            out[h.where] = _apart(weights, values, h.seen)
        lse[h.where] = h.lse
    out, lse = (out[0], lse[0]) if call.squeeze else (out, lse)
    return (out if dtype is not None else out.astype(x.q.dtype)), lse


def naive_weights(
    q: Any, k: Any, mask: Any = None, *, dtype: np.typing.DTypeLike | None = None, **options: Any
) -> np.ndarray:
    """The whole matrix of weights ``(..., Hq, Sq, Sk)``, zero where hidden."""
    call, acc = _understood(q, k, k, mask, dtype, options)
    weights = np.zeros((*call.operands.q.shape[:-1], call.problem.kv_len), acc)
    for h in _heads(call, acc):
        weights[h.bias_where] = h.weights
    return weights[0] if call.squeeze else weights


def naive_grad(
    q: Any,
    k: Any,
    v: Any,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    mask: Any = None,
    *,
    dtype: np.typing.DTypeLike | None = None,
    saved: tuple[np.ndarray, np.ndarray] | None = None,
    **options: Any,
) -> Grads:
    """Gradients of ``sum(out * dout) + sum(lse * dlse)`` with the whole matrix; NaN in rows without keys is ignored.

    With ``saved = (out, lse)`` weights and row sums come from those rounded arrays, as in a backward pass.
    """
    call, acc = _understood(q, k, v, mask, dtype, options)
    x, p = call.operands, call.problem
    if call.squeeze:
        dout, dlse = dout[None], None if dlse is None else dlse[None]
        saved = None if saved is None else (saved[0][None], saved[1][None])
    dq, dk, dv = np.zeros(x.q.shape, acc), np.zeros(x.k.shape, acc), np.zeros(x.v.shape, acc)
    dbias = None if x.bias is None else np.zeros(x.bias.shape, acc)
    dsinks = None if x.sinks is None else np.zeros(p.heads, acc)
    for h in _heads(call, acc):
        live = np.any(h.seen, axis=1)
        qs = np.where(live[:, None], x.q[h.where].astype(acc), 0)
        ks, vs = x.k[h.kv_where].astype(acc), x.v[h.kv_where].astype(acc)
        do = np.where(live[:, None], dout[h.where].astype(acc), 0)
        dl = (
            np.zeros(len(live), acc)
            if dlse is None
            else np.where(np.isneginf(h.lse), 0, dlse[h.where].astype(acc))
        )
        with np.errstate(all="ignore"):
            dp, lse = do @ vs.T, h.lse
            if saved is None:
                delta = np.where(h.seen, h.weights * dp, 0).sum(axis=1) - dl
            else:
                out, lse = (a[h.where].astype(acc) for a in saved)
                h.weights = np.where(h.seen, np.exp(h.s - np.where(live, lse, 0)[:, None]), 0)
                delta = (do * np.where(live[:, None], out, 0)).sum(axis=1) - dl
            ds = np.where(h.seen, h.weights * (dp - delta[:, None]), 0)
            if dbias is not None:
                dbias[h.bias_where] += ds
            if dsinks is not None and x.sinks is not None:
                sink = x.sinks[(*h.where[:-1],)].astype(acc)
                dsinks[h.head] += np.where(np.isneginf(h.lse), 0, -np.exp(sink - lse) * delta).sum()
            if p.softcap is not None:
                ds = np.where(h.seen, ds * (1 - (h.capped / p.softcap) ** 2), 0)
            ds = ds * p.scale
            dq[h.where] += _apart(ds, ks, h.seen)
            dk[h.kv_where] += _apart(ds.T, qs, h.seen.T)
            dv[h.kv_where] += _apart(h.weights.T, do, h.seen.T)
    if dbias is not None and x.given_bias is not None:
        dbias = _sum_to(dbias, x.given_bias.shape)
    if call.squeeze:
        dq, dk, dv = dq[0], dk[0], dv[0]
    return Grads(dq, dk, dv, dbias, dsinks)


def _understood(
    q: Any, k: Any, v: Any, mask: Any, dtype: Any, options: dict[str, Any]
) -> tuple[Any, np.dtype]:
    call = understand(q, k, v, Options(mask=mask, **options), backend="numpy")
    return call, call.problem.accumulate if dtype is None else np.dtype(dtype)


def _heads(call: Any, acc: np.dtype) -> Iterator[_Head]:
    x, p = call.operands, call.problem
    for f in frames(p, x):
        for head in range(p.heads):
            rows, keys = slice(f.q0, f.q0 + f.q_len), slice(f.k0, f.k0 + f.kv_len)
            where, kv_where = (*f.index, head, rows), (*f.index, head // p.group, keys)
            seen = _seen(call, f, head)
            at = np.arange(f.q_len)[:, None] + f.offset
            with np.errstate(all="ignore"):
                s = x.q[where].astype(acc) @ x.k[kv_where].astype(acc).T * acc.type(p.scale)
                if p.softcap is not None:
                    s = acc.type(p.softcap) * np.tanh(s / acc.type(p.softcap))
                capped = s
                if x.alibi is not None:
                    slope = x.alibi[(*f.index, head)].astype(acc)
                    s = s - slope * np.abs(at - np.arange(f.kv_len)).astype(acc)
                if x.bias is not None:
                    bias = x.bias[(*f.index, head, rows, keys)]
                    seen = seen & ~np.isneginf(bias.astype(p.accumulate))
                    s = s + bias.astype(acc)
                s = np.where(seen, s, acc.type(-np.inf))
                weights, lse = _softmax(
                    s, None if x.sinks is None else x.sinks[(*f.index, head)].astype(acc), seen
                )
            yield _Head(where, kv_where, head, (*f.index, head, rows, keys), seen, capped, s, weights, lse)


def _seen(call: Any, f: Frame, head: int) -> np.ndarray:
    """The whole mask of one head as booleans."""
    band = call.problem.band._replace(
        offset=f.offset if call.problem.band.offset is None else call.problem.band.offset
    )
    rows, keys = slice(0, f.q_len), slice(0, f.kv_len)
    seen = band_panel(band, rows, keys).cells(0, f.kv_len)
    if call.operands.mask is None:
        return seen
    frame = Frame(f.q_len, f.kv_len, f.index, head, f.q0, f.k0, f.q_total, f.kv_total)
    return np.asarray(seen & call.operands.mask.panel(frame, rows, keys).cells(0, f.kv_len))


def _softmax(s: np.ndarray, sink: Any, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = s.max(axis=1, initial=-np.inf)
    if sink is not None:
        top = np.maximum(top, sink)
    empty = np.isneginf(top) & ~seen.any(axis=1)
    shift = np.where(empty, 0, top).astype(s.dtype)
    e = np.where(seen, np.exp(s - shift[:, None]), 0)
    total = e.sum(axis=1) + (0 if sink is None else np.exp(sink - shift))
    weights = np.where(seen, e / np.where(total == 0, 1, total)[:, None], 0)
    return weights.astype(s.dtype), np.where(empty, -np.inf, shift + np.log(total)).astype(s.dtype)


def _apart(p: np.ndarray, x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """``p @ x`` without the pairs that do not see each other, for whom 0 * NaN would be NaN."""
    if np.isfinite(x).all():
        return np.asarray(p @ x)
    return np.asarray(np.where(seen[:, :, None], p[:, :, None] * x[None], 0).sum(axis=1))


def _sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return np.asarray(x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True))
