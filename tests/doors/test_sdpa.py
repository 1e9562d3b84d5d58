"""The drop-in for torch's scaled_dot_product_attention means what torch documents, by each of its three ways.

What is expected is computed in float64 by `expected`, plain steps on whole matrices that share nothing with the
library, forward and backward. How far off a result may be is computed beside it, by the rule of `budgets`. Whether
tilefold or torch computed is told by bits: the inputs are such that the two differ in some last place.
"""

import math
import threading
import warnings
from contextlib import nullcontext, suppress

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

    `weights` is a type that weights are rounded to; `saved` the output that a backward pass is given, whose gradients
    are rounded to the types of what they belong to before torch sums them over what it broadcast.
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
    rounds = saved is not None
    dv = summed(p.mT @ dout, value, enable_gqa, rounds)
    dk = summed(ds.mT @ q * factor, key, enable_gqa, rounds)
    dq = summed(ds @ k_many * factor, query, False, rounds)
    floats = attn_mask is not None and attn_mask.dtype is not torch.bool
    return out, dq, dk, dv, summed(ds, attn_mask) if floats else None


def summed(gradient, of, grouped=False, rounds=False):
    """A gradient summed over what was repeated, then over what was broadcast."""
    if grouped:
        heads = of.shape[-3]
        gradient = gradient.unflatten(-3, (heads, gradient.shape[-3] // heads)).sum(-3)
    return (gradient.to(of.dtype).to(gradient.dtype) if rounds else gradient).sum_to_size(of.shape)


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


def run(call, inputs, dout=None, frozen=False, **options):
    """(out, dq, dk, dv, dmask) of a call, and the gradient it was asked for; `frozen` masks need none."""
    leaves = [x if x is None or x.dtype is torch.bool else x.detach().requires_grad_() for x in inputs]
    if frozen and leaves[3] is not None:
        leaves[3] = leaves[3].detach()
    out = call(*leaves, **options)
    dout = tensors(out.shape, dtype=out.dtype, seed=5)[0] if dout is None else dout
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, dout))
    return [out, *(next(grads) if x is not None and x.requires_grad else None for x in leaves)], dout


def check(
    query, key, value, attn_mask=None, call=scaled_dot_product_attention, frozen=False, bits=True, **options
):
    """Output and gradients of a call against the formulas; `bits`: the output has the same without gradients."""
    inputs = (query, key, value, attn_mask)
    got, dout = run(call, inputs, frozen=frozen, **options)
    assert not complaints(got, inputs, dout, **options)
    with torch.no_grad():
        assert not bits or torch.equal(call(*inputs, **options), got[0])


def bits_of_torch(*inputs, **options):
    """What torch's own kernel gives; it differs from tilefold's in some last place."""
    out = F.scaled_dot_product_attention(*inputs, **options)
    assert not torch.equal(out, scaled_dot_product_attention(*inputs, **options))
    return out


CASES_OF_TORCH = ["shapes", "broadcast", "grouped", "masks"]


@pytest.mark.parametrize("which", CASES_OF_TORCH)
def test_what_is_expected_is_what_torch_gives(which):
    """In float64 and without gradients of masks that are not floats: the formulas here are torch's."""
    cases = {
        "shapes": [(shapes, None, {"is_causal": True}) for shapes in SHAPES.values()],
        "broadcast": [(shapes, None, {"scale": -0.5}) for shapes in BROADCAST.values()],
        "grouped": [(shapes, None, {"enable_gqa": True}) for shapes in GROUPED.values()],
        "masks": [
            (SHAPES["4-D"], mask_of(kind, shape, torch.float64), {})
            for kind in ("bool", "float", "hiding") for shape in MASKS if len(shape) > 1
        ],
    }  # fmt: skip
    for shapes, mask, options in cases[which]:
        inputs = (*tensors(*shapes, dtype=torch.float64), mask)
        got, dout = run(F.scaled_dot_product_attention, inputs, **options)
        right = expected(*inputs, dout, torch.float64, **options)
        for name, mine, known in zip(NAMES, got, right, strict=True):
            if mine is not None:
                torch.testing.assert_close(mine, known, msg=lambda text, at=(shapes, name): f"{at}: {text}")


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

