"""What the arguments of a call mean. Here, and only here, they become a `Problem` and `Operands`, or a sentence.

The public table of meanings lives in this file: shapes, alignment, what combines with what. The fact to know: lengths
(`q_lengths`, `kv_lengths`, `cu_seqlens_*`) say where each sequence *ends*, so causal masks, windows and ALiBi count
from there, and a padded batch equals the same sequences packed, or alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import compress, product
from math import inf, isfinite, prod, sqrt
from operator import or_
from typing import Any

import numpy as np

from .arrays import enter, enter_floats
from .backends.cpu import FAR, as_crosses
from .caches import cascade, packed
from .dtypes import CODES, ROWS, Code, code_of, name_of
from .frameworks import is_traced
from .layouts import Frame, Stored, empty_like, packed_frames
from .masks import BandMask, Mask, causal, check_cu_seqlens, dense, split, window
from .plan import Plan, backend_of, choose, pinned
from .problem import Band, Has, Layout, Operands, Problem, Want, bytes_of
from .replay import Grads
from .scores import refuse_infinite
from .taps import Tapped, wanted

ROWS_AT_ONCE = 256  # query rows whose mask is held against what a cache forgot
NO_VALUES = object()
DROPOUT = "dropout is not offered: exact attention has no random part; apply it to what goes in or comes out"


@dataclass(slots=True, kw_only=True)
class Options:
    """Everything about a call but the arrays q, k, v; `attention` says what each means."""

    mask: Any = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: Any = None
    alibi: Any = None
    sinks: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    q_lengths: Any = None
    kv_lengths: Any = None
    invariant: bool = False


@dataclass(slots=True)
class Call:
    """One call, understood: what, on which arrays, how, and which plans were refused."""

    problem: Problem
    operands: Operands
    plan: Plan
    refusals: tuple[tuple[str, str], ...]
    squeeze: bool  # 2-D arguments: the head axis that was added is taken off again
    shared: int = 0  # leading pages that all sequences of a cache have in common and that are folded once
    parts: tuple[
        tuple[packed.Batch, Call], ...
    ] = ()  # of packed queries over a cache: what is folded instead

    def allocate(self, out: Any = None) -> None:
        """Make the arrays that a fold fills, or take the caller's `out`."""
        p, x = self.problem, self.operands
        shape = (*x.q.shape[:-1], p.v_dim)
        q_type = x.q.dtype
        bytes_of(shape, q_type)
        if out is None:
            x.out = empty_like(x.q, shape, q_type)
        else:
            x.out = self._check_out(out, shape)
            refuse_infinite(x.given_bias, p.accumulate)  # the caller's array is not written in vain
        if p.want & Want.LSE:
            x.lse = np.empty(x.q.shape[:-1], p.accumulate)

    def fold(self, rows: slice | None = None) -> int:
        """Run sweep one; the bytes of workspace it allocated."""
        return backend_of(self.plan).fold(self.plan, self.operands, rows)

    def run(self, backend: str) -> None:
        """Run sweep one in the way of this call: all at once, what is shared first, or batch by batch."""
        for batch, part in self.parts:
            packed.place(self.operands, part.operands, batch)
            part.run(backend)
            packed.give(self.operands, part.operands, batch)
        if self.shared and not self.parts:
            cascade.fold(self.problem, self.operands, self.shared, backend)
        elif not self.parts:
            self.fold()

    def see(self) -> int:
        """Run sweep two for the taps that sweep one left; the bytes of workspace it allocated."""
        x = self.operands
        left = [tap for tap in x.taps if tap not in x.seen]
        return backend_of(self.plan).replay(self.plan, x, left) if left else 0

    @property
    def out(self) -> np.ndarray:
        assert self.operands.out is not None
        return self.operands.out[0] if self.squeeze else self.operands.out

    @property
    def lse(self) -> np.ndarray:
        assert self.operands.lse is not None
        return self.operands.lse[0] if self.squeeze else self.operands.lse

    def _check_out(self, out: Any, shape: tuple[int, ...]) -> np.ndarray:
        x = self.operands
        array = enter_floats("out", out)
        expected = shape[1:] if self.squeeze else shape
        if array.shape != expected:
            raise ValueError(f"out must have shape {expected}, got {array.shape}")
        if array.dtype != x.q.dtype:
            raise TypeError(f"out must be {x.q.dtype.name} as q is, got {array.dtype.name}")
        if not array.flags.writeable:
            raise ValueError("out must be writeable, got a read-only array")
        if array.size > 1 and _overlaps_itself(array):
            raise ValueError(
                f"out must not overlap itself, got strides {array.strides} for shape {array.shape}"
            )
        given = [("q", x.q), ("k", x.k), ("v", x.v), ("bias", x.given_bias), ("sinks", x.sinks)]
        given += [("alibi", x.alibi), *(("mask", cells) for cells in (x.mask.arrays if x.mask else ()))]
        for name, other in given:
            if other is not None and _share_memory(array, other):
                raise ValueError(f"out must not share memory with {name}")
        return array[None] if self.squeeze else array


