"""Caches as their users see them: what is appended, forked, truncated and forgotten, held against plain arrays.

A paged cache is also run by Hypothesis against a dictionary of arrays, with every reference counted after each step.
Bits are the matter of `laws/test_cached_bits.py`, files that of `faults/test_snapshots.py`.
"""

import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import tilefold as tf
from tilefold import plan
from tilefold.caches import cascade, dequantise, packed, quantise
from tilefold.caches.paged import roomy
from tilefold.caches.pool import Pool
from tilefold.dtypes import ROWS
from tilefold.layouts import Stored

HEADS, DIM, V_DIM = 2, 6, 5


def rows(batch, length, seed=0, dtype=np.float32):
    rng = np.random.default_rng([batch, length, seed])
    shapes = (batch, HEADS, length, DIM), (batch, HEADS, length, V_DIM)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def queries(batch, length, dtype=np.float32):
    return (
        np.random.default_rng([batch, length]).standard_normal((batch, 2 * HEADS, length, DIM)).astype(dtype)
    )


def paged(**settings):
    return tf.PagedKVCache(HEADS, DIM, V_DIM, **{"page": 4} | settings)


def held(cache, id):
    """(keys, values) of a sequence as its pages have them, codes as their numbers, NaN where they were given back."""
    stored = cache[id].stored()
    (length,), table = stored.lengths, stored.table[0]
    parts = []
    for memory, scale in ((stored.k, stored.k_scale), (stored.v, stored.v_scale)):
        memory = memory if scale is None else dequantise(memory, scale)
        pages = np.where(table[:, None, None, None] < 0, np.nan, memory[np.maximum(table, 0)])
        parts.append(pages.swapaxes(1, 2).reshape(-1, HEADS, memory.shape[-1])[:length].swapaxes(0, 1))
    return parts


def filled(cache, *lengths):
    """Sequences of these lengths, and their rows."""
    ids, every = [cache.open() for _ in lengths], [rows(1, n, n) for n in lengths]
    for id, (k, v) in zip(ids, every, strict=True):
        cache.append(id, k, v)
    return ids, every


def end_to_end(arrays, counts):
    """Padded arrays as packed ones."""
    return [np.concatenate([x[n, :, :count] for n, count in enumerate(counts)], axis=1) for x in arrays]


# ---- one stretch per sequence --------------------------------------------------------------------------------


def test_rows_lie_where_they_were_appended():
    cache = tf.KVCache(2, HEADS, DIM, V_DIM, capacity=9)
    k, v = rows(2, 5)
    cache.append(k, v, [5, 2])
    assert cache.lengths.tolist() == [5, 2]
    more_k, more_v = rows(2, 3, 1)
    cache.append(more_k, more_v, [1, 3])
    assert cache.lengths.tolist() == [6, 5]
    for mine, first, second in ((cache.k, k, more_k), (cache.v, v, more_v)):
        assert np.array_equal(mine[0, :, :6], np.concatenate([first[0], second[0, :, :1]], axis=1))
        assert np.array_equal(mine[1, :, :5], np.concatenate([first[1, :, :2], second[1]], axis=1))


def test_growing_doubles_and_keeps_every_row():
    cache = tf.KVCache(2, HEADS, DIM, V_DIM)
    k, v = rows(2, 100)
    capacities = []
    for n in range(100):
        cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [16, 32, 64, 128]
    assert np.array_equal(cache.k[:, :, :100], k) and np.array_equal(cache.v[:, :, :100], v)
    assert cache.nbytes == 2 * HEADS * 128 * (DIM + V_DIM) * 4


def test_a_full_cache_says_so_and_keeps_what_it_has():
    cache = tf.KVCache(2, HEADS, DIM, V_DIM, capacity=4)
    k, v = rows(2, 4)
    cache.append(k, v, [4, 3])
    before = cache.k.copy(), cache.v.copy()
    with pytest.raises(tf.CacheFull, match="capacity of the cache is 4 rows, and 5 are needed"):
        cache.append(k, v, [0, 2])
    assert isinstance(tf.CacheFull(), MemoryError)
    assert cache.lengths.tolist() == [4, 3]
    assert np.array_equal(cache.k, before[0], equal_nan=True)
    cache.append(k, v, [0, 1])
    assert cache.lengths.tolist() == [4, 4]


def test_what_was_truncated_is_written_anew():
    cache = tf.KVCache(2, HEADS, DIM, V_DIM, capacity=8)
    k, v = rows(2, 6)
    cache.append(k, v)
    cache.truncate([2, 6])
    assert cache.lengths.tolist() == [2, 6]
    other = rows(2, 1, 7)
    cache.append(*other, [1, 0])
    q = queries(2, 1)
    joined = [np.concatenate([x[:1, :, :2], y[:1]], axis=2) for x, y in zip((k, v), other, strict=True)]
    assert_same_bits(tf.attention(q, cache, causal=True)[:1], tf.attention(q[:1], *joined, causal=True))
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    assert not tf.attention(q, cache).any()


def test_lengths_are_a_copy():
    cache = tf.KVCache(1, HEADS, DIM, capacity=8)
    cache.lengths[...] = 5
    assert cache.lengths.tolist() == [0]


@pytest.mark.parametrize("kind", ["one stretch", "pages"])
def test_a_step_makes_no_new_plan(kind):
    k, v = rows(2, 40)
    if kind == "pages":
        cache = paged(page=16)
        ids = [cache.open(), cache.open()]
        whole, append = cache[ids], lambda *x: cache.append(ids, *x)
    else:
        whole = tf.KVCache(2, HEADS, DIM, V_DIM, capacity=64)
        append = whole.append
    append(k[:, :, :33], v[:, :, :33])
    q = queries(2, 1)
    tf.attention(q, whole, causal=True)
    made = plan._choose.cache_info().misses
    for n in range(33, 40):
        append(k[:, :, n : n + 1], v[:, :, n : n + 1])
        tf.attention(q, whole, causal=True)
    assert plan._choose.cache_info().misses == made


def test_widths_of_tables_are_few_and_never_a_third_too_wide():
    widths = [roomy(n) for n in range(2000)]
    assert all(n <= width <= 1.25 * n for n, width in enumerate(widths))
    assert len(set(widths)) < 50


# ---- pages ---------------------------------------------------------------------------------------------------


def test_a_fork_shares_pages_until_it_writes():
    cache = paged()
    (a,), ((k, v),) = filled(cache, 10)
    assert cache.pages_used == 3
    b = cache.fork(a)
    assert cache.pages_used == 3
    cache.append(b, *rows(1, 1))
    assert cache.pages_used == 4  # only the last page, which was not full
    assert np.array_equal(held(cache, a)[0], k[0]) and np.array_equal(held(cache, b)[1][:, :10], v[0])
    cache.append(a, *rows(1, 1))
    assert cache.pages_used == 4  # now its own
    cache.free(a)
    assert cache.pages_used == 3
    assert np.array_equal(held(cache, b)[0][:, :10], k[0])


def test_a_fork_of_full_pages_copies_none():
    cache = paged()
    (a,), _ = filled(cache, 8)
    cache.append(cache.fork(a), *rows(1, 1))
    assert cache.pages_used == 3