MASKS = [
    (),
    (7,),
    (1, 7),
    (5, 1),
    (5, 7),
    (4, 5, 7),
    (1, 1, 5, 7),
    (2, 1, 1, 7),
    (1, 4, 1, 7),
    (2, 4, 5, 1),
    CELLS,
]


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
@pytest.mark.parametrize(
    "shapes", [SHAPES["5-D"], BROADCAST["2-D keys"], BROADCAST["keys of one head"]], ids=str
)
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
            check(q, k, v, given, call=call, frozen=way == "activated", bits=way != "activated")


def test_memory_that_is_read_more_than_once():
    q, k, v = qkv()
    check(q[:1].expand_as(q), k[:, :1].expand_as(k), v[:1, :1].expand_as(v))


@pytest.mark.parametrize("dims", [(-3, -2), (-4, -2)], ids=["heads", "batch"])
def test_the_output_has_the_memory_order_of_query(dims):
    q, k, v = (x.transpose(*dims).contiguous().transpose(*dims) for x in qkv())
    assert scaled_dot_product_attention(q, k, v).transpose(*dims).is_contiguous()


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0, got 0.1; dropout is not offered"),
        ({"query": np.ones((5, 8))}, TypeError, "query must be a torch.Tensor, got ndarray"),
        ({"value": None}, TypeError, "value must be a torch.Tensor, got NoneType"),
        ({"attn_mask": [True]}, TypeError, "attn_mask must be a torch.Tensor, got list"),
        ({"key": torch.ones(2, 4, 7, 8, device="meta")}, TypeError, "key must be in CPU memory, got a tensor on meta"),
        ({"query": torch.ones(8)}, ValueError, r"query must have shape \(..., length, dim\), got \(8,\)"),
        ({"key": torch.ones(2, 4, 7, 8, dtype=torch.half)}, TypeError, "key must be torch.float32 as query is, got"),
        ({"key": torch.ones(2, 4, 7, 6)}, ValueError, r"key must have query's last dimension 8, got \(2, 4, 7, 6\)"),
        ({"value": torch.ones(2, 4, 6, 8)}, ValueError, r"value must have key's length 7, got \(2, 4, 6, 8\)"),
        (
            {"key": torch.ones(2, 2, 7, 8), "value": torch.ones(2, 2, 7, 8)}, ValueError,
            r"must broadcast, got query \(2, 4, 5, 8\), key \(2, 2, 7, 8\), .*enable_gqa=True shares key heads",
        ),
        ({"query": torch.ones(3, 4, 5, 8)}, ValueError, r"leading dimensions must broadcast, got query \(3, 4, 5, 8\)"),
        (
            {"query": torch.ones(3, 4, 5, 8), "enable_gqa": True}, ValueError,
            r"leading dimensions must broadcast, got query \(3, 4, 5, 8\)",
        ),
        (
            {"query": torch.ones(2, 6, 5, 8), "enable_gqa": True}, ValueError,
            "key must have heads that divide the 6 of query, got 4",
        ),
        (
            {"key": torch.ones(7, 8), "enable_gqa": True}, ValueError,
            r"key must have shape \(..., heads, length, dim\) for enable_gqa, got \(7, 8\)",
        ),
        ({"attn_mask": torch.ones(5, 7), "is_causal": True}, ValueError, "attn_mask must be None with is_causal=True"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "attn_mask must be bool, float32 or"),
        ({"attn_mask": torch.ones(5, 7).double()}, TypeError, "attn_mask must be .*, got torch.float64"),
        ({"attn_mask": torch.ones(5, 6)}, ValueError, r"attn_mask must broadcast to \(2, 4, 5, 7\), got \(5, 6\)"),
        (
            {"attn_mask": torch.ones(3, 1, 5, 7).bool()}, ValueError,
            r"attn_mask must broadcast to \(2, 4, 5, 7\), got \(3, 1, 5, 7\)",
        ),
        (
            {"attn_mask": torch.ones(1, 2, 4, 5, 7)}, ValueError,
            r"attn_mask must broadcast to \(2, 4, 5, 7\), got \(1, 2, 4, 5, 7\)",
        ),
        ({"attn_mask": causal_lower_right(4, 7)}, ValueError, r"lengths of query and key \(5, 7\), got \(4, 7\)"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False, got int"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": NAN}, ValueError, "scale must be finite, got nan"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_wrong_use_says_what_is_wrong(change, kind, says):
    arguments = dict(zip(("query", "key", "value"), qkv(), strict=True)) | change
    with pytest.raises(kind, match=says):
        scaled_dot_product_attention(**arguments)