def _share_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have a byte in common; where that is too hard to tell, whether their extents overlap."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # NumPy's stubs know -1 and 0
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(x: np.ndarray) -> bool:
    """Whether two elements may share bytes; exact for strides that nest, as those of any sliced array do."""
    reach = x.itemsize
    for step, n in sorted((abs(step), n) for n, step in zip(x.shape, x.strides, strict=True) if n > 1):
        if step < reach:
            return True
        reach = step * (n - 1) + reach
    return False


def understand(
    q: Any,
    k: Any,
    v: Any,
    o: Options,
    *,
    want: Want = Want(0),
    taps: tuple[Tapped, ...] = (),
    backend: str = "auto",
    plan: Plan | None = None,
) -> Call:
    """Check every argument and make the call; nothing runs. With `NO_VALUES` for `v` only weights are of interest."""
    k, v = _without_values(k) if v is NO_VALUES else (k, v)
    stored = _stored(k, v)
    code: Code | None = None
    if stored is None:
        arrays = {name: enter_floats(name, a) for name, a in (("q", q), ("k", k), ("v", v))}
    else:
        arrays, code, stored = _entered(q, stored, pages=o.cu_seqlens_q is not None)
    if stored is not None and stored.table is not None:
        _check_pages(arrays, stored, code, queries_packed=o.cu_seqlens_q is not None)
    else:
        _check_shapes(arrays)
    squeeze = arrays["q"].ndim == 2
    q, k, v = (a[None] if squeeze else a for a in arrays.values())
    (heads, q_len, dim), (kv_heads, kv_len, v_dim) = q.shape[-3:], v.shape[-3:]
    x = Operands(q, k, v, taps=taps)
    if stored is not None and stored.table is not None:
        x.table = _table(stored.table, len(k))
        kv_len *= x.table.shape[1]
    if stored is not None and code is not None:
        x.k_scale = _scales("k_scale", stored.k_scale, k, code)
        x.v_scale = _scales("v_scale", stored.v_scale, v, code)
        v_dim *= code.each
    layout, batch = _lengths(o, x, kv_len, stored)
    band = _masks(o, x, kv_len)
    if stored is not None and stored.first is not None:
        _check_held(x, band, heads, kv_len, stored)
    if stored is not None and stored.settled is not None:
        _check_order(x, band, kv_len, stored)
    _score_arrays(o, x, kv_len)
    problem = Problem(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        dim=dim,
        v_dim=v_dim,
        q_dtype=name_of(q.dtype),
        kv_dtype=name_of(k.dtype) if code is None else code.name,
        acc_dtype=ROWS[name_of(q.dtype)].accumulate,
        scale=_number("scale", o.scale, q.dtype) if o.scale is not None else (1 / sqrt(dim) if dim else 1.0),
        softcap=None if o.softcap is None else _number("softcap", o.softcap, q.dtype),
        band=band,
        layout=layout,
        has=_has(layout, x),
        want=want | wanted(taps) | (Want.INVARIANT if flag("invariant", o.invariant) else Want(0)),
    )
    if stored is not None and o.cu_seqlens_q is not None:
        return _by_batches(problem, x, stored, backend, plan)
    if plan is not None:
        if backend not in ("auto", getattr(plan, "backend", backend)):
            raise ValueError(f"backend={backend!r} contradicts the plan, which is for {plan.backend!r}")
        return Call(problem, x, pinned(plan, problem), (), squeeze)
    return _planned(problem, x, stored, backend, squeeze)


