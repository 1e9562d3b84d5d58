"""flash-attn 2's functions mean what the original's mean: every option, layout and type against loops in float64.

`flash_oracle` has the loops. What the original's kernels do besides its documents is stated here too: the lse of rows
without keys (+inf), the lse under causal ALiBi, an lse without a gradient.
"""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from flash_oracle import Arithmetic, by_position, near, sequence, signed, slanted  # noqa: E402

from tilefold.drop_in import flash_attn as fa  # noqa: E402

INF = float("inf")
TYPES = {x: getattr(torch, x) for x in ("float16", "bfloat16", "float32", "float64")}
int32 = torch.int32


def tensors(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def qkv(batch=2, q_len=7, kv_len=9, heads=4, kv_heads=2, dim=16, v_dim=None, dtype=torch.float32, seed=0):
    kv = (batch, kv_len, kv_heads)
    shapes = (batch, q_len, heads, dim), (*kv, dim), (*kv, dim if v_dim is None else v_dim)
    return tensors(*shapes, dtype=dtype, seed=seed)


def rules(a: Arithmetic, q_len, k_len, o, item=0, longest=None):
    """The oracle's arguments for flash-attn 2's options `o`, of item `item` of the batch."""
    left, right = signed(o.get("causal", False), o.get("window_size", (-1, -1)))
    wide = left is None or left >= (k_len if longest is None else longest)
    added = None
    if o.get("alibi_slopes") is not None:
        slopes = a.array(o["alibi_slopes"])
        slopes = slopes if slopes.ndim == 1 else slopes[item]
        added = slanted(slopes, q_len, k_len, causal=wide and right == 0)
    return {
        "sees": by_position(q_len, k_len, left, right),
        "scale": o.get("softmax_scale"),
        "softcap": o.get("softcap", 0.0),
        "added": added,
        "empty": INF,
    }


def in_batch(o, q, k, v, dout=None):
    """What a batch should give, as a function of arithmetic."""

    def expected(a: Arithmetic):
        given = [a.array(x) for x in (q, k, v)]
        more = {} if dout is None else {"dout": a.array(dout)}
        if a.saved and dout is not None:
            more |= {name: a.array(a.saved[name]) for name in ("out", "lse")}
        parts = [
            sequence(
                a, *(x[b] for x in given), **rules(a, q.shape[1], k.shape[1], o, b),
                **{name: x[b] for name, x in more.items()},
            )
            for b in range(len(q))
        ]  # fmt: skip
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    return expected


def checked(o, q, k, v, grad=True):
    """`flash_attn_func` and its gradients against the oracle."""
    if not grad:
        out, lse, _ = fa.flash_attn_func(q, k, v, **o, return_attn_probs=True)
        return near({"out": out, "lse": lse}, in_batch(o, q, k, v), q.dtype)
    (dout,) = tensors((*q.shape[:3], v.shape[3]), dtype=q.dtype, seed=9)
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k, v)]
    out, lse, empty = fa.flash_attn_func(*leaves, **o, return_attn_probs=True)
    assert (tuple(empty.shape), empty.dtype) == ((0,), q.dtype)
    out.backward(dout)
    dq, dk, dv = (x.grad for x in leaves)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return near(got, in_batch(o, q, k, v, dout), q.dtype)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