def test_gradients_once():
    q, k, v = (x.requires_grad_() for x in qkv())
    (dq,) = torch.autograd.grad(scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        dq.sum().backward()


# ---- transforms of torch -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own compiler
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        (None, {"is_causal": True}),
        ("bool", {}),
        ("hiding", {"scale": 0.3}),
    ],
    ids=["plain", "causal", "bool", "hiding"],
)
def test_compiled(mask, options, backend):
    inputs = (*qkv(), None if mask is None else mask_of(mask, (5, 7)))
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend=backend)
    got, dout = run(compiled, inputs, **options)
    right, _ = run(scaled_dot_product_attention, inputs, dout, **options)
    for mine, known in zip(got, right, strict=True):
        assert (mine is None and known is None) or torch.equal(mine, known)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_broadcast_and_grouped_heads():
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    for shapes, grouped in ((BROADCAST["2-D keys"], False), (GROUPED["4-D"], True), (GROUPED["3-D"], True)):
        inputs = (*tensors(*shapes), None)
        got, dout = run(compiled, inputs, enable_gqa=grouped)
        assert not complaints(got, inputs, dout, enable_gqa=grouped)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_a_learned_bias_and_a_question():
    """A parameter as mask; is_causal that depends on a length."""
    bias = torch.nn.Parameter(mask_of("float", (5, 7)))
    compiled = torch.compile(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, bias), fullgraph=True, backend="aot_eager"
    )
    compiled(*qkv()).sum().backward()
    got, bias.grad = bias.grad, None
    scaled_dot_product_attention(*qkv(), bias).sum().backward()
    assert torch.equal(got, bias.grad)
    asking = torch.compile(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for q_len in (5, 1):
        q, k, v = tensors((1, 2, q_len, 8), (1, 2, 7, 8), (1, 2, 7, 8))
        assert torch.equal(asking(q, k, v), scaled_dot_product_attention(q, k, v, is_causal=q_len > 1))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_any_lengths():
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for q_len, kv_len in ((5, 7), (6, 6), (9, 9), (9, 4), (3, 11)):
        inputs = (*tensors((2, 4, q_len, 8), (2, 4, kv_len, 8), (2, 4, kv_len, 8)), None)
        got, dout = run(compiled, inputs, is_causal=True)
        assert not complaints(got, inputs, dout, is_causal=True)


def test_exported():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = tuple(qkv())
    with sdpa.use():
        program = torch.export.export(Module(), inputs)
    assert "tilefold.fwd" in str(program.graph)
    assert torch.equal(program.module()(*inputs), scaled_dot_product_attention(*inputs, is_causal=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, by torch's own rule
@pytest.mark.parametrize("way", ["in use", "activated"])
def test_transforms_of_torchs_function(way, request):
    if way == "activated":
        request.getfixturevalue("activated")
    q, k, v = qkv()
    call = F.scaled_dot_product_attention
    with sdpa.use() if way == "in use" else nullcontext():
        stacked = torch.vmap(call)(q[:, None], k[:, None], v[:, None])
        dq = torch.func.grad(lambda x: call(x, k, v).sum())(q)
        with torch.inference_mode():
            plain = call(q, k, v)
    right, _ = run(scaled_dot_product_attention, (q, k, v, None), torch.ones_like(q))
    assert torch.equal(stacked[:, 0], right[0])
    assert torch.equal(plain, right[0])
    assert torch.equal(dq, right[1])


def test_vmap_is_a_loop():
    q, k, v = qkv()
    mask = mask_of("hiding", (2, 1, 5, 7))
    stacked = torch.vmap(scaled_dot_product_attention)(q, k, v, mask)
    for n in range(2):
        assert torch.equal(stacked[n], scaled_dot_product_attention(q[n], k[n], v[n], mask[n]))
    shared = torch.vmap(scaled_dot_product_attention, in_dims=(0, None, None))(q, k[0], v[0])
    assert torch.equal(shared[1], scaled_dot_product_attention(q[1], k[0], v[0]))


def test_functional_gradients_are_those_of_autograd():
    inputs = (*qkv(), mask_of("float", (5, 7)))
    (out, *grads), dout = run(scaled_dot_product_attention, inputs)
    got, pull = torch.func.vjp(scaled_dot_product_attention, *inputs)
    assert torch.equal(got, out)
    for mine, known in zip(pull(dout), grads, strict=True):
        assert torch.equal(mine, known)


@pytest.mark.parametrize("way", ["called", "in use"])
def test_autocast_computes_in_its_type(way):
    q, k, v = qkv()
    mask = mask_of("hiding", (5, 7))
    narrow = [x.bfloat16() for x in (q, k, v)]
    call = scaled_dot_product_attention if way == "called" else F.scaled_dot_product_attention
    with sdpa.use() if way == "in use" else nullcontext(), torch.autocast("cpu", torch.bfloat16):
        got = call(q, k, v)
        masked = call(q, k, v, mask)
        assert call(q.double(), k.double(), v.double()).dtype is torch.float64
        assert call(q, narrow[1], v, mask.bfloat16()).dtype is torch.bfloat16
    assert torch.equal(got, scaled_dot_product_attention(*narrow))
    assert not complaints([masked], (*narrow, mask.bfloat16()), masked)


# ---- use -----------------------------------------------------------------------------------------------------


def test_use_reaches_calls_of_torchs_function_by_any_name():
    inputs = qkv()
    torchs, ours = bits_of_torch(*inputs), scaled_dot_product_attention(*inputs)
    from torch._C._nn import scaled_dot_product_attention as another_name

    with sdpa.use():
        for call in (F.scaled_dot_product_attention, another_name):
            assert torch.equal(call(*inputs), ours)
        assert torch.equal(
            F.scaled_dot_product_attention(query=inputs[0], key=inputs[1], value=inputs[2]), ours
        )
    assert torch.equal(F.scaled_dot_product_attention(*inputs), torchs)


@pytest.mark.parametrize("shapes", [*SHAPES.values(), *BROADCAST.values()], ids=[*SHAPES, *BROADCAST])
def test_use_takes_all_shapes(shapes):
    with sdpa.use():
        check(*tensors(*shapes), call=F.scaled_dot_product_attention, is_causal=True)


@pytest.mark.parametrize("inner", ["use", "device"])
def test_use_goes_with_other_modes(inner):
    """Torch's own modes, around it and within."""
    (x,) = tensors((2, 9, 16))
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    with sdpa.use():
        ours = module(x, x, x, need_weights=False)[0]
    modes = [torch.device("cpu"), sdpa.use()]
    with modes[inner == "device"], modes[inner == "use"]:
        assert torch.equal(module(x, x, x, need_weights=False)[0], ours)
        assert torch.equal(F.scaled_dot_product_attention(*qkv()), scaled_dot_product_attention(*qkv()))
    assert not torch.equal(module(x, x, x, need_weights=False)[0], ours)


def test_use_nests_and_ends_with_the_block():
    inputs = qkv()
    torchs, ours = bits_of_torch(*inputs), scaled_dot_product_attention(*inputs)
    with sdpa.use():
        with suppress(ZeroDivisionError), sdpa.use():
            assert torch.equal(F.scaled_dot_product_attention(*inputs), ours)
            raise ZeroDivisionError
        assert torch.equal(F.scaled_dot_product_attention(*inputs), ours)
        mode = sdpa.use()
        for _ in range(2):  # one object, used again
            with mode:
                assert torch.equal(F.scaled_dot_product_attention(*inputs), ours)
    assert torch.equal(F.scaled_dot_product_attention(*inputs), torchs)


def test_use_holds_for_its_thread():
    """Threads inside and outside at the same time: each has its own bits, every time."""
    inputs = qkv()
    torchs, ours = bits_of_torch(*inputs), scaled_dot_product_attention(*inputs)
    start, wrong = threading.Barrier(4), []

    def work(way, known):
        start.wait()
        for _ in range(50):
            with way():
                wrong.extend([] if torch.equal(F.scaled_dot_product_attention(*inputs), known) else [way])

    ways = [(sdpa.use, ours), (nullcontext, torchs)] * 2
    threads = [threading.Thread(target=work, args=way) for way in ways]
    with sdpa.use():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_use_and_compile(backend):
    """Compiled code asks where it is called: inside it is tilefold, outside torch, in any order."""
    inputs = qkv()

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    torchs, ours = call(*inputs), scaled_dot_product_attention(*inputs, is_causal=True)
    assert not torch.equal(torchs, ours)
    for _ in range(2):
        with sdpa.use():
            assert torch.equal(compiled(*inputs), ours)
        assert torch.equal(compiled(*inputs), torchs)
    with sdpa.use():
        got, dout = run(compiled, (*inputs, None)[:3])
    assert not complaints(got, (*inputs, None), dout, is_causal=True)


@pytest.mark.usefixtures("fresh_compiler")
def test_use_within_compiled_code():
    inputs = qkv()

    def call(q, k, v):
        with sdpa.use():
            return F.scaled_dot_product_attention(q, k, v)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, scaled_dot_product_attention(*inputs))


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "call",
    {
        "dropout": lambda sdp, q, k, v: sdp(q, k, v, dropout_p=0.5),
        "mask and causal": lambda sdp, q, k, v: sdp(q, k, v, torch.ones(5, 7) > 0, is_causal=True),
        "subclass": lambda sdp, q, k, v: sdp(q.as_subclass(Subclass), k, v),
        "meta": lambda sdp, q, k, v: sdp(q.to("meta"), k.to("meta"), v.to("meta")),
        "nested": lambda sdp, q, k, v: sdp(*[torch.nested.nested_tensor([*x]) for x in (q, k, v)]).unbind()[
            0
        ],
    }.items(),
    ids=lambda x: x[0],
)
def test_use_leaves_to_torch_what_tilefold_does_not_do(call):
    """The same bits as outside, random ones too."""
    results = []
    for way in (nullcontext, sdpa.use):
        torch.manual_seed(0)
        with way():
            results.append(call[1](F.scaled_dot_product_attention, *qkv()))
    outside, inside = results
    assert type(outside) is type(inside)
    assert outside.device == inside.device
    assert outside.is_meta or torch.equal(outside, inside)


def test_use_obeys_the_choice_of_a_kernel():
    """The plain method can be differentiated twice; who asked for it gets it."""
    q, k, v = (x.double().requires_grad_() for x in qkv())
    with sdpa.use(), sdpa_kernel(SDPBackend.MATH):
        (dq,) = torch.autograd.grad(
            F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True
        )
        assert torch.isfinite(torch.autograd.grad(dq.sum(), k)[0]).all()
    inputs = qkv()
    with sdpa.use(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        ours = F.scaled_dot_product_attention(*inputs)
    assert torch.equal(ours, scaled_dot_product_attention(*inputs))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("pull", ["backward", "grad", "autograd.backward"])
def test_use_and_gradient_checkpointing(pull, use_reentrant, monkeypatch):
    """What is computed again is computed by tilefold again."""
    if use_reentrant and pull == "grad":
        pytest.skip("torch refuses it: reentrant checkpoints go with backward only")
    q, k, v = (x.requires_grad_() for x in qkv())
    right, dout = run(scaled_dot_product_attention, (q, k, v, None))
    runs = []
    attention = sdpa.attention
    monkeypatch.setattr(
        sdpa, "attention", lambda *args, **options: runs.append(1) or attention(*args, **options)
    )
    with sdpa.use():
        out = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=use_reentrant)
        if pull == "grad":
            grads = torch.autograd.grad(out, (q, k, v), dout)
        elif pull == "backward":
            out.backward(dout)
        else:
            torch.autograd.backward(out, dout)
    if pull != "grad":
        grads = [x.grad for x in (q, k, v)]
    assert len(runs) == 2
    assert torch.equal(out, right[0])
    for mine, known in zip(grads, right[1:4], strict=True):
        assert torch.equal(mine, known)


def test_use_and_gradients_in_any_form():
    """Functions of torch that `use` runs itself take all that they took."""
    q, k, v = (x.requires_grad_() for x in qkv())
    with sdpa.use():
        out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out.sum(), [q], retain_graph=True, allow_unused=True, materialize_grads=True)
        torch.autograd.grad([out], inputs=q, grad_outputs=[torch.ones_like(out)], retain_graph=True)
        out.sum().backward(retain_graph=True, inputs=[q, k])
        torch.Tensor.backward(out, torch.ones_like(out), create_graph=False)
    assert v.grad is not None
    (dq,) = torch.autograd.grad(scaled_dot_product_attention(q, k, v).sum(), q)
    torch.testing.assert_close(q.grad, 2 * dq)


