"""The drop-in for torch's scaled_dot_product_attention means what torch's documentation says, by each of its three ways.

What is expected is computed in float64 by `expected`, plain steps on whole matrices that share nothing with the
library, forward and backward. How far off a result may be is computed beside it, by the rule of `budgets`. Whether
tilefold or torch computed is told by bits: the inputs are such that the two differ in some last place.
"""

import copy
import math
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
from budgets import judge, rounds_weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import (  # noqa: E402
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from tilefold.drop_in import sdpa  # noqa: E402
from tilefold.drop_in.sdpa import scaled_dot_product_attention  # noqa: E402

INF, NAN = math.inf, math.nan
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
CELLS = (2, 4, 5, 7)  # batch, heads, queries and keys of most inputs here


def tensors(*shapes, dtype=torch.float32, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes]


def qkv(dtype=torch.float32, seed=0, dim=8):
    """Query, key and value of CELLS."""
    *lead, q_len, kv_len = CELLS
    return tensors((*lead, q_len, dim), (*lead, kv_len, dim), (*lead, kv_len, dim), dtype=dtype, seed=seed)


# ---- what is expected ----------------------------------------------------------------------------------------


def expected(query, key, value, attn_mask, dout, dtype, *, is_causal=False, scale=None, enable_gqa=False,
             weights=None, saved=None):  # fmt: skip
    """(out, dq, dk, dv, dmask) in `dtype`, by the formulas; dmask is None for booleans and for no mask.

    `weights` is a type that weights are rounded to; `saved` the output that a backward pass is given.
    """
    q, k, v, dout = (x.detach().to(dtype) for x in (query, key, value, dout))
    k_many, v_many = k, v
    if enable_gqa:
        k_many, v_many = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    dim = q.shape[-1]
    factor = scale if scale is not None else 1 / math.sqrt(max(dim, 1))
    scores = q @ k_many.mT * factor
    seen = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        seen = seen.tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.detach().to(dtype)
        seen = seen & (attn_mask != -INF)
    scores = torch.where(seen, scores, -INF)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)
    e = torch.where(seen, (scores - top).exp(), 0)
    p = e / e.sum(-1, keepdim=True)
    p = torch.where(seen.any(-1, keepdim=True), p, 0)
    rounded = p if weights is None else p.to(weights).to(dtype)
    out = rounded @ v_many
    delta = (dout * (out if saved is None else saved.detach().to(dtype))).sum(-1, keepdim=True)
    ds = p * (dout @ v_many.mT - delta)
    dv = summed(p.mT @ dout, value, enable_gqa)
    dk = summed(ds.mT @ q * factor, key, enable_gqa)
    dq = summed(ds @ k_many * factor, query)
    floats = attn_mask is not None and attn_mask.dtype is not torch.bool
    return out, dq, dk, dv, summed(ds, attn_mask) if floats else None