BY_ITEM = torch.stack([SLOPES, SLOPES.flip(0)])

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "scale 0": {"softmax_scale": 0.0},
    "scale < 0": {"softmax_scale": -0.2, "causal": True},
    "itself": {"window_size": (0, 0)},
    "(-1, 0) is causal": {"window_size": (-1, 0)},
    "to the right": {"window_size": (-1, 2)},
    "to the left": {"window_size": (2, -1)},
    "both": {"window_size": (2, 1)},
    "causal and window": {"window_size": (3, 5), "causal": True},
    "wider than all": {"window_size": (100, 100)},
    "any negative": {"window_size": (-7, 0)},
    "softcap": {"softcap": 1.5, "causal": True},
    "softcap off": {"softcap": -1.0},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi, causal": {"alibi_slopes": SLOPES, "causal": True},
    "alibi, causal by window": {"alibi_slopes": SLOPES, "window_size": (50, 0)},
    "alibi, window of all keys": {"alibi_slopes": SLOPES, "window_size": (9, 0)},
    "alibi, window of all but one": {"alibi_slopes": SLOPES, "window_size": (8, 0)},
    "alibi, window": {"alibi_slopes": SLOPES, "window_size": (3, 0)},
    "alibi by item": {"alibi_slopes": BY_ITEM},
    "alibi by item, causal, softcap": {"alibi_slopes": BY_ITEM, "causal": True, "softcap": 2.0},
    "deterministic": {"deterministic": True, "causal": True},
}
LENGTHS = [(7, 9), (9, 7), (1, 9), (5, 5), (3, 0), (0, 4)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("o", OPTIONS.values(), ids=OPTIONS)
def test_options(o, lengths):
    checked(o, *qkv(q_len=lengths[0], kv_len=lengths[1]))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("key", ["plain", "causal", "both", "softcap", "alibi by item, causal, softcap"])
def test_types(key, name):
    checked(OPTIONS[key], *qkv(q_len=19, kv_len=40, dim=24, dtype=TYPES[name]))
    out, lse, _ = fa.flash_attn_func(*qkv(dtype=TYPES[name]), return_attn_probs=True)
    assert out.dtype == TYPES[name]
    assert lse.dtype == (torch.float64 if name == "float64" else torch.float32)


@pytest.mark.parametrize("dim", [1, 7, 30, 80, 129, 256, 300])
def test_head_sizes(dim):
    """Not a multiple of 8 too: the scale is that of the size itself."""
    checked({"causal": True}, *qkv(dim=dim, q_len=3, kv_len=5))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (6, 3), (6, 6), (8, 1)])
def test_groups_of_heads(heads, kv_heads):
    checked({"causal": True}, *qkv(heads=heads, kv_heads=kv_heads))


def test_values_of_another_size():
    checked({"causal": True}, *qkv(dim=16, v_dim=5))


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches(batch):
    q, k, v = qkv(batch=batch)
    if batch:
        return checked({}, q, k, v)
    out, lse, _ = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (tuple(out.shape), tuple(lse.shape)) == ((0, 7, 4, 16), (0, 4, 7))
    return None


def test_rows_without_keys():
    q, k, v = qkv(q_len=9, kv_len=4)
    out, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    assert bool((lse[..., :5] == INF).all())
    assert bool(lse[..., 5:].isfinite().all())


def test_nan_that_nobody_sees():
    q, k, v = qkv(q_len=4, kv_len=9)
    expected = fa.flash_attn_func(q, k, v, window_size=(1, 0))
    k[:, :4], v[:, :4] = float("nan"), INF
    assert torch.equal(fa.flash_attn_func(q, k, v, window_size=(1, 0)), expected)


ORDERS = {
    "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dim strided": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "rows strided": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "one of many": lambda x: torch.stack([x] * 3, 2)[:, :, 1],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_memory_orders(order):
    q, k, v = qkv()
    expected = fa.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(fa.flash_attn_func(*(order(x) for x in (q, k, v)), causal=True), expected)
    checked({"causal": True}, *(order(x) for x in (q, k, v)))


def test_a_result_can_be_viewed_as_rows():
    q, k, v = qkv()
    assert fa.flash_attn_func(q, k, v).is_contiguous()
    packed = torch.randn(2, 7, 3, 4, 16)
    assert fa.flash_attn_qkvpacked_func(packed).view(2, 7, 64).shape == (2, 7, 64)


def test_the_lse_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv())
    out, lse, _ = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_autocast_changes_no_type():
    q, k, v = qkv()
    expected = fa.flash_attn_func(q, k, v, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fa.flash_attn_func(q, k, v, causal=True), expected)