# ---- torch's registry ----------------------------------------------------------------------------------------


@pytest.fixture
def activated():
    sdpa.register()
    activate_flash_attention_impl("tilefold")
    yield
    restore_flash_attention_impl(_raise_warn=False)


def test_register_changes_nothing_by_itself():
    torchs = bits_of_torch(*qkv())
    sdpa.register()
    sdpa.register()
    assert list_flash_attention_impls().count("tilefold") == 1
    assert current_flash_attention_impl() is None
    assert torch.equal(F.scaled_dot_product_attention(*qkv()), torchs)


def test_activated_and_restored():
    """Forward and backward are tilefold's, then torch's again, to the bit; as often as one likes."""
    inputs = (*qkv(), mask_of("bool", (5, 7)))
    torchs, dout = run(F.scaled_dot_product_attention, inputs)
    ours, _ = run(scaled_dot_product_attention, inputs, dout)
    assert not any(torch.equal(x, y) for x, y in zip(ours[:4], torchs[:4], strict=True))
    sdpa.register()
    for _ in range(2):
        activate_flash_attention_impl("tilefold")
        assert current_flash_attention_impl() == "tilefold"
        inside, _ = run(F.scaled_dot_product_attention, inputs, dout)
        restore_flash_attention_impl()
        outside, _ = run(F.scaled_dot_product_attention, inputs, dout)
        assert all(torch.equal(x, y) for x, y in zip(inside[:4], ours[:4], strict=True))
        assert all(torch.equal(x, y) for x, y in zip(outside[:4], torchs[:4], strict=True))


