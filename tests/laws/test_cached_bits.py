"""Same bits from caches: a row becomes what plain arrays make of it, whatever cache its keys lie in.

Not the size or order of pages, nor who shares them, nor how rows were appended, nor what else is in the memory: here
that is NaN wherever no sequence has a row. Nothing here has a tolerance. This is the native core's promise.
"""

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import tilefold as tf
from tilefold.dtypes import ROWS

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

DTYPES = list(ROWS)
HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 24, 17
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (37, 0)},
    "anchors": {"mask": tf.anchors(5, 60)},
    "softcap and sinks": {"causal": True, "softcap": 3.0, "sinks": np.linspace(-1, 1, HEADS)},
    "alibi": {"causal": True, "alibi": np.linspace(0.01, 0.3, HEADS)},
    "documents of 100": {"mask": tf.chunked(100) & tf.causal()},
}


def numpy_type(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


def keys(length, dtype, seed=0):
    rng = np.random.default_rng([length, seed])
    shapes = (1, KV_HEADS, length, DIM), (1, KV_HEADS, length, V_DIM)
    return [rng.standard_normal(shape).astype(numpy_type(dtype)) for shape in shapes]


def queries(batch, length, dtype):
    rng = np.random.default_rng([batch, length])
    return (2 * rng.standard_normal((batch, HEADS, length, DIM))).astype(numpy_type(dtype))


def attend(q, *kv, **options):
    return tf.attention(q, *kv, return_lse=True, backend="native", **options)


def poisoned(cache):
    """The cache with NaN in its whole memory, which nobody has written to yet."""
    for memory in (cache.k, cache.v):
        memory[...] = np.nan
    return cache


def paged(dtype, **settings):
    settings = {"pages": 700, "page": 16} | settings
    return poisoned(tf.PagedKVCache(KV_HEADS, DIM, V_DIM, dtype=numpy_type(dtype), **settings))


def append_in_parts(append, k, v, sizes):
    """Rows in parts of these sizes, and then what is left."""
    at = 0
    for size in [*sizes, k.shape[2]]:
        end = min(at + size, k.shape[2])
        if at < end:
            append(k[:, :, at:end], v[:, :, at:end])
        at = end


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_give_what_arrays_give(dtype, options):
    k, v = keys(530, dtype)
    q = queries(1, 70, dtype)
    cache = paged(dtype)
    id = cache.open()
    append_in_parts(lambda *rows: cache.append(id, *rows), k, v, [1, 15, 1, 200, 3])
    assert_same_bits(attend(q, cache[id], **options), attend(q, k, v, **options), dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_stretch_gives_what_arrays_give(dtype, options):
    k, v = keys(530, dtype)
    q = queries(1, 70, dtype)
    cache = poisoned(tf.KVCache(1, KV_HEADS, DIM, V_DIM, capacity=600, dtype=numpy_type(dtype)))
    append_in_parts(cache.append, k, v, [1, 15, 1, 200, 3])
    assert_same_bits(attend(q, cache, **options), attend(q, k, v, **options), dtype)


@given(
    page=st.sampled_from([1, 2, 7, 16, 64, 100, 128, 1000]),
    length=st.integers(1, 400),
    q_len=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 150), max_size=5),
    scattered=st.booleans(),
    name=st.sampled_from(list(OPTIONS)),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_any_page_in_any_place(page, length, q_len, sizes, scattered, name, dtype):
    k, v = keys(length, dtype)
    q = queries(1, q_len, dtype)
    cache = paged(dtype, page=page, pages=None if page > 100 else 900)
    id, other = cache.open(), cache.open()

    def append(*rows):
        cache.append(id, *rows)
        if scattered:
            cache.append(other, *rows)  # takes the pages in between

    append_in_parts(append, k, v, sizes)
    expected = attend(q, k, v, **OPTIONS[name])
    assert_same_bits(attend(q, cache[id], **OPTIONS[name]), expected)
    cache.free(other)
    third = cache.open()
    cache.append(third, *(np.full_like(x, np.nan) for x in (k, v)))  # in the pages that came back
    assert_same_bits(attend(q, cache[id], **OPTIONS[name]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_gives_what_each_sequence_gives_alone(dtype):
    lengths = [300, 1, 0, 129, 64]
    every = [keys(n, dtype, seed) for seed, n in enumerate(lengths)]
    q = queries(len(lengths), 3, dtype)
    cache = paged(dtype)
    ids = [cache.open() for _ in lengths]
    for id, (k, v) in zip(ids, every, strict=True):
        cache.append(id, k, v)
    order = [3, 0, 4, 0, 2, 1]
    out, lse = attend(q[order], cache[[ids[n] for n in order]], causal=True)
    for row, n in enumerate(order):
        alone = attend(q[n : n + 1], *every[n], causal=True)
        assert_same_bits((out[row : row + 1], lse[row : row + 1]), alone, n)


@pytest.mark.parametrize("kind", ["one stretch", "pages"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_and_decoding_in_one_batch(dtype, kind):
    """Three sequences: one is read in, one decodes, one rests; their new rows come padded."""
    have, new = np.array([0, 90, 33]), np.array([40, 1, 0])
    every = [keys(int(n), dtype, seed) for seed, n in enumerate(have + new)]
    first, second = (
        [np.full((3, KV_HEADS, 90, d), np.nan, numpy_type(dtype)) for d in (DIM, V_DIM)] for _ in "ab"
    )
    for b, rows in enumerate(every):
        for x, early, late in zip(rows, first, second, strict=True):
            early[b, :, : have[b]] = x[0, :, : have[b]]
            late[b, :, : new[b]] = x[0, :, have[b] :]
    if kind == "pages":
        cache = paged(dtype)
        ids = [cache.open() for _ in every]
        cache.append(ids, *first, have)
        cache.append(ids, *second, new)
        whole = cache[ids]
    else:
        whole = poisoned(tf.KVCache(3, KV_HEADS, DIM, V_DIM, capacity=100, dtype=numpy_type(dtype)))
        whole.append(*first, have)
        whole.append(*second, new)
    q = queries(3, 40, dtype)
    out, lse = attend(q, whole, causal=True, q_lengths=new)
    for b in range(3):
        rows = slice(0, new[b])
        alone = attend(q[b : b + 1, :, rows], *every[b], causal=True)
        assert_same_bits((out[b : b + 1, :, rows], lse[b : b + 1, :, rows]), alone, b)
        assert not out[b, :, new[b] :].any() and np.isneginf(lse[b, :, new[b] :]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fork_gives_what_its_own_rows_give(dtype):
    k, v = keys(100, dtype)
    cache = paged(dtype)
    a = cache.open()
    cache.append(a, k[:, :, :50], v[:, :, :50])
    b = cache.fork(a)
    other = keys(30, dtype, seed=9)
    cache.append(a, k[:, :, 50:], v[:, :, 50:])
    cache.append(b, *other)
    q = queries(1, 9, dtype)
    assert_same_bits(attend(q, cache[a], causal=True), attend(q, k, v, causal=True))
    joined = [np.concatenate([x[:, :, :50], y], axis=2) for x, y in zip((k, v), other, strict=True)]
    assert_same_bits(attend(q, cache[b], causal=True), attend(q, *joined, causal=True))


@pytest.mark.parametrize("page", [1, 16, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_that_forgets_gives_what_one_that_keeps_gives(dtype, page):
    """Reading in 70 rows, then one at a time: with a window alone, and with anchors."""
    k, v = keys(200, dtype)
    q = queries(1, 200, dtype)
    for anchors, options in ((0, {"window": (29, 0)}), (20, {"mask": tf.anchors(20, 29)})):
        cache = paged(dtype, page=page, window=30, anchors=anchors)
        id = cache.open()
        whole = attend(q, k, v, **options)
        for start, stop in [(0, 70), *((n, n + 1) for n in range(70, 200))]:
            rows = (slice(None), slice(None), slice(start, stop))
            cache.append(id, k[rows], v[rows])
            expected = tuple(x[rows] for x in whole)
            assert_same_bits(attend(q[rows], cache[id], **options), expected, (anchors, start))
        held = -(-anchors // page) + -(-30 // page) + 1
        assert cache.pages_used <= held < 200 // page
