"""Each row of the table of meanings is a test here: what the arguments of `attention` and its relatives mean.

What is expected is computed by `looped`, plain loops over keys in double precision that share nothing with the library,
so that a mistake in its own masks cannot hide itself. Most calls run twice, in one tile and in tiles of 3 x 4; and each
test runs twice, once with calls that name no backend and once on NumPy.
"""

import math
import sys
import tracemalloc
from dataclasses import replace
from inspect import signature
from itertools import permutations, product
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import tilefold as tf
from tilefold.backends.cpu import NativeBackend
from tilefold.dtypes import ROWS
from tilefold.naive import naive_weights

INF, NAN = np.inf, np.nan

pytestmark = pytest.mark.usefixtures("either_backend")


def arrays(*shapes, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def qkv(heads=2, kv_heads=None, q_len=5, kv_len=7, dim=4, v_dim=3, lead=(), dtype=np.float64, seed=0):
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = (heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, v_dim)
    return arrays(*((*lead, *shape) for shape in shapes), dtype=dtype, seed=seed)


def looped(q, k, v, sees=lambda i, j: True, score=None, sinks=None, scale=None):
    """(out, lse) of arrays (heads, length, dim): one query, one key at a time.

    `sees(i, j)` or `sees(h, i, j)` is the mask; `score(s, h, i, j)` is what becomes of a scaled score.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    heads, q_len, dim = q.shape
    kv_len, v_dim = v.shape[1:]
    scale = 1 / math.sqrt(dim) if scale is None else float(scale)
    per_head = len(signature(sees).parameters) - len(sees.__defaults__ or ()) == 3
    out, lse = np.zeros((heads, q_len, v_dim)), np.full((heads, q_len), -INF)
    for h, i in product(range(heads), range(q_len)):
        g = h // (heads // len(k))
        logits = {}
        for j in range(kv_len):
            if sees(h, i, j) if per_head else sees(i, j):
                s = scale * math.fsum(q[h, i] * k[g, j])
                logits[j] = s if score is None else score(s, h, i, j)
        everything = [*logits.values(), *([] if sinks is None else [sinks[h]])]
        if everything:
            top = max(everything)
            lse[h, i] = top + math.log(math.fsum(math.exp(s - top) for s in everything))
            out[h, i] = sum((math.exp(s - lse[h, i]) * v[g, j] for j, s in logits.items()), np.zeros(v_dim))
    return out, lse


def close(got, expected, dtype=np.float64):
    """Equal up to the rounding of `dtype`, with NaN and infinity in the same places."""
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=64 * ROWS[np.dtype(dtype).name].roundoff, equal_nan=True
    )


def run(q, k, v, mask=None, **options):
    """(out, lse), after making sure that small tiles give the same."""
    out, lse = tf.attention(q, k, v, mask, return_lse=True, **options)
    plan = replace(tf.explain(q, k, v, mask, return_lse=True, **options).plan, block_q=3, block_k=4)
    small_out, small_lse = tf.attention(q, k, v, mask, return_lse=True, plan=plan, **options)
    np.testing.assert_allclose(small_out, out, rtol=1e-6, atol=64 * ROWS[out.dtype.name].roundoff)
    np.testing.assert_allclose(small_lse, lse, rtol=1e-6, atol=64 * ROWS[lse.dtype.name].roundoff)
    return out, lse


def check(q, k, v, mask=None, *, sees=lambda i, j: True, score=None, **options):
    """The call against the loops."""
    out, lse = run(q, k, v, mask, **options)
    expected = looped(q, k, v, sees, score, options.get("sinks"), options.get("scale"))
    close(out, expected[0])
    close(lse, expected[1])


# ---- shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)])
def test_any_leading_dimensions(lead):
    q, k, v = qkv(heads=4, kv_heads=2, lead=lead)
    out, lse = tf.attention(q, k, v, return_lse=True)
    assert out.shape == (*lead, 4, 5, 3)
    assert lse.shape == (*lead, 4, 5)
    for at in np.ndindex(lead):
        expected = looped(q[at], k[at], v[at])
        close(out[at], expected[0])
        close(lse[at], expected[1])


def test_two_dimensions_are_one_head():
    q, k, v = (x[0] for x in qkv(heads=1))
    out, lse = tf.attention(q, k, v, causal=True, return_lse=True)
    whole, whole_lse = looped(q[None], k[None], v[None], lambda i, j: j <= i + 2)
    close(out, whole[0])
    close(lse, whole_lse[0])


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 0, "kv_heads": 1},
        {"q_len": 0},
        {"dim": 0},
        {"v_dim": 0},
        {"q_len": 1, "kv_len": 1, "dim": 1},
    ],
    ids=str,
)
def test_sizes_of_zero_and_one(sizes):
    check(*qkv(**sizes), scale=1.0)


def test_without_keys_every_row_is_empty():
    out, lse = tf.attention(*qkv(kv_len=0), return_lse=True)
    assert (out == 0).all()
    assert (lse == -INF).all()


def test_scale_is_one_over_the_root_of_dim_unless_given():
    q, k, v = qkv()
    check(q, k, v)
    for scale in (0.3, -2, 0.0, np.float32(0.5), 7):
        check(q, k, v, scale=scale)


# ---- heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 2), (6, 1), (1, 1)])
def test_query_head_h_reads_key_head_h_over_group(heads, kv_heads):
    q, k, v = qkv(heads, kv_heads)
    out = tf.attention(q, k, v)
    for h in range(heads):
        g = h // (heads // kv_heads)
        close(out[h : h + 1], looped(q[h : h + 1], k[g : g + 1], v[g : g + 1])[0])


def peak_bytes(call):
    """The most memory that was allocated at once during a call."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_shared_heads_are_never_copied():
    q, k, v = qkv(heads=32, kv_heads=1, q_len=1, kv_len=20_000, dim=16, v_dim=16, dtype=np.float32)
    tf.attention(q, k, v)
    assert peak_bytes(lambda: tf.attention(q, k, v)) < k.nbytes / 2


# ---- types ---------------------------------------------------------------------------------------------------


def dtype_of(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


@pytest.mark.parametrize("name", ROWS)
def test_out_is_as_q_and_lse_as_the_sums(name):
    dtype = dtype_of(name)
    q, k, v = qkv(dtype=dtype)
    out, lse = tf.attention(q, k, v, causal=True, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if name == "float64" else np.float32)
    expected = looped(q, k, v, lambda i, j: j <= i + 2)
    close(out.astype(np.float64), expected[0], dtype)
    close(lse, expected[1], lse.dtype)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_narrow_types_sum_in_float32(name):
    """4096 equal scores: a sum kept in the narrow type would stop growing long before."""
    dtype = dtype_of(name)
    q, k, v = np.zeros((1, 1, 2), dtype), np.zeros((1, 4096, 2), dtype), np.ones((1, 4096, 1), dtype)
    out, lse = tf.attention(q, k, v, return_lse=True)
    assert out == 1
    close(lse, np.full((1, 1), math.log(4096)), np.float32)


def test_float16_products_beyond_its_range_are_finite():
    q = np.full((1, 1, 2), 400, np.float16)
    k = np.array([[[400, 400], [399.75, 400]]], np.float16)
    out, lse = tf.attention(q, k, np.array([[[1], [3]]], np.float16), scale=1.0, return_lse=True)
    assert out == 1
    assert lse == 320_000


def test_float64_stays_float64():
    q, k, v = np.array([[1.0]]), np.array([[1.0], [1.0 + 2**-40]]), np.array([[0.0], [1.0]])
    assert tf.attention(q, k, v)[0, 0] - 0.5 == pytest.approx(2**-42, rel=1e-3)


# ---- memory order --------------------------------------------------------------------------------------------


def misaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def spread(x):
    """Every second element of a wider array."""
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), NAN, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def odd_field(x):
    """A field of records whose size is no multiple of the field's: 6 bytes for a float32."""
    records = np.zeros(x.shape, [("before", np.int16), ("x", x.dtype)])
    records["x"] = x
    assert records["x"].strides[-1] % x.itemsize
    return records["x"]


ORDERS = {
    "plain": np.ascontiguousarray,
    "bshd": lambda x: np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2),
    "bhds": lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
    "fortran": np.asfortranarray,
    "backwards": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1, ::-1])[..., ::-1, ::-1, ::-1],
    "last dim strided": spread,
    "misaligned": misaligned,
    "field of a record": lambda x: np.rec.fromarrays([x, x], names="a, b")["a"].view(np.ndarray),
    "field at an odd pace": odd_field,
}
ODD = ("misaligned", "field at an odd pace")