@pytest.fixture
def counted(activated, monkeypatch):
    """How often the activated kernels ran: [forward, backward]."""
    counts = [0, 0]

    def counting(n, function):
        def counted(*args, **options):
            counts[n] += 1
            return function(*args, **options)

        return counted

    monkeypatch.setattr(sdpa, "attention", counting(0, sdpa.attention))
    monkeypatch.setattr(sdpa, "attention_grad", counting(1, sdpa.attention_grad))
    return counts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", [None, "bool", "float", "hiding"])
def test_activated_kernels(kind, is_causal, dtype, counted):
    """Torch's kernel takes a mask and is_causal together, so this one does."""
    mask = None if kind is None else mask_of(kind, (2, 1, 5, 7), dtype)
    check(*qkv(dtype), mask, call=F.scaled_dot_product_attention, frozen=True, is_causal=is_causal)
    assert counted == [2, 1]


@pytest.mark.usefixtures("activated")
@pytest.mark.parametrize(("kind", "as_what"), [("bool", "mask"), ("float", "bias"), ("hiding", "bias")])
def test_activated_kernels_see_booleans_again(kind, as_what, monkeypatch):
    """Torch hands booleans on as floats; as booleans they hide tiles, and have no gradient that nobody asked for."""
    seen = []
    attention = sdpa.attention
    monkeypatch.setattr(
        sdpa, "attention", lambda *args, **options: seen.append(options) or attention(*args, **options)
    )
    F.scaled_dot_product_attention(*qkv(), mask_of(kind, (5, 7)))
    assert {"mask", "bias"} & seen[0].keys() == {as_what}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_activated_kernels_and_masks_of_float32(dtype, counted):
    mask = mask_of("hiding", (5, 7))
    check(*qkv(dtype), mask, call=F.scaled_dot_product_attention, frozen=True)
    assert counted == [2, 1]