def _planned(problem: Problem, x: Operands, stored: Stored | None, backend: str, squeeze: bool) -> Call:
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name, got {type(backend).__name__}")
    chosen, refusals = choose(problem, backend)
    shares = stored is not None and stored.cascade and stored.table is not None and not x.taps
    shared = cascade.shared_pages(problem, x, backend) if shares else 0
    return Call(problem, x, chosen, refusals, squeeze, shared)


def _by_batches(problem: Problem, x: Operands, stored: Stored, backend: str, plan: Plan | None) -> Call:
    """Packed queries over a cache: a call for each number of queries. The one with most work speaks for all."""
    if plan is not None:
        raise ValueError(
            "plan must not be given with packed queries over a cache: they are folded in batches, and each has its own"
        )
    if x.taps:
        raise ValueError(
            "probes must not be given with packed queries over a cache; give them padded, with q_lengths"
        )
    assert x.q_ends is not None
    parts = []
    for batch in packed.batches(x.q_ends):
        part = replace(problem, batch=len(batch.sequences), q_len=batch.q_len)
        parts.append((batch, _planned(part, packed.operands(x, batch), stored, backend, squeeze=False)))
    most = max((part for _, part in parts), key=lambda part: part.problem.batch * part.problem.q_len)
    return replace(most, operands=x, parts=tuple(parts))


def folded(
    q: Any,
    k: Any,
    v: Any,
    o: Options,
    *,
    want: Want = Want(0),
    taps: tuple[Tapped, ...] = (),
    backend: str = "auto",
    plan: Plan | None = None,
    out: Any = None,
) -> Call:
    """A call, understood and run: `out`, `lse` and what `taps` saw are filled."""
    call = understand(q, k, v, o, want=want, taps=taps, backend=backend, plan=plan)
    call.allocate(out)
    call.run(backend)
    call.see()
    return call


def differentiated(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any, o: Options, *, backend: str = "auto"
) -> Grads:
    """The gradients through a call, as arrays; `attention_grad` says what they are."""
    call = understand(q, k, v, o, want=Want.LSE | Want.GRAD, backend=backend)
    x, p = call.operands, call.problem
    rows, acc = x.q.shape[:-1], p.accumulate
    given = {
        "out": (out, (*rows, p.v_dim), x.q.dtype),
        "lse": (lse, rows, acc),
        "dout": (dout, (*rows, p.v_dim), x.q.dtype),
        "dlse": (dlse, rows, acc),
    }
    checked: dict[str, np.ndarray] = {}
    for name, (array, shape, dtype) in given.items():
        if array is None and name == "dlse":
            continue
        a = enter_floats(name, array)
        if a.shape != (shape[1:] if call.squeeze else shape):
            raise ValueError(f"{name} must have shape {shape[1:] if call.squeeze else shape}, got {a.shape}")
        if a.dtype != dtype:
            raise TypeError(f"{name} must be {dtype.name}, got {a.dtype.name}")
        checked[name] = a[None] if call.squeeze else a
    x.out, x.lse = checked["out"], checked["lse"]
    grads = backend_of(call.plan).gradient(call.plan, x, checked["dout"], checked.get("dlse"))
    return grads._replace(dq=grads.dq[0], dk=grads.dk[0], dv=grads.dv[0]) if call.squeeze else grads


# ---- calls that are known: what was understood once, and what is looked at each time ---------------------------


def may_be_known(o: Options) -> bool:
    """Whether options that equal these mean the same, arrays aside: True == 1, but causal=1 is an error."""
    return (
        (o.causal is True or o.causal is False)
        and (o.scale is None or type(o.scale) is float)
        and (o.softcap is None or type(o.softcap) is float)
        and (o.window is None or _is_plain_window(o.window))
        and o.mask is None
        and o.bias is None
        and o.invariant is False
    )


def _is_plain_window(window: Any) -> bool:
    if type(window) is not tuple or len(window) != 2:
        return False
    left, right = window
    return (left is None or (type(left) is int and 0 <= left < FAR)) and (
        right is None or (type(right) is int and 0 <= right < FAR)
    )