@pytest.mark.parametrize("name", ORDERS)
def test_any_strides(name):
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,))
    plain = run(q, k, v, causal=True)
    moved = [ORDERS[name](x) for x in (q, k, v)]
    for got, expected in zip(run(*moved, causal=True), plain, strict=True):
        close(got, expected)
    dout = np.ones_like(plain[0])
    a = tf.attention_grad(q, k, v, *plain, dout, causal=True)
    b = tf.attention_grad(*moved, *plain, dout, causal=True)
    for x, y in zip(a[:3], b[:3], strict=True):
        close(x, y)


def test_strides_of_zero():
    q, k, v = qkv(heads=1, kv_heads=1)
    q, k, v = (np.broadcast_to(x, (3, 2, *x.shape[1:])) for x in (q, k, v))
    out = tf.attention(q, k, v)
    close(out, np.broadcast_to(looped(q[0], k[0], v[0])[0], out.shape))


@pytest.mark.parametrize("name", ORDERS)
def test_no_whole_input_is_copied(name, either_backend):
    if name in ODD and either_backend == "auto":
        pytest.skip("the native core reads a copy of what lies at odd addresses")
    q, k, v = qkv(q_len=2, kv_len=20_000, dim=16, v_dim=16, dtype=np.float32)
    q, k, v = (ORDERS[name](x) for x in (q, k, v))
    tf.attention(q, k, v)
    plan = tf.explain(q, k, v).plan
    untraced = plan.workspace_bytes if plan.backend == "native" else 0
    assert peak_bytes(lambda: tf.attention(q, k, v)) + untraced < k.nbytes / 2


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_out_lies_in_memory_as_q_does(order):
    q, k, v = qkv(heads=3, kv_heads=3, q_len=5, dim=4, v_dim=6, lead=(2,))
    q = np.ascontiguousarray(q.transpose(order)).transpose(np.argsort(order))
    assert tf.attention(q, k, v).transpose(order).flags.c_contiguous


def test_out_may_be_given():
    q, k, v = qkv(lead=(2,))
    expected = tf.attention(q, k, v)
    for order in ORDERS.values():
        out = order(np.full(expected.shape, NAN))
        assert tf.attention(q, k, v, out=out) is out
        assert np.array_equal(out, expected)
    flat = np.full((5, 3), NAN)
    assert tf.attention(q[0, 0], k[0, 0], v[0, 0], out=flat) is flat
    close(flat, expected[0, 0])


def test_a_given_out_is_written_to_the_last_element():
    q, k, v = qkv(lead=(2,))
    hidden = np.zeros((5, 7), bool)
    for options in ({"mask": hidden}, {"q_lengths": 2, "kv_lengths": 3}):
        out = tf.attention(q, k, v, out=np.full((2, 2, 5, 3), NAN), **options)
        assert np.isfinite(out).all()


def test_inputs_are_never_written():
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,))
    given = {
        "mask": np.random.default_rng(1).random((5, 7)) < 0.7,
        "bias": arrays((4, 5, 7))[0],
        "alibi": np.full(4, 0.5),
        "sinks": np.ones(4),
        "q_lengths": np.array([5, 3]),
        "kv_lengths": np.array([7, 6]),
    }
    inputs = [q, k, v, *given.values()]
    before = [x.copy() for x in inputs]
    for x in inputs:
        x.flags.writeable = False
    out, lse = run(q, k, v, softcap=3.0, causal=True, **given)
    dout = np.ones_like(out)
    for x in (out, lse, dout):
        x.flags.writeable = False
    tf.attention_grad(q, k, v, out, lse, dout, softcap=3.0, causal=True, **given)
    tf.probe(q, k, KeyMass(), softcap=3.0, causal=True, **given)
    for x, y in zip(inputs, before, strict=True):
        assert np.array_equal(x, y)


# ---- causal, window, band ------------------------------------------------------------------------------------

LENGTHS = [(5, 5), (3, 7), (7, 3), (1, 9), (9, 1)]


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_causal_is_bottom_right(q_len, kv_len):
    q, k, v = qkv(q_len=q_len, kv_len=kv_len)

    def sees(i, j):
        return j <= i + kv_len - q_len

    check(q, k, v, causal=True, sees=sees)
    check(q, k, v, tf.causal(), sees=sees)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_causal_top_left_exists(q_len, kv_len):
    check(*qkv(q_len=q_len, kv_len=kv_len), tf.causal(align="top-left"), sees=lambda i, j: j <= i)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize(
    "window", [(0, 0), (2, 1), (None, 1), (1, None), (None, None), (2**63, 10**30)], ids=str
)
def test_window_counts_other_keys_and_always_includes_self(q_len, kv_len, window):
    left, right = (INF if n is None else n for n in window)

    def sees(i, j):
        return -left <= j - (i + kv_len - q_len) <= right

    q, k, v = qkv(q_len=q_len, kv_len=kv_len)
    check(q, k, v, window=window, sees=sees)
    check(q, k, v, window=list(window), sees=sees)
    check(q, k, v, tf.window(*window), sees=sees)
    check(q, k, v, window=window, causal=True, sees=lambda i, j: sees(i, j) and j <= i + kv_len - q_len)


FAR = 2**63 - 1


@pytest.mark.parametrize(
    "band",
    [(1, 2, 0), (0, 0, -3), (-2, 3, 1), (3, -2, 1), (None, 0, 4), (0, None, -4), (None, None, 9), (-1, -1, 0)]
    + [(FAR, FAR, 0), (FAR, 0, -5), (-FAR, FAR, 3), (0, 0, FAR), (0, 0, -(10**30)), (10**30, 0, 10**30)],
    ids=str,
)
def test_band_is_affine_with_any_integers(band):
    left, right, offset = band

    def sees(i, j):
        at = i + offset
        return (left is None or at - left <= j) and (right is None or j <= at + right)

    check(*qkv(), tf.band(left, right, offset), sees=sees)


def test_bands_of_shards_make_the_whole():
    q, k, v = qkv(q_len=8, kv_len=8)
    whole = looped(q, k, v, lambda i, j: i - 3 <= j <= i)
    for q0 in (0, 3, 6):
        rows = slice(q0, q0 + 3)
        parts = []
        for k0 in (0, 5):
            keys = slice(k0, k0 + 5)
            shard = tf.band(3, 0, q0 - k0)
            parts.append(tf.attention(q[:, rows], k[:, keys], v[:, keys], shard, return_lse=True))
        out, lse = tf.merge(*parts)
        close(out, whole[0][:, rows])
        close(lse, whole[1][:, rows])