def summed(gradient, of, grouped=False):
    """A gradient summed over what was broadcast or repeated."""
    if grouped:
        heads = of.shape[-3]
        gradient = gradient.unflatten(-3, (heads, gradient.shape[-3] // heads)).sum(-3)
    return gradient.sum_to_size(of.shape)


def nudged(x, dtype, seed):
    """`x` moved by up to one rounding of the type that sums are kept in, in float64."""
    step = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    (noise,) = tensors(x.shape, dtype=torch.float64, seed=seed)
    return x.detach().double() * (1 + step * noise.clamp(-1, 1))


def array(x):
    return x.detach().double().numpy()


NAMES = ("out", "dq", "dk", "dv", "dmask")


def complaints(got, inputs, dout, **options):
    """What is wrong with (out, dq, …) of the inputs (query, key, value, attn_mask)."""
    query = inputs[0]
    dtype = query.dtype
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    name = str(dtype).removeprefix("torch.")
    right = expected(*inputs, dout, torch.float64, **options)
    plain = expected(*inputs, dout, acc, saved=got[0], **options)
    moved = expected(
        *(x if x is None or x.dtype is torch.bool else nudged(x, dtype, n) for n, x in enumerate(inputs)),
        nudged(dout, dtype, 9), torch.float64, **options,
    )  # fmt: skip
    narrow = rounds_weights(name)
    coarse = expected(*inputs, dout, acc, weights=DTYPES[narrow], **options)[0] if narrow else None
    wrong = []
    for n, (what, mine, r, p, m) in enumerate(zip(NAMES, got, right, plain, moved, strict=False)):
        if mine is None:
            continue
        of = query if n == 0 else inputs[n - 1]
        assert mine.dtype is of.dtype, what
        assert mine.shape == r.shape, what
        rounded = array(coarse) if n == 0 and coarse is not None else None
        kind = str(of.dtype).removeprefix("torch.")
        error = judge(what, array(mine), (array(p), array(m)), array(r), kind, rounded)
        wrong += [] if error.ok else [str(error)]
    return wrong


def run(call, inputs, dout=None, **options):
    """(out, dq, dk, dv, dmask) of a call, and the gradient it was asked for."""
    leaves = [x if x is None or x.dtype is torch.bool else x.detach().requires_grad_() for x in inputs]
    out = call(*leaves, **options)
    dout = tensors(out.shape, dtype=out.dtype, seed=5)[0] if dout is None else dout
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, dout))
    return [out, *(next(grads) if x is not None and x.requires_grad else None for x in leaves)], dout


def check(query, key, value, attn_mask=None, call=scaled_dot_product_attention, **options):
    """Output and gradients of a call against the formulas; without gradients the output has the same bits."""
    inputs = (query, key, value, attn_mask)
    got, dout = run(call, inputs, **options)
    assert not complaints(got, inputs, dout, **options)
    with torch.no_grad():
        assert torch.equal(call(*inputs, **options), got[0])


def bits_of_torch(*inputs, **options):
    """What torch's own kernel gives; it differs from tilefold's in some last place."""
    out = F.scaled_dot_product_attention(*inputs, **options)
    assert not torch.equal(out, scaled_dot_product_attention(*inputs, **options))
    return out


# ---- shapes, types, heads ------------------------------------------------------------------------------------

SHAPES = {
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "2-D": ((5, 8), (7, 8), (7, 8)),
    "5-D": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8)),
    "one query": ((2, 4, 1, 16), (2, 4, 40, 16), (2, 4, 40, 16)),
    "more queries than keys": ((2, 2, 9, 8), (2, 2, 4, 8), (2, 2, 4, 8)),
    "dim 1": ((2, 5, 1), (2, 7, 1), (2, 7, 1)),
    "dim 13": ((2, 2, 33, 13), (2, 2, 47, 13), (2, 2, 47, 13)),
    "dim 80": ((1, 2, 130, 80), (1, 2, 259, 80), (1, 2, 259, 80)),
    "narrow values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
    "wide values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 24)),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    "no keys, 3-D": ((4, 5, 8), (4, 0, 8), (4, 0, 8)),
    "no batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
    "no heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    "no dim": ((2, 4, 5, 0), (2, 4, 7, 0), (2, 4, 7, 8)),
    "no value dim": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 0)),
}