def test_slopes_have_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv())
    slopes = SLOPES.clone().requires_grad_()
    fa.flash_attn_func(q, k, v, alibi_slopes=slopes, causal=True).sum().backward()
    assert slopes.grad is None


def test_inputs_are_not_written():
    given = qkv()
    kept = [x.clone() for x in given]
    fa.flash_attn_func(*given, causal=True)
    assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))


# ---- one tensor for several ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_qkvpacked(name):
    (qkv_, dout) = tensors((2, 9, 3, 4, 16), (2, 9, 4, 16), dtype=TYPES[name])
    o = {"causal": True, "window_size": (4, -1)}
    leaf = qkv_.clone().requires_grad_()
    out, lse, _ = fa.flash_attn_qkvpacked_func(leaf, **o, return_attn_probs=True)
    out.backward(dout)
    assert leaf.grad.shape == leaf.shape
    dq, dk, dv = leaf.grad.unbind(2)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    near(got, in_batch(o, *qkv_.unbind(2), dout), TYPES[name])


def test_kvpacked():
    q, kv, dout = tensors((2, 7, 4, 16), (2, 9, 2, 2, 16), (2, 7, 4, 16))
    o = {"causal": True, "softcap": 2.0}
    leaves = q.clone().requires_grad_(), kv.clone().requires_grad_()
    out, lse, _ = fa.flash_attn_kvpacked_func(*leaves, **o, return_attn_probs=True)
    out.backward(dout)
    dk, dv = leaves[1].grad.unbind(2)
    got = {"out": out, "lse": lse, "dq": leaves[0].grad, "dk": dk, "dv": dv}
    near(got, in_batch(o, q, *kv.unbind(2), dout), q.dtype)


# ---- packed sequences ----------------------------------------------------------------------------------------

SIZES = {
    "alike": ([4, 4], [4, 4]),
    "ragged": ([3, 1, 6], [5, 2, 3]),
    "empty queries": ([3, 0, 2], [4, 5, 6]),
    "empty keys": ([3, 2, 4], [5, 0, 6]),
    "both empty": ([0, 3, 0], [0, 5, 0]),
    "none at all": ([0, 0], [0, 0]),
}


def ends(sizes):
    return torch.tensor([0, *sizes], dtype=int32).cumsum(0, dtype=int32)


def in_rows(o, q_sizes, k_sizes, q, k, v, dout=None):
    """What packed sequences should give."""

    def expected(a: Arithmetic):
        given = {"q": a.array(q), "k": a.array(k), "v": a.array(v)}
        if dout is not None:
            given["dout"] = a.array(dout)
            if a.saved:
                given |= {name: a.array(a.saved[name]) for name in ("out", "lse")}
        rows = {"out": q, "dq": q, "dk": k, "dv": v}
        r = {x: np.zeros((len(like), *like.shape[1:-1], v.shape[-1] if x in ("out", "dv") else q.shape[-1]), a.dtype)
             for x, like in rows.items() if dout is not None or x == "out"}  # fmt: skip
        r["lse"] = np.full((q.shape[1], len(q)), INF, a.dtype)
        q0 = k0 = 0
        for b, (n, m) in enumerate(zip(q_sizes, k_sizes, strict=True)):
            mine = {x: y[k0 : k0 + m] if x in ("k", "v") else y[q0 : q0 + n] for x, y in given.items()}
            if "lse" in given:
                mine["lse"] = given["lse"][:, q0 : q0 + n]
            part = sequence(a, **mine, **rules(a, n, m, o, b, max(k_sizes)))
            for x, y in part.items():
                at = slice(k0, k0 + m) if x in ("dk", "dv") else slice(q0, q0 + n)
                r[x][(slice(None), at) if x == "lse" else at] = y
            q0, k0 = q0 + n, k0 + m
        return r

    return expected