# ---- masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 5, 7), (4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (5, 7), (5, 1), (1, 7), (7,), (1,), ()],
    ids=str,
)
def test_boolean_array_broadcasts_and_true_means_attend(shape):
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,))
    mask = np.asarray(np.random.default_rng(5).random(shape) < 0.6)
    whole = np.broadcast_to(mask, (2, 4, 5, 7))
    for given in (mask, tf.dense(mask), np.asfortranarray(mask)):
        out, lse = run(q, k, v, given)
        for b in range(2):
            expected = looped(q[b], k[b], v[b], lambda h, i, j, b=b: whole[b, h, i, j])
            close(out[b], expected[0])
            close(lse[b], expected[1])


def test_everything_that_hides_combines_by_and():
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,))
    array = np.random.default_rng(5).random((2, 4, 5, 7)) < 0.7
    kv_ends, q_ends = [7, 5], [5, 4]
    bias = np.where(np.arange(7) == 1, -INF, 0.0)
    options = {
        "causal": True,
        "window": (3, 1),
        "q_lengths": np.array(q_ends),
        "kv_lengths": np.array(kv_ends),
    }
    out, lse = run(q, k, v, tf.dense(array) & ~tf.prefix(1), bias=bias, **options)
    for b in range(2):

        def sees(h, i, j, b=b):
            at = i + kv_ends[b] - q_ends[b]
            return i < q_ends[b] and j < kv_ends[b] and array[b, h, i, j] and j > 1 and at - 3 <= j <= at

        expected = looped(q[b], k[b], v[b], sees)
        close(out[b], expected[0])
        close(lse[b], expected[1])


def test_a_mask_is_an_expression_bound_when_used():
    mask = (tf.causal() | tf.prefix(2)) & ~tf.window(1, 1)
    for q_len, kv_len in LENGTHS:

        def sees(i, j, shift=kv_len - q_len):
            return (j <= i + shift or j < 2) and abs(j - i - shift) > 1

        check(*qkv(q_len=q_len, kv_len=kv_len), mask, sees=sees)


def test_a_sliced_mask_keeps_its_positions():
    q, k, v = qkv(q_len=8, kv_len=9)
    whole = (tf.causal() & tf.chunked(4)).bind(8, 9)
    part = whole[2:6, 3:]
    expected = looped(
        q[:, 2:6], k[:, 3:], v[:, 3:], lambda i, j: j + 3 <= i + 3 and (j + 3) // 4 == (i + 3) // 4
    )
    close(tf.attention(q[:, 2:6], k[:, 3:], v[:, 3:], part), expected[0])


def test_constructors():
    ids = np.array([0, 0, 1, 1, 0, 2, 2])
    for mask, sees in [
        (tf.prefix(3), lambda i, j: j < 3),
        (tf.prefix(10**30), lambda i, j: True),
        (
            tf.spans([0, 2, 7, 3, 1], [7, 2, 7, 6, 3]),
            lambda i, j: [0, 2, 7, 3, 1][i] <= j < [7, 2, 7, 6, 3][i],
        ),
        (tf.spans([[0, 4]] * 5, [[2, 7]] * 5), lambda i, j: j < 2 or j >= 4),
        (tf.spans(np.zeros((5, 0), int), np.zeros((5, 0), int)), lambda i, j: False),
        (tf.chunked(3), lambda i, j: (i + 2) // 3 == j // 3),
        (tf.chunked(10**30), lambda i, j: True),
        (tf.anchors(1, 2), lambda i, j: (j < 1 and j <= i + 2) or i <= j <= i + 2),
        (tf.lengths(4, q_lengths=3), lambda i, j: j < 4 and i < 3),
        (tf.documents(ids), lambda i, j: ids[i + 2] == ids[j]),
        (tf.documents(ids, q_ids=ids[:5]), lambda i, j: ids[i] == ids[j]),
        (
            tf.documents(cu_seqlens=[0, 2, 2, 5, 7]),
            lambda i, j: np.digitize(i + 2, [2, 5]) == np.digitize(j, [2, 5]),
        ),
        (tf.from_predicate(lambda i, j: (i + j) % 3 > 0), lambda i, j: (i + j) % 3 > 0),
    ]:
        check(*qkv(), mask, sees=sees)


def test_a_predicate_may_differ_per_batch_item_and_head():
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,))
    mask = tf.from_predicate(lambda index, head, i, j: (i + j + head + index[0]) % 3 > 0, per_head=True)
    out, _ = run(q, k, v, mask)
    for b in range(2):
        close(out[b], looped(q[b], k[b], v[b], lambda h, i, j, b=b: (i + j + h + b) % 3 > 0)[0])


def test_a_predicate_is_asked_for_panels_of_rows_never_for_the_matrix():
    asked = []

    def rule(i, j):
        shape = np.broadcast_shapes(i.shape, j.shape)
        assert i.shape == (shape[0], 1)
        assert j.shape == (1, shape[1])
        asked.append(shape)
        return (i + j) % 2 == 0

    peaks = []
    for n in (3000, 6000):
        q, k, v = qkv(heads=1, q_len=n, kv_len=n, dim=1, v_dim=1, dtype=np.float32)
        mask = tf.from_predicate(rule)
        plan = tf.explain(q, k, v, mask).plan
        asked.clear()
        tf.attention(q, k, v, mask)
        assert max(rows for rows, _ in asked) <= (256 if plan.backend == "native" else plan.block_q)
        assert sum(rows * columns for rows, columns in asked) == n * n  # and each cell is looked at once
        peaks.append(max(rows * columns for rows, columns in asked))
    assert peaks[1] < 2.1 * peaks[0]


# ---- score transforms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 7), (4, 5, 7), (4, 1, 1), (2, 1, 1, 7), (5, 7), (5, 1), (7,), (1,), ()], ids=str
)
def test_bias_is_added_and_broadcasts(shape):
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,))
    (bias,) = arrays(shape, seed=3)
    whole = np.broadcast_to(bias, (2, 4, 5, 7))
    out, lse = run(q, k, v, bias=np.asarray(bias))
    for b in range(2):
        expected = looped(q[b], k[b], v[b], score=lambda s, h, i, j, b=b: s + whole[b, h, i, j])
        close(out[b], expected[0])
        close(lse[b], expected[1])


@pytest.mark.parametrize("name", ORDERS)
def test_bias_of_any_strides(name):
    q, k, v = qkv()
    (bias,) = arrays((2, 5, 7), seed=3)
    given = ORDERS[name](bias)
    check(q, k, v, bias=given, score=lambda s, h, i, j: s + bias[h, i, j])
    with_zero_stride = np.broadcast_to(bias[:, :, :1], (2, 5, 7))
    check(q, k, v, bias=with_zero_stride, score=lambda s, h, i, j: s + bias[h, i, 0])


def test_bias_may_have_another_type():
    q, k, v = qkv()
    bias = np.arange(7, dtype=np.float16)
    check(q, k, v, bias=bias, score=lambda s, h, i, j: s + j)