def beside(k: Any, v: Any, o: Options) -> tuple[Stored | None, Any, Any, tuple[Any, ...]] | None:
    """(what a cache holds, its k and v or those given, all other arrays) as the core takes them at a known call; None
    where they must be looked at in full. Nothing is checked here but what goes together."""
    packed = o.cu_seqlens_q is not None or o.cu_seqlens_k is not None
    if packed and (o.cu_seqlens_q is None or o.cu_seqlens_k is None or o.q_lengths is not None):
        return None
    if v is not None:
        if not packed:
            return (
                None,
                k,
                v,
                (False, o.q_lengths, o.kv_lengths, None, None, 0, None, None, -1, o.alibi, o.sinks),
            )
        if o.kv_lengths is not None:
            return None
        return (
            None,
            k,
            v,
            (True, o.cu_seqlens_q, o.cu_seqlens_k, None, None, 0, None, None, -1, o.alibi, o.sinks),
        )
    if packed or o.kv_lengths is not None or not is_cache(k):
        return None
    x = k.stored()
    if type(x) is not Stored or x.cascade or x.settled is not None:
        return None
    k, v, kind = x.k, x.v, -1
    if type(k) is np.ndarray and type(v) is np.ndarray:
        if k.dtype != v.dtype:
            return None
        k, v, kind = as_crosses(k), as_crosses(v), k.dtype.num
    return x, k, v, (
        False, o.q_lengths, x.lengths, x.table, x.first, x.kept, x.k_scale, x.v_scale, kind, o.alibi, o.sinks
    )  # fmt: skip


def _masks(o: Options, x: Operands, kv_len: int) -> Band:
    """All that hides by position or by choice: the affine part, the rest of it into ``x.mask``."""
    heads, q_len = x.q.shape[-3:-1]
    mask = mask_of(o)
    if mask is not None:
        mask.check(x.lead, heads, q_len, kv_len)
    ragged = x.q_ends is not None or x.kv_ends is not None
    band, x.mask = split(mask, None if ragged else kv_len - q_len)
    return band


def _score_arrays(o: Options, x: Operands, kv_len: int) -> None:
    """Bias, ALiBi and sinks into `x`, checked."""
    heads, q_len = x.q.shape[-3:-1]
    if o.bias is not None:
        x.given_bias = enter_floats("bias", o.bias)
        shape = (*x.lead, heads, q_len, kv_len)
        x.bias = _broadcast("bias", x.given_bias, shape, "(..., heads, q_len, kv_len)")
    if o.alibi is not None:
        slopes = _small_floats("alibi", o.alibi)
        if np.isinf(slopes).any():
            raise ValueError("alibi must not hold NaN or infinity")
        _fits("alibi", np.abs(slopes), x.q.dtype)
        x.alibi = _per_head("alibi", slopes, x.lead, heads)
    if o.sinks is not None:
        logits = _small_floats("sinks", o.sinks)
        if logits.shape != (heads,):
            raise ValueError(
                f"sinks must have shape ({heads},), one logit per query head; got {logits.shape}"
            )
        _fits("sinks", logits, x.q.dtype)
        x.sinks = _per_head("sinks", logits, x.lead, heads)


# ---- caches: objects that stand for keys and values -----------------------------------------------------------


def is_cache(k: Any) -> bool:
    """Whether `k` stands for keys and values, so that it is asked what it holds."""
    return callable(getattr(k, "stored", None))


def _without_values(k: Any) -> tuple[Any, Any]:
    """Keys, or a cache, with values of no dims."""
    if not is_cache(k):
        keys = enter_floats("k", k)
        return k, np.broadcast_to(keys.dtype.type(0), (*keys.shape[:-1], 0))
    stored = k.stored()
    values, scale = enter("v", stored.v), stored.v_scale
    return _Keys(replace(stored, v=values[..., :0], v_scale=scale)), None


@dataclass(slots=True)
class _Keys:
    """The keys of a cache."""

    held: Stored

    def stored(self) -> Stored:
        return self.held