@pytest.mark.usefixtures("activated")
@pytest.mark.parametrize("shapes", [*SHAPES.values(), *BROADCAST.values()], ids=[*SHAPES, *BROADCAST])
def test_activated_with_all_shapes(shapes):
    """Also those that torch gives to its plain method."""
    check(*tensors(*shapes), call=F.scaled_dot_product_attention, bits=False, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_activated_with_grouped_heads(dtype, counted):
    check(*tensors(*GROUPED["4-D"], dtype=dtype), call=F.scaled_dot_product_attention, enable_gqa=True)
    assert counted == [2, 1]


@pytest.mark.usefixtures("activated")
@pytest.mark.parametrize(
    "order",
    [
        lambda x: x,
        lambda x: x[:1].expand_as(x),
        lambda x: x.as_strided(x.shape, (0, 0, 1, 1)),
        *list(ORDERS.values())[:3],
    ],
    ids=["plain", "one batch item again", "overlapping rows", *list(ORDERS)[:3]],
)
def test_activated_kernels_keep_the_memory_order_of_torchs(order):
    """Compiled code relies on what the kernels of meta tensors announce."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v = (order(x) for x in qkv())
    made = {}
    for device in ("cpu", "meta"):
        x, y, z = (torch.empty_strided(t.shape, t.stride(), device=device).zero_() for t in (q, k, v))
        out, lse = forward(x, y, z)
        made[device] = [
            (t.shape, t.stride(), t.dtype) for t in (out, lse, *backward(out, x, y, z, out, lse, 0.0, False))
        ]
    assert made["cpu"] == made["meta"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_activated_kernels_return_the_sums_of_torchs(dtype):
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = qkv(dtype)
    mask = mask_of("hiding", CELLS, dtype)
    _, right = forward(q, k, v, attn_mask=mask)
    sdpa.register()
    activate_flash_attention_impl("tilefold")
    _, lse = forward(q, k, v, attn_mask=mask)
    restore_flash_attention_impl()
    assert (lse.dtype, lse.stride()) == (right.dtype, right.stride())
    assert (lse[..., 2] == 0).all()
    torch.testing.assert_close(lse, right)


@pytest.mark.usefixtures("activated")
def test_activated_refuses_dropout():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"dropout_p must be 0, got 0\.5"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5)
    assert F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).shape == q.shape


@pytest.mark.usefixtures("fresh_compiler")
def test_activated_and_compiled(counted):
    """Compiled code asks when it runs; what is compiled inside goes on outside."""
    inputs = (*qkv(), mask_of("bool", (5, 7)))

    def call(q, k, v, mask):
        return F.scaled_dot_product_attention(q.sin(), k.cos(), v, mask).sin()

    compiled = torch.compile(call, fullgraph=True)
    right, dout = run(call, inputs)
    counted[:] = [0, 0]
    got, _ = run(compiled, inputs, dout)
    assert counted == [1, 1]
    for mine, known in zip(got[:4], right[:4], strict=True):
        torch.testing.assert_close(mine, known)
    restore_flash_attention_impl()
    outside, _ = run(compiled, inputs, dout)
    assert counted == [1, 1]
    activate_flash_attention_impl("tilefold")
    run(compiled, inputs, dout)
    assert counted == [2, 2]
    for mine, known in zip(outside[:4], right[:4], strict=True):
        torch.testing.assert_close(mine, known)


# ---- modules -------------------------------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    """Two layers of attention with a causal mask, as people write them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(11, 16)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(2))
        self.proj = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.head = torch.nn.Linear(16, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for qkv, proj in zip(self.qkv, self.proj, strict=True):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + proj(seen.transpose(1, 2).flatten(2))
        return self.head(x)


def trained(dtype, way, activate=False):
    """Losses and parameters of a few steps."""
    model = Tiny().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tokens,) = (torch.arange(40).reshape(2, 20) * 7 % 11,)
    losses = []
    for _ in range(5):
        with way():
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model.state_dict()