def test_minus_infinity_in_bias_is_a_mask():
    q, k, v = qkv()
    hidden = np.random.default_rng(2).random((2, 5, 7)) < 0.5
    hidden[1, 2] = True
    bias = np.where(hidden, -INF, 0.25)
    check(q, k, v, bias=bias, sees=lambda h, i, j: not hidden[h, i, j], score=lambda s, h, i, j: s + 0.25)
    masked = run(q, k, v, ~hidden, bias=np.array(0.25))
    for a, b in zip(run(q, k, v, bias=bias), masked, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1])], ids=["", "sinks"])
@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_a_bias_that_is_too_low_for_the_scores_is_a_mask(backend, sinks):
    """-1e300 is a number in float64 and none in float32, where the scores of float32 inputs are summed."""
    q, k, v = qkv(dtype=np.float32)
    hidden = np.random.default_rng(2).random((2, 5, 7)) < 0.5
    hidden[1, 2] = True

    def everything(low):
        options = {"bias": np.where(hidden, low, 0.25), "sinks": sinks, "backend": backend}
        out, lse = tf.attention(q, k, v, **options, return_lse=True)
        return out, lse, *tf.attention_grad(q, k, v, out, lse, np.ones_like(out), **options)

    for a, b in zip(everything(-1e300), everything(-INF), strict=True):
        assert (a is None and b is None) or np.array_equal(a, b)
    assert (everything(-1e300)[0][1, 2] == 0).all()


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("by_batch", [False, True])
def test_alibi(lengths, by_batch):
    q_len, kv_len = lengths
    q, k, v = qkv(heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, lead=(2,))
    slopes = np.array([[0.5, 0.25, 1, 0], [2, 3, -0.5, 0.125]])
    out, lse = run(q, k, v, alibi=slopes if by_batch else slopes[0])
    for b in range(2):

        def score(s, h, i, j, b=b):
            return s - slopes[b if by_batch else 0, h] * abs(i + kv_len - q_len - j)

        expected = looped(q[b], k[b], v[b], score=score)
        close(out[b], expected[0])
        close(lse[b], expected[1])


def test_alibi_counts_from_the_end_whatever_the_mask():
    q, k, v = qkv()

    def score(s, h, i, j):
        return s - 0.5 * abs(i + 2 - j)

    check(q, k, v, tf.causal(align="top-left"), alibi=[0.5, 0.5], sees=lambda i, j: j <= i, score=score)
    check(q, k, v, tf.band(3, 0, 1), alibi=[0.5, 0.5], sees=lambda i, j: i - 2 <= j <= i + 1, score=score)


def test_softcap():
    check(*qkv(), softcap=0.7, score=lambda s, h, i, j: 0.7 * math.tanh(s / 0.7))
    check(*qkv(), softcap=None)


def alone(logits, v=None):
    """Softmax of one row of finished scores: what one query over these keys gives."""
    logits = np.asarray(logits, float)
    top = logits.max()
    return top + np.log(np.exp(logits - top).sum())


class TestOrder:
    """scale -> softcap -> bias + alibi -> mask: each pair of neighbours exchanged gives another number."""

    q, k, v = (x[:1, :1] if n == 0 else x[:1] for n, x in enumerate(qkv()))
    s = (k[0] @ q[0, 0]) * 1.0
    cap, scale = 0.7, 0.4
    bias = np.linspace(-1, 1, 7)

    def lse(self, mask=None, **options):
        return run(self.q, self.k, self.v, mask, **options)[1][0, 0]

    def test_softcap_after_scale(self):
        ours = self.cap * np.tanh(self.scale * self.s / self.cap)
        swapped = self.scale * self.cap * np.tanh(self.s / self.cap)
        got = self.lse(scale=self.scale, softcap=self.cap)
        assert got == pytest.approx(alone(ours), rel=1e-12)
        assert abs(got - alone(swapped)) > 0.01

    def test_bias_after_softcap(self):
        ours = self.cap * np.tanh(self.s / self.cap) + self.bias
        swapped = self.cap * np.tanh((self.s + self.bias) / self.cap)
        got = self.lse(scale=1, softcap=self.cap, bias=self.bias)
        assert got == pytest.approx(alone(ours), rel=1e-12)
        assert abs(got - alone(swapped)) > 0.01

    def test_alibi_after_softcap(self):
        slant = -0.3 * np.abs(6 - np.arange(7))
        ours = self.cap * np.tanh(self.s / self.cap) + slant
        swapped = self.cap * np.tanh((self.s + slant) / self.cap)
        got = self.lse(scale=1, softcap=self.cap, alibi=[0.3])
        assert got == pytest.approx(alone(ours), rel=1e-12)
        assert abs(got - alone(swapped)) > 0.01

    def test_bias_is_not_scaled(self):
        got = self.lse(scale=self.scale, bias=self.bias)
        assert got == pytest.approx(alone(self.scale * self.s + self.bias), rel=1e-12)
        assert abs(got - alone(self.scale * (self.s + self.bias))) > 0.01

    def test_mask_after_softcap(self):
        """A mask before the softcap would leave hidden keys with the score -cap."""
        mask = np.arange(7) < 4
        ours = self.cap * np.tanh(self.s[:4] / self.cap)
        swapped = np.append(ours, [-self.cap] * 3)
        got = self.lse(mask, scale=1, softcap=self.cap)
        assert got == pytest.approx(alone(ours), rel=1e-12)
        assert abs(got - alone(swapped)) > 0.01

    def test_mask_after_bias(self):
        """A bias after the mask could bring a hidden key back, or turn the row into NaN."""
        bias = self.bias.copy()
        bias[4:] = NAN
        got = self.lse(np.arange(7) < 4, scale=1, bias=bias)
        assert got == pytest.approx(alone(self.s[:4] + self.bias[:4]), rel=1e-12)


# ---- sinks ---------------------------------------------------------------------------------------------------


def test_sinks_are_one_more_key_without_a_value():
    q, k, v = qkv(heads=4, kv_heads=2)
    sinks = np.array([0.5, -3, 4, -INF])
    check(q, k, v, sinks=sinks)
    close(run(q, k, v, sinks=list(sinks))[0], run(q, k, v, sinks=sinks)[0])


def test_sinks_are_neither_scaled_nor_capped():
    q, k, v = qkv()
    sinks = np.array([5.0, -2.0])
    check(q, k, v, sinks=sinks, scale=0.1, softcap=0.5, score=lambda s, h, i, j: 0.5 * math.tanh(s / 0.5))


def test_lse_includes_the_sink():
    q, k, v = qkv()
    sinks = np.array([1.5, -0.5])
    _, bare = run(q, k, v)
    _, lse = run(q, k, v, sinks=sinks)
    close(lse, np.logaddexp(bare, sinks[:, None]))


def test_a_sink_is_seeded_once_however_the_keys_are_split():
    q, k, v = qkv()
    sinks = np.array([1.5, -0.5])
    whole = run(q, k, v, sinks=sinks)
    first = tf.attention(q, k[:, :3], v[:, :3], sinks=sinks, return_lse=True)
    second = tf.attention(q, k[:, 3:], v[:, 3:], return_lse=True)
    for got, expected in zip(tf.merge(first, second), whole, strict=True):
        close(got, expected)


