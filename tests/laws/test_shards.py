"""Shard then merge equals the whole: any split of the keys, any split of the queries, any mask, on either backend."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.call import Options, understand

NAMES = [b.name for b in BACKENDS if b.why_not(tf.explain(*np.zeros((3, 1, 1, 1))).problem) is None]

Q, K, D = 11, 17, 4
MASKS = {
    "full": None,
    "causal": tf.causal(),
    "window": tf.window(4, 2),
    "anchors": tf.anchors(2, 3),
    "documents": tf.documents(cu_seqlens=[0, 6, 7, K]),
    "predicate": tf.from_predicate(lambda i, j: (i + j) % 3 != 0),
    "dense": tf.dense(np.random.default_rng(1).random((Q, K)) < 0.4),
}


@given(
    st.sampled_from(NAMES),
    st.sampled_from(list(MASKS)),
    st.lists(st.integers(0, K), max_size=4),
    st.lists(st.integers(0, Q), max_size=3),
)
def test_shards_merge_to_the_whole(backend, name, key_cuts, row_cuts):
    rng = np.random.default_rng(7)
    q, k, v = rng.normal(size=(2, Q, D)), rng.normal(size=(2, K, D)), rng.normal(size=(2, K, D))
    mask = MASKS[name] or tf.band()
    whole, lse = tf.attention(q, k, v, mask, return_lse=True, backend=backend)
    bound = mask.bind(Q, K)
    keys, rows = sorted({0, K, *key_cuts}), sorted({0, Q, *row_cuts})
    for i0, i1 in zip(rows, rows[1:], strict=False):
        parts = [
            tf.attention(
                q[:, i0:i1], k[:, a:b], v[:, a:b], bound[i0:i1, a:b], return_lse=True, backend=backend
            )
            for a, b in zip(keys, keys[1:], strict=False)
        ]
        out, part_lse = tf.merge(*parts)
        np.testing.assert_allclose(out, whole[:, i0:i1], atol=1e-13)
        np.testing.assert_allclose(part_lse, lse[:, i0:i1], atol=1e-13)


@pytest.mark.parametrize("block_q", [1, 3, 64])
@pytest.mark.parametrize("block_kv", [1, 5, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", NAMES)
def test_any_tile_size_gives_the_same(backend, block_q, block_kv, causal):
    q, k, v = np.random.default_rng(3).normal(size=(3, 2, 33, 8))
    options = {"scale": 0.3, "causal": causal}
    plan = tf.explain(q, k, v, backend=backend, **options).plan
    plan = next(b for b in BACKENDS if b.name == backend).resize(plan, block_q, block_kv)
    whole = tf.attention(q, k, v, backend=backend, **options)
    np.testing.assert_allclose(tf.attention(q, k, v, plan=plan, **options), whole, atol=1e-14)
    config = tf.FlashConfig(block_q, block_kv, **options)
    np.testing.assert_allclose(tf.flash_attention(q, k, v, config).output, whole, atol=1e-14)


@given(st.sampled_from(NAMES), st.integers(0, 12), st.integers(0, 12))
def test_rows_of_a_call_are_those_of_the_whole(backend, a, b):
    """Folding only some rows writes these and no others, with the positions they have in the whole."""
    i0, i1 = sorted((a, b))
    q, k, v = np.random.default_rng(3).normal(size=(3, 2, 12, 8))
    whole = tf.attention(q, k, v, causal=True, alibi=[0.1, 0.2], backend=backend)
    out = np.full_like(q, np.nan)
    call = understand(q, k, v, Options(causal=True, alibi=[0.1, 0.2]), backend=backend)
    call.allocate(out)
    call.fold(slice(i0, i1))
    np.testing.assert_allclose(out[:, i0:i1], whole[:, i0:i1], atol=1e-14)
    assert np.isnan(out[:, :i0]).all() and np.isnan(out[:, i1:]).all()