def test_forks_may_append_at_once():
    cache = paged(pages=4)
    (a,), ((k, _),) = filled(cache, 6)
    ids = [a, cache.fork(a), cache.fork(a)]
    more, values = rows(3, 1)
    with pytest.raises(tf.CacheFull):
        cache.append([*ids, cache.fork(a)], *rows(4, 1))
    cache.free(cache.ids[-1])
    cache.append(ids, more, values)  # two copies: the last one has the page to itself
    assert cache.pages_used == 4
    for n, id in enumerate(ids):
        assert np.array_equal(held(cache, id)[0], np.concatenate([k[0], more[n]], axis=1))


def test_a_full_pool_says_so_and_keeps_what_it_has():
    cache = paged(pages=4)
    (a, b), every = filled(cache, 9, 3)
    assert (cache.pages_used, cache.pages_free) == (4, 0)
    with pytest.raises(tf.CacheFull, match="4 pages of 4 rows, 0 of them free, and 1 more are needed"):
        cache.append([b, a], *rows(2, 4), [1, 4])
    assert cache.lengths([a, b]).tolist() == [9, 3]
    for id, (k, v) in zip((a, b), every, strict=True):
        assert np.array_equal(held(cache, id)[0], k[0]) and np.array_equal(held(cache, id)[1], v[0])
    cache.append([b, a], *rows(2, 4), [1, 3])
    cache.free(a)
    assert (cache.pages_used, cache.pages_free) == (1, 3)


def test_a_pool_without_limit_doubles():
    cache = paged()
    (a,), ((k, _),) = filled(cache, 100)
    sizes = {cache.pages_free + cache.pages_used}
    for _ in range(100):
        cache.append(a, *rows(1, 1))
        sizes.add(cache.pages_free + cache.pages_used)
    assert sizes == {25, 50}
    assert np.array_equal(held(cache, a)[0][:, :100], k[0])
    assert cache.nbytes == 50 * 4 * HEADS * (DIM + V_DIM) * 4


def test_the_lowest_pages_are_taken_first_and_a_heads_rows_lie_together():
    cache = paged()
    (a,), _ = filled(cache, 40)
    assert np.array_equal(cache[a].stored().table[0][:10], np.arange(10))
    keys = cache[a].stored().k
    assert keys.strides[2:] == (DIM * keys.itemsize, keys.itemsize)


def test_ids_are_never_used_twice():
    cache = paged()
    a = cache.open()
    cache.free(a)
    assert cache.open() != a
    with pytest.raises(ValueError, match="id must name a sequence of this cache, got 0"):
        cache[a]


def test_a_view_follows_its_sequences():
    cache = paged()
    (a,), ((k, v),) = filled(cache, 5)
    view, q = cache[a], queries(1, 1)
    cache.append(a, *rows(1, 3))
    joined = [np.concatenate([x, y], axis=2) for x, y in zip((k, v), rows(1, 3), strict=True)]
    assert_same_bits(tf.attention(q, view, causal=True), tf.attention(q, *joined, causal=True))
    cache.free(a)
    with pytest.raises(ValueError, match="id must name a sequence"):
        tf.attention(q, view)


def test_an_empty_sequence_is_seen_by_nobody():
    cache = paged()
    out, lse = tf.attention(queries(1, 2), cache[cache.open()], return_lse=True)
    assert not out.any() and np.isneginf(lse).all()


def test_arrays_over_keys_have_the_capacity_of_the_view():
    cache = paged()
    (a,), ((k, v),) = filled(cache, 70)
    q, view = queries(1, 3), cache[a]
    bias = np.random.default_rng(0).standard_normal((3, view.capacity)).astype(np.float32)
    expected = tf.attention(q, k, v, causal=True, bias=bias[:, :70])
    assert_same_bits(tf.attention(q, view, causal=True, bias=bias), expected)


def test_numpy_reads_pages_too():
    cache = paged()
    ids, every = filled(cache, 37, 0, 8)
    q = queries(3, 2)
    out = tf.attention(q, cache[ids], causal=True, backend="numpy")
    for n, (k, v) in enumerate(every):
        alone = tf.attention(q[n : n + 1], k, v, causal=True, backend="numpy")
        np.testing.assert_allclose(out[n : n + 1], alone, rtol=0, atol=64 * ROWS["float32"].roundoff)


def test_what_it_would_do_is_explained():
    cache = paged()
    (a,), _ = filled(cache, 30)
    told = tf.explain(queries(1, 1), cache[a], causal=True)
    assert told.cells == 30 * 2 * HEADS
    assert told.bytes == 4 * (2 * HEADS * (DIM + V_DIM) + 30 * HEADS * (DIM + V_DIM))
    assert "paged" in str(told)


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_boolean_masks_over_the_capacity(backend):
    cache = paged()
    (a,), ((k, v),) = filled(cache, 70)
    q, view = queries(1, 3), cache[a]
    assert view.capacity > 72
    mask = np.random.default_rng(0).random((3, view.capacity)) < 0.5
    expected = tf.attention(q, k, v, mask=mask[:, :70], backend=backend)
    assert_same_bits(tf.attention(q, view, mask=mask, backend=backend), expected)


# ---- packed queries ------------------------------------------------------------------------------------------

COUNTS = (1, 1, 9, 0, 1, 3)
ENDS = np.cumsum([0, *COUNTS])


def packed_call(kind, counts=COUNTS):
    """(view, q, the keys and values of each sequence), of so many queries each."""
    lengths = [n + 5 * i for i, n in enumerate(counts)]
    every = [rows(1, n, n) for n in lengths]
    if kind == "pages":
        cache = paged()
        ids, every = filled(cache, *lengths)
        view = cache[ids]
    else:
        view = tf.KVCache(len(counts), HEADS, DIM, V_DIM)
        padded = [np.zeros((len(counts), HEADS, max(lengths), d), np.float32) for d in (DIM, V_DIM)]
        for n, (k, v) in enumerate(every):
            padded[0][n, :, : lengths[n]], padded[1][n, :, : lengths[n]] = k[0], v[0]
        view.append(*padded, lengths)
    return view, queries(1, sum(counts))[0], every


def alone(q, every, counts=COUNTS, **options):
    """(out, lse) of each sequence by itself, one after the other."""
    ends = np.cumsum([0, *counts])
    parts = [
        tf.attention(q[:, a:b], k[0], v[0], return_lse=True, **options)
        for a, b, (k, v) in zip(ends[:-1], ends[1:], every, strict=True)
    ]
    return tuple(np.concatenate(x, axis=1) for x in zip(*parts, strict=True))