# ---- rows without keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hide", ["mask", "bias", "window", "causal"])
@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.5])], ids=["bare", "sinks"])
def test_a_row_without_keys(hide, sinks):
    """out 0, lse -inf or the sink, no gradient from it, even where its q and dout are NaN."""
    q, k, v = qkv(q_len=7, kv_len=5) if hide in ("causal", "window") else qkv()
    empty = np.arange(q.shape[1]) < 2
    row = np.where(empty, -INF, 0.0)[:, None]
    options = {
        "mask": {"mask": np.broadcast_to(~empty[:, None], (q.shape[1], k.shape[1]))},
        "bias": {"bias": np.broadcast_to(row, (q.shape[1], k.shape[1]))},
        "window": {"window": (None, 0)},
        "causal": {"causal": True},
    }[hide]
    dout, dlse = arrays((2, q.shape[1], 3), (2, q.shape[1]), seed=9)
    if sinks is not None:
        dlse[:, empty] = 0  # what the sink's own gradient would be
    clean = tf.attention_grad(
        q, k, v, *run(q, k, v, sinks=sinks, **options), dout, dlse, sinks=sinks, **options
    )
    q[:, empty], dout[:, empty] = NAN, NAN
    if sinks is None:
        dlse[:, empty] = NAN
    out, lse = run(q, k, v, sinks=sinks, **options)
    assert (out[:, empty] == 0).all()
    assert (lse[:, empty] == (-INF if sinks is None else sinks[:, None])).all()
    assert np.isfinite(out).all()
    grads = tf.attention_grad(q, k, v, out, lse, dout, dlse, sinks=sinks, **options)
    assert (grads.dq[:, empty] == 0).all()
    for got, expected in zip(grads, clean, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            close(got, expected)


def test_a_row_without_keys_is_neutral_in_merge():
    q, k, v = qkv()
    whole = tf.attention(q, k, v, return_lse=True)
    nothing = tf.attention(q, k, v, ~tf.prefix(7), return_lse=True)
    garbage = np.full_like(whole[0], NAN), np.full_like(whole[1], -INF)
    for other in (nothing, garbage):
        for parts in ((whole, other), (other, whole), (other, whole, other)):
            for got, expected in zip(tf.merge(*parts), whole, strict=True):
                assert np.array_equal(got, expected)
    out, lse = tf.merge(nothing, garbage)
    assert (out == 0).all()
    assert (lse == -INF).all()


# ---- masked means ignored ------------------------------------------------------------------------------------

SEEN = np.zeros((2, 5, 7), bool)
SEEN[:, :, 1:4] = True
SEEN[0, 0, 1] = SEEN[1, 4, 2:] = False
ONE = np.array([2, 1])

# How a call can hide some keys from everyone; keys 1, 2 and 3 stay. Each also hides single cells where it can.
HIDING = {
    "array": {"mask": SEEN},
    "array, 2-D": {"mask": SEEN[0]},
    "predicate": {"mask": tf.from_predicate(lambda i, j: (j > 0) & (j < 4) & ((i + j) % 3 > 0))},
    "bias": {"bias": np.where(SEEN, 0.5, -INF)},
    "bias row": {"bias": np.where(SEEN[0, 1], 0.5, -INF)},
    "band": {"mask": tf.band(0, 1, 1) & tf.prefix(4)},
    "documents": {"mask": tf.documents([5, 0, 0, 0, 6, 5, 6], q_ids=[0, 0, 0, 0, 0])},
    "lengths as a mask": {"mask": tf.lengths(4) & ~tf.prefix(1)},
    "kv_lengths": {"kv_lengths": 4, "mask": ~tf.prefix(1)},
    "kv_lengths, causal": {"kv_lengths": 4, "causal": True, "mask": ~tf.prefix(1)},
    "window": {"window": (2, 0), "kv_lengths": 4, "mask": ~tf.prefix(1)},
    "sinks and mask": {"mask": SEEN, "sinks": np.array([0.5, 1.0])},
    "softcap and mask": {"mask": SEEN, "softcap": 2.0},
    "alibi, softcap, bias": {"alibi": [0.5, 1.0], "softcap": 2.0, "bias": np.where(SEEN, 0.5, -INF)},
}


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", HIDING)
def test_what_a_mask_hides_reaches_nothing(name, poison):
    """Every output and gradient is what it is with zeros in the hidden keys and values: finite, to the bit."""
    options = HIDING[name]
    q, k, v = qkv(heads=2, kv_heads=1)
    dout, dlse = arrays((2, 5, 3), (2, 5), seed=9)
    hidden = [0, 4, 5, 6]
    results = []
    for value in (0.0, poison):
        k[:, hidden], v[:, hidden] = value, value
        out, lse = run(q, k, v, **options)
        grads = tf.attention_grad(q, k, v, out, lse, dout, dlse, **options)
        mass = tf.probe(q, k, KeyMass(), **options).key_mass
        results.append([out, lse, mass, *(x for x in grads if x is not None)])
    for clean, poisoned in zip(*results, strict=True):
        assert not np.isnan(poisoned).any()
        assert np.array_equal(clean, poisoned)


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_a_poisoned_key_reaches_only_rows_that_see_it(poison):
    """Causal: key 4 is the future of rows 0 and 1, which must not notice; rows 2 to 4 see it and must be NaN."""
    q, k, v = qkv()
    q[...] = np.abs(q)
    clean = run(q, k, v, causal=True)
    k[:, 4] = poison
    out, lse = run(q, k, v, causal=True)
    close(out[:, :2], clean[0][:, :2])
    close(lse[:, :2], clean[1][:, :2])
    assert np.isnan(out[:, 2:]).all()
    assert np.isnan(lse[:, 2:]).all()


def test_a_poisoned_value_reaches_only_rows_that_see_it():
    q, k, v = qkv()
    clean, _ = run(q, k, v, causal=True)
    v[:, 4, 1] = NAN
    out, lse = run(q, k, v, causal=True)
    assert np.isfinite(lse).all()
    assert np.isnan(out[:, 2:, 1]).all()
    for columns in (0, 2):
        close(out[:, :, columns], clean[:, :, columns])
    close(out[:, :2], clean[:, :2])


@pytest.mark.parametrize("what", ["q", "dout"])
def test_a_poisoned_row_reaches_only_keys_that_it_sees(what):
    """Row 1 sees keys 0 to 3 and is NaN: the gradients of keys 4 to 6 and of other rows must not notice."""
    q, k, v = qkv()
    (dout,) = arrays((2, 5, 3), seed=9)

    def grads():
        return tf.attention_grad(q, k, v, *run(q, k, v, causal=True), dout, causal=True)

    clean = grads()
    {"q": q, "dout": dout}[what][:, 1] = NAN
    dirty = grads()
    close(dirty.dk[:, 4:], clean.dk[:, 4:])
    close(dirty.dv[:, 4:], clean.dv[:, 4:])
    close(dirty.dq[:, [0, 2, 3, 4]], clean.dq[:, [0, 2, 3, 4]])
    assert np.isnan(dirty.dq[:, 1]).all()


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (2, 1)}, {"alibi": [0.5, 0.1]}], ids=str
)
def test_padding_is_never_read_and_padded_rows_are_zero(options):
    q, k, v = qkv(lead=(3,))
    dout, dlse = arrays((3, 2, 5, 3), (3, 2, 5), seed=9)
    q_ends, kv_ends = np.array([5, 2, 0]), np.array([3, 7, 4])
    for b in range(3):
        q[b, :, q_ends[b] :], dout[b, :, q_ends[b] :], dlse[b, :, q_ends[b] :] = NAN, NAN, NAN
        k[b, :, kv_ends[b] :], v[b, :, kv_ends[b] :] = NAN, NAN
    options = options | {"q_lengths": q_ends, "kv_lengths": kv_ends}
    out, lse = run(q, k, v, **options)
    grads = tf.attention_grad(q, k, v, out, lse, dout, dlse, **options)
    assert np.isfinite(out).all()
    for b in range(3):
        assert (out[b, :, q_ends[b] :] == 0).all()
        assert (lse[b, :, q_ends[b] :] == -INF).all()
        assert (grads.dq[b, :, q_ends[b] :] == 0).all()
        assert (grads.dk[b, :, kv_ends[b] :] == 0).all()
        assert (grads.dv[b, :, kv_ends[b] :] == 0).all()
    assert all(np.isfinite(x).all() for x in grads[:3])