def _stored(k: Any, v: Any) -> Stored | None:
    """What the cache `k` holds; None if `k` is an array of keys, with its values in `v`."""
    if not is_cache(k):
        if v is None:
            raise TypeError(
                "v must be an array of values; only a cache object stands for keys and values together"
            )
        return None
    if v is not None:
        hint = "; give a mask as mask=" if isinstance(v, Mask) else ""
        raise TypeError(f"v must not be given beside a {type(k).__name__}, which holds keys and values{hint}")
    stored = k.stored()
    if not isinstance(stored, Stored):
        raise TypeError(f"a cache's stored() must give tilefold.layouts.Stored, got {type(stored).__name__}")
    return stored


def _entered(q: Any, stored: Stored, pages: bool) -> tuple[dict[str, np.ndarray], Code | None, Stored]:
    """q and what is stored as arrays, and the codes that the latter are; in `pages` if asked, and codes always."""
    keys, values = enter("k", stored.k), enter("v", stored.v)
    code = code_of(keys.dtype)
    if code is None and stored.k_scale is None and stored.v_scale is None:
        arrays = {name: enter_floats(name, a) for name, a in (("q", q), ("k", keys), ("v", values))}
        if pages:
            stored = _in_pages(replace(stored, k=keys, v=values))
            arrays |= {"k": stored.k, "v": stored.v}
        return arrays, None, stored
    if code is None:
        kinds = ", ".join(f"{c.array} ({c.name})" if c.array != c.name else c.name for c in CODES.values())
        raise TypeError(f"k must be {kinds} where it has a scale, got {keys.dtype.name}")
    if values.dtype != keys.dtype:
        raise TypeError(f"k and v must be stored in one type, got k {keys.dtype.name}, v {values.dtype.name}")
    queries = enter_floats("q", q)
    if queries.dtype == np.float64:
        raise TypeError(
            f"q must be float16, bfloat16 or float32 with keys and values of {code.name}, got float64"
        )
    stored = _in_pages(replace(stored, k=keys, v=values))
    return {"q": queries, "k": stored.k, "v": stored.v}, code, stored


def _in_pages(stored: Stored) -> Stored:
    """The same in pages: without a table each sequence is one, or has none where there is no room for a key."""
    keys, values = stored.k, stored.v
    if stored.table is not None or keys.ndim != 4 or values.ndim != 4:
        return stored
    if keys.shape[2] or values.shape[2]:
        return replace(stored, table=np.arange(len(keys))[:, None])
    none: dict[str, Any] = {
        name: x if x is None else x[:0] if x.ndim == 2 else x.reshape(0, x.shape[1], 1, *x.shape[3:])
        for name in ("k", "v", "k_scale", "v_scale")
        for x in [getattr(stored, name)]
    }
    return replace(stored, table=np.zeros((len(keys), 0), np.int64), **none)


def _scales(name: str, given: Any, codes: np.ndarray, code: Code) -> np.ndarray:
    """The scales of codes as a view ``(pages, kv_heads, page, groups)``."""
    if given is None:
        raise TypeError(f"{name} must be given where keys and values are {code.name}")
    scale = enter(name, given)
    if scale.dtype != np.float32:
        raise TypeError(f"{name} must be float32, got {scale.dtype.name}")
    rows, dim = codes.shape[:-1], codes.shape[-1] * code.each
    if scale.shape == rows[:-1]:
        return np.broadcast_to(scale[..., None, None], (*rows, 1))
    if scale.shape == rows:
        return scale[..., None]
    groups = scale.shape[-1] if scale.shape[:-1] == rows else 0
    if not groups or dim % groups or dim // groups % code.each:
        whole = " of an even number of dims" if code.each > 1 else ""
        raise ValueError(
            f"{name} must have shape (pages, kv_heads) = {rows[:-1]}, (pages, kv_heads, page) = {rows}, or one more "
            f"axis of groups that divide {dim} dims into parts{whole}; got {scale.shape}"
        )
    return scale