@pytest.mark.parametrize("kind", ["one stretch", "pages"])
def test_packed_queries_are_each_sequence_alone(kind):
    view, q, every = packed_call(kind)
    for options in ({}, {"causal": True}, {"window": (3, 1)}, {"sinks": [0.0, 1, 2, 3], "softcap": 2.0}):
        got = tf.attention(q, view, cu_seqlens_q=ENDS, return_lse=True, **options)
        assert_same_bits(got, alone(q, every, **options))
        out, lse = tf.attention(q, view, cu_seqlens_q=ENDS, return_lse=True, backend="numpy", **options)
        for x, y in zip((out, lse), got, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=64 * ROWS["float32"].roundoff)


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_masks_of_packed_queries_count_packed_rows(backend):
    """What a mask has for each query comes in the order of the queries; positions are of each sequence."""
    view, q, every = packed_call("pages")
    total, lengths = len(q[0]), [k.shape[2] for k, _ in every]
    before = np.repeat([n - c for n, c in zip(lengths, COUNTS, strict=True)], COUNTS)
    step = np.concatenate([np.arange(n) for n in COUNTS])
    lo, hi = before // 2, before + step + 1
    heads = np.arange(4)[:, None, None]
    cells = (heads + np.arange(view.capacity) + np.arange(total)[:, None]) % 3 > 0
    masks = {
        "spans": (tf.spans(lo, hi), lambda a, b, end: tf.spans(lo[a:b], hi[a:b])),
        "tree": (tf.tree(step - 1), lambda a, b, end: tf.tree(step[a:b] - 1)),
        "cells": (cells, lambda a, b, end: cells[:, a:b, :end]),
        "cells of one head": (cells[0], lambda a, b, end: cells[0, a:b, :end]),
        "cells and spans": (
            tf.dense(cells) & tf.spans(lo, hi),
            lambda a, b, end: tf.dense(cells[:, a:b, :end]) & tf.spans(lo[a:b], hi[a:b]),
        ),
        "a rule": (tf.from_predicate(lambda i, j: (i + j) % 2 == 0), None),
        "a rule for each head": (
            tf.from_predicate(lambda at, h, i, j: (i + j + h) % 3 > 0, per_head=True),
            None,
        ),
    }
    for name, (mask, part) in masks.items():
        got = tf.attention(q, view, mask=mask, cu_seqlens_q=ENDS, return_lse=True, backend=backend)
        for n, (k, v) in enumerate(every):
            a, b = ENDS[n : n + 2]
            own = mask if part is None else part(a, b, lengths[n])
            right = tf.attention(q[:, a:b], k[0], v[0], mask=own, return_lse=True, backend=backend)
            for x, y in zip(got, right, strict=True):
                if backend == "auto":
                    assert_same_bits(x[:, a:b], y, f"{name}, sequence {n}")
                else:
                    np.testing.assert_allclose(x[:, a:b], y, rtol=0, atol=64 * ROWS["float32"].roundoff)


def test_packed_results_go_where_they_are_wanted():
    """Into `out`, in any memory order; rows of nobody else are touched."""
    view, q, every = packed_call("pages")
    right, _ = alone(q, every, causal=True)
    memory = np.full((len(q[0]) + 2, 4, V_DIM), 7, np.float32)
    out = memory[1:-1].swapaxes(0, 1)
    assert tf.attention(q, view, causal=True, cu_seqlens_q=ENDS, out=out) is out
    assert_same_bits(out, right)
    assert (memory[[0, -1]] == 7).all()
    by_rows = np.ascontiguousarray(q.swapaxes(0, 1)).swapaxes(0, 1)
    got = tf.attention(by_rows, view, causal=True, cu_seqlens_q=ENDS)
    assert_same_bits(got, right)
    assert got.strides[1] > got.strides[0]


def test_sequences_that_follow_one_another_are_not_copied():
    x = np.arange(4 * 12).reshape(4, 12, 1)
    seen = {b.q_len: b for b in packed.batches(np.array([0, 1, 2, 2, 3, 6, 9, 12]))}
    assert sorted(seen) == [0, 1, 3] and seen[1].sequences.tolist() == [0, 1, 3]
    for batch in seen.values():
        assert isinstance(batch.rows, slice) and (batch.q_len == 0 or np.shares_memory(batch.taken(x), x))
    apart = next(b for b in packed.batches(np.array([0, 1, 3, 4])) if b.q_len == 1)
    assert not np.shares_memory(apart.taken(x), x) and apart.taken(x)[1].tolist() == x[:, 3:4].tolist()
    one_row = np.broadcast_to(x[:, :1], (4, 12, 9))
    assert apart.taken(one_row).strides[2:] == (0, 0)


def test_packed_queries_are_explained():
    view, q, every = packed_call("pages")
    told = tf.explain(q, view, causal=True, cu_seqlens_q=ENDS)
    lengths = [k.shape[2] for k, _ in every]
    assert told.batches == 4 and (told.problem.batch, told.problem.q_len) == (1, 9)
    assert told.cells == 2 * HEADS * sum(
        c * n - c * (c - 1) // 2 for c, n in zip(COUNTS, lengths, strict=True)
    )
    assert told.kv_bytes == 4 * HEADS * (DIM + V_DIM) * sum(lengths)
    assert "packed      4 calls" in str(told)
    assert tf.explain(queries(1, 1), paged_one(), causal=True).batches == 1


def paged_one():
    cache = paged()
    return cache[filled(cache, 9)[0]]


def test_packed_queries_must_not_see_what_is_forgotten():
    cache = paged(window=5)
    (a, b), _ = filled(cache, 20, 3)
    cache.append([a, b], *rows(2, 2))
    q, ends = queries(1, 3)[0], np.array([0, 2, 3])
    out = tf.attention(q, cache[a, b], window=(4, 0), cu_seqlens_q=ends)
    for n, id in enumerate((a, b)):
        rows_of = slice(*ends[n : n + 2])
        assert_same_bits(out[:, rows_of], tf.attention(q[None, :, rows_of], cache[id], window=(4, 0))[0])
    with pytest.raises(ValueError, match="the cache has forgotten keys 0 to 15 of sequence 0"):
        tf.attention(q, cache[a, b], causal=True, cu_seqlens_q=ends)
    out = tf.attention(
        q[:, :1], cache[a, b], causal=True, cu_seqlens_q=np.array([0, 0, 1])
    )  # b has forgotten none
    assert_same_bits(out, tf.attention(q[None, :, :1], cache[b], causal=True)[0])


def test_packed_tensors():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    view, q, every = packed_call("pages")
    out, lse = tf.attention(
        torch.from_numpy(q), view, causal=True, cu_seqlens_q=torch.from_numpy(ENDS), return_lse=True
    )
    right = alone(q, every, causal=True)
    assert isinstance(out, torch.Tensor)
    assert_same_bits((out.numpy(), lse.numpy()), right)


def test_shared_pages_of_packed_queries_are_read_once(monkeypatch):
    monkeypatch.setattr(cascade, "PAYS", -(2**40))
    cache = paged()
    (a,), _ = filled(cache, 21)
    ids = [a, cache.fork(a), cache.fork(a)]
    q, ends = queries(1, 4)[0], np.array([0, 1, 3, 4])
    told = tf.explain(q, cache.view(ids, cascade=True), cu_seqlens_q=ends)
    assert told.shared == 20 and told.batches == 2
    out = tf.attention(q, cache.view(ids, cascade=True), cu_seqlens_q=ends)
    right = tf.attention(q, cache[ids], cu_seqlens_q=ends)
    np.testing.assert_allclose(out, right, rtol=0, atol=64 * ROWS["float32"].roundoff)