def packed_operands(q_sizes, k_sizes, dtype=torch.float32, spare=0):
    q, dout = tensors((sum(q_sizes) + spare, 4, 16), (sum(q_sizes) + spare, 4, 16), dtype=dtype)
    k, v = tensors((sum(k_sizes) + spare, 2, 16), (sum(k_sizes) + spare, 2, 16), dtype=dtype, seed=1)
    return q, k, v, dout


VARLEN = [
    "plain",
    "causal",
    "both",
    "softcap",
    "alibi, causal",
    "alibi, window",
    "alibi by item, causal, softcap",
]


@pytest.mark.parametrize("key", VARLEN)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_varlen(sizes, key):
    checked_rows(sizes, key, torch.float32)


def checked_rows(sizes, key, dtype):
    """`flash_attn_varlen_func` and its gradients against the oracle."""
    o = dict(OPTIONS[key])
    if "by item" in key:
        o["alibi_slopes"] = SLOPES * torch.rand(len(sizes[0]), 4, generator=torch.Generator().manual_seed(1))
    q, k, v, dout = packed_operands(*sizes, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    most = [max(x) for x in sizes]
    out, lse, _ = fa.flash_attn_varlen_func(
        *leaves, ends(sizes[0]), ends(sizes[1]), *most, **o, return_attn_probs=True
    )
    out.backward(dout)
    dq, dk, dv = (x.grad for x in leaves)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    near(got, in_rows(o, *sizes, q, k, v, dout), dtype)


@pytest.mark.parametrize("name", TYPES)
def test_varlen_types(name):
    checked_rows(([20, 0, 13], [33, 4, 13]), "causal", TYPES[name])


def test_varlen_packed_tensors():
    sizes, o = [3, 0, 6], {"causal": True}
    q, k, v, dout = packed_operands(sizes, sizes)
    q = q[:, :2].contiguous()
    dout = dout[:, :2].contiguous()
    leaf = torch.stack([q, k, v], 1).requires_grad_()
    out, lse, _ = fa.flash_attn_varlen_qkvpacked_func(leaf, ends(sizes), 6, **o, return_attn_probs=True)
    out.backward(dout)
    dq, dk, dv = leaf.grad.unbind(1)
    expected = in_rows(o, sizes, sizes, q, k, v, dout)
    near({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}, expected, q.dtype)
    kv = torch.stack([k, v], 1).requires_grad_()
    args = (ends(sizes), ends(sizes), 6, 6)
    again = fa.flash_attn_varlen_kvpacked_func(q, kv, *args, **o)
    again.backward(dout)
    assert torch.equal(again, out)
    assert torch.equal(kv.grad, leaf.grad[:, 1:])


def test_rows_after_the_last_sequence_are_ignored():
    sizes = ([3, 4], [5, 2])
    q, k, v, _ = packed_operands(*sizes, spare=3)
    for x in (q, k, v):
        x[-3:] = float("nan")
    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, v, ends(sizes[0]), ends(sizes[1]), 4, 5, return_attn_probs=True
    )
    alone = fa.flash_attn_varlen_func(q[:7], k[:7], v[:7], ends(sizes[0]), ends(sizes[1]), 4, 5)
    assert torch.equal(out[:7], alone)
    assert torch.equal(out[7:], torch.zeros_like(out[7:]))
    assert bool((lse[:, 7:] == INF).all())