def as_far_off_as_torch(ours, torchs, right):
    """Errors of float32 against float64, with the budget that torch's own error gives."""
    return [
        str(error)
        for name, x, y, z in zip(map(str, range(len(ours))), ours, torchs, right, strict=True)
        if not (error := judge(name, array(x), (array(y),), array(z), "float32")).ok
    ]


def plainly():
    return sdpa_kernel(SDPBackend.MATH)


def test_training_is_that_of_torch():
    ours = trained(torch.float32, sdpa.use)
    torchs = trained(torch.float32, nullcontext)
    right = trained(torch.float64, plainly)
    assert not torch.equal(ours[0], torchs[0])
    assert [*ours[1]] == [*torchs[1]]
    assert ours[0][-1] < ours[0][0]
    assert not as_far_off_as_torch(*([x[0], *x[1].values()] for x in (ours, torchs, right)))


MODULES = {
    "MultiheadAttention": lambda: torch.nn.MultiheadAttention(16, 2, batch_first=True),
    "TransformerEncoderLayer": lambda: torch.nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, batch_first=True
    ),
    "TransformerDecoderLayer": lambda: torch.nn.TransformerDecoderLayer(
        16, 2, 32, dropout=0.0, batch_first=True
    ),
    "TransformerEncoder": lambda: torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        2,
        enable_nested_tensor=False,
    ),
}
ATTENTIONS = {
    "MultiheadAttention": 1,
    "TransformerEncoderLayer": 1,
    "TransformerDecoderLayer": 2,
    "TransformerEncoder": 2,
}