def test_packed_queries_of_nobody():
    cache = paged()
    for ids in ([], [cache.open(), cache.open()]):
        out, lse = tf.attention(
            queries(1, 0)[0], cache[ids], cu_seqlens_q=np.zeros(len(ids) + 1, int), return_lse=True
        )
        assert out.shape == (2 * HEADS, 0, V_DIM) and lse.shape == (2 * HEADS, 0)


# ---- forgetting ----------------------------------------------------------------------------------------------


def test_pages_are_given_back_once_no_later_query_sees_them():
    cache = paged(window=5)
    (a,), ((k, _),) = filled(cache, 20)
    assert cache.pages_used == 5  # its 20 queries were still to come
    cache.append(a, *rows(1, 1))
    assert cache.pages_used == 2  # keys 16 to 19, and a new page
    assert cache.lengths(a).tolist() == [21]
    keys = held(cache, a)[0]
    assert np.isnan(keys[:, :16]).all() and np.array_equal(keys[:, 16:20], k[0, :, 16:])
    stored = cache[a].stored()
    assert stored.first.tolist() == [16] and stored.kept == 0


def test_anchors_stay():
    cache = paged(window=5, anchors=6)
    (a,), ((k, _),) = filled(cache, 20)
    cache.append(a, *rows(1, 1))
    assert cache.pages_used == 4  # two of anchors, keys 16 to 19, and a new page
    keys = held(cache, a)[0]
    assert np.array_equal(keys[:, :6], k[0, :, :6]) and np.isnan(keys[:, 8:16]).all()


def test_what_is_given_back_makes_room_for_the_same_append():
    cache = paged(window=4, pages=3)
    (a,), _ = filled(cache, 9)
    cache.append(a, *rows(1, 7))
    assert cache.lengths(a).tolist() == [16]
    assert cache.pages_used == 3


def test_shared_pages_are_given_back_by_each():
    cache = paged(window=4)
    (a,), ((k, _),) = filled(cache, 12)
    b = cache.fork(a)
    cache.append(a, *rows(1, 1))
    assert np.array_equal(held(cache, b)[0], k[0])
    assert cache.pages_used == 4
    cache.append(b, *rows(1, 1))
    assert cache.pages_used == 3


ALLOWED = {
    "the window": ({"window": (4, 0)}, 0),
    "a narrower one": ({"window": (2, 0)}, 0),
    "the window as a mask": ({"mask": tf.window(4, 0)}, 0),
    "within the window by spans": ({"mask": tf.spans([17], [21])}, 0),
    "within the window by cells": ({"mask": tf.from_predicate(lambda i, j: j > 17)}, 0),
    "anchors": ({"mask": tf.anchors(6, 4)}, 6),
    "fewer anchors": ({"mask": tf.anchors(2, 3)}, 6),
    "anchors alone": ({"mask": tf.prefix(6)}, 6),
    "anchors by a band": ({"mask": tf.band(None, -15)}, 6),
    "no query": ({"q_lengths": 0}, 0),
}
REFUSED = {
    "everything": ({}, 0),
    "causal": ({"causal": True}, 0),
    "a wider window": ({"window": (5, 0)}, 0),
    "a window of which only the right side is set": ({"window": (None, 0)}, 0),
    "anchors that are gone": ({"mask": tf.anchors(1, 4)}, 0),
    "anchors and a wider window": ({"mask": tf.anchors(6, 5)}, 6),
    "one key by a band": ({"mask": tf.band(None, -14)}, 6),
    "more anchors": ({"mask": tf.anchors(7, 4)}, 6),
    "one forgotten key": ({"mask": tf.spans([15], [16])}, 6),
    "one forgotten cell": ({"mask": tf.from_predicate(lambda i, j: j == 9)}, 6),
    "one head": (
        {"mask": tf.from_predicate(lambda at, h, i, j: (j == 20) | (j == 9) & (h == 3), per_head=True)},
        6,
    ),
}


def forgetful(anchors):
    """A cache that has forgotten keys 0, or with 6 anchors 6, to 15."""
    cache = paged(window=5, anchors=anchors, page=1)
    (a,), (given,) = filled(cache, 20)
    last = rows(1, 1)
    cache.append(a, *last)
    return cache[a], [np.concatenate([x, y], axis=2) for x, y in zip(given, last, strict=True)]


@pytest.mark.parametrize(("options", "anchors"), ALLOWED.values(), ids=ALLOWED)
def test_what_is_left_may_be_asked_for(options, anchors):
    view, arrays = forgetful(anchors)
    q = queries(1, 1)
    assert_same_bits(tf.attention(q, view, **options), tf.attention(q, *arrays, **options))


@pytest.mark.parametrize(("options", "anchors"), REFUSED.values(), ids=REFUSED)
def test_what_is_gone_is_refused(options, anchors):
    view, _ = forgetful(anchors)
    with pytest.raises(ValueError, match=f"the cache has forgotten keys {anchors} to 15 of sequence 0"):
        tf.attention(queries(1, 1), view, **options)


def test_an_array_within_what_is_left():
    view, arrays = forgetful(0)
    q, cells = queries(1, 1), np.arange(view.capacity) > 17
    assert view.capacity > 21
    assert_same_bits(tf.attention(q, view, mask=cells), tf.attention(q, *arrays, mask=cells[:21]))
    cells[9] = True
    with pytest.raises(ValueError, match="the cache has forgotten keys 0 to 15"):
        tf.attention(q, view, mask=cells)


limits = st.none() | st.integers(-25, 25)
masks = st.one_of(
    st.builds(tf.band, limits, limits),
    st.builds(tf.anchors, st.integers(0, 9), st.integers(0, 9)),
    st.builds(tf.chunked, st.integers(1, 12)),
    st.builds(lambda n: tf.from_predicate(lambda i, j: (i + j) % n == 0), st.integers(2, 20)),
)


@given(st.sampled_from([0, 6]), st.integers(1, 7), masks, masks)
def test_refused_is_what_sees_a_forgotten_key_and_nothing_else(anchors, q_len, a, b):
    view, arrays = forgetful(anchors)
    q = queries(1, q_len)
    for mask in (a, b, a & b, a | b):
        if mask.dense(q_len, 21)[:, anchors:16].any():
            with pytest.raises(ValueError, match="the cache has forgotten"):
                tf.attention(q, view, mask=mask)
        else:
            assert_same_bits(tf.attention(q, view, mask=mask), tf.attention(q, *arrays, mask=mask))


def test_guesses_can_be_taken_back_within_a_window():
    cache = paged(window=5)
    (a,), ((k, v),) = filled(cache, 20)
    cache.append(a, *rows(1, 6, 1))
    cache.truncate(a, 22)
    last = rows(1, 1, 2)
    cache.append(a, *last)
    early = rows(1, 6, 1)
    joined = [
        np.concatenate([x, y[:, :, :2], z], axis=2) for x, y, z in zip((k, v), early, last, strict=True)
    ]
    q = queries(1, 1)
    assert_same_bits(tf.attention(q, cache[a], window=(4, 0)), tf.attention(q, *joined, window=(4, 0)))