def _check_pages(
    arrays: dict[str, np.ndarray], stored: Stored, code: Code | None, queries_packed: bool
) -> None:
    q, k, v = arrays.values()
    for name, a in arrays.items():
        if name == "q" and queries_packed:
            if a.ndim != 3:
                raise ValueError(f"with cu_seqlens_q q must be (heads, total, dim), got {a.shape}")
        elif a.ndim != 4:
            raise ValueError(
                f"with pages q must be (batch, heads, length, dim), k and v (pages, heads, page, dim); "
                f"got {name} {a.shape}"
            )
        if code is None and a.dtype != q.dtype:
            raise TypeError(
                f"q and the cache must have one dtype, got q {q.dtype.name}, {name} {a.dtype.name}"
            )
    if k.shape[:-1] != v.shape[:-1] or not k.shape[-2]:
        raise ValueError(f"k and v must have the same pages of at least one row, got {k.shape} and {v.shape}")
    if k.shape[-1] * (1 if code is None else code.each) != q.shape[-1]:
        two = "" if code is None or code.each == 1 else ", two dims to a byte"
        raise ValueError(
            f"q and the cache must have the same last dimension, got q {q.shape}, k {k.shape}{two}"
        )
    if not queries_packed and len(stored.table) != len(q):
        raise ValueError(f"the cache holds {len(stored.table)} sequences, q has {len(q)}")


def _table(table: Any, pages: int) -> np.ndarray:
    """A private copy of the block table, in which every page exists."""
    given = enter("the block table", table)
    if given.ndim != 2 or given.dtype.kind not in "iu":
        raise TypeError(f"the block table must be integers (batch, n), got {given.dtype} {given.shape}")
    own = np.array(given, np.int64, order="C")
    if own.size and not (own.min() >= -1 and own.max() < pages):
        raise ValueError(
            f"the block table must name pages 0 to {pages - 1}, or -1 for none; got {own.min()} to {own.max()}"
        )
    return own


def _cached_frames(x: Operands, kv_len: int) -> list[Frame]:
    """Every sequence of a call over a cache."""
    assert x.kv_ends is not None
    if x.table is not None and not x.lead:
        return list(packed_frames(x))
    q_len = x.q.shape[-2]
    counts = np.full(x.kv_ends.shape, q_len) if x.q_ends is None else x.q_ends
    return [
        Frame(q_count, kv_end, (n,), 0, 0, 0, q_len, kv_len)
        for n, (q_count, kv_end) in enumerate(zip(counts.tolist(), x.kv_ends.tolist(), strict=True))
    ]


def _check_held(x: Operands, band: Band, heads: int, kv_len: int, stored: Stored) -> None:
    """A cache that forgets must not be asked for what it forgot: keys `kept` to `first` of each sequence."""
    assert x.kv_ends is not None
    if band.left is not None and band.right is not None and band.left + band.right < 0:
        return  # nobody sees anything
    firsts = np.broadcast_to(np.asarray(stored.first), x.kv_ends.shape)
    for n, (frame, first) in enumerate(zip(_cached_frames(x, kv_len), firsts.tolist(), strict=True)):
        lo, hi = stored.kept, min(first, frame.kv_len)
        if band.left is not None:
            lo = max(lo, frame.offset - band.left)
        if band.right is not None:
            hi = min(hi, frame.offset + frame.q_len + band.right)
        if (
            not frame.q_len
            or lo >= hi
            or (x.mask is not None and not _sees(x.mask, band, frame, heads, lo, hi))
        ):
            continue
        raise ValueError(
            f"the cache has forgotten keys {stored.kept} to {first - 1} of sequence {n}, and a query here would see "
            "some of them: pass the window that the cache has, or a narrower one"
            + (", as mask=tilefold.anchors(anchors, window - 1)" if stored.kept else "")
        )


def _check_order(x: Operands, band: Band, kv_len: int, stored: Stored) -> None:
    """What an eviction left is all before the last query that it knew: earlier ones cannot be told what to see."""
    if band.right is None and x.mask is None:
        return
    for n, (frame, settled) in enumerate(
        zip(_cached_frames(x, kv_len), stored.settled.tolist(), strict=True)
    ):
        since = frame.kv_len - settled
        if settled and frame.q_len > since + 1:
            raise ValueError(
                f"q must have at most {since + 1} rows for sequence {n}, whose cache evicted keys and got {since} "
                f"since then; got {frame.q_len}, of which the first stand where nobody knows any more what came after"
            )