# ---- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"bias": np.zeros(3, np.float32)}, {"alibi": [0.5]}, {"causal": True}], ids=str
)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_overflow_give_nan_never_a_silent_zero(sign, options):
    q = np.full((1, 3, 2), 1e25, np.float32)
    k = np.full((1, 3, 2), sign * 1e25, np.float32)
    out, lse = run(q, k, np.ones((1, 3, 2), np.float32), **options)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_an_overflowing_row_leaves_the_others_alone():
    q, k, v = qkv(dtype=np.float32)
    clean, _ = run(q, k, v)
    k[:, :] = np.abs(k)
    clean, _ = run(q, k, v)
    q[:, 2] = -3e38
    out, _ = run(q, k, v, scale=0.5)
    assert np.isnan(out[:, 2]).all()
    close(np.delete(out, 2, axis=1), np.delete(clean, 2, axis=1), np.float32)


def test_huge_finite_scores_are_exact_one_hots():
    q = np.array([[[1e15]]], np.float32)
    k = np.array([[[-1e15], [1e15], [0.5e15], [0]]], np.float32)
    v = np.array([[[3], [5], [7], [9]]], np.float32)
    out, lse = run(q, k, v, scale=1.0)
    assert out == 5
    assert lse == np.float32(1e15) * np.float32(1e15)


def test_a_million_equal_scores():
    n = 2**20
    out, lse = tf.attention(
        np.zeros((1, 2, 1), np.float32),
        np.zeros((1, n, 1), np.float32),
        np.ones((1, n, 1), np.float32),
        return_lse=True,
    )
    close(out, np.ones((1, 2, 1)), np.float32)
    close(lse, np.full((1, 2), math.log(n)), np.float32)


# ---- lengths and packing -------------------------------------------------------------------------------------

Q_SIZES, KV_SIZES = [3, 0, 5, 2], [6, 4, 0, 2]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (1, 1)},
        {"causal": True, "window": (2, 0), "softcap": 2.0},
        {"alibi": np.array([0.5, 0.25])},
        {"sinks": np.array([0.5, 1.0]), "causal": True},
        {"mask": tf.chunked(2)},
        {"mask": tf.causal() | tf.prefix(1)},
        {"mask": tf.from_predicate(lambda i, j: (i + j) % 2 == 0)},
    ],
    ids=str,
)
def test_padded_packed_and_alone_are_the_same(options):
    """A sequence ends where its lengths say: everything aligns to that, in a batch, packed, or on its own."""
    n = len(Q_SIZES)
    q, k, v = qkv(q_len=5, kv_len=7, lead=(n,))
    dout, dlse = arrays((n, 2, 5, 3), (n, 2, 5), seed=9)

    def packed(x, sizes):
        return np.concatenate([x[b, :, :m] for b, m in enumerate(sizes)], axis=1)

    def both(options, q, k, v, dout, dlse):
        out, lse = tf.attention(q, k, v, return_lse=True, **options)
        grads = tf.attention_grad(q, k, v, out, lse, dout, dlse, **options)
        return out, lse, *grads

    padded = both(
        options | {"q_lengths": np.array(Q_SIZES), "kv_lengths": np.array(KV_SIZES)}, q, k, v, dout, dlse
    )
    ends = [np.cumsum([0, *sizes]).astype(t) for sizes, t in ((Q_SIZES, np.int32), (KV_SIZES, np.int64))]
    together = both(
        options | {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]},
        *(
            packed(x, s)
            for x, s in ((q, Q_SIZES), (k, KV_SIZES), (v, KV_SIZES), (dout, Q_SIZES), (dlse, Q_SIZES))
        ),
    )
    sizes = [Q_SIZES, Q_SIZES, Q_SIZES, KV_SIZES, KV_SIZES]
    alone = [
        both(options, q[b, :, :m], k[b, :, :t], v[b, :, :t], dout[b, :, :m], dlse[b, :, :m])
        for b, (m, t) in enumerate(zip(Q_SIZES, KV_SIZES, strict=True))
    ]
    for part in range(5):
        single = np.concatenate([results[part] for results in alone], axis=1)
        close(packed(padded[part], sizes[part]), single)
        close(together[part], single)
    if "sinks" in options:
        close(padded[6], sum(results[6] for results in alone))
        close(together[6], padded[6])


def test_packed_against_loops():
    q, k, v = qkv(heads=4, kv_heads=2, q_len=10, kv_len=12)
    q_ends, k_ends = np.cumsum([0, *Q_SIZES]), np.cumsum([0, *KV_SIZES])
    out, lse = run(q, k, v, causal=True, cu_seqlens_q=q_ends, cu_seqlens_k=k_ends)
    for b in range(4):
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        shift = KV_SIZES[b] - Q_SIZES[b]
        expected = looped(q[:, rows], k[:, keys], v[:, keys], lambda i, j, shift=shift: j <= i + shift)
        close(out[:, rows], expected[0])
        close(lse[:, rows], expected[1])