def test_truncating_far_back_never_answers_with_what_is_gone():
    cache = paged(window=5, anchors=2)
    (a,), ((k, v),) = filled(cache, 20)
    cache.append(a, *rows(1, 1))
    cache.truncate(a, 16)  # keys 11 to 15 would be seen from here
    q = queries(1, 1)
    with pytest.raises(ValueError, match="has forgotten keys 2 to 15"):
        tf.attention(q, cache[a], window=(4, 0))
    with pytest.raises(
        ValueError, match=r"must not lie in what was given back, 2 to 16 of sequence 0; got 15"
    ):
        cache.truncate(a, 15)
    cache.truncate(a, 2)  # all of them anchors: nothing is missing
    assert_same_bits(tf.attention(q, cache[a]), tf.attention(q, k[:, :, :2], v[:, :, :2]))
    assert cache.pages_used == 1


# ---- codes ---------------------------------------------------------------------------------------------------

WAYS = {
    "int8": {"quantised": "int8"},
    "float8_e4m3fn": {"quantised": "float8_e4m3fn"},
    "int4": {"quantised": "int4"},
    "int4 in groups": {"quantised": "int4", "group": 4},
}
WIDE, V_WIDE = 16, 12


def wide_rows(batch, length, seed=0):
    rng = np.random.default_rng([batch, length, seed])
    return [rng.standard_normal((batch, HEADS, length, d)).astype(np.float32) for d in (WIDE, V_WIDE)]


def coded(kind, way, batch=2, **settings):
    """(cache, append, view) of so many sequences, of either kind."""
    if way["quantised"] == "float8_e4m3fn":
        pytest.importorskip("ml_dtypes", reason="float8_e4m3fn needs ml_dtypes")
    if kind == "one stretch":
        cache = tf.KVCache(batch, HEADS, WIDE, V_WIDE, **way, **settings)
        return cache, cache.append, cache
    cache = tf.PagedKVCache(HEADS, WIDE, V_WIDE, page=4, **way, **settings)
    ids = [cache.open() for _ in range(batch)]
    return cache, lambda *given, **more: cache.append(ids, *given, **more), cache[ids]


KINDS = pytest.mark.parametrize("kind", ["one stretch", "pages"])
CODED = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@KINDS
@CODED
def test_rows_become_the_codes_that_quantise_makes(kind, way):
    cache, append, _ = coded(kind, way)
    k, v = wide_rows(2, 3)
    append(k, v)
    for codes, scales, x in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
        right = quantise(x, way["quantised"], group=way.get("group"))
        for mine, expected in zip((codes, scales), right, strict=True):
            assert mine.dtype == expected.dtype
            assert_same_bits(mine[:2, :, :3].view(np.uint8), expected.view(np.uint8))


@KINDS
@CODED
def test_the_bytes_of_codes_and_scales(kind, way):
    """What `nbytes` says is what Python allocates, but for a hundredth."""
    if way["quantised"] == "float8_e4m3fn":
        pytest.importorskip("ml_dtypes", reason="float8_e4m3fn needs ml_dtypes")
    tracemalloc.start()
    try:
        if kind == "one stretch":
            cache = tf.KVCache(2, HEADS, WIDE, V_WIDE, capacity=6400, **way)
        else:
            cache = tf.PagedKVCache(HEADS, WIDE, V_WIDE, page=128, pages=100, **way)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    group, each = way.get("group"), 2 if way["quantised"] == "int4" else 1
    scales = 2 if group is None else (WIDE + V_WIDE) // group
    assert cache.nbytes == 12800 * HEADS * ((WIDE + V_WIDE) // each + 4 * scales)
    assert cache.nbytes <= held <= 1.01 * cache.nbytes


@KINDS
def test_a_cache_of_numbers_has_no_scales(kind):
    cache, *_ = coded(kind, {"quantised": None})
    assert cache.k_scale is None and cache.v_scale is None and "float32" in repr(cache)
    cache, *_ = coded(kind, {"quantised": "int8"})
    assert "int8 of float32" in repr(cache)


@KINDS
def test_what_is_not_finite_is_refused_unless_it_is_padding(kind):
    cache, append, view = coded(kind, {"quantised": "int8"})
    k, v = wide_rows(2, 3)
    append(k, v)
    before = [x.copy() for x in (cache.k, cache.v, cache.k_scale, cache.v_scale)]
    q = np.ones((2, HEADS, 1, WIDE), np.float32)
    right = tf.attention(q, view, causal=True)
    for name, rows in {"k": (k, v), "v": (v, k)}.items():
        bad = rows[0].copy()
        bad[1, :, 2] = np.nan
        given = (bad, v) if name == "k" else (k, bad)
        with pytest.raises(ValueError, match=f"^{name} must be finite in float32, got NaN or infinity"):
            append(*given)
        assert all(
            np.array_equal(x, y, equal_nan=True)
            for x, y in zip((cache.k, cache.v, cache.k_scale, cache.v_scale), before, strict=True)
        )
        assert_same_bits(tf.attention(q, view, causal=True), right)
    append(*given, [3, 2])
    assert np.isfinite(tf.attention(q, view, causal=True)).all()


@KINDS
def test_a_cache_of_codes_without_a_row(kind):
    for room in ({}, {"capacity": 0} if kind == "one stretch" else {"pages": 0}):
        *_, view = coded(kind, {"quantised": "int8"}, **room)
        q = np.ones((2, HEADS, 3, WIDE), np.float32)
        for backend in ("auto", "numpy"):
            out, lse = tf.attention(q, view, return_lse=True, backend=backend)
            assert not out.any() and np.isneginf(lse).all()


@KINDS
@CODED
def test_tensors_are_kept_as_codes(kind, way):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("ml_dtypes", reason="bfloat16 tensors need ml_dtypes")
    k, v = (torch.from_numpy(x).to(torch.bfloat16) for x in wide_rows(2, 9))
    cache, append, view = coded(kind, way, like=k)
    append(k, v)
    q = torch.ones((2, HEADS, 9, WIDE), dtype=torch.bfloat16)  # few rows may have other bits
    group = way.get("group")
    numbers = [dequantise(*quantise(x, way["quantised"], group=group), torch.bfloat16) for x in (k, v)]
    assert torch.equal(tf.attention(q, view, causal=True), tf.attention(q, *numbers, causal=True))
    kept = {"int4": torch.uint8}.get(way["quantised"]) or getattr(torch, way["quantised"])
    assert cache.k.dtype == cache.v.dtype == kept and cache.k_scale.dtype == torch.float32


@KINDS
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_queries_over_codes_may_have_any_type_that_numbers_have(kind, name):
    """Whatever the type of the rows was: codes become numbers of the queries' type."""
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    _, append, view = coded(kind, {"quantised": "int8"})
    k, v = wide_rows(2, 9)
    append(k, v)
    q = np.ones((2, HEADS, 9, WIDE), np.float32).astype(dequantise(*quantise(k), name).dtype)
    numbers = [dequantise(*quantise(x), q.dtype) for x in (k, v)]
    assert_same_bits(tf.attention(q, view, causal=True), tf.attention(q, *numbers, causal=True))
    with pytest.raises(
        TypeError, match="q must be float16, bfloat16 or float32 with keys and values of int8"
    ):
        tf.attention(q.astype(float), view)


def test_shared_pages_of_codes_are_read_once(monkeypatch):
    monkeypatch.setattr(cascade, "PAYS", -(2**40))
    cache = tf.PagedKVCache(HEADS, WIDE, V_WIDE, page=4, quantised="int4")
    a = cache.open()
    cache.append(a, *wide_rows(1, 21))
    ids = [a, cache.fork(a)]
    cache.append(ids, *wide_rows(2, 3))
    q = np.random.default_rng(0).standard_normal((2, HEADS, 1, WIDE)).astype(np.float32)
    assert tf.explain(q, cache.view(ids, cascade=True), causal=True).shared == 20
    np.testing.assert_allclose(
        tf.attention(q, cache.view(ids, cascade=True), causal=True),
        tf.attention(q, cache[ids], causal=True),
        rtol=0,
        atol=64 * ROWS["float32"].roundoff,
    )


@KINDS
@pytest.mark.parametrize("way", [{"quantised": None}, *WAYS.values()], ids=["numbers", *WAYS])
def test_rows_that_come_packed_lie_where_padded_ones_would(kind, way):
    (padded, append, _), (packed, append_packed, _) = (coded(kind, way, batch=4) for _ in "ab")
    for seed, counts in enumerate([(5, 0, 9, 1), (1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0), (3, 3, 3, 3)]):
        rows = wide_rows(4, 9, seed)
        append(*rows, counts)
        append_packed(*end_to_end(rows, counts), cu_seqlens=np.cumsum([0, *counts]))
    ends = (9, 5, 13, 6)
    for mine, right in zip(
        *((cache.k, cache.v, cache.k_scale, cache.v_scale) for cache in (packed, padded)), strict=True
    ):
        assert (mine is None) == (right is None)
        if mine is not None and kind == "one stretch":
            for n, end in enumerate(ends):
                assert_same_bits(mine[n, :, :end].view(np.uint8), right[n, :, :end].view(np.uint8))
    if kind == "pages":
        for id in packed.ids:
            assert packed.lengths(id).tolist() == [ends[id]]
            for mine, right in zip(held(packed, id), held(padded, id), strict=True):
                assert_same_bits(mine, right)


# ---- tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one stretch", "pages"])
@pytest.mark.parametrize("name", list(ROWS))
def test_tensors(kind, name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("ml_dtypes", reason="bfloat16 tensors need ml_dtypes")
    dtype = getattr(torch, name)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in (queries(1, 4), *rows(1, 9)))
    if kind == "pages":
        cache = paged(like=k)
        id = cache.open()
        cache.append(id, k, v)
        whole = cache[id]
    else:
        cache = whole = tf.KVCache(1, HEADS, DIM, V_DIM, like=k)
        cache.append(k, v)
        assert torch.equal(cache.k[:, :, :9], k)
    assert isinstance(cache.k, torch.Tensor) and cache.v.dtype == dtype
    out, lse = tf.attention(q, whole, causal=True, return_lse=True)
    right, right_lse = tf.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)


