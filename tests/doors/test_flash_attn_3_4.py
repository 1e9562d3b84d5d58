"""flash-attn 3's and 4's functions mean what the originals' mean, against the loops of `flash_oracle`.

Where they differ from version 2: the lse of a row without keys, windows (None and -1), rows that sequences leave
unused, sinks, an lse with a gradient in 4, chunks in 3, and what they return.
"""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from flash_oracle import by_position, near, sequence, signed  # noqa: E402

import tilefold as tf  # noqa: E402
from tilefold.drop_in.flash_attn import fa3, fa4  # noqa: E402

INF, NAN = float("inf"), float("nan")
TYPES = {x: getattr(torch, x) for x in ("float16", "bfloat16", "float32", "float64")}
HEADS, KV_HEADS, DIM = 4, 2, 16


def tensors(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def qkv(q_len=7, kv_len=9, batch=2, dtype=torch.float32):
    kv = (batch, kv_len, KV_HEADS, DIM)
    return tensors((batch, q_len, HEADS, DIM), kv, kv, dtype=dtype)


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def ends(sizes):
    return ints(0, *sizes).cumsum(0, dtype=torch.int32)


def rules3(a, q_len, k_len, o):
    left, right = signed(o.get("causal", False), o.get("window_size", (-1, -1)))
    sees = by_position(q_len, k_len, left, right, o.get("attention_chunk", 0))
    return {"sees": sees, "scale": o.get("softmax_scale"), "softcap": o.get("softcap", 0.0)}


def rules4(a, q_len, k_len, o):
    """Version 4's own words: causal sets the right limit; a pair with a negative sum is no window; None is infinite."""
    left, right = o.get("window_size", (None, None))
    causal = o.get("causal", False)
    if causal:
        right = 0
    if left is not None and right is not None and left + right < 0:
        left, right = None, 0 if causal else None
    sink = o.get("learnable_sink")
    more = {} if sink is None else {"sink": a.array(sink)}
    sees = by_position(q_len, k_len, left, right)
    return {"sees": sees, "scale": o.get("softmax_scale"), "softcap": o.get("softcap", 0.0), **more}


def batch_of(rules, o, q, k, v, dout=None, dlse=None):
    """What a batch should give."""

    def expected(a):
        given = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}
        given = {name: a.array(x) for name, x in given.items() if x is not None}
        if a.saved and dout is not None:
            given |= {name: a.array(a.saved[name]) for name in ("out", "lse")}
        parts = [
            sequence(a, **{n: x[b] for n, x in given.items()}, **rules(a, q.shape[1], k.shape[1], o))
            for b in range(len(q))
        ]
        whole = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        if "dsink" in whole:
            whole["dsink"] = whole["dsink"].sum(0)
        return whole

    return expected


