"""Repeated calls: what was understood once about NumPy arrays is not asked again.

Checking the arguments of a call takes ten times as long as the arithmetic of a small one. A call with few options is
known by the shapes, strides and types of its arrays and a few scalars; its second time costs one look-up. Lengths,
block tables and numbers per head are no part of that: the core copies them at every call, and checks the copy.
The fact to know: a key must tell apart all else that a check would tell apart, so scalars are taken only in the exact
types whose equality means the same argument (True == 1, but causal=1 is an error).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends.cpu import running, team
from .call import Call, Options, beside, folded, may_be_known
from .layouts import order_of
from .problem import Want
from .threads import get_num_threads

MOST = 1024  # calls that are remembered
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """A call that needs no more checks: how to run it, and what its results look like."""

    run: Callable[..., int]
    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[tuple[int, ...], tuple[int, ...]] | None  # axes as they lie, and back; None as numbered
    lse: tuple[tuple[int, ...], np.dtype] | None
    narrow: bool  # bfloat16, which crosses as integers

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, given: Any = None) -> Any:
        """The result of `attention`; None if something must be looked at after all: misaligned arrays, or what else was
        `given` is wrong."""
        if self.order is None:
            out = np.empty(self.shape, self.dtype)
        else:
            there, back = self.order
            out = np.empty([self.shape[axis] for axis in there], self.dtype).transpose(back)
        lse = None if self.lse is None else np.empty(*self.lse)
        arrays: tuple[np.ndarray, ...] = (q, k, v, out)
        if self.narrow:
            arrays = tuple(x.view(np.uint16) if x.dtype == self.dtype else x for x in arrays)
        if self.run(*arrays, lse, team(), given) < 0:
            return None
        return out if lse is None else (out, lse)


_known: dict[Key, Known] = {}


def _alike(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Key:
    """What tells arrays of a call from others."""
    return (q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype, v.shape, v.strides, v.dtype)


def known(q: Any, k: Any, v: Any, causal: Any, scale: Any, softcap: Any, return_lse: Any) -> Any:
    """The result of a call that has no other arguments; None where it must be looked at in full."""
    if (
        type(q) is not np.ndarray or type(k) is not np.ndarray or type(v) is not np.ndarray
        or (causal is not True and causal is not False) or (return_lse is not True and return_lse is not False)
        or (scale is not None and type(scale) is not float) or (softcap is not None and type(softcap) is not float)
    ):  # fmt: skip
        return None
    key = (*_alike(q, k, v), causal, scale, softcap, return_lse, get_num_threads())
    run = _known.get(key)
    if run is not None and (result := run(q, k, v)) is not None:
        return result
    return _first(key, q, k, v, Options(causal=causal, scale=scale, softcap=softcap), return_lse)


def known_with(q: Any, k: Any, v: Any, o: Options, return_lse: Any) -> Any:
    """The same for a call with lengths, a window, slopes or sinks, or with a cache for its keys and values."""
    if (
        type(q) is not np.ndarray or not may_be_known(o) or (return_lse is not True and return_lse is not False)
        or (found := beside(k, v, o)) is None
    ):  # fmt: skip
        return None
    stored, keys, values, given = found
    key = _key_of(given, keys, values)
    if key is not None:
        key = (
            *_alike(q, keys, values), *key, o.causal, o.window, o.scale, o.softcap, return_lse, get_num_threads()
        )  # fmt: skip
        run = _known.get(key)
        if run is not None and (result := run(q, keys, values, given)) is not None:
            return result
    return _first(key, q, k if stored is None else stored, v, o, return_lse)


def _key_of(given: Key, k: Any, v: Any) -> Key | None:
    """What tells such a call from others, but for q, k, v and numbers: which other arrays there are, and their shapes
    where these say what the problem is. None where one is not as the core takes it."""
    packed, q_ends, kv_ends, table, first, _, k_scale, v_scale, kind, alibi, sinks = given
    if type(k) is not np.ndarray or type(v) is not np.ndarray:
        return None
    for x in (table, k_scale, v_scale, alibi, sinks):
        if x is not None and type(x) is not np.ndarray:
            return None
    for x in (q_ends, kv_ends, first):
        if x is not None and type(x) is not np.ndarray and (packed or type(x) is not int):
            return None
    return (
        (q_ends.shape, kv_ends.shape) if packed else (q_ends is None, kv_ends is None),
        None if table is None else table.shape,
        None if k_scale is None else (k_scale.shape, k_scale.strides, k_scale.dtype),
        None if v_scale is None else (v_scale.shape, v_scale.strides, v_scale.dtype),
        kind, alibi is None, sinks is None,
    )  # fmt: skip


def _first(key: Key | None, q: np.ndarray, k: Any, v: Any, o: Options, return_lse: bool) -> Any:
    """Look at a call in full, and keep what was understood."""
    call = folded(q, k, v, o, want=Want.LSE if return_lse else Want(0))
    if key is not None:
        _remember(key, call, return_lse)
    return (call.out, call.lse) if return_lse else call.out


def _remember(key: Key, call: Call, return_lse: bool) -> None:
    """Keep a call, if the native core runs it as it is."""
    x, p = call.operands, call.problem
    if call.plan.backend != "native" or call.squeeze or x.q.ndim < 3 or x.mask is not None:
        return
    arrays = [a for a in (x.q, x.k, x.v, x.k_scale, x.v_scale) if a is not None]
    if any(step % a.itemsize for a in arrays for step in a.strides):
        return
    if len(_known) >= MOST:
        _known.clear()
    there, back = order_of(x.q)
    _known[key] = Known(
        run=running(call.plan).run_known,
        shape=(*x.q.shape[:-1], p.v_dim),
        dtype=x.q.dtype,
        order=None if there == back == tuple(range(x.q.ndim)) else (there, back),
        lse=(x.q.shape[:-1], p.accumulate) if return_lse else None,
        narrow=p.q_dtype == "bfloat16",
    )