def test_tensors_that_a_cache_refuses():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    cache = paged(dtype=torch.float32)
    (a,), _ = filled(cache, 9)
    q = torch.from_numpy(queries(1, 1))
    with pytest.raises(ValueError, match="a gradient cannot be asked for beside a PagedView"):
        tf.attention(q.clone().requires_grad_(), cache[a])
    with torch.no_grad():
        assert isinstance(tf.attention(q.clone().requires_grad_(), cache[a]), torch.Tensor)
    with pytest.raises(TypeError, match="k must not be a PagedView in a program that is compiled"):
        torch.func.vmap(lambda q: tf.attention(q, cache[a]))(q)
    with pytest.raises(TypeError, match="k must not be a PagedView in a program that is compiled"):
        tf.attention(q.to("meta"), cache[a])


# ---- any order of operations ---------------------------------------------------------------------------------


class Pages(RuleBasedStateMachine):
    """A paged cache beside a dictionary of arrays: id to [keys, values, first key that is not gone]."""

    page, window, anchors, pages = 3, None, 0, None
    codes: ClassVar = {}  # how rows are quantised

    def __init__(self):
        super().__init__()
        self.cache = paged(
            page=self.page, window=self.window, anchors=self.anchors, pages=self.pages, **self.codes
        )
        self.model = {}
        self.seed = 0
        self.folder = TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    def kept(self, x):
        """What appended rows are from then on."""
        return dequantise(*quantise(x, self.codes["quantised"])) if self.codes else x

    def some(self, data, least=1):
        """Different ids."""
        return data.draw(
            st.lists(st.sampled_from(sorted(self.model)), min_size=least, max_size=4, unique=True)
        )

    @precondition(lambda self: len(self.model) < 6)
    @rule()
    def open(self):
        id = self.cache.open()
        assert id not in self.model
        self.model[id] = [*(x[0] for x in rows(1, 0)), 0]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def append(self, data):
        ids = self.some(data)
        new = [data.draw(st.integers(0, 8)) for _ in ids]
        self.seed += 1
        k, v = rows(len(ids), 8, self.seed)
        expected = self.kept(k), self.kept(v)
        for n, count in enumerate(new):
            k[n, :, count:] = v[n, :, count:] = np.nan
        before, used = self.state(), self.cache.pages_used
        needed = self.cache.pages_needed(ids, new)
        assert self.state() == before
        try:
            if data.draw(st.booleans()):
                self.cache.append(ids, *end_to_end((k, v), new), cu_seqlens=np.cumsum([0, *new]))
            else:
                self.cache.append(ids, k, v, new)
        except tf.CacheFull:
            assert self.pages is not None and self.state() == before and needed > self.cache.pages_free
            return
        assert self.cache.pages_used == used + needed
        for n, (id, count) in enumerate(zip(ids, new, strict=True)):
            if not count:
                continue
            keys, values, first = self.model[id]
            if self.window is not None:
                first = max(first, keys.shape[1] - self.window + 1)
            self.model[id] = [
                *(
                    np.concatenate([x, y[n, :, :count]], axis=1)
                    for x, y in zip((keys, values), expected, strict=True)
                ),
                first,
            ]

    @precondition(lambda self: 0 < len(self.model) < 6)
    @rule(data=st.data())
    def fork(self, data):
        (id,) = self.some(data)[:1]
        self.model[self.cache.fork(id)] = list(self.model[id])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        ids = self.some(data)
        self.cache.free(ids)
        for id in ids:
            del self.model[id]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        (id,) = self.some(data)[:1]
        keys, values, first = self.model[id]
        length = data.draw(st.integers(0, keys.shape[1]))
        before = self.state()
        if self.anchors < length < first:
            with pytest.raises(ValueError, match="given back"):
                self.cache.truncate(id, length)
            assert self.state() == before
            return
        self.cache.truncate(id, length)
        first = first if length > self.anchors else 0
        self.model[id] = [keys[:, :length], values[:, :length], first]

    @rule()
    def restore(self):
        """The cache that a file holds takes the place of the one that wrote it."""
        path = Path(self.folder.name, "cache")
        self.cache.snapshot(path)
        self.cache = tf.PagedKVCache.restore(path)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fail(self, data):
        """What is refused changes nothing."""
        id, *_ = self.some(data)
        k, v = rows(1, 2)
        before = self.state()
        for wrong in (
            lambda: self.cache.append([id, id], *rows(2, 2)),
            lambda: self.cache.append(id, k, v[:, :, :1]),
            lambda: self.cache.append(id, k, v, 3),
            lambda: self.cache.truncate(id, self.model[id][0].shape[1] + 1),
            lambda: self.cache.free([id, -1]),
            lambda: self.cache.fork(-1),
            *([lambda: self.cache.append(id, k, v * np.inf)] if self.codes else []),
        ):
            with pytest.raises(ValueError, match=r"id|lengths|rows|v must be finite"):
                wrong()
        assert self.state() == before

    def state(self):
        """Everything that a failed operation must leave as it was."""
        tables = {id: self.cache[id].stored() for id in self.cache.ids}
        held = {id: (s.table.tolist(), s.lengths.tolist()) for id, s in tables.items()}
        return held, list(self.cache._pool.holders), sorted(self.cache._pool._free)

    @invariant()
    def pages_are_held_by_those_that_have_them(self):
        pool = self.cache._pool
        tables = [self.cache[id].stored().table[0] for id in self.cache.ids]
        counts = np.zeros(pool.pages, int)
        for table in tables:
            np.add.at(counts, table[table >= 0], 1)
        assert counts.tolist() == pool.holders
        assert sorted(pool._free) == np.flatnonzero(counts == 0).tolist()
        assert self.cache.pages_used == np.count_nonzero(counts)

    @invariant()
    def every_row_is_there(self):
        assert sorted(self.cache.ids) == sorted(self.model)
        for id, (keys, values, first) in self.model.items():
            assert self.cache.lengths(id).tolist() == [keys.shape[1]]
            stored = self.cache[id].stored()
            assert stored.first is None or stored.first.tolist() == [first]
            there = np.arange(keys.shape[1])
            there = (there >= first) | (there < self.anchors)
            for mine, right in zip(held(self.cache, id), (keys, values), strict=True):
                assert np.array_equal(mine[:, there], right[:, there])

    @invariant()
    def no_page_is_held_in_vain(self):
        """A sequence has the pages of the rows that may still be seen, and no others."""
        for id, (keys, _, first) in self.model.items():
            table, length = self.cache[id].stored().table[0], keys.shape[1]
            starts = np.arange(0, length, self.page)
            needed = (starts + self.page > first) | (starts < self.anchors)
            assert np.array_equal(table[: len(starts)] >= 0, needed)
            assert (table[len(starts) :] < 0).all()


