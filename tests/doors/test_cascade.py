"""A cascade is as exact as the plain way, and is taken where it may and pays, nowhere else.

Every sequence is held against `naive` in a wider type, within the budget that any backend has; half types are given
the rounding of the two parts, which is computed too.
"""

import numpy as np
import pytest
from budgets import judge, nudged, reference_type, rounds_weights

import tilefold as tf
from tilefold.caches import cascade
from tilefold.dtypes import ROWS
from tilefold.naive import naive

HEADS, KV_HEADS, DIM, V_DIM, PAGE = 4, 2, 16, 12, 8

pytestmark = pytest.mark.usefixtures("either_backend")


def numpy_type(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


def random(seed, *shape, dtype="float32"):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(numpy_type(dtype))


def family(shared=64, own=(5, 0, 20, 9), dtype="float32", **settings):
    """Sequences that begin with the same pages: the cache, their ids, and keys and values of each."""
    cache = tf.PagedKVCache(KV_HEADS, DIM, V_DIM, page=PAGE, dtype=numpy_type(dtype), pages=100, **settings)
    for memory in (cache.k, cache.v):
        memory[...] = np.nan
    first = cache.open()
    start = [random(n, 1, KV_HEADS, shared, d, dtype=dtype) for n, d in enumerate((DIM, V_DIM))]
    cache.append(first, *start)
    ids = [cache.fork(first) for _ in own]
    cache.free(first)
    every = []
    for id, rows in zip(ids, own, strict=True):
        rest = [random(n, 1, KV_HEADS, rows, d, dtype=dtype) + id for n, d in enumerate((DIM, V_DIM))]
        rest = [x.astype(start[0].dtype) for x in rest]
        cache.append(id, *rest)
        every.append([np.concatenate([x, y], axis=2) for x, y in zip(start, rest, strict=True)])
    return cache, ids, every


@pytest.fixture
def always(monkeypatch):
    """However little it saves."""
    monkeypatch.setattr(cascade, "PAYS", -(2**60))


HALVES = slice(0, 64), slice(64, None)  # the shared keys and the rest
TAKEN = {
    "full": {},
    "causal": {"causal": True},
    "softcap": {"causal": True, "softcap": 2.0},
    "sinks": {"causal": True, "sinks": np.linspace(-2, 3, HEADS)},
    "scale": {"scale": -0.3},
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("dtype", list(ROWS))
def test_within_the_budget_of_every_backend(dtype, options, q_len):
    cache, ids, every = family(dtype=dtype, own=(5, 6, 20, 9))
    view, acc = cache.view(ids, cascade=True), ROWS[dtype].accumulate
    q = random(0, len(ids), HEADS, q_len, DIM, dtype=dtype)
    assert tf.explain(q, view, **options).shared == 64
    got = tf.attention(q, view, return_lse=True, **options)
    wide, narrow, rng = reference_type(acc), rounds_weights(dtype), np.random.default_rng(0)
    for n, (k, v) in enumerate(every):
        mine = q[n : n + 1], k, v
        right = naive(*mine, **options, dtype=wide)
        plain = naive(*mine, **options, dtype=acc)
        moved = naive(*(nudged(x, acc, rng) for x in mine), **options, dtype=wide)
        rounded = naive(*mine, **options, dtype=acc, weights_dtype=narrow)[0] if narrow else None
        parts = [
            naive(q[n : n + 1], k[:, :, some], v[:, :, some], dtype=wide, **options)[0] for some in HALVES
        ]
        rounding = ROWS[dtype].roundoff * max(np.abs(part).max() for part in parts) if dtype != acc else 0
        for i, (name, to) in enumerate((("out", dtype), ("lse", acc))):
            error = judge(name, got[i][n : n + 1], (plain[i], moved[i]), right[i], to, None if i else rounded)
            assert error.same_specials, str(error)
            assert error.error <= error.budget + (0 if i else rounding), (n, str(error))


@pytest.mark.usefixtures("always")
def test_padding_is_zero_whatever_it_holds():
    cache, ids, _ = family()
    q = random(0, 4, HEADS, 6, DIM)
    q_lengths = [2, 0, 6, 1]
    for n, end in enumerate(q_lengths):
        q[n, :, end:] = np.nan
    options = {"causal": True, "q_lengths": np.array(q_lengths), "sinks": np.ones(HEADS)}
    view = cache.view(ids, cascade=True)
    assert tf.explain(q, view, **options).shared == 64
    out, lse = tf.attention(q, view, return_lse=True, **options)
    plain, plain_lse = tf.attention(q, cache[ids], return_lse=True, **options)
    for n, end in enumerate(q_lengths):
        assert not out[n, :, end:].any() and np.isneginf(lse[n, :, end:]).all()
    tolerance = 64 * ROWS["float32"].roundoff
    np.testing.assert_allclose(out, plain, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, plain_lse, rtol=tolerance)


@pytest.mark.usefixtures("always")
def test_a_sequence_may_end_where_the_shared_pages_end():
    """It has no keys of its own: the rest is empty, and sinks count once all the same."""
    cache, ids, every = family(own=(0, 3))
    q, sinks = random(0, 2, HEADS, 1, DIM), np.linspace(-1, 2, HEADS)
    view = cache.view(ids, cascade=True)
    assert tf.explain(q, view, causal=True).shared == 64
    out, lse = tf.attention(q, view, causal=True, sinks=sinks, return_lse=True)
    alone, alone_lse = tf.attention(q[:1], *every[0], causal=True, sinks=sinks, return_lse=True)
    tolerance = 64 * ROWS["float32"].roundoff
    np.testing.assert_allclose(out[:1], alone, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse[:1], alone_lse, rtol=tolerance)


NOT_TAKEN = {
    "a window": {"window": (70, 0)},
    "a mask": {"mask": tf.prefix(70)},
    "alibi": {"causal": True, "alibi": np.full(HEADS, 0.1)},
    "bias": {"bias": np.zeros((HEADS, 1, 1))},
    "invariant": {"causal": True, "invariant": True},
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_not_where_positions_or_masks_differ(options, either_backend):
    if either_backend == "numpy" and "invariant" in options:
        pytest.skip("NumPy refuses invariant=True")
    cache, ids, _ = family()
    q, view = random(0, 4, HEADS, 1, DIM), cache.view(ids, cascade=True)
    assert tf.explain(q, view, **options).shared == 0
    assert np.array_equal(tf.attention(q, view, **options), tf.attention(q, cache[ids], **options))


@pytest.mark.usefixtures("always")
def test_only_pages_that_all_share_and_all_queries_see():
    cache, ids, _ = family(shared=61)  # the last shared page is not full, so each has its own
    q = random(0, 4, HEADS, 1, DIM)

    def shared(q, *which, **options):
        return tf.explain(q, cache.view([ids[n] for n in which], cascade=True), **options).shared

    assert shared(q, 0, 1, 2, 3) == 56
    assert shared(q[:1], 0) == 0
    assert shared(q[:2], 2, 2) == 80  # twice the same
    late = np.repeat(q, 20, axis=2)  # the first queries of sequence 1 stand at 41
    assert shared(late, 0, 1, 2, 3, causal=True) == 40
    assert shared(late, 0, 1, 2, 3) == 56
    assert shared(np.repeat(late, 4, axis=2), 0, 1, 2, 3, causal=True) == 0
    other = cache.open()
    cache.append(other, *(random(n, 1, KV_HEADS, 70, d) for n, d in enumerate((DIM, V_DIM))))
    assert tf.explain(q[:2], cache.view([ids[0], other], cascade=True)).shared == 0
    assert tf.explain(q[:2], cache.view([ids[0], cache.open()], cascade=True)).shared == 0


def test_only_where_asked_and_only_where_it_pays(monkeypatch):
    cache, ids, _ = family()
    q = random(0, 4, HEADS, 1, DIM)
    row = KV_HEADS * (DIM + V_DIM) * 4
    view = cache.view(ids, cascade=True)
    assert tf.explain(q, view).shared == 0
    gain = 64 * row * 3 - cascade.PASSES * 4 * HEADS * V_DIM * 4
    monkeypatch.setattr(cascade, "PAYS", gain)
    assert tf.explain(q, view).shared == 64
    assert tf.explain(q, cache[ids]).shared == 0
    monkeypatch.setattr(cascade, "PAYS", gain + 1)
    assert tf.explain(q, view).shared == 0
    monkeypatch.setattr(cascade, "PAYS", 0)
    many = np.repeat(q, 400, axis=2)  # joining costs by the row, reading does not
    assert tf.explain(many, view).shared == 0


@pytest.mark.usefixtures("always")
def test_results_come_as_they_were_asked_for():
    cache, ids, _ = family()
    q, view = random(0, 4, 3, HEADS, DIM).swapaxes(1, 2), cache.view(ids, cascade=True)
    out = tf.attention(q, view, causal=True)
    assert out.shape == (4, HEADS, 3, V_DIM) and out.swapaxes(1, 2).flags.c_contiguous
    into = np.full((4, HEADS, 3, V_DIM), np.nan, np.float32)
    assert tf.attention(q, view, causal=True, out=into) is into
    assert np.array_equal(into, out)
    pinned = tf.explain(q, cache[ids], causal=True).plan
    assert np.array_equal(
        tf.attention(q, view, causal=True, plan=pinned), tf.attention(q, cache[ids], causal=True)
    )


@pytest.mark.usefixtures("always")
def test_tensors(either_backend):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    cache, ids, _ = family()
    q, view = random(0, 4, HEADS, 1, DIM), cache.view(ids, cascade=True)
    out, lse = tf.attention(torch.from_numpy(q), view, causal=True, return_lse=True)
    right, right_lse = tf.attention(q, view, causal=True, return_lse=True)
    assert np.array_equal(out.numpy(), right) and np.array_equal(lse.numpy(), right_lse)


def test_a_switch_is_true_or_false():
    cache, ids, _ = family()
    with pytest.raises(TypeError, match="cascade must be True or False, got int"):
        cache.view(ids, cascade=1)
