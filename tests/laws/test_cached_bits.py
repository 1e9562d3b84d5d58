"""Same bits from caches: a row becomes what plain arrays make of it, whatever cache its keys lie in.

Not the size or order of pages, nor who shares them, nor how rows were appended, nor what else is in the memory: here
that is NaN wherever no sequence has a row. A cache of codes gives what arrays of the numbers give that each row alone
becomes, where `invariant` asks for that, and few rows their own bits anywhere. Nothing here has a tolerance. This is
the native core's promise.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import tilefold as tf
from tilefold.caches import dequantise, quantise
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
    """The cache with NaN in its whole memory, which nobody has written to yet: of codes, in their scales."""
    for memory in (cache.k, cache.v) if cache.k_scale is None else (cache.k_scale, cache.v_scale):
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
        whole = attend(q, k, v, invariant=True, **options)
        for start, stop in [(0, 70), *((n, n + 1) for n in range(70, 200))]:
            rows = (slice(None), slice(None), slice(start, stop))
            cache.append(id, k[rows], v[rows])
            expected = tuple(x[rows] for x in whole)
            assert_same_bits(
                attend(q[rows], cache[id], invariant=True, **options), expected, (anchors, start)
            )
        held = -(-anchors // page) + -(-30 // page) + 1
        assert cache.pages_used <= held < 200 // page


# ---- codes -----------------------------------------------------------------------------------------------------

WAYS = {
    "int8": {"quantised": "int8"},
    "float8_e4m3fn": {"quantised": "float8_e4m3fn"},
    "int4": {"quantised": "int4"},
    "int8 in groups": {"quantised": "int8", "group": 8},
    "int4 in groups": {"quantised": "int4", "group": 4},
}
HALVES = [name for name in DTYPES if name != "float64"]
CODED_V_DIM = 40


def coded_keys(length, dtype, seed=0):
    rng = np.random.default_rng([length, seed])
    sizes = rng.uniform(0.01, 10, (2, 1, KV_HEADS, length, 1))  # of rows: a shared scale would show
    shapes = (1, KV_HEADS, length, DIM), (1, KV_HEADS, length, CODED_V_DIM)
    return [
        (size * rng.standard_normal(shape)).astype(numpy_type(dtype))
        for size, shape in zip(sizes, shapes, strict=True)
    ]


def bring_types(way):
    if way["quantised"] == "float8_e4m3fn":
        pytest.importorskip("ml_dtypes", reason="float8_e4m3fn needs ml_dtypes")


def coded_cache(dtype, way, **settings):
    bring_types(way)
    settings = {"pages": 700, "page": 16} | settings
    return poisoned(tf.PagedKVCache(KV_HEADS, DIM, CODED_V_DIM, dtype=numpy_type(dtype), **way, **settings))


def attend_numbers(*args, **options):
    """Attention in the bits of what codes stand for, which few rows have where they are asked for."""
    return attend(*args, invariant=True, **options)


def meant(x, way):
    """The numbers that rows stand for once they are codes, each row quantised alone."""
    rows = x.reshape(-1, 1, x.shape[-1])
    each = [dequantise(*quantise(row, way["quantised"], group=way.get("group")), x.dtype) for row in rows]
    return np.concatenate(each).reshape(x.shape)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", HALVES)
def test_codes_give_what_their_numbers_give(dtype, way):
    k, v = coded_keys(230, dtype)
    q = queries(1, 30, dtype)
    pages = coded_cache(dtype, way)
    id = pages.open()
    stretch = poisoned(
        tf.KVCache(1, KV_HEADS, DIM, CODED_V_DIM, capacity=300, dtype=numpy_type(dtype), **way)
    )
    numbers = [meant(x, way) for x in (k, v)]
    for append in (lambda *rows: pages.append(id, *rows), stretch.append):
        append_in_parts(append, k, v, [1, 15, 1, 100, 3])
    for name, options in OPTIONS.items():
        right = attend(q, *numbers, **options)
        assert_same_bits(attend(q, pages[id], **options), right, name)
        assert_same_bits(attend(q, stretch, **options), right, name)


@pytest.mark.parametrize("way", ["int8", "float8_e4m3fn", "int4", "int8 in groups", "int4 in groups"])
@pytest.mark.parametrize("dtype", HALVES)
@given(
    dim=st.sampled_from([32, 64, 96]),
    v_dim=st.sampled_from([32, 96, 160]),
    page=st.sampled_from([16, 24, 48]),
    length=st.integers(1, 300),
    q_len=st.integers(1, 4),
    name=st.sampled_from(list(OPTIONS)),
)
@settings(max_examples=12)
def test_codes_of_whole_vectors(dtype, way, dim, v_dim, page, length, q_len, name):
    """Rows as long as vectors, which a core may decode on their way into products; groups are as long, too."""
    way = WAYS[way] | ({"group": 32} if "group" in WAYS[way] else {})
    bring_types(way)
    rng = np.random.default_rng([dim, v_dim, length])
    k, v = (rng.standard_normal((1, KV_HEADS, length, d)).astype(numpy_type(dtype)) for d in (dim, v_dim))
    q = rng.standard_normal((1, HEADS, q_len, dim)).astype(k.dtype)
    cache = poisoned(tf.PagedKVCache(KV_HEADS, dim, v_dim, page=page, pages=40, dtype=k.dtype, **way))
    id = cache.open()
    cache.append(id, k, v)
    right = attend(q, *(meant(x, way) for x in (k, v)), **OPTIONS[name])
    assert_same_bits(attend_numbers(q, cache[id], **OPTIONS[name]), right, name)


@given(
    page=st.sampled_from([1, 2, 7, 16, 100]),
    length=st.integers(1, 150),
    q_len=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 60), max_size=5),
    forked=st.integers(0, 150),
    name=st.sampled_from(list(OPTIONS)),
    way=st.sampled_from(list(WAYS)),
    dtype=st.sampled_from(HALVES),
)
@settings(max_examples=60)
def test_codes_in_any_page_of_any_fork(page, length, q_len, sizes, forked, name, way, dtype):
    """Rows in parts, the first `forked` of them by way of another sequence, which then goes on and goes away."""
    k, v = coded_keys(length, dtype)
    other = coded_keys(9, dtype, seed=9)
    q = queries(1, q_len, dtype)
    cache = coded_cache(dtype, WAYS[way], page=page, pages=700)
    first, forked = cache.open(), min(forked, length)
    append_in_parts(lambda *rows: cache.append(first, *rows), k[:, :, :forked], v[:, :, :forked], sizes)
    id = cache.fork(first)
    cache.append(first, *other)
    append_in_parts(lambda *rows: cache.append(id, *rows), k[:, :, forked:], v[:, :, forked:], sizes)
    cache.append(id, *other)
    cache.truncate(id, length)
    numbers = [meant(x, WAYS[way]) for x in (k, v)]
    right = attend_numbers(q, *numbers, **OPTIONS[name])
    assert_same_bits(attend_numbers(q, cache[id], **OPTIONS[name]), right)
    beside, _ = attend_numbers(np.concatenate([q, q]), cache[first, id], **OPTIONS[name])
    assert_same_bits(beside[1:], right[0])
    cache.free(first)
    cache.append(cache.open(), *(np.full_like(x, 1e4) for x in (k, v)))  # in the pages that came back
    assert_same_bits(attend_numbers(q, cache[id], **OPTIONS[name]), right)


@given(
    page=st.sampled_from([1, 7, 16, 24, 100]),
    length=st.integers(1, 150),
    dim=st.sampled_from([24, 64, 128, 130]),
    sizes=st.lists(st.integers(1, 60), max_size=5),
    name=st.sampled_from(list(OPTIONS)),
    way=st.sampled_from(["int8", "int4"]),
    dtype=st.sampled_from(HALVES),
)
@settings(max_examples=40)
def test_a_token_over_codes_has_its_bits_anywhere(page, length, dim, sizes, name, way, dtype):
    """One query, as calls decode: in pages, in one stretch, forked, beside others, restored."""
    rng = np.random.default_rng([dim, length])
    k, v = (rng.standard_normal((1, KV_HEADS, length, d)).astype(numpy_type(dtype)) for d in (dim, dim + 6))
    q = rng.standard_normal((1, HEADS, 1, dim)).astype(k.dtype)
    stretch = poisoned(tf.KVCache(1, KV_HEADS, dim, dim + 6, capacity=length, dtype=k.dtype, **WAYS[way]))
    stretch.append(k, v)
    right = attend(q, stretch, **OPTIONS[name])
    cache = poisoned(
        tf.PagedKVCache(KV_HEADS, dim, dim + 6, page=page, pages=500, dtype=k.dtype, **WAYS[way])
    )
    first = cache.open()
    append_in_parts(lambda *rows: cache.append(first, *rows), k, v, sizes)
    id = cache.fork(first)
    cache.append(first, k, v)
    assert_same_bits(attend(q, cache[id], **OPTIONS[name]), right)
    out, lse = attend(np.concatenate([q, q, q]), cache[first, id, first], **OPTIONS[name])
    assert_same_bits((out[1:2], lse[1:2]), right)
    with tempfile.TemporaryDirectory() as place:
        cache.snapshot(Path(place) / "cache")
        again = tf.PagedKVCache.restore(Path(place) / "cache")
    assert_same_bits(attend(q, again[id], **OPTIONS[name]), right)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_restored_cache_of_codes_goes_on_with_the_same_bits(way, tmp_path):
    k, v = coded_keys(90, "bfloat16")
    q = queries(1, 5, "bfloat16")
    pages = coded_cache("bfloat16", way)
    id = pages.open()
    stretch = tf.KVCache(1, KV_HEADS, DIM, CODED_V_DIM, dtype=k.dtype, **way)
    right = attend(q, *(meant(x, way) for x in (k, v)), causal=True)
    for whole, append in (
        (pages, lambda c: lambda *rows: c.append(id, *rows)),
        (stretch, lambda c: c.append),
    ):
        append(whole)(k[:, :, :50], v[:, :, :50])
        whole.snapshot(tmp_path / "cache")
        again = type(whole).restore(tmp_path / "cache")
        append(again)(k[:, :, 50:], v[:, :, 50:])
        assert_same_bits(attend(q, again if whole is stretch else again[id], causal=True), right)


# ---- packed queries --------------------------------------------------------------------------------------------

STORES = ("pages", "one stretch", "pages of int8", "one stretch of int4")


def mixed(store, dtype, lengths, page=16):
    """(view, capacity) of sequences of these lengths; floats are in pages that many sequences took in turn."""
    sizes = (KV_HEADS, DIM, CODED_V_DIM)
    way = {"int8": WAYS["int8"], "int4": WAYS["int4 in groups"]}.get(store.split()[-1], {})
    every = [coded_keys(n, dtype, seed) for seed, n in enumerate(lengths)]
    if store.startswith("pages"):
        cache = tf.PagedKVCache(*sizes, page=page, pages=900, dtype=numpy_type(dtype), **way)
        ids = [cache.open() for _ in lengths]
        for part in range(0, max(lengths, default=0), 50):
            for id, (k, v) in zip(ids, every, strict=True):
                cache.append(id, k[:, :, part : part + 50], v[:, :, part : part + 50])
        return cache[ids], cache[ids].capacity
    cache = tf.KVCache(len(lengths), *sizes, dtype=numpy_type(dtype), **way)
    padded = [np.zeros((len(lengths), KV_HEADS, max(lengths), d), numpy_type(dtype)) for d in sizes[1:]]
    for n, rows in enumerate(every):
        for x, y in zip(padded, rows, strict=True):
            x[n, :, : y.shape[2]] = y[0]
    cache.append(*padded, list(lengths))
    return cache, cache.capacity


def padded_from(packed, ends):
    """(heads, total, ...) as (batch, heads, longest, ...), NaN behind each sequence."""
    counts = np.diff(ends)
    shape = len(counts), len(packed), max(counts, default=0), *packed.shape[2:]
    whole = np.full(shape, np.nan if packed.dtype.kind != "b" else True, packed.dtype)
    for n, (start, count) in enumerate(zip(ends[:-1], counts, strict=True)):
        whole[n, :, :count] = packed[:, start : start + count]
    return whole


def packed_from(padded, ends):
    parts = [x[:, :count] for x, count in zip(padded, np.diff(ends), strict=True)]
    return np.concatenate(parts, axis=1)


def assert_packed_is_padded(store, dtype, lengths, counts, given, arrays=(), page=16):
    """`arrays`: names of arrays over scores that come packed, too."""
    view, capacity = mixed(store, dtype, lengths, page)
    ends = np.cumsum([0, *counts])
    rng = np.random.default_rng(int(ends[-1]))
    q = rng.standard_normal((HEADS, ends[-1], DIM)).astype(numpy_type(dtype))
    shape = HEADS, int(ends[-1]), capacity
    packed = {"bias": rng.standard_normal(shape).astype(np.float32), "mask": rng.random(shape) < 0.6}
    packed = {name: packed[name] for name in arrays}
    got = attend(q, view, cu_seqlens_q=ends, **given, **packed)
    padded = {name: padded_from(x, ends) for name, x in packed.items()}
    if "bias" in padded:
        np.nan_to_num(padded["bias"], copy=False)
    whole = padded_from(q, ends)
    right = attend(whole, view, q_lengths=np.array(counts, np.int64), **given, **padded)
    assert_same_bits(got, tuple(packed_from(x, ends) for x in right))


LENGTHS, COUNTS = (
    (60, 1, 130, 75, 30, 300, 9),
    (1, 1, 40, 1, 0, 300, 7),
)  # decoding, chunks, a prompt, one that rests


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packed_queries_give_what_padded_ones_give(dtype, store, options):
    assert_packed_is_padded(store, dtype, LENGTHS, COUNTS, options)


@pytest.mark.parametrize("arrays", [("bias",), ("mask",), ("bias", "mask")], ids=str)
@pytest.mark.parametrize("counts", [COUNTS, (1,) * 7, (2, 1, 2, 1, 0, 1, 2)], ids=str)
def test_arrays_over_packed_scores(counts, arrays):
    for causal in (False, True):
        assert_packed_is_padded("pages", "float32", LENGTHS, counts, {"causal": causal}, arrays)


@given(
    store=st.sampled_from(STORES),
    page=st.sampled_from([1, 7, 16, 100]),
    sequences=st.lists(
        st.tuples(st.integers(0, 90), st.sampled_from([0, 1, 1, 1, 2, 3, 17])), min_size=1, max_size=7
    ),
    name=st.sampled_from(list(OPTIONS)),
    dtype=st.sampled_from(HALVES),
)
@settings(max_examples=60)
def test_any_packing(store, page, sequences, name, dtype):
    lengths, counts = [n for n, _ in sequences], [n for _, n in sequences]
    assert_packed_is_padded(store, dtype, lengths, counts, OPTIONS[name], page=page)