class Forgetful(Pages):
    window = 7


class Anchored(Pages):
    window, anchors, page = 5, 4, 2


class Small(Pages):
    pages, window = 9, 12


class Coded(Pages):
    codes: ClassVar = {"quantised": "int8"}


class CodedAndAnchored(Anchored):
    pages, codes = 12, {"quantised": "int8"}


for machine in (Pages, Forgetful, Anchored, Small, Coded, CodedAndAnchored):
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    globals()[f"Test{machine.__name__}"] = case


# ---- errors --------------------------------------------------------------------------------------------------

K, V = rows(2, 3)
Q = queries(2, 1)

WRONG = {
    "kv_heads must be >= 1, got 0": lambda: tf.KVCache(1, 0, 4),
    "dim must be an integer, got '4'": lambda: tf.PagedKVCache(1, "4"),
    "v_dim must be >= 1": lambda: tf.KVCache(1, 1, 4, 0),
    "batch must be >= 1, got 0": lambda: tf.KVCache(0, 1, 4),
    "capacity must be >= 0, got -1": lambda: tf.KVCache(1, 1, 4, capacity=-1),
    "page must be >= 1, got 0": lambda: tf.PagedKVCache(1, 4, page=0),
    "pages must be an integer, got 2.5": lambda: tf.PagedKVCache(1, 4, pages=2.5),
    "window must be >= 1, got 0": lambda: tf.PagedKVCache(1, 4, window=0),
    "anchors must be 0 without a window, where everything stays; got 3": lambda: tf.PagedKVCache(1, 4, anchors=3),
    "dtype must be float16, bfloat16, float32 or float64, got int32": lambda: tf.KVCache(1, 1, 4, dtype="int32"),
    "dtype must be float16, bfloat16, float32 or float64, got 'single_'": lambda: tf.KVCache(1, 1, 4, dtype="single_"),
    "dtype must be that of like, float32": lambda: tf.KVCache(1, 1, 4, dtype="float64", like=K),
    "like must be a NumPy array or a tensor, got list": lambda: tf.KVCache(1, 1, 4, like=[1.0]),
    "like must be float16, bfloat16, float32 or float64, got int64": lambda: tf.KVCache(1, 1, 4, like=np.arange(3)),
    "quantised must be the name of a type, got bool": lambda: tf.KVCache(1, 1, 4, quantised=True),
    "quantised must be 'int8', 'float8_e4m3fn', 'int4', got 'int2'": lambda: tf.PagedKVCache(1, 4, quantised="int2"),
    "group must divide the 6 dims of k, got 4": lambda: tf.PagedKVCache(1, 6, quantised="int8", group=4),
    "group must divide the 5 dims of v, got 3": lambda: tf.KVCache(1, 1, 6, 5, quantised="int8", group=3),
    "group must be even for int4, got 3": lambda: tf.KVCache(1, 1, 6, quantised="int4", group=3),
    "v must have an even number of dims for int4, got 5": lambda: tf.PagedKVCache(1, 6, 5, quantised="int4"),
    "group must be left out where nothing is quantised, got 4": lambda: tf.KVCache(1, 1, 4, group=4),
    "dtype must be float16, bfloat16 or float32 for a quantised cache, got float64": lambda: tf.PagedKVCache(
        1, 4, dtype=float, quantised="int8"
    ),
    "k must have shape (batch, kv_heads, S, dim) = (3, 2, S, 6), got (2, 2, 3, 6)": lambda: tf.KVCache(
        3, HEADS, DIM, V_DIM
    ).append(K, V),
    "v must have shape (batch, kv_heads, S, dim) = (2, 2, S, 4)": lambda: tf.KVCache(2, HEADS, DIM, 4).append(K, V),
    "k must be float64 as the cache is, got float32": lambda: tf.KVCache(2, HEADS, DIM, dtype=float).append(K, V),
    "k must be an array": lambda: tf.KVCache(2, HEADS, DIM, V_DIM).append(None, V),
    "k and v must have the same number of rows, got 3 and 2": lambda: one().append(K, V[:, :, :2]),
    "k must have shape (kv_heads, total, dim) = (2, total, 6), got (2, 2, 3, 6)": lambda: one().append(
        K, V, cu_seqlens=np.array([0, 3, 6])
    ),
    "cu_seqlens must end at 3, the number of packed rows; got 2": lambda: one().append(
        K[0], V[0], cu_seqlens=np.array([0, 1, 2])
    ),
    "cu_seqlens must count the 2 sequences of the cache, got 1": lambda: two().append(
        [0, 1], K[0], V[0], cu_seqlens=np.array([0, 3])
    ),
    "cu_seqlens must be a 1-D int32 or int64 array": lambda: one().append(K[0], V[0], cu_seqlens=np.array([0.0, 3])),
    "cu_seqlens and lengths exclude each other: packed rows": lambda: one().append(
        K[0], V[0], 1, cu_seqlens=np.array([0, 1, 3])
    ),
    "lengths must be at most 3, the rows of k and v; got 4": lambda: one().append(K, V, [4, 0]),
    "lengths must be one integer or have shape (2,), got (3,)": lambda: one().append(K, V, [1, 1, 1]),
    "lengths must be integers, got float64": lambda: one().append(K, V, [1.0, 1.0]),
    "lengths must be integers, got bool": lambda: one().append(K, V, True),
    "lengths must be >= 0, got -1": lambda: one().truncate(-1),
    "lengths must not exceed what is stored: 4 for 3 at index 1": lambda: one().truncate([3, 4]),
    "ids must differ, got 1 twice": lambda: two().append([1, 0, 1], *rows(3, 1)),
    "ids must differ, got 0 twice": lambda: two().pages_needed([0, 0], 1),
    "lengths must be >= 0, got -2": lambda: two().pages_needed([0, 1], [1, -2]),
    "ids must be one id or a sequence of them, got str": lambda: two()["0"],
    "id must be an integer, got '0'": lambda: two()[["0"]],
    "id must be an integer, got True": lambda: two().fork(True),
    "id must name a sequence of this cache, got 2": lambda: two().free([0, 2]),
    "v must not be given beside a KVCache, which holds keys and values": lambda: tf.attention(queries(2, 1), one(), V),
    "which holds keys and values; give a mask as mask=": lambda: tf.attention(queries(2, 1), one(), tf.causal()),
    "kv_lengths must not be given with a cache": lambda: tf.attention(queries(2, 1), one(), kv_lengths=[1, 1]),
    "cu_seqlens_k must not be given with a cache": lambda: tf.attention(Q, one(), cu_seqlens_k=np.array([0, 1])),
    "cu_seqlens_q must count the 2 sequences of the cache, got 1": lambda: tf.attention(
        Q[0], one(), cu_seqlens_q=np.array([0, 1])
    ),
    "cu_seqlens_q must end at 1, the number of packed rows; got 2": lambda: tf.attention(
        Q[0], two()[0, 1], cu_seqlens_q=np.array([0, 1, 2])
    ),
    "with cu_seqlens_q q must be (heads, total, dim), got (2, 4, 1, 6)": lambda: tf.attention(
        Q, two()[0, 1], cu_seqlens_q=np.array([0, 1, 2])
    ),
    "cu_seqlens and lengths exclude each other": lambda: tf.attention(
        Q[0], two()[0, 1], cu_seqlens_q=np.array([0, 1, 1]), q_lengths=[1, 1]
    ),
    "plan must not be given with packed queries over a cache": lambda: tf.attention(
        Q[0], two()[0, 1], cu_seqlens_q=np.array([0, 1, 1]), plan=tf.explain(Q, two()[0, 1]).plan
    ),
    "probes must not be given with packed queries over a cache": lambda: tf.attention(
        Q[0], two()[0, 1], cu_seqlens_q=np.array([0, 1, 1]), probes=[tf.entropy()]
    ),
    "mask of shape (4, 2, 12) does not broadcast to (..., heads, q_len, kv_len) = (4, 1, 4)": lambda: tf.attention(
        Q[0], two()[0, 1], mask=np.ones((4, 2, 12), bool), cu_seqlens_q=np.array([0, 1, 1])
    ),
    "the cache holds 2 sequences, q has 3": lambda: tf.attention(queries(3, 1), two()[0, 1]),
    "q and the cache must have one dtype, got q float64, k float32": lambda: tf.attention(
        queries(2, 1, float), two()[0, 1]
    ),
    "k and v must have the same leading dimensions, got q (3, 4, 1, 6)": lambda: tf.attention(queries(3, 1), one()),
}  # fmt: skip