def test_packed_arrays_are_indexed_by_packed_rows():
    """A mask or bias of packed sequences is one matrix; each sequence reads its own rectangle of it."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=10, kv_len=12)
    bias, dout = arrays((4, 10, 12), (4, 10, 3), seed=3)
    mask = np.random.default_rng(5).random((4, 10, 12)) < 0.7
    q_ends, k_ends = np.cumsum([0, *Q_SIZES]), np.cumsum([0, *KV_SIZES])
    ends = {"cu_seqlens_q": q_ends, "cu_seqlens_k": k_ends}
    out, lse = run(q, k, v, mask, bias=bias, **ends)
    grads = tf.attention_grad(q, k, v, out, lse, dout, mask=mask, bias=bias, **ends)
    for b in range(4):
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        part, shift = (q[:, rows], k[:, keys], v[:, keys]), bias[:, rows, keys]
        seen = mask[:, rows, keys]
        expected = looped(
            *part, lambda h, i, j, x=seen: x[h, i, j], lambda s, h, i, j, x=shift: s + x[h, i, j]
        )
        close(out[:, rows], expected[0])
        close(lse[:, rows], expected[1])
        alone = tf.attention_grad(*part, *expected, dout[:, rows], mask=seen, bias=shift)
        close(grads.dk[:, keys], alone.dk)
        close(grads.dbias[:, rows, keys], alone.dbias)


def test_one_length_stands_for_all():
    q, k, v = qkv(lead=(2, 2))
    a = tf.attention(q, k, v, q_lengths=4, kv_lengths=np.int32(6))
    b = tf.attention(q, k, v, q_lengths=np.full((2, 2), 4), kv_lengths=np.full((2, 2), 6, np.uint8))
    assert np.array_equal(a, b)
    close(a[..., :4, :], tf.attention(q[..., :4, :], k[..., :6, :], v[..., :6, :]))


# ---- verbs ---------------------------------------------------------------------------------------------------


class KeyMass:
    """How much weight each key got: a column statistic, as a user would write one."""

    name = "key_mass"

    def start(self, problem, lead):
        self.mass = np.zeros((*lead, problem.heads, problem.kv_len))
        return self

    def open(self, block, live, scores):
        pass

    def take(self, w):
        self.mass[w.index][w.heads, w.keys] += w.by_head.sum(axis=2)

    def close(self, block):
        pass

    def result(self):
        return self.mass


def test_what_is_returned():
    q, k, v = qkv()
    out = tf.attention(q, k, v)
    assert type(out) is np.ndarray
    pair = tf.attention(q, k, v, return_lse=True)
    assert type(pair) is tuple
    assert [type(x) for x in pair] == [np.ndarray] * 2
    assert np.array_equal(pair[0], out)
    for return_lse in (False, True):
        three = tf.attention(q, k, v, probes=[KeyMass()], return_lse=return_lse)
        assert [type(x) for x in three] == [np.ndarray, np.ndarray, tf.Seen]
        few = 4 * np.finfo(float).eps  # a probe of one's own is shown its tiles by NumPy
        assert np.allclose(three[1], pair[1], rtol=few)
        assert vars(three[2]).keys() == {"key_mass"}
    given = np.empty_like(out)
    assert tf.attention(q, k, v, out=given, return_lse=True)[0] is given
    assert type(tf.attention(q, k, v, probes=[])) is np.ndarray
    grads = tf.attention_grad(q, k, v, *pair, out)
    assert type(grads) is tf.Grads
    assert grads.dbias is None
    assert grads.dsinks is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"mask": SEEN[0]},
        {"bias": np.where(SEEN, 0.5, -INF), "softcap": 2.0},
        {"sinks": np.ones(4)},
        {"q_lengths": np.array([5, 2]), "kv_lengths": np.array([3, 7]), "causal": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_a_probe_sees_every_weight_once(options):
    q, k, v = qkv(heads=4, kv_heads=2, q_len=5, lead=(2,))
    if "bias" in options:
        options = options | {"bias": np.concatenate([options["bias"]] * 2)}
    sums = naive_weights(q, k, **options).sum(axis=-2)
    close(tf.probe(q, k, KeyMass(), **options).key_mass, sums)
    close(tf.attention(q, k, v, probes=[KeyMass()], **options)[2].key_mass, sums)


def test_a_probe_of_packed_sequences():
    q, k, _ = qkv(q_len=10, kv_len=12)
    ends = {"cu_seqlens_q": np.cumsum([0, *Q_SIZES]), "cu_seqlens_k": np.cumsum([0, *KV_SIZES])}
    close(
        tf.probe(q, k, KeyMass(), causal=True, **ends).key_mass,
        naive_weights(q, k, causal=True, **ends).sum(axis=-2),
    )


def test_the_weights_of_the_oracle_are_the_loops():
    q, k, _ = qkv()
    picks = np.broadcast_to(np.eye(7), (2, 7, 7))
    close(naive_weights(q, k, causal=True), looped(q, k, picks, lambda i, j: j <= i + 2)[0])


def test_merge_joins_any_split_of_the_keys():
    q, k, v = qkv(q_len=5, kv_len=9, lead=(2,))
    whole = tf.attention(q, k, v, return_lse=True)
    cuts = [0, 1, 1, 4, 9]
    parts = [
        tf.attention(q, k[..., a:b, :], v[..., a:b, :], return_lse=True)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    for order in (parts, parts[::-1], [tf.merge(*parts[:2]), tf.merge(*parts[2:])]):
        for got, expected in zip(tf.merge(*order), whole, strict=True):
            close(got, expected)


@pytest.mark.parametrize("name", ROWS)
def test_merge_keeps_types_and_memory_order(name):
    dtype = dtype_of(name)
    q, k, v = (ORDERS["bshd"](x) for x in qkv(lead=(2,), dtype=dtype))
    part = tf.attention(q, k, v, return_lse=True)
    out, lse = tf.merge(part, part)
    assert (out.dtype, lse.dtype) == (dtype, part[1].dtype)
    assert out.swapaxes(-3, -2).flags.c_contiguous
    close(out.astype(float), part[0].astype(float), dtype)
    close(lse, part[1] + math.log(2), lse.dtype)


def test_merge_of_one_part_is_that_part():
    part = tf.attention(*qkv(), return_lse=True)
    for got, expected in zip(tf.merge(part), part, strict=True):
        assert np.array_equal(got, expected)
        assert got is not expected


def test_a_plan_can_be_passed_back():
    q, k, v = qkv(heads=4, kv_heads=2)
    why = tf.explain(q, k, v, causal=True)
    assert why.plan == tf.explain(q, k, v, causal=True).plan
    assert np.array_equal(
        tf.attention(q, k, v, causal=True, plan=why.plan), tf.attention(q, k, v, causal=True)
    )
    out, lse = tf.attention(q, k, v, causal=True, plan=why.plan, return_lse=True)
    assert lse.shape == out.shape[:-1]
    assert tf.explain(q, k, v, causal=True, plan=why.plan).plan == why.plan
    assert tf.attention(q, k, v, causal=True, plan=why.plan, backend=why.plan.backend).shape == out.shape


def test_explain_runs_nothing_and_says_what_would_run():
    q, k, v = qkv()
    for x in (q, k, v):
        x.flags.writeable = False
    why = tf.explain(q, k, v, causal=True)
    assert why.plan.backend in str(why)
    for name, sentence in why.refusals:
        assert f"passed over {name}: {sentence}" in str(why)
    seen = sum(j <= i + 2 for i in range(5) for j in range(7)) * 2
    assert why.cells == seen
    assert why.flops == 2 * seen * (4 + 3)
    assert why.exact
    assert tf.explain(q, k, v, backend="numpy").refusals == ()


def test_an_explicit_backend_never_falls_back():
    q, k, v = qkv()
    sentence = NativeBackend().why_not(tf.explain(q, k, v).problem)
    if sentence is not None:
        with pytest.raises(tf.BackendRefused) as refused:
            tf.attention(q, k, v, backend="native")
        assert sentence in str(refused.value)
        assert "'native'" in str(refused.value)
    with pytest.raises(tf.BackendRefused, match="'numpy' refuses: invariant=True promises the same bits"):
        tf.attention(q, k, v, backend="numpy", invariant=True)
    assert tf.explain(q, k, v, backend="numpy").plan.backend == "numpy"


# ---- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sees", "score"),
    [
        ({}, lambda i, j: True, None),
        ({"causal": True}, lambda i, j: j <= i + 1, None),
        ({"softcap": 0.9, "scale": 0.8}, lambda i, j: True, lambda s, h, i, j: 0.9 * math.tanh(s / 0.9)),
        ({"alibi": [0.5, 0.1]}, lambda i, j: True, lambda s, h, i, j: s - [0.5, 0.1][h] * abs(i + 1 - j)),
    ],
    ids=["plain", "causal", "softcap", "alibi"],
)
def test_gradients_are_slopes(options, sees, score):
    """Against differences of the loops: dq, dk, dv, dbias and dsinks, through out and through lse."""
    q, k, v = qkv(heads=2, kv_heads=1, q_len=3, kv_len=4, dim=2, v_dim=2)
    bias, sinks, dout, dlse = arrays((3, 4), (2,), (2, 3, 2), (2, 3), seed=8)

    def target():
        def shifted(s, h, i, j):
            return (s if score is None else score(s, h, i, j)) + bias[i, j]

        out, lse = looped(q, k, v, sees, shifted, sinks, options.get("scale"))
        return (out * dout).sum() + (lse * dlse).sum()

    out, lse = tf.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **options)
    grads = tf.attention_grad(q, k, v, out, lse, dout, dlse, bias=bias, sinks=sinks, **options)
    step = 1e-5
    for x, got in zip((q, k, v, bias, sinks), grads, strict=True):
        assert got.shape == x.shape
        slopes = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            here = x[at]
            x[at] = here + step
            up = target()
            x[at] = here - step
            slopes[at] = (up - target()) / (2 * step)
            x[at] = here
        np.testing.assert_allclose(got, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 7), (4, 5, 7), (4, 1, 1), (2, 1, 1, 7), (5, 1), (7,), ()], ids=str
)
def test_gradient_of_a_broadcast_bias_is_summed(shape):
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,))
    (bias,) = arrays(shape, seed=3)
    bias = np.asarray(bias)
    out, lse = tf.attention(q, k, v, bias=bias, return_lse=True)
    (dout,) = arrays(out.shape, seed=4)
    got = tf.attention_grad(q, k, v, out, lse, dout, bias=bias).dbias
    full = np.ascontiguousarray(np.broadcast_to(bias, (2, 4, 5, 7)))
    whole = tf.attention_grad(q, k, v, out, lse, dout, bias=full).dbias
    extra = tuple(range(4 - bias.ndim))
    summed = whole.sum(axis=extra)
    summed = summed.sum(axis=tuple(n for n, size in enumerate(shape) if size == 1), keepdims=True)
    assert got.shape == shape
    close(got, summed)


@pytest.mark.parametrize("name", ROWS)
def test_gradients_have_the_types_and_orders_of_what_they_belong_to(name):
    dtype = dtype_of(name)
    q, k, v = (ORDERS["bshd"](x) for x in qkv(heads=4, kv_heads=2, lead=(2,), dtype=dtype))
    bias = np.zeros((5, 1), np.float16)
    out, lse = tf.attention(q, k, v, bias=bias, sinks=np.zeros(4, np.float32), return_lse=True)
    grads = tf.attention_grad(q, k, v, out, lse, out, bias=bias, sinks=np.zeros(4, np.float32))
    for x, dx in zip((q, k, v), grads, strict=False):
        assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
        assert dx.swapaxes(-3, -2).flags.c_contiguous
    assert (grads.dbias.shape, grads.dbias.dtype) == ((5, 1), np.float16)
    assert (grads.dsinks.shape, grads.dsinks.dtype) == ((4,), np.float32)


def test_gradients_of_two_dimensions():
    q, k, v = (x[0] for x in qkv(heads=1))
    out, lse = tf.attention(q, k, v, return_lse=True)
    flat = tf.attention_grad(q, k, v, out, lse, out, lse)
    whole = tf.attention_grad(q[None], k[None], v[None], out[None], lse[None], out[None], lse[None])
    for a, b in zip(flat[:3], whole[:3], strict=True):
        assert np.array_equal(a, b[0])


# ---- any array in, the same kind out -------------------------------------------------------------------------


class Foreign:
    """An array of another library: all that is known of it is DLPack."""

    __module__ = "foreign.arrays"

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Standard(Foreign):
    """One that also names its namespace, as the array API standard asks."""

    def __array_namespace__(self):
        return SimpleNamespace(from_dlpack=lambda x: Standard(np.from_dlpack(x)))


@pytest.fixture
def foreign(monkeypatch):
    module = ModuleType("foreign")
    module.from_dlpack = lambda x: Foreign(np.from_dlpack(x))
    monkeypatch.setitem(sys.modules, "foreign", module)


@pytest.mark.parametrize("kind", [Foreign, Standard])
@pytest.mark.usefixtures("foreign")
def test_a_foreign_array_comes_back_as_its_own_kind(kind):
    q, k, v = qkv(lead=(2,))
    expected = tf.attention(q, k, v, causal=True, return_lse=True)
    fq, fk, fv = (kind(x) for x in (q, k, v))
    got = tf.attention(fq, fk, fv, causal=True, return_lse=True)
    for a, b in zip(got, expected, strict=True):
        assert type(a) is kind
        assert np.array_equal(a.array, b)
    out = kind(np.full_like(expected[0], NAN))
    assert tf.attention(fq, fk, fv, causal=True, out=out) is out
    assert np.array_equal(out.array, expected[0])
    mask = np.tri(5, 7, 2, dtype=bool)
    assert np.array_equal(tf.attention(fq, fk, fv, kind(mask)).array, expected[0])
    grads = tf.attention_grad(fq, fk, fv, *got, got[0], causal=True)
    for a, b in zip(
        grads[:3], tf.attention_grad(q, k, v, *expected, expected[0], causal=True)[:3], strict=True
    ):
        assert type(a) is kind
        assert np.array_equal(a.array, b)
    merged = tf.merge(got, got)
    assert [type(x) for x in merged] == [kind, kind]
    flash = tf.flash_attention(fq, fk, fv)
    assert type(flash.output) is kind
    assert type(tf.naive_attention(fq, fk, fv)[0]) is kind


def test_a_foreign_array_elsewhere_is_refused():
    q, k, v = qkv()
    remote = Foreign(q)
    remote.__class__ = type("Remote", (Foreign,), {"__dlpack_device__": lambda self: (2, 0)})
    with pytest.raises(
        TypeError, match=r"q is a .*Remote on DLPack device type 2; only arrays in CPU memory"
    ):
        tf.attention(remote, k, v)


def test_subclasses_of_ndarray_are_taken_as_what_they_hold(tmp_path):
    q, k, v = qkv()
    expected = tf.attention(q, k, v)
    mapped = np.memmap(tmp_path / "q", np.float64, "w+", shape=q.shape)
    mapped[...] = q
    assert np.array_equal(tf.attention(mapped, k, v), expected)
    assert np.array_equal(tf.attention(q.view(type("Mine", (np.ndarray,), {})), k, v), expected)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_torch_tensors(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    q, k, v = qkv(heads=4, kv_heads=2, lead=(2,), dtype=name)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    out, lse = tf.attention(*tensors, causal=True, return_lse=True)
    assert [type(x) for x in (out, lse)] == [torch.Tensor, torch.Tensor]
    assert out.dtype == tensors[0].dtype
    expected = tf.attention(q, k, v, causal=True, return_lse=True)
    assert np.array_equal(out.numpy(), expected[0])
    assert np.array_equal(lse.numpy(), expected[1])
    into = torch.full_like(out, NAN)
    assert tf.attention(*tensors, causal=True, out=into) is into
    assert torch.equal(into, out)
    swapped = [x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in tensors]
    assert torch.equal(tf.attention(*swapped, causal=True), out)
    assert isinstance(tf.attention_grad(*tensors, out, lse, out, causal=True).dk, torch.Tensor)
    assert isinstance(tf.merge((out, lse), (out, lse))[1], torch.Tensor)


def test_jax_arrays():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    q, k, v = qkv(dtype=np.float32)
    out, lse = tf.attention(*(jax.numpy.asarray(x) for x in (q, k, v)), causal=True, return_lse=True)
    assert isinstance(out, jax.Array)
    assert isinstance(lse, jax.Array)
    assert np.array_equal(np.asarray(out), tf.attention(q, k, v, causal=True))
    with pytest.raises(ValueError, match="out must be writeable"):
        tf.attention(q, k, v, out=jax.numpy.zeros(out.shape))
