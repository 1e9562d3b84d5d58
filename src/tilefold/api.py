"""Four verbs: attention, merge, probe, explain; and attention_grad for arrays without autograd.

This is the door: it says what may be asked, hands it to `call.py` to be understood, runs the plan, and gives back
arrays of the kind that came in.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, overload

import numpy as np

from . import shortcut, witnesses
from .arrays import door_of, enter_floats, leave
from .call import DROPOUT, NO_VALUES, Call, Options, differentiated, flag, folded, understand
from .dtypes import CODES
from .layouts import empty_like, frames
from .masks import Mask
from .plan import Plan
from .probes.statistic import Filled, Regions, Seen, Statistic, TopK, check, results, taps_of
from .problem import Has, Operands, Problem, Want
from .replay import Grads
from .stats import OnlineStats
from .tiles import visible_in_band

Array = Any


@overload
def attention(
    q: Array, k: Array, v: Array = None, mask: Mask | Array | None = None, *, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, scale: float | None = None, softcap: float | None = None,
    bias: Array | None = None, alibi: Array | None = None, sinks: Array | None = None,
    cu_seqlens_q: Array | None = None, cu_seqlens_k: Array | None = None, q_lengths: Array | None = None,
    kv_lengths: Array | None = None, return_lse: Literal[False] = False, probes: tuple[()] = (),
    out: Array | None = None, invariant: bool = False, backend: str = "auto", plan: Plan | None = None,
) -> Array: ...  # fmt: skip
@overload
def attention(
    q: Array, k: Array, v: Array = None, mask: Mask | Array | None = None, *, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, scale: float | None = None, softcap: float | None = None,
    bias: Array | None = None, alibi: Array | None = None, sinks: Array | None = None,
    cu_seqlens_q: Array | None = None, cu_seqlens_k: Array | None = None, q_lengths: Array | None = None,
    kv_lengths: Array | None = None, return_lse: Literal[True], probes: tuple[()] = (),
    out: Array | None = None, invariant: bool = False, backend: str = "auto", plan: Plan | None = None,
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def attention(
    q: Array, k: Array, v: Array = None, mask: Mask | Array | None = None, *, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, scale: float | None = None, softcap: float | None = None,
    bias: Array | None = None, alibi: Array | None = None, sinks: Array | None = None,
    cu_seqlens_q: Array | None = None, cu_seqlens_k: Array | None = None, q_lengths: Array | None = None,
    kv_lengths: Array | None = None, return_lse: bool = False, probes: list[Any] | tuple[Any, ...],
    out: Array | None = None, invariant: bool = False, backend: str = "auto", plan: Plan | None = None,
) -> tuple[Array, Array, Seen]: ...  # fmt: skip
def attention(
    q: Array, k: Array, v: Array = None, mask: Mask | Array | None = None, *, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, scale: float | None = None, softcap: float | None = None,
    bias: Array | None = None, alibi: Array | None = None, sinks: Array | None = None,
    cu_seqlens_q: Array | None = None, cu_seqlens_k: Array | None = None, q_lengths: Array | None = None,
    kv_lengths: Array | None = None, return_lse: bool = False, probes: list[Any] | tuple[Any, ...] = (),
    out: Array | None = None, invariant: bool = False, backend: str = "auto", plan: Plan | None = None,
    **unknown: Any,
) -> Any:  # fmt: skip
    """Exact softmax attention in memory that grows with the length, not with its square.

    Args:
        q: queries ``(..., Hq, Sq, D)``; ``(Sq, D)`` is one head.
        k: keys ``(..., Hkv, Sk, D)``. Hq is a multiple of Hkv; query head h reads key head ``h // (Hq / Hkv)``. Or a
            cache, which stands for keys and values: a `KVCache`, or sequences ``cache[ids]`` of a `PagedKVCache`.
        v: values ``(..., Hkv, Sk, Dv)``.
        mask: a `Mask`, or booleans broadcastable to ``(..., Hq, Sq, Sk)``, True = visible. Combined by ``&`` with
            `causal`, `window` and lengths.
        causal: query i sees key j iff ``j <= i + Sk - Sq`` (bottom-right; `tilefold.causal` has the other one).
        window: ``(left, right)`` other keys on each side of a query's own position, None = unlimited.
        scale: factor of the scores, ``1 / sqrt(D)`` by default; any finite number.
        softcap: ``cap * tanh(score / cap)``, > 0, after the scale.
        bias: added to the scores, broadcastable to ``(..., Hq, Sq, Sk)`` and never expanded; -inf hides, and so does a
            number that is -inf in the type of the scores (-1e300 in float64 beside float32 inputs).
        alibi: slopes ``(Hq,)`` or ``(..., Hq)``: ``-slope * |i + Sk - Sq - j|`` is added (Press et al. 2021, arXiv
            2108.12409).
        sinks: learned logits ``(Hq,)``: one extra key per head without a value, neither scaled nor capped.
        cu_seqlens_q, cu_seqlens_k: cumulative lengths, int32 or int64, of sequences packed as ``(H, total, D)``. With
            a cache only `cu_seqlens_q`: the queries of each of its sequences in turn, none or many. Arrays over scores
            then have the shape ``(Hq, total, capacity)``.
        q_lengths, kv_lengths: lengths of padded sequences, of the leading shape. A sequence counts as ending there:
            masks align to its own lengths, its padding is ignored, padding rows of the output are 0.
        return_lse: also return the log-sum-exp of the scores ``(..., Hq, Sq)`` in the accumulate type.
        probes: statistics of the weights, as of `probe`; the result is then ``(out, lse, seen)``.
        out: array to write to; q's shape (with Dv), type, no memory shared with an input.
        invariant: demand the same bits for a row however many queries its sequence has, so that decoding reproduces
            prefill; refused by backends that cannot. The native core does so in any case, but where a machine has
            AMX: float32 and float16 are multiplied in tiles there where a sequence has more than 64 query rows (the
            heads that share a key head counted), in other bits and about 1.4 times as fast, and up to 8 rows over
            int8 and int4 as integers. `explain` says where numbers are sums of bfloat16. Batch, packing, pages and
            threads never matter.
        backend: "auto", or the name of one that must do it.
        plan: a plan from `explain` to use again.

    Returns:
        out ``(..., Hq, Sq, Dv)`` in q's type, kind and memory order. A row that sees no key is 0, its lse -inf. NaN or
        infinity behind a mask reaches no output.

    Raises:
        TypeError: an argument of the wrong kind or type.
        ValueError: a wrong value or shape. The message names the argument, what it was and what was expected.
        BackendRefused: no backend, or not the one asked for, can do this; the message says why.

    Scores and sums are float32, for float64 inputs float64. Order of score transforms: scale, softcap, bias and ALiBi,
    mask. (Dao et al. 2022, arXiv 2205.14135; softcap: Gemma 2, arXiv 2408.00118; sinks: gpt-oss, 2025.)

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(3, 8, 1000, 64)).astype(np.float32)
    >>> attention(q, k, v, causal=True).shape
    (8, 1000, 64)
    """
    if witnesses.there:
        witnesses.show(
            q, k, mask=mask, causal=causal, window=window, scale=scale, softcap=softcap, bias=bias, alibi=alibi,
            sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, q_lengths=q_lengths,
            kv_lengths=kv_lengths,
        )  # fmt: skip
    usual = probes == () and out is None and backend == "auto" and plan is None and not unknown
    door = None if type(q) is np.ndarray else door_of(q)
    way = door or shortcut
    if (
        usual and v is not None and mask is None and window is None and bias is None and alibi is None and sinks is None
        and cu_seqlens_q is None and cu_seqlens_k is None and q_lengths is None and kv_lengths is None
        and invariant is False
    ):  # fmt: skip
        result = way.known(q, k, v, causal, scale, softcap, return_lse)
        if result is not None:
            return result
    refuse_unknown(unknown)
    options = Options(
        mask=mask, causal=causal, window=window, scale=scale, softcap=softcap, bias=bias, alibi=alibi, sinks=sinks,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, q_lengths=q_lengths, kv_lengths=kv_lengths,
        invariant=invariant,
    )  # fmt: skip
    if usual:
        result = way.known_with(q, k, v, options, return_lse)
        if result is not None:
            return result
    statistics = check(probes, "probes")
    return_lse = flag("return_lse", return_lse) or bool(probes)
    if door is not None and (not statistics or door.sees_more(q, k, v, options)):
        result = door.attention(q, k, v, options, return_lse, out, backend, plan)
        return (*result, _probed(q, k, statistics, options, backend)) if statistics else result
    want = Want.LSE if return_lse else Want(0)
    call = folded(q, k, v, options, want=want, taps=taps_of(statistics), backend=backend, plan=plan, out=out)
    result = out if out is not None else leave(q, call.out)
    if statistics:
        return result, leave(q, call.lse), _seen(q, call, statistics)
    return (result, leave(q, call.lse)) if return_lse else result


def refuse_unknown(given: Iterable[str], known: Container[str] = ()) -> None:
    """A sentence for an argument that this library refuses, or does not know."""
    for name in given:
        if name in known:
            continue
        if name in ("dropout", "dropout_p"):
            raise TypeError(f"{name}: {DROPOUT}")
        raise TypeError(f"unexpected keyword argument {name!r}; tilefold.attention lists the options")


def probe(q: Array, k: Array, *what: Any, mask: Mask | Array | None = None, **options: Any) -> Seen:
    """Statistics of the attention weights of q and k, without the matrix: one attribute per statistic, by its name.

    Args:
        q, k: as of `attention`; k may be a cache, whose values are not read.
        what: statistics, such as `entropy()`, `topk(8)`, `key_mass()`, `heatmap(64, 64)`; see `tilefold.probes`. Or
            objects with a `name` and ``start(problem, lead)``, which returns a tap that is shown every tile of weights
            (`tilefold.replay.Weights`) by the NumPy backend.
        mask, options: the masks and score options of `attention`, with the same meaning, and `backend`.

    Returns:
        `Seen`, whose arrays are of q's kind, and numbers in the accumulate type. Memory is O(n) beside the results.

    Raises:
        TypeError, ValueError: as `attention`, and for a statistic that the call has not enough rows or keys for.

    >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
    >>> from tilefold import entropy, key_mass, topk
    >>> seen = probe(q, k, entropy(), key_mass(), topk(3), causal=True)
    >>> seen.key_mass.sum(axis=1).round(9), seen.topk.keys.shape
    (array([100., 100., 100., 100.]), (4, 100, 3))
    """
    statistics = check(what, "probe: statistics")
    if not what:
        raise TypeError("probe: give at least one statistic, such as tilefold.entropy()")
    backend = options.pop("backend", "auto")
    refuse_unknown(options, known=Options.__dataclass_fields__)
    return _probed(q, k, statistics, Options(mask=mask, **options), backend)


def _probed(q: Array, k: Array, statistics: Sequence[Statistic], o: Options, backend: str) -> Seen:
    """What the statistics find without values."""
    door = door_of(q)
    if door is not None:
        q, k = door.entering(q, k)
    call = folded(q, k, NO_VALUES, o, taps=taps_of(statistics), backend=backend)
    seen = _seen(q, call, statistics)
    if door is None or not door.wants_gradient(q, k, o):
        return seen
    filled = Filled(call.problem, call.operands)
    return Seen(**door.differentiable(vars(seen), statistics, filled, call.squeeze, q, k, o))


def _seen(q: Array, call: Call, statistics: Sequence[Statistic]) -> Seen:
    """What the statistics found, in the kind of q."""
    found = results(statistics, Filled(call.problem, call.operands), call.squeeze)
    return Seen(**{name: _left(q, x) for name, x in found.items()})


def _left(q: Array, x: Any) -> Any:
    if isinstance(x, TopK):
        return TopK(*(leave(q, part) for part in x))
    if isinstance(x, Regions):
        return Regions(**{name: leave(q, part) for name, part in vars(x).items()})
    return leave(q, x) if isinstance(x, np.ndarray) else x


def attention_grad(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array | None = None,
    mask: Mask | Array | None = None,
    *,
    backend: str = "auto",
    **options: Any,
) -> Grads:
    """Gradients of a scalar through `attention`, for arrays without autograd.

    Args:
        q, k, v: as given to `attention`, with the same mask and score options.
        out, lse: what it returned.
        dout: gradient of the scalar with respect to out; `dlse`: with respect to lse, if it depends on that.

    Returns:
        ``Grads(dq, dk, dv, dbias, dsinks)``, each in the shape and type of what it belongs to (dbias summed over the
        dimensions the bias does not have), None where there was no bias or no sinks. Rows without keys contribute
        nothing, even where their q or dout is NaN. O(n) memory: the weights are rebuilt tile by tile.

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 50, 16))
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> attention_grad(q, k, v, out, lse, np.ones_like(out), causal=True).dq.shape
    (2, 50, 16)
    """
    refuse_unknown(options, known=Options.__dataclass_fields__)
    door = door_of(q)
    if door is not None and mask is None and dlse is None and backend == "auto":
        known = door.known_gradients(q, k, v, out, lse, dout, **options)
        if known is not None:
            return Grads(*known)
    grads = differentiated(q, k, v, out, lse, dout, dlse, Options(mask=mask, **options), backend=backend)
    return Grads._make(None if g is None else leave(q, g) for g in grads)


def merge(*parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """Join the attention of the same queries over disjoint sets of keys: ``(out, lse)`` of each part, to those of all.

    This is what makes split keys, shared prefixes and rings exact. Shapes ``(..., Sq, Dv)`` and ``(..., Sq)``; parts in
    any order, an empty part (0, -inf) is neutral. The state is kept in float32 or wider. On tensors it differentiates.

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 40, 16))
    >>> halves = [attention(q, k[s], v[s], return_lse=True) for s in (slice(0, 9), slice(9, 40))]
    >>> bool(np.allclose(merge(*halves)[0], attention(q, k, v)))
    True
    """
    if not parts:
        raise TypeError("merge: give at least one (out, lse)")
    for n, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise TypeError(f"merge: part {n} must be (out, lse), got {type(part).__name__}")
    if all(door_of(x) is not None for part in parts for x in part):
        _check_parts(parts)
        return door_of(parts[0][0]).merge(parts)  # type: ignore[no-any-return, union-attr]
    arrays = [
        (enter_floats(f"merge: out of part {n}", out), enter_floats(f"merge: lse of part {n}", lse))
        for n, (out, lse) in enumerate(parts)
    ]
    _check_parts(arrays)
    total: OnlineStats | None = None
    with np.errstate(all="ignore"):
        for out, lse in arrays:
            wide = lse.dtype if lse.dtype == np.float64 else np.dtype(np.float32)
            wide = out.dtype if out.dtype == np.float64 else wide
            state = OnlineStats.closed(out.astype(wide), lse.astype(wide))
            total = state if total is None else total.merge(state)
        assert total is not None
        merged, lse = total.finalize()
    like = arrays[0][0]
    result = empty_like(like, like.shape, like.dtype)
    result[...] = merged
    return leave(parts[0][0], result), leave(parts[0][1], lse)


def _check_parts(parts: Sequence[tuple[Array, Array]]) -> None:
    like = parts[0][0]
    for n, (out, lse) in enumerate(parts):
        shape, dtype = tuple(out.shape), str(out.dtype).removeprefix("torch.")
        if len(shape) < 2:
            raise ValueError(f"merge: out of part {n} must have shape (..., length, dim), got {shape}")
        if tuple(lse.shape) != shape[:-1]:
            raise ValueError(
                f"merge: part {n} has out {shape} and lse {tuple(lse.shape)}; lse must be {shape[:-1]}"
            )
        if out.shape != like.shape or out.dtype != like.dtype:
            first = f"{str(like.dtype).removeprefix('torch.')} {tuple(like.shape)}"
            raise ValueError(f"merge: part {n} is {dtype} {shape}, the first is {first}")


class Explanation(SimpleNamespace):
    """What a call would do. Attributes: `problem`, `plan`, `refusals`, `cells`, `flops`, `bytes` (of inputs and output)
    and of these `kv_bytes`, `exact`, `shared` (keys that a cascade reads once for all sequences), `batches` (how many
    calls packed queries over a cache become, else 1; `problem` and `plan` are of the one with most queries)."""

    problem: Problem
    plan: Plan
    refusals: tuple[tuple[str, str], ...]
    cells: int
    flops: int
    bytes: int
    kv_bytes: int
    exact: bool
    shared: int
    batches: int

    def __str__(self) -> str:
        p, plan = self.problem, self.plan
        most = "" if self.exact else "at most "
        matrix = max(p.score_bytes, 1)
        tile = f"{plan.block_q} query rows x {plan.block_k} keys"
        tile += f" x {p.group} heads of a group" if p.group > 1 else ""
        lines = [
            f"{p}",
            f"backend     {plan.backend} ({plan.isa}): {plan.note}",
            *(f"passed over {name}: {why}" for name, why in self.refusals),
            f"tile        {tile}",
            f"work        {most}{self.cells:,} visible cells, {self.flops / 1e9:,.2f} GFLOP",
            f"workspace   {size(plan.workspace_bytes)}; the score matrix would take {size(p.score_bytes)} "
            f"({matrix / max(plan.workspace_bytes, 1):,.0f} x)",
            f"traffic     inputs and output are {size(self.bytes)}, keys and values "
            f"{size(self.kv_bytes)} of {p.kv_dtype}" + (" and scales" if p.kv_dtype in CODES else ""),
        ]
        if self.shared:
            lines.append(f"cascade     the first {self.shared} keys are folded once for {p.batch} sequences")
        if self.batches > 1:
            lines.append(
                f"packed      {self.batches} calls, each for all sequences with equally many queries; the one with most"
                " is shown, the work and the traffic are of all"
            )
        return "\n".join(lines)

    __repr__ = __str__


def size(n: float) -> str:
    """Bytes in words, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    raise AssertionError