BROADCAST = {
    "keys of one batch item": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "keys of one head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "keys of one head and batch item": ((2, 4, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8)),
    "2-D keys": ((2, 4, 5, 8), (7, 8), (7, 8)),
    "3-D keys": ((2, 4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "2-D queries": ((5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "queries of one head": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "queries of one batch item": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "one head of keys, four of values": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 8)),
    "values of more batch items": ((1, 4, 5, 8), (1, 4, 7, 8), (3, 4, 7, 8)),
    "3-D": ((4, 5, 8), (1, 7, 8), (1, 7, 8)),
    "5-D": ((3, 1, 4, 5, 8), (2, 1, 7, 8), (3, 2, 1, 7, 8)),
}

GROUPED = {
    "4-D": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "3-D": ((6, 5, 8), (3, 7, 8), (3, 7, 8)),
    "5-D": ((3, 2, 6, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8)),
    "one key head": ((2, 6, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "as many": ((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 8)),
    "one query": ((1, 6, 1, 16), (1, 2, 40, 16), (1, 2, 40, 16)),
    "keys of one batch item": ((2, 6, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)),
    "keys without batch": ((2, 6, 5, 8), (2, 7, 8), (2, 7, 8)),
    "two heads of keys, three of values": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8)),
    "values of another width": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, is_causal, dtype):
    check(*tensors(*shapes, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shapes", BROADCAST.values(), ids=BROADCAST)
def test_leading_dimensions_broadcast(shapes, is_causal):
    check(*tensors(*shapes), is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shapes", GROUPED.values(), ids=GROUPED)
def test_query_head_h_reads_key_head_h_over_group(shapes, is_causal, dtype):
    check(*tensors(*shapes, dtype=dtype), is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize(
    ("shapes", "enable_gqa"),
    [*((shapes, False) for shapes in BROADCAST.values()), (GROUPED["4-D"], True)],
    ids=[*BROADCAST, "grouped"],
)
def test_nothing_is_copied(shapes, enable_gqa, monkeypatch):
    """What reaches `tilefold.attention` is the memory of the arguments."""
    given = tensors(*shapes)
    reached = []
    monkeypatch.setattr(sdpa, "attention", lambda *args, **options: reached.extend(args[:3]))
    scaled_dot_product_attention(*given, enable_gqa=enable_gqa)
    assert [x.data_ptr() for x in reached] == [x.data_ptr() for x in given]


def test_causal_is_aligned_to_the_top_left():
    """Both ways of not being square, told from bottom-right: the first query sees the first key and no other."""
    for q_len, kv_len in ((3, 9), (9, 3)):
        q, k, v = tensors((1, q_len, 4), (1, kv_len, 4), (1, kv_len, 4))
        assert torch.equal(scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0], v[0, 0])


# ---- scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, -2.0, 0.0, 7, np.float32(0.5), -0.0])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_scale(scale, is_causal):
    check(*qkv(torch.float64), scale=scale, is_causal=is_causal)


def test_scale_may_be_a_tensor():
    q, k, v = qkv()
    assert torch.equal(
        scaled_dot_product_attention(q, k, v, scale=torch.tensor(0.25)),
        scaled_dot_product_attention(q, k, v, scale=0.25),
    )


# ---- masks ---------------------------------------------------------------------------------------------------

MASKS = [(), (7,), (1, 7), (5, 1), (5, 7), (4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (1, 4, 1, 7), (2, 4, 5, 1), CELLS]


def mask_of(kind, shape, dtype=torch.float32):
    """Booleans; floats; or floats that hide some cells, and where there are enough, all of a query."""
    (numbers,) = tensors(shape, dtype=torch.float64, seed=3)
    if kind == "float":
        return numbers.to(dtype)
    seen = numbers < 0.6
    if len(shape) > 1 and shape[-2] > 1:
        seen[..., 2, :] = False
    return seen if kind == "bool" else torch.where(seen, numbers, -INF).to(dtype)


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "hiding"])
def test_masks(kind, shape):
    check(*qkv(), mask_of(kind, shape))


@pytest.mark.parametrize("shape", [(5, 7), (4, 1, 7), (1, 4, 5, 7)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "hiding"])
@pytest.mark.parametrize("shapes", [SHAPES["5-D"], BROADCAST["2-D keys"], BROADCAST["keys of one head"]], ids=str)
def test_masks_of_other_shapes(shapes, kind, shape):
    check(*tensors(*shapes), mask_of(kind, shape))


@pytest.mark.parametrize("kind", ["bool", "float", "hiding"])
def test_masks_with_grouped_heads(kind):
    check(*tensors(*GROUPED["4-D"]), mask_of(kind, (2, 6, 5, 7)), enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float", "hiding"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_masks_are_of_the_type_of_query_or_float32(dtype, kind):
    check(*qkv(dtype), mask_of(kind, (5, 7), dtype))
    check(*qkv(dtype), mask_of(kind, (5, 7), torch.float32))


@pytest.mark.parametrize("kind", ["bool", "hiding"])
@pytest.mark.parametrize("make", [torch.zeros_like, torch.ones_like], ids=["nothing seen", "everything seen"])
def test_masks_that_hide_all_or_nothing(make, kind):
    seen = make(mask_of("bool", (5, 7)))
    mask = seen if kind == "bool" else torch.zeros(5, 7).masked_fill(~seen, -INF)
    check(*qkv(), mask)
    assert seen.any() or (scaled_dot_product_attention(*qkv(), mask) == 0).all()


@pytest.mark.parametrize(
    ("make", "offset"), [(causal_upper_left, 0), (causal_lower_right, 2)], ids=["upper left", "lower right"]
)
@pytest.mark.parametrize("way", [nullcontext, sdpa.use], ids=["called", "in use"])
def test_causal_biases_of_torch(make, offset, way):
    q, k, v = qkv()
    bias = make(5, 7)
    full = torch.ones(5, 7, dtype=torch.bool).tril(offset)
    call = scaled_dot_product_attention if way is nullcontext else F.scaled_dot_product_attention
    with way():
        got = call(q, k, v, bias)
    inputs = (q, k, v, full)
    assert not complaints([got], inputs, got)
    assert torch.equal(got, scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("hides", ["bool", "-inf", "causal"])
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_what_is_hidden_reaches_nothing(poison, hides):
    """NaN in a hidden key or value: torch multiplies it by 0, so its result may be NaN. Here it was never there."""
    q, k, v = tensors((2, 2, 4, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    dout = tensors(q.shape, seed=5)[0]
    k[..., 4:, :], v[..., 4:, :] = poison, poison
    seen = torch.arange(6) < 4
    mask = {"bool": seen, "-inf": torch.zeros(6).masked_fill(~seen, -INF), "causal": None}[hides]
    got, _ = run(scaled_dot_product_attention, (q, k, v, mask), dout, is_causal=mask is None)
    clean = (q, k[..., :4, :], v[..., :4, :], mask if mask is None else mask[:4])
    right, _ = run(scaled_dot_product_attention, clean, dout, is_causal=mask is None)
    for mine, known in zip(got[:4], right[:4], strict=True):
        assert torch.isfinite(mine).all()
        assert torch.equal(mine[..., :4, :], known)
        assert (mine[..., 4:, :] == 0).all()


# ---- memory order --------------------------------------------------------------------------------------------


def packed(x):
    """A third of a matrix that holds queries, keys and values side by side, heads moved forward."""
    wide = x.new_full((*x.shape[:-3], x.shape[-2], 3, x.shape[-3], x.shape[-1]), NAN)
    wide.select(-3, 1).copy_(x.transpose(-3, -2))
    return wide.select(-3, 1).transpose(-3, -2)


def every_other(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), NAN)
    wide[..., ::2] = x
    return wide[..., ::2]


ORDERS = {
    "length before heads": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "dim before length": lambda x: x.mT.contiguous().mT,
    "packed": packed,
    "every other number": every_other,
    "rows far apart": lambda x: F.pad(x, (1, 2), value=NAN)[..., 1:-2],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("way", ["called", "in use", "activated"])
def test_any_strides(order, way, request):
    if way == "activated":
        request.getfixturevalue("activated")
    call = scaled_dot_product_attention if way == "called" else F.scaled_dot_product_attention
    q, k, v = (order(x) for x in qkv())
    mask = mask_of("hiding", CELLS)
    with sdpa.use() if way == "in use" else nullcontext():
        for given in (None, order(mask), mask.mT.contiguous().mT > -INF):
            check(q, k, v, given, call=call)


def test_memory_that_is_read_more_than_once():
    q, k, v = qkv()
    check(q[:1].expand_as(q), k[:, :1].expand_as(k), v[:1, :1].expand_as(v))


@pytest.mark.parametrize("dims", [(-3, -2), (-4, -2)], ids=["heads", "batch"])
def test_the_output_has_the_memory_order_of_query(dims):
    q, k, v = (x.transpose(*dims).contiguous().transpose(*dims) for x in qkv())
    assert scaled_dot_product_attention(q, k, v).transpose(*dims).is_contiguous()