def _sees(mask: Mask, band: Band, frame: Frame, heads: int, lo: int, hi: int) -> bool:
    """Whether any query of a sequence sees any of its keys lo to hi."""
    bound = BandMask(band.left, band.right, "bottom-right") & mask
    every = range(heads) if mask.by_head else (0,)
    return any(
        bool(bound.panel(replace(frame, head=head), slice(row, min(row + ROWS_AT_ONCE, frame.q_len)), slice(lo, hi))
             .visible().any())
        for head in every
        for row in range(0, frame.q_len, ROWS_AT_ONCE)
    )  # fmt: skip


def _has(layout: Layout, x: Operands) -> Has:
    """Which optional arrays there are."""
    ends = x.q_ends is not None or x.kv_ends is not None
    there = (
        x.mask is not None,
        x.mask is not None and x.mask.may_need_bits,
        x.bias is not None,
        x.alibi is not None,
        x.sinks is not None,
        ends and layout is not Layout.VARLEN,
    )
    return _HAS[there]


# Looked up, because flags that are joined one by one cost as much as the rest of such a check.
_HAS = {there: reduce(or_, compress(Has, there), Has(0)) for there in product((False, True), repeat=len(Has))}


def _check_shapes(arrays: dict[str, np.ndarray]) -> None:
    q, k, v = arrays.values()
    for name, a in arrays.items():
        if a.ndim < 2:
            raise ValueError(
                f"{name} must have shape (..., heads, length, dim) or (length, dim), got {a.shape}"
            )
        if a.ndim != q.ndim:
            raise ValueError(
                f"q, k and v must have the same number of dimensions, got q {q.shape} and {name} {a.shape}"
            )
        if a.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got q {q.dtype.name} and {name} {a.dtype.name}")
        if a.shape[:-3] != q.shape[:-3]:
            raise ValueError(
                f"q, k and v must have the same leading dimensions, got q {q.shape} and {name} {a.shape}; "
                "numpy.broadcast_to repeats without copying"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q and k must have the same last dimension, got q {q.shape} and k {k.shape}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"k and v must have the same heads and length, got k {k.shape} and v {v.shape}")


def _lengths(o: Options, x: Operands, kv_len: int, stored: Stored | None) -> tuple[Layout, int]:
    """Where sequences end: fills ``x.q_ends`` and ``x.kv_ends``; the layout and the number of sequences."""
    lead, q_len, kv_lengths = x.lead, x.q.shape[-2], o.kv_lengths
    if stored is not None:
        for name in ("cu_seqlens_k", "kv_lengths"):
            if getattr(o, name) is not None:
                raise TypeError(f"{name} must not be given with a cache, which knows its lengths")
        if o.cu_seqlens_q is not None:
            return Layout.PAGED, _packed_lengths(o, x, kv_len, stored)
        kv_lengths = stored.lengths
    packed = o.cu_seqlens_q is not None or o.cu_seqlens_k is not None
    if not packed:
        x.q_ends = _ends("q_lengths", o.q_lengths, lead, q_len)
        x.kv_ends = _ends("kv_lengths", kv_lengths, lead, kv_len)
        layout = Layout.DENSE if x.table is None else Layout.PAGED
        return layout, prod(lead)
    if o.cu_seqlens_q is None or o.cu_seqlens_k is None:
        raise TypeError("cu_seqlens_q and cu_seqlens_k come together")
    if o.q_lengths is not None or o.kv_lengths is not None:
        raise TypeError("cu_seqlens and lengths exclude each other: packed sequences have no padding")
    if lead:
        raise ValueError(
            f"packed sequences have shape (heads, total, dim) without a batch, got q {x.q.shape}"
        )
    x.q_ends = check_cu_seqlens("cu_seqlens_q", enter("cu_seqlens_q", o.cu_seqlens_q), q_len)
    x.kv_ends = check_cu_seqlens("cu_seqlens_k", enter("cu_seqlens_k", o.cu_seqlens_k), kv_len)
    if len(x.q_ends) != len(x.kv_ends):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must count the same sequences, "
            f"got {len(x.q_ends) - 1} and {len(x.kv_ends) - 1}"
        )
    return Layout.VARLEN, len(x.q_ends) - 1