def explain(
    q: Array, k: Array, v: Array = None, mask: Mask | Array | None = None, *, return_lse: bool = False,
    backend: str = "auto", plan: Plan | None = None, **options: Any,
) -> Explanation:  # fmt: skip
    """What `attention` with these arguments would do, and why; nothing runs. Prints as prose.

    ``.plan`` can be passed back as ``plan=``; ``.refusals`` are the backends passed over, each with its reason;
    ``.flops`` counts the visible cells only (``.exact`` is False where only a mask's evaluation could tell).

    >>> q = np.zeros((8, 4096, 64), np.float32)
    >>> explain(q, q, q, causal=True).flops
    17184063488
    """
    refuse_unknown(options, known=Options.__dataclass_fields__)
    want = Want.LSE if flag("return_lse", return_lse) else Want(0)
    call = understand(q, k, v, Options(mask=mask, **options), want=want, backend=backend, plan=plan)
    p, x = call.problem, call.operands
    if p.has & Has.LENGTHS or p.band.offset is None:
        cells = sum(visible_in_band(p.band, f.q_len, f.kv_len) for f in frames(p, x)) * p.heads
    else:
        cells = visible_in_band(p.band, p.q_len, p.kv_len) * p.batch * p.heads
    out_bytes = x.q.size // max(p.dim, 1) * p.v_dim * x.q.itemsize
    kv_bytes = _kv_bytes(p, x)
    return Explanation(
        problem=p,
        plan=call.plan,
        refusals=call.refusals,
        cells=cells,
        flops=2 * cells * (p.dim + p.v_dim),
        bytes=x.q.nbytes + kv_bytes + out_bytes,
        kv_bytes=kv_bytes,
        exact=x.mask is None and x.bias is None,
        shared=call.shared * x.k.shape[-2],
        batches=max(len(call.parts), 1),
    )


def _kv_bytes(p: Problem, x: Operands) -> int:
    """Of keys and values, scales included. Pages hold more than the sequences of a call: only their rows count."""
    arrays = [a for a in (x.k, x.v, x.k_scale, x.v_scale) if a is not None]
    if x.table is None or x.kv_ends is None:
        return sum(a.nbytes for a in arrays)
    rows, pages = (int(n.sum()) for n in (x.kv_ends, -(-x.kv_ends // x.k.shape[-2])))
    read = sum((rows if a.strides[-2] else pages) * a.shape[-1] * a.itemsize for a in arrays)
    return int(p.kv_heads * read)