def paged(rows, sizes, page_len, seed=3):
    """Packed rows laid out in pages in a random order, NaN wherever no row is; with their table."""
    counts = [-(-n // page_len) for n in sizes]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    pages = [torch.full((len(order), page_len, *x.shape[1:]), float("nan"), dtype=x.dtype) for x in rows]
    table = torch.full((len(sizes), max([*counts, 1])), 10**6, dtype=int32)
    at = 0
    for b, (n, count) in enumerate(zip(sizes, counts, strict=True)):
        for p in range(count):
            page = table[b, p] = order.pop()
            some = slice(at + p * page_len, at + min(n, (p + 1) * page_len))
            for x, there in zip(rows, pages, strict=True):
                there[page, : some.stop - some.start] = x[some]
        at += n
    return (*pages, table)


@pytest.mark.parametrize("page_len", [1, 3, 256])
@pytest.mark.parametrize("key", ["causal", "alibi by item, causal, softcap"])
def test_block_table(key, page_len):
    """Entries that no length reaches are 10**6, pages beyond the lengths NaN."""
    sizes, o = ([3, 1, 6], [5, 0, 7]), dict(OPTIONS[key])
    if "by item" in key:
        o["alibi_slopes"] = torch.stack([SLOPES, SLOPES.flip(0), SLOPES / 2])
    q, k, v, _ = packed_operands(*sizes)
    *pages, table = paged((k, v), sizes[1], page_len)
    out, lse, _ = fa.flash_attn_varlen_func(
        q, *pages, ends(sizes[0]), ends(sizes[1]), 6, 7, **o, block_table=table, return_attn_probs=True
    )
    near({"out": out, "lse": lse}, in_rows(o, *sizes, q, k, v), q.dtype)


def test_gradients_through_pages():
    sizes = ([3, 1], [5, 4])
    q, k, v, dout = packed_operands(*sizes)
    k_pages, v_pages, table = paged((k, v), sizes[1], 2)
    leaves = [x.requires_grad_() for x in (k_pages, v_pages)]
    args = (ends(sizes[0]), ends(sizes[1]), 3, 5)
    fa.flash_attn_varlen_func(q, *leaves, *args, causal=True, block_table=table).backward(dout)
    plain = [x.clone().requires_grad_() for x in (k, v)]
    fa.flash_attn_varlen_func(q, *plain, *args, causal=True).backward(dout)
    for page, row in zip(leaves, plain, strict=True):
        where = torch.cat(
            [table[0, :3].repeat_interleave(2)[:5], table[1, :2].repeat_interleave(2)[:4]]
        ).long()
        place = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0, 1])
        assert torch.equal(page.grad[where, place], row.grad)
        assert float(page.grad.abs().sum()) == pytest.approx(float(row.grad.abs().sum()))


@settings(max_examples=60)
@given(
    q_len=st.integers(0, 5),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    key=st.sampled_from(["plain", "causal", "both", "softcap", "alibi, causal", "alibi, window"]),
    name=st.sampled_from(list(TYPES)),
    page_len=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 99),
)
def test_same_bits_however_sequences_lie(q_len, sizes, key, name, page_len, seed):
    """Each alone, packed, in pages, in a cache, in a cache of pages, in a cache picked by index: the same bits."""
    o, batch = OPTIONS[key], len(sizes)
    q, k, v = qkv(batch, q_len, max(sizes), dtype=TYPES[name], seed=seed)
    alone = torch.cat(
        [
            fa.flash_attn_func(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], **o)
            for b, n in enumerate(sizes)
        ]
    )
    rows = [torch.cat([x[b, :n] for b, n in enumerate(sizes)]) for x in (k, v)]
    cu = ends([q_len] * batch), ends(sizes), q_len, max(sizes)
    flat = q.flatten(0, 1)
    assert torch.equal(fa.flash_attn_varlen_func(flat, *rows, *cu, **o), alone.flatten(0, 1))
    *pages, table = paged(rows, sizes, page_len)
    in_pages = fa.flash_attn_varlen_func(flat, *pages, *cu, **o, block_table=table)
    assert torch.equal(in_pages, alone.flatten(0, 1))
    lengths = torch.tensor(sizes, dtype=int32)
    more = {"cache_seqlens": lengths, **o}
    more.pop("deterministic", None)
    assert torch.equal(fa.flash_attn_with_kvcache(q, k, v, **more), alone)
    assert torch.equal(fa.flash_attn_with_kvcache(q, *pages, **more, block_table=table), alone)
    turn = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    picked = fa.flash_attn_with_kvcache(q, k[turn], v[turn], **more, cache_batch_idx=turn.argsort().to(int32))
    assert torch.equal(picked, alone)