def one():
    cache = tf.KVCache(2, HEADS, DIM, V_DIM)
    cache.append(K, V)
    return cache


def two():
    cache = paged()
    filled(cache, 3, 4)
    return cache


@pytest.mark.parametrize(("says", "call"), WRONG.items(), ids=WRONG)
def test_each_mistake_has_its_sentence(says, call):
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert says in str(raised.value)


def test_memory_that_does_not_suffice_leaves_the_cache_as_it_was(monkeypatch):
    caches = one(), two()
    empty = np.empty

    def scarce(shape, *rest):
        if np.prod(shape) > 100:
            raise MemoryError
        return empty(shape, *rest)

    before = caches[0].k.copy(), caches[1].k.copy()
    monkeypatch.setattr(np, "empty", scarce)
    with pytest.raises(MemoryError):
        caches[0].append(*rows(2, 100))
    with pytest.raises(MemoryError):
        caches[1].append([0, 1], *rows(2, 100))
    monkeypatch.undo()
    assert caches[0].lengths.tolist() == [3, 3] and caches[1].lengths([0, 1]).tolist() == [3, 4]
    assert all(np.array_equal(cache.k, x, equal_nan=True) for cache, x in zip(caches, before, strict=True))


def test_an_interrupted_append_leaves_the_lengths_as_they_were(monkeypatch):
    cache = paged()
    (a, b), ((k, _), _) = filled(cache, 9, 4)
    write, calls = Pool.write, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(Pool, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append([a, b], *rows(2, 30))
    monkeypatch.undo()
    assert cache.lengths([a, b]).tolist() == [9, 4] and cache.pages_used == 4
    cache.append([a, b], *rows(2, 30))
    assert np.array_equal(held(cache, a)[0][:, :9], k[0])
    assert np.array_equal(held(cache, b)[0][:, 4:], rows(2, 30)[0][1])


def test_statistics_of_weights_over_pages():
    class Mass:
        name = "mass"

        def start(self, problem, lead):
            self.sums = np.zeros((*lead, problem.heads, problem.q_len))
            return self

        def open(self, block, live, scores):
            self.index = block.frame.index

        def take(self, w):
            self.sums[(*self.index, w.heads)] += w.by_head.sum(axis=-1)

        def close(self, block):
            pass

        def result(self):
            return self.sums

    cache = paged()
    ids, _ = filled(cache, 9, 30)
    q = queries(2, 1)
    out, _, seen = tf.attention(q, cache[ids], causal=True, probes=[Mass()])
    np.testing.assert_allclose(seen.mass, 1, rtol=1e-5)
    np.testing.assert_array_equal(out, tf.attention(q, cache[ids], causal=True, backend="numpy"))


def test_any_object_that_stores_is_a_cache():
    class Mine:
        def stored(self):
            return Stored(K, V, np.array([2, 3]))

    q = queries(2, 1)
    right = tf.attention(q, K, V, causal=True, kv_lengths=np.array([2, 3]))
    assert_same_bits(tf.attention(q, Mine(), causal=True), right)
