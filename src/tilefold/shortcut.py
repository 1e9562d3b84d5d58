"""Repeated calls: what was understood once about plain NumPy arrays is not asked again.

Checking the arguments of a call takes ten times as long as the arithmetic of a small one. A call with nothing optional
is known by the shapes, strides and types of its arrays and a few scalars; its second time costs one look-up. The fact
to know: a key must tell apart all that a check would tell apart, so scalars are taken only in the exact types whose
equality means the same argument (True == 1, but causal=1 is an error).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends.cpu import running, team
from .call import Call
from .layouts import order_of
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

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Any:
        """The result of `attention`, or None if these arrays are misaligned after all."""
        if self.order is None:
            out = np.empty(self.shape, self.dtype)
        else:
            there, back = self.order
            out = np.empty([self.shape[axis] for axis in there], self.dtype).transpose(back)
        lse = None if self.lse is None else np.empty(*self.lse)
        arrays: tuple[np.ndarray, ...] = (q, k, v, out)
        if self.narrow:
            arrays = tuple(x.view(np.uint16) for x in arrays)
        if self.run(*arrays, lse, team()) < 0:
            return None
        return out if lse is None else (out, lse)


_known: dict[Key, Known] = {}


def _key(q: Any, k: Any, v: Any, causal: Any, scale: Any, softcap: Any, return_lse: Any) -> Key | None:
    """What tells this call from others; None where it must be looked at in full."""
    if type(q) is not np.ndarray or type(k) is not np.ndarray or type(v) is not np.ndarray:
        return None
    if (causal is not True and causal is not False) or (return_lse is not True and return_lse is not False):
        return None
    if (scale is not None and type(scale) is not float) or (
        softcap is not None and type(softcap) is not float
    ):
        return None
    return (
        q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype, v.shape, v.strides, v.dtype,
        causal, scale, softcap, return_lse, get_num_threads(),
    )  # fmt: skip


def known(q: Any, k: Any, v: Any, causal: Any, scale: Any, softcap: Any, return_lse: Any) -> Any:
    """The result of a call that was understood before; None where it must be looked at in full."""
    key = _key(q, k, v, causal, scale, softcap, return_lse)
    run = None if key is None else _known.get(key)
    return None if run is None else run(q, k, v)


def remember(
    call: Call, q: Any, k: Any, v: Any, causal: Any, scale: Any, softcap: Any, return_lse: Any
) -> None:
    """Keep what was understood, if the native core runs it as it is."""
    x, p = call.operands, call.problem
    key = _key(q, k, v, causal, scale, softcap, return_lse)
    if key is None or call.plan.backend != "native" or call.squeeze or x.q.ndim < 3:
        return
    if any(step % a.itemsize for a in (x.q, x.k, x.v) for step in a.strides):
        return
    if len(_known) >= MOST:
        _known.clear()
    there, back = order_of(x.q)
    _known[key] = Known(
        run=running(call.plan).run_plain,
        shape=(*x.q.shape[:-1], p.v_dim),
        dtype=x.q.dtype,
        order=None if there == back == tuple(range(x.q.ndim)) else (there, back),
        lse=None if x.lse is None else (x.q.shape[:-1], p.accumulate),
        narrow=p.q_dtype == "bfloat16",
    )