# ---- compiled, transformed -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_whole():
    """One graph, same bits, forward and backward; packed and padded sequences too."""
    from tilefold.drop_in.flash_attn import fa3, fa4

    q, k, v = qkv()
    lengths = torch.tensor([3, 9], dtype=int32)
    args = (ends([3, 0, 4]), ends([5, 0, 4]), 4, 5)

    def both(q, k, v, q_ends, k_ends):
        out = fa.flash_attn_func(q, k, v, causal=True, window_size=(4, -1))
        rows = fa.flash_attn_varlen_func(q[0], k[0], v[0], q_ends, k_ends, *args[2:], causal=True)
        _, lse = fa4.flash_attn_func(q, k, v, window_size=(3, -1), learnable_sink=SLOPES, return_lse=True)
        padded = fa3.flash_attn_varlen_func(q, k, v, None, None, 7, 9, None, lengths, attention_chunk=4)
        return out, rows, lse, padded

    leaves = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    results = (
        both(*leaves[0], *args[:2]),
        torch.compile(both, fullgraph=True, backend="aot_eager")(*leaves[1], *args[:2]),
    )
    for some in results:
        sum(x.sum() for x in some).backward()
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(*leaves, strict=True):
        assert torch.equal(x.grad, y.grad)


# ---- wrong use -----------------------------------------------------------------------------------------------


def wrong(says, *args, error=ValueError, call=fa.flash_attn_func, **options):
    with pytest.raises(error, match=says):
        call(*args, **options)


def test_wrong_tensors():
    q, k, v = qkv()
    wrong("dropout_p must be 0, got 0.1: dropout is not offered", q, k, v, 0.1)
    wrong("q must be a torch.Tensor, got ndarray", q.numpy(), k, v, error=TypeError)
    wrong("v must be a torch.Tensor, got list", q, k, [1.0], error=TypeError)
    wrong("q and k must have one dtype, got torch.float32 and torch.float16", q, k.half(), v, error=TypeError)
    wrong("q must be float16, bfloat16, float32 or float64, got torch.int64", q.long(), k, v, error=TypeError)
    eight = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    wrong("q must be .*got torch.float8_e4m3fn; 8-bit floats", *eight, error=TypeError)
    wrong(r"k is on meta, and this is flash-attn's interface for the CPU: pass k.cpu\(\)", q, k.to("meta"), v)
    wrong(r"q must have shape \(batch, q_len, heads, dim\), got \(7, 4, 16\)", q[0], k, v)
    wrong(r"k must have shape \(2, kv_len, kv_heads, 16\), got \(1, 9, 2, 16\)", q, k[:1], v)
    wrong("k and v must differ in their head size only", q, k, v[:, :8])
    wrong("the heads of q must be a multiple of those of k and v, got 3 and 2", q[:, :, :3], k, v)


def test_wrong_options():
    q, k, v = qkv()
    wrong(
        "window_size must be .* an integer, -1 for infinite; got 3", q, k, v, window_size=3, error=TypeError
    )
    wrong("window_size must be .*None", q, k, v, window_size=(None, None), error=TypeError)
    wrong(r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)", q, k, v, alibi_slopes=SLOPES[:3])
    wrong(
        "alibi_slopes must be float32, got torch.int64", q, k, v, alibi_slopes=SLOPES.long(), error=TypeError
    )
    wrong("scale must be finite", q, k, v, softmax_scale=INF)
    wrong(r"qkv must have shape \(batch, length, 3,", q, call=fa.flash_attn_qkvpacked_func)
    wrong(r"kv must have shape \(batch, kv_len, 2,", q, k, call=fa.flash_attn_kvpacked_func)