def _packed_lengths(o: Options, x: Operands, kv_len: int, stored: Stored) -> int:
    """The same for packed queries over a cache: how many sequences."""
    assert x.table is not None
    batch = len(x.table)
    if o.q_lengths is not None:
        raise TypeError("cu_seqlens and lengths exclude each other: packed sequences have no padding")
    x.q_ends = check_cu_seqlens("cu_seqlens_q", enter("cu_seqlens_q", o.cu_seqlens_q), x.q.shape[-2])
    if len(x.q_ends) != batch + 1:
        raise ValueError(
            f"cu_seqlens_q must count the {batch} sequences of the cache, got {len(x.q_ends) - 1}"
        )
    x.kv_ends = _ends("the cache's lengths", stored.lengths, (batch,), kv_len)
    return batch


def _ends(name: str, given: Any, lead: tuple[int, ...], most: int) -> np.ndarray | None:
    if given is None:
        return None
    if isinstance(given, int) and not 0 <= given <= most:
        raise ValueError(f"{name} must lie within 0 and {most}, got {given}")
    array = np.asarray(given) if isinstance(given, (int, np.integer)) else enter(name, given)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.shape not in ((), lead):
        raise ValueError(
            f"{name} must have the leading shape {lead} of q, or be one integer; got {array.shape}"
        )
    if array.size and not (array.min() >= 0 and array.max() <= most):
        raise ValueError(f"{name} must lie within 0 and {most}, got {array.min()} to {array.max()}")
    own = np.empty(lead, np.int64)
    own[...] = array
    return own


def mask_of(o: Options) -> Mask | None:
    """All that hides by position or by choice, as one conjunction."""
    parts: list[Mask] = []
    if flag("causal", o.causal):
        parts.append(causal())
    if o.window is not None:
        if not isinstance(o.window, (tuple, list)) or len(o.window) != 2:
            raise TypeError(f"window must be (left, right), each an integer >= 0 or None; got {o.window!r}")
        parts.append(window(*o.window))
    if isinstance(o.mask, Mask):
        parts.append(o.mask)
    elif o.mask is not None:
        parts.append(dense(o.mask if is_traced(o.mask) else enter("mask", o.mask)))
    whole: Mask | None = None
    for part in parts:
        whole = part if whole is None else whole & part
    return whole


def flag(name: str, x: object) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(x).__name__}")
    return bool(x)


def _number(name: str, x: Any, dtype: np.dtype) -> float:
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    try:
        number = float(x)
    except OverflowError:  # an integer beyond every float
        number = inf
    if not isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    _fits(name, np.float64(abs(number)), dtype)
    return number


def _fits(name: str, x: np.ndarray | np.float64, dtype: np.dtype) -> None:
    """ValueError for a number that is infinite where the scores of `dtype` are summed."""
    sums = ROWS[dtype.name].accumulate
    with np.errstate(over="ignore"):
        if np.isposinf(x.astype(sums)).any():
            raise ValueError(f"{name} must be finite in {sums}, where scores are summed; got {np.max(x)}")


def _small_floats(name: str, x: Any) -> np.ndarray:
    """Per-head numbers; a list of floats is taken too."""
    if isinstance(x, (list, tuple)):
        try:
            x = np.asarray(x, float)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be an array or a list of numbers, got {x!r}") from None
    array = enter_floats(name, x)
    if np.isnan(array).any() or np.isposinf(array).any():
        raise ValueError(f"{name} must not hold NaN or +inf")
    return array


def _per_head(name: str, x: np.ndarray, lead: tuple[int, ...], heads: int) -> np.ndarray:
    if x.shape not in ((heads,), (*lead, heads)):
        raise ValueError(f"{name} must have shape ({heads},) or {(*lead, heads)}, got {x.shape}")
    return np.broadcast_to(x, (*lead, heads))


def _broadcast(name: str, x: np.ndarray, shape: tuple[int, ...], words: str) -> np.ndarray:
    try:
        return np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"{name} of shape {x.shape} does not broadcast to {words} = {shape}") from None