LENGTHS = [(7, 9), (9, 7), (1, 9), (3, 0), (0, 4)]
THREE = {
    "plain": {},
    "causal": {"causal": True, "num_splits": 4, "pack_gqa": True, "sm_margin": 1},
    "scale": {"softmax_scale": -0.2},
    "itself": {"window_size": (0, 0)},
    "(-1, 0) is causal": {"window_size": (-1, 0)},
    "both": {"window_size": (2, 1)},
    "causal and window": {"window_size": (3, 5), "causal": True},
    "wider than all": {"window_size": (100, 100)},
    "softcap": {"softcap": 1.5, "causal": True, "deterministic": True},
    "chunks": {"attention_chunk": 3},
    "chunks, causal": {"attention_chunk": 4, "causal": True},
    "chunks, window": {"attention_chunk": 4, "window_size": (1, 1)},
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("key", THREE)
def test_version_3(key, lengths):
    checked3(key, lengths, torch.float32)


def checked3(key, lengths, dtype):
    """Version 3's `flash_attn_func` and its gradients against the oracle."""
    o = THREE[key]
    q, k, v = qkv(*lengths, dtype=dtype)
    (dout,) = tensors(q.shape, dtype=dtype, seed=9)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = fa3.flash_attn_func(*leaves, **o, return_attn_probs=True)
    assert not lse.requires_grad
    out.backward(dout)
    dq, dk, dv = (x.grad for x in leaves)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    near(got, batch_of(rules3, o, q, k, v, dout), dtype)
    assert torch.equal(fa3.flash_attn_func(q, k, v, **o), out)


@pytest.mark.parametrize("name", TYPES)
def test_types_of_version_3(name):
    checked3("causal", (20, 33), TYPES[name])


@pytest.mark.parametrize("form", ["three", "heads"])
def test_qkvpacked(form):
    """Both forms: (..., 3, heads, dim), and all heads in one axis with fewer of keys than of queries."""
    kv_heads = HEADS if form == "three" else KV_HEADS
    q, k, v, dout = tensors(
        (2, 9, HEADS, DIM), (2, 9, kv_heads, DIM), (2, 9, kv_heads, DIM), (2, 9, HEADS, DIM)
    )
    leaf = (torch.stack([q, k, v], 2) if form == "three" else torch.cat([q, k, v], 2)).requires_grad_()
    more = {} if form == "three" else {"num_heads_q": HEADS}
    out, lse = fa3.flash_attn_qkvpacked_func(leaf, causal=True, **more, return_attn_probs=True)
    out.backward(dout)
    assert leaf.grad.shape == leaf.shape
    dq, dk, dv = leaf.grad.unbind(2) if form == "three" else leaf.grad.split([HEADS, KV_HEADS, KV_HEADS], 2)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    near(got, batch_of(rules3, {"causal": True}, q, k, v, dout), q.dtype)


SINK = torch.tensor([0.3, -1.0, 2.0, 0.0])
FOUR = {
    "plain": {},
    "causal": {"causal": True, "num_splits": 4, "pack_gqa": False},
    "None, 0 is causal": {"window_size": (None, 0)},
    "left": {"window_size": (2, None)},
    "right": {"window_size": (None, 1)},
    "both": {"window_size": (2, 1)},
    "-1 is an offset": {"window_size": (4, -1)},
    "strictly before": {"window_size": (None, -1)},
    "negative left": {"window_size": (-1, 3)},
    "negative sum": {"window_size": (-1, -1)},
    "negative sum is not causal": {"window_size": (-1, 0)},
    "negative sum, causal": {"window_size": (-1, 3), "causal": True},
    "causal and window": {"window_size": (3, 5), "causal": True},
    "softcap": {"softcap": 1.5, "causal": True},
    "sink": {"learnable_sink": SINK},
    "sink, causal": {"learnable_sink": SINK, "causal": True, "softcap": 2.0},
    "sink, window": {"learnable_sink": SINK, "window_size": (1, 0)},
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("key", FOUR)
def test_version_4(key, lengths):
    """Gradients through out and lse both, the sink's too."""
    checked4(key, lengths, torch.float32)


def checked4(key, lengths, dtype):
    o = dict(FOUR[key])
    q, k, v = qkv(*lengths, dtype=dtype)
    dout, dlse = tensors(q.shape, (2, HEADS, lengths[0]), dtype=dtype, seed=9)
    dlse = dlse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = batch_of(rules4, dict(o), q, k, v, dout, dlse)
    if "learnable_sink" in o:
        o["learnable_sink"] = o["learnable_sink"].clone().requires_grad_()
    out, lse = fa4.flash_attn_func(*leaves, **o, return_lse=True)
    torch.autograd.backward([out, lse], [dout, dlse])
    dq, dk, dv = (x.grad for x in leaves)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if "learnable_sink" in o:
        got["dsink"] = o["learnable_sink"].grad
    near(got, expected, dtype)


@pytest.mark.parametrize("name", TYPES)
def test_types_of_version_4(name):
    checked4("sink, causal", (20, 33), TYPES[name])


def test_what_version_4_returns():
    """Always a pair; the lse is None where nobody asked and nobody will, and has a gradient only where asked for."""
    q, k, v = qkv()
    assert fa4.flash_attn_func(q, k, v)[1] is None
    asked = fa4.flash_attn_func(q, k, v, return_lse=True)[1]
    assert tuple(asked.shape) == (2, HEADS, 7)
    q.requires_grad_()
    _, lse = fa4.flash_attn_func(q, k, v)
    assert torch.equal(lse, asked)
    assert not lse.requires_grad
    assert fa4.flash_attn_func(q, k, v, return_lse=True)[1].requires_grad
    with torch.no_grad():
        assert fa4.flash_attn_func(q, k, v)[1] is None


def test_rows_without_keys():
    q, k, v = qkv(9, 4)
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    assert bool((lse[..., :5] == -INF).all())
    out, lse = fa4.flash_attn_func(q, k, v, causal=True, learnable_sink=SINK, return_lse=True)
    assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
    assert torch.equal(lse[..., :5], SINK[:, None].expand(2, HEADS, 5))


def test_results_are_contiguous_whatever_q_is():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    assert fa3.flash_attn_func(q, k, v).is_contiguous()
    assert fa4.flash_attn_func(q, k, v)[0].is_contiguous()


# ---- ragged sequences ----------------------------------------------------------------------------------------

# For each side: how long each sequence is where it lies, and how many of its rows are used.
Q_SIZES, Q_USED = [4, 1, 0, 6], [3, 1, 0, 2]
K_SIZES, K_USED = [5, 7, 3, 4], [5, 2, 0, 4]


def lie(form, side, sizes, used, width):
    """One tensor or two of sequences in the form given, NaN where no row is used, the arguments that say so, and the
    used rows of each sequence."""
    n = 1 if side == "q" else 2
    batch, most = len(sizes), max(sizes)
    where = ends(sizes).tolist()
    if form.startswith("packed"):
        used = sizes if form == "packed" else used
        whole = tensors(*[(sum(sizes) + 2, *width)] * n, seed=len(side) + n)
        index = [slice(where[b], where[b] + used[b]) for b in range(batch)]
        more = {f"cu_seqlens_{side}": ends(sizes), f"max_seqlen_{side}": most}
        if form == "packed, used":
            more[f"seqused_{side}"] = ints(*used)
    else:
        used = [most] * batch if form == "batch" else used
        whole = tensors(*[(batch, most, *width)] * n, seed=len(side) + n)
        index = [(b, slice(0, used[b])) for b in range(batch)]
        more = {} if form == "batch" else {f"seqused_{side}": ints(*used)}
    hidden = [torch.full_like(x, NAN) for x in whole]
    for x, y in zip(whole, hidden, strict=True):
        for at in index:
            y[at] = x[at]
    return hidden, more, index


FORMS = ["packed", "packed, used", "batch", "batch, used"]


def ragged_expected(rules, o, q, kv, q_at, k_at, dout=None):
    def expected(a):
        r = {"out": np.zeros(tuple(q.shape), a.dtype)}
        lse = np.full((*q.shape[:-1],), -INF, a.dtype)
        if dout is not None:
            r |= {"dq": np.zeros(tuple(q.shape), a.dtype)}
            r |= {"dk": np.zeros(tuple(kv[0].shape), a.dtype), "dv": np.zeros(tuple(kv[0].shape), a.dtype)}
        for qq, kk in zip(q_at, k_at, strict=True):
            more = {} if dout is None else {"dout": a.array(dout[qq])}
            if a.saved and dout is not None:
                whole = a.saved["lse"].transpose(-1, -2)
                more |= {"out": a.array(a.saved["out"][qq]), "lse": a.array(whole[qq]).T}
            n, m = len(q[qq]), len(kv[0][kk])
            part = sequence(a, a.array(q[qq]), *(a.array(x[kk]) for x in kv), **rules(a, n, m, o), **more)
            r["out"][qq], lse[qq] = part["out"], part["lse"].T
            if dout is not None:
                r["dq"][qq], r["dk"][kk], r["dv"][kk] = part["dq"], part["dk"], part["dv"]
        return {**r, "lse": lse.swapaxes(-1, -2)}

    return expected


@pytest.mark.parametrize("k_form", FORMS)
@pytest.mark.parametrize("q_form", FORMS)
@pytest.mark.parametrize("o", [{}, {"causal": True}, {"window_size": (2, 0)}], ids=str)
@pytest.mark.parametrize("version", [3, 4])
def test_ragged(version, o, q_form, k_form):
    """Every way to lie for queries with every way for keys; NaN in unused rows reaches nothing, gradients included."""
    (q,), q_more, q_at = lie(q_form, "q", Q_SIZES, Q_USED, (HEADS, DIM))
    kv, k_more, k_at = lie(k_form, "k", K_SIZES, K_USED, (KV_HEADS, DIM))
    given = {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None, "max_seqlen_k": None}
    (dout,) = tensors(q.shape, seed=11)
    leaves = [x.clone().requires_grad_() for x in (q, *kv)]
    call, ask = (
        (fa3.flash_attn_varlen_func, "return_attn_probs")
        if version == 3
        else (fa4.flash_attn_varlen_func, "return_lse")
    )
    out, lse = call(*leaves, **{**given, **q_more, **k_more}, **o, **{ask: True})
    out.backward(dout)
    dq, dk, dv = (x.grad for x in leaves)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    rules = rules3 if version == 3 else rules4
    near(got, ragged_expected(rules, o, q, kv, q_at, k_at, dout), q.dtype)
    for at in q_at:  # rows in use are marked; the others must be 0
        q[at] = 0
    unused = q.isnan()
    assert not out[unused].any()
    assert out.is_contiguous()


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("q_form", ["packed", "batch", "batch, used"])
def test_pages_of_version_4(q_form, used):
    page_len, sizes = 3, ([5, 0, 4, 6] if used else [6, 6, 6, 6])
    (q,), q_more, q_at = lie(q_form, "q", Q_SIZES, Q_USED, (HEADS, DIM))
    k, v = tensors(*[(4, 6, KV_HEADS, DIM)] * 2, seed=4)
    pages = [torch.full((10, page_len, KV_HEADS, DIM), NAN) for _ in "kv"]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.full((4, 2), -7, dtype=torch.int32)
    for b, n in enumerate(sizes):
        for j in range(n):
            if j % page_len == 0:
                table[b, j // page_len] = order.pop()
            for x, y in zip(pages, (k, v), strict=True):
                x[table[b, j // page_len], j % page_len] = y[b, j]
    o = {"causal": True, "learnable_sink": SINK}
    more = {"seqused_k": ints(*sizes)} if used else {}
    out, lse = fa4.flash_attn_varlen_func(
        *[q, *pages], **q_more, page_table=table, **more, **o, return_lse=True
    )
    k_at = [(b, slice(0, n)) for b, n in enumerate(sizes)]
    near({"out": out, "lse": lse}, ragged_expected(rules4, o, q, (k, v), q_at, k_at), q.dtype)
    bad = table.clone()
    bad[0, 0] = 10
    with pytest.raises(ValueError, match="page_table's entries in use must lie within 0 and 9, got 10"):
        fa4.flash_attn_varlen_func(*[q, *pages], **q_more, page_table=bad, **more)


def test_the_lse_of_ragged_sequences_has_a_gradient_in_version_4():
    q, k, v = tensors((5, HEADS, DIM), (8, KV_HEADS, DIM), (8, KV_HEADS, DIM))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    more = {"cu_seqlens_q": ends([2, 3]), "cu_seqlens_k": ends([3, 5]), "return_lse": True}
    fa4.flash_attn_varlen_func(*leaves, **more)[1].sum().backward()
    parts = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    for leaf, i, j in ((parts[0], slice(0, 2), slice(0, 3)), (parts[1], slice(2, 5), slice(3, 8))):
        alone = (x[at][None] for x, at in zip(leaf, (i, j, j), strict=True))
        fa4.flash_attn_func(*alone, return_lse=True)[1].sum().backward()
    for n in range(2):
        assert torch.equal(leaves[n].grad, parts[0][n].grad + parts[1][n].grad)


# ---- joining splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", [fa3.flash_attn_combine, fa4.flash_attn_combine], ids=["3", "4"])
def test_combine(combine):
    """Three splits of the keys, one of them empty for some rows, give the whole."""
    q, k, v = qkv(6, 12)
    whole = fa3.flash_attn_func(q, k, v, window_size=(4, 0))
    sees = by_position(6, 12, 4, 0)
    parts = []
    for at in (slice(0, 5), slice(5, 6), slice(6, 12)):
        mask = torch.from_numpy(sees[:, at])
        out, part = tf.attention(*(x.transpose(1, 2) for x in (q, k[:, at], v[:, at])), mask, return_lse=True)
        parts.append((out.transpose(1, 2), part.transpose(1, 2)))
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    assert bool((lses == -INF).any())
    got, got_lse = combine(outs, lses)

    def expected(a):
        r = batch_of(lambda a, n, m, o: {"sees": sees}, {}, q, k, v)(a)
        return {"out": r["out"], "lse": r["lse"].swapaxes(1, 2)}

    near({"out": got, "lse": got_lse}, expected, q.dtype)
    into = torch.empty_like(whole, dtype=torch.bfloat16)
    assert combine(outs, lses, into, torch.bfloat16)[0] is into
    assert torch.equal(into, got.bfloat16())
    assert combine(outs, lses, out_dtype=torch.float16)[0].dtype == torch.float16
    nothing = combine(torch.zeros(2, 1, 3, 4, 8), torch.full((2, 1, 3, 4), -INF))
    assert torch.equal(nothing[0], torch.zeros(1, 3, 4, 8))
    assert bool((nothing[1] == -INF).all())
    with pytest.raises(ValueError, match=r"lse_partial must have shape \(3, 2, 6, 4\), got \(3, 2, 6\)"):
        combine(outs, lses[..., 0])
    with pytest.raises(TypeError, match="out must be out_dtype"):
        combine(outs, lses, into, torch.float32)
    with pytest.raises(ValueError, match="out_partial must have shape"):
        combine(outs[:0], lses[:0])


def test_combine_of_version_4_takes_packed_rows():
    out, lse = tensors((2, 7, HEADS, DIM), (2, 7, HEADS))
    assert tuple(fa4.flash_attn_combine(out, lse)[0].shape) == (7, HEADS, DIM)
    assert fa4.flash_attn_combine(out, lse, return_lse=False)[1] is None


# ---- wrong use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qv", "q_descale", "k_descale", "v_descale"])
def test_options_that_version_3_has_and_we_have_not(name):
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=f"{name} must be None"):
        fa3.flash_attn_func(q, k, v, **{name: q})


ABSENT = ["qv", "gather_kv_indices", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars"]


@pytest.mark.parametrize("name", [*ABSENT, "block_sparse_tensors", "block_sparse_tensors_bwd"])
def test_options_that_version_4_has_and_we_have_not(name):
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=f"{name} must be None"):
        fa4.flash_attn_func(q, k, v, **{name: q})
    if name != "block_sparse_tensors_bwd":
        with pytest.raises(NotImplementedError, match=f"{name} must be None"):
            fa4.flash_attn_varlen_func(q, k, v, **{name: q})


def test_wrong_arguments():
    q, k, v = qkv()

    def wrong(says, call, *args, error=ValueError, **options):
        with pytest.raises(error, match=says):
            call(*args, **options)

    three, four = fa3.flash_attn_varlen_func, fa4.flash_attn_varlen_func
    wrong(
        "window_size must be .* None or an integer",
        fa4.flash_attn_func,
        q,
        k,
        v,
        window_size=2,
        error=TypeError,
    )
    wrong(r"learnable_sink must have shape \(4,\)", fa4.flash_attn_func, q, k, v, learnable_sink=SINK[:2])
    wrong("num_heads_q must say", fa3.flash_attn_qkvpacked_func, q, error=TypeError)
    wrong("num_heads_q leaves no keys", fa3.flash_attn_qkvpacked_func, q, num_heads_q=3)
    wrong(r"k must have shape \(2, kv_len", four, q, k[:1], v[:1])
    wrong(
        "page_table excludes cu_seqlens_k",
        four,
        q,
        k,
        v,
        page_table=ints(0)[None],
        cu_seqlens_k=ints(0, 1, 2),
    )
    wrong("seqused_q must lie between 0 and the lengths", four, q, k, v, seqused_q=ints(3, 8))
    wrong(r"seqused_k must have shape \(2,\)", four, q, k, v, seqused_k=ints(3))
    wrong("max_seqlen_q must be at least 7", three, q, k, v, None, None, 3, 9)
    wrong(
        "seqused_k must lie between 0 and the lengths",
        three, q[0], k[0], v[0], ends([7]), ends([9]), 7, 9, None, ints(10),
    )  # fmt: skip


# ---- the signatures ------------------------------------------------------------------------------------------

DESCALE = "q_descale=None, k_descale=None, v_descale=None"
TAIL = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
FA4_MIDDLE = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
)
SIGNATURES = [
    (
        fa3.flash_attn_func,
        f"q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALE}, window_size=(-1, -1), attention_chunk=0, "
        f"softcap=0.0, {TAIL}",
    ),
    (
        fa3.flash_attn_qkvpacked_func,
        f"qkv, softmax_scale=None, causal=False, {DESCALE}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False",
    ),
    (
        fa3.flash_attn_varlen_func,
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        f"softmax_scale=None, causal=False, qv=None, {DESCALE}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        f"{TAIL}",
    ),
    (fa3.flash_attn_combine, "out_partial, lse_partial, out=None, out_dtype=None"),
    (
        fa4.flash_attn_func,
        f"q, k, v, qv=None, gather_kv_indices=None, {FA4_MIDDLE}aux_tensors=None, aux_scalars=None, "
        "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False",
    ),
    (
        fa4.flash_attn_varlen_func,
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
        f"{FA4_MIDDLE}block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False",
    ),
    (
        fa4.flash_attn_combine,
        "out_partial, lse_partial, out=None, out_dtype=None, cu_seqlens=None, seqused=None, return_lse=True",
    ),
]


@pytest.mark.parametrize(
    ("function", "expected"), SIGNATURES, ids=[f.__module__[-3:] + f.__name__ for f, _ in SIGNATURES]
)
def test_signatures(function, expected):
    parameters = inspect.signature(function).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == expected