def module_and_call(name, dtype=torch.float32):
    """A module of torch, and a function of its input that runs it with a causal mask."""
    torch.manual_seed(2)
    module = MODULES[name]().to(dtype)
    hidden = torch.ones(9, 9).triu(1) > 0

    def call(x):
        if name == "MultiheadAttention":
            return module(x, x, x, attn_mask=hidden, need_weights=False)[0]
        if name == "TransformerDecoderLayer":
            return module(x, x.flip(1), tgt_mask=hidden)
        return module(x, hidden, is_causal=name == "TransformerEncoder")

    return module, call


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("way", ["in use", "activated"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch(name, way, train, monkeypatch):
    """Every attention of a module is tilefold's, and so is its gradient."""
    (x,) = tensors((2, 9, 16))
    results = {}
    counts = [0]

    def counting(*args, **options):
        counts[0] += 1
        return attention(*args, **options)

    attention = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", counting)
    for kind, dtype in (("ours", torch.float32), ("torchs", torch.float32), ("right", torch.float64)):
        module, call = module_and_call(name, dtype)
        module.train(train)
        inside = nullcontext()
        if kind == "right":
            inside = plainly()
        elif kind == "ours" and way == "in use":
            inside = sdpa.use()
        elif kind == "ours":
            sdpa.register()
            activate_flash_attention_impl("tilefold")
        with inside:
            leaf = x.to(dtype).requires_grad_()
            out = call(leaf)
            results[kind] = [out, *torch.autograd.grad(out.sin().sum(), [leaf, *module.parameters()])]
        if kind == "ours" and way == "activated":
            restore_flash_attention_impl()
        if kind == "ours":
            assert counts == [ATTENTIONS[name]]
    assert counts == [ATTENTIONS[name]]
    assert not torch.equal(results["ours"][0], results["torchs"][0])
    assert not as_far_off_as_torch(results["ours"], results["torchs"], results["right"])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoder"])
def test_use_and_compiled_modules(name):
    (x,) = tensors((2, 9, 16))
    _, call = module_and_call(name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torchs = call(x)
    with sdpa.use():
        ours = call(x)
        assert torch.equal(compiled(x), ours)
    assert not torch.equal(torchs, ours)
    assert torch.equal(compiled(x), torchs)


def test_a_module_in_training_with_dropout_runs_as_it_did():
    (x,) = tensors((2, 9, 16))
    module = torch.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    results = []
    for way in (nullcontext, sdpa.use):
        torch.manual_seed(0)
        with way():
            results.append(module(x, x, x, need_weights=False)[0])
    assert torch.equal(*results)


def test_modules_without_gradients(counted):
    """Where torch would run a whole layer as one kernel of its own: `use` comes first, the registry is not asked."""
    (x,) = tensors((2, 9, 16))
    module = MODULES["TransformerEncoderLayer"]().eval()
    with torch.no_grad():
        fast = module(x)
        assert counted == [0, 0]
        with sdpa.use():
            used = module(x)
        assert counted == [1, 0]
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            asked = module(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert counted == [2, 0]
    torch.testing.assert_close(used, fast)
    torch.testing.assert_close(asked, fast)