def test_wrong_packing():
    q, k, v, _ = packed_operands([3, 4], [5, 2])

    def call(q_ends, k_ends, *most, **options):
        return fa.flash_attn_varlen_func(q, k, v, q_ends, k_ends, *(most or (4, 5)), **options)

    right = ends([3, 4]), ends([5, 2])
    cu = torch.tensor
    wrong("cu_seqlens_q must start at 0, got 1", cu([1, 7]), right[1][:2], call=call)
    wrong(r"cu_seqlens_q must not decrease, got \[0, 5, 3\]", cu([0, 5, 3]), right[1], call=call)
    wrong("cu_seqlens_k must not go beyond the 7 packed rows, got 8", right[0], cu([0, 5, 8]), call=call)
    wrong(r"cu_seqlens_k must have shape \(3,\), got \(2,\)", right[0], cu([0, 7]), call=call)
    wrong("cu_seqlens_q must be int32", right[0].float(), right[1], call=call, error=TypeError)
    wrong("cu_seqlens_q must be a torch.Tensor, got list", [0, 7], right[1], call=call, error=TypeError)
    wrong("cu_seqlens_q must hold at least the 0", cu([], dtype=int32), right[1], call=call)
    wrong("max_seqlen_q must be at least 4, the longest sequence; got 3", *right, 3, 5, call=call)
    wrong("max_seqlen_k must be at least 5, the longest sequence; got 2", *right, 4, 2, call=call)
    wrong(
        r"alibi_slopes must have shape \(4,\) or \(2, 4\)", *right, alibi_slopes=torch.ones(3, 4), call=call
    )


def test_only_private_copies_of_indices_are_used(monkeypatch):
    """A caller who overwrites them during a call changes nothing."""
    from tilefold.drop_in.flash_attn import calls

    q, k, v, _ = packed_operands([3, 4], [5, 2])
    *pages, table = paged((k, v), [5, 2], 2)
    indices = [ends([3, 4]).long(), ends([5, 2]).long(), table.long()]

    def call():
        return fa.flash_attn_varlen_func(q, *pages, *indices[:2], 4, 5, block_table=indices[2])

    expected, attention = call(), calls.attention

    def meanwhile(*args, **options):
        for x in indices:
            x.fill_(10**9)
        return attention(*args, **options)

    monkeypatch.setattr(calls, "attention", meanwhile)
    assert torch.equal(call(), expected)


def test_wrong_block_tables():
    q, k, v, _ = packed_operands([3, 4], [5, 2])
    k_pages, v_pages, table = paged((k, v), [5, 2], 2)

    def call(table, *k_sizes):
        k_ends = ends(k_sizes or [5, 2])
        return fa.flash_attn_varlen_func(q, k_pages, v_pages, ends([3, 4]), k_ends, 4, 9, block_table=table)

    call(table)
    for entry in (-1, len(k_pages), 2**31 - 1):
        bad = table.clone()
        bad[0, 1] = entry
        says = f"block_table's entries in use must lie within 0 and {len(k_pages) - 1}, got {entry}"
        wrong(says, bad, call=call)
    wrong("block_table must be int32", table.float(), call=call, error=TypeError)
    wrong("block_table must be a torch.Tensor, got list", [[0]], call=call, error=TypeError)
    wrong(r"block_table must have shape .* got \(\)", torch.tensor(0), call=call)
    wrong(r"block_table must have shape \(2, pages per sequence\)", table[:1], call=call)
    wrong("block_table has room for 3 pages of 2 rows a sequence", table, 7, 2, call=call)


# ---- the signatures ------------------------------------------------------------------------------------------

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {CU}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {CU}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, "
    "num_splits=0, return_softmax_lse=False",
    "unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "pad_input": "hidden_states, indices, batch, seqlen",
    "index_first_axis": "input, indices",
    "index_put_first_axis": "values, indices, first_axis_dim",
}


def plainly(function):
    """A signature without its annotations."""
    s = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in s.parameters.values()]
    return str(s.replace(parameters=plain, return_annotation=s.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert plainly(getattr(fa, name)) == f"({SIGNATURES[name]})"
