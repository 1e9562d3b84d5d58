"""Eviction: what stays is what a brute-force formula over the whole matrix says, and the loss is what it lost.

After it a cache answers with the bits of plain arrays of the rows that stayed, forks and files included, and a call
that would need their order is refused.
"""

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import tilefold as tf
from tilefold.eviction import anchors_and_window, evict, heaviest, snapkv
from tilefold.naive import naive_weights

BATCH, HEADS, KV_HEADS, DIM, V_DIM = 3, 4, 2, 6, 5
LENGTHS = [40, 17, 29]


def made(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def keys_and_values(length=LENGTHS[0], dtype=np.float32):
    k, v = (made(BATCH, KV_HEADS, length, d, seed=d, dtype=dtype) for d in (DIM, V_DIM))
    return k * 2, v


def queries(rows, heads=HEADS, dtype=np.float32):
    return made(BATCH, heads, rows, DIM, seed=1, dtype=dtype)


def filled(lengths=LENGTHS, dtype=np.float32, **settings):
    k, v = keys_and_values(dtype=dtype)
    cache = tf.KVCache(BATCH, KV_HEADS, DIM, V_DIM, dtype=dtype, **settings)
    cache.append(k, v, lengths)
    return cache


def paged(lengths=LENGTHS, **settings):
    k, v = keys_and_values()
    cache = tf.PagedKVCache(KV_HEADS, DIM, V_DIM, **{"page": 4} | settings)
    ids = [cache.open() for _ in lengths]
    cache.append(ids, k, v, lengths)
    return cache, ids


def weights(q, k, lengths, **options):
    """The whole matrices in float64, one sequence after the other, each of its own length."""
    return [
        naive_weights(q[n : n + 1], k[n : n + 1, :, :end], causal=True, dtype=np.float64, **options)[0]
        for n, end in enumerate(lengths)
    ]


def gathered(x, kept, n):
    """The rows of a sequence that stay, ``(1, kv_heads, n, dim)``, picked one by one."""
    of_heads = np.broadcast_to(kept.keys[n], (KV_HEADS, kept.keys.shape[-1]))
    return np.stack([[x[n, h, j] for j in of_heads[h] if j >= 0] for h in range(KV_HEADS)])[None]


def decoded(cache, kept, ids=None):
    """A step on the cache has the bits of plain arrays of what is kept."""
    k, v = keys_and_values()
    q = queries(1)
    out = tf.attention(q, cache if ids is None else cache[ids], causal=True)
    for n in range(BATCH):
        alone = tf.attention(
            q[n : n + 1], *(np.ascontiguousarray(gathered(x, kept, n)) for x in (k, v)), causal=True
        )
        assert_same_bits(out[n : n + 1], alone)


# ---- choices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recent", [0, 1, 6])
def test_heaviest_is_what_sorting_the_columns_gives(recent):
    k, _ = keys_and_values()
    q = queries(12)
    mass = tf.probe(q, filled(), tf.key_mass(heads="group"), causal=True).key_mass
    kept = heaviest(mass, 10, recent=recent, lengths=LENGTHS)
    for n, w in enumerate(weights(q, k, LENGTHS)):
        for h in range(KV_HEADS):
            columns = w[2 * h : 2 * h + 2].sum(axis=(0, 1))
            end = LENGTHS[n]
            last = set(range(end - recent, end))
            others = sorted(set(range(end)) - last, key=lambda j: -columns[j])
            assert set(kept.keys[n, h]) == last | set(others[: 10 - recent])
    assert kept.counts.tolist() == [10] * BATCH


def test_equal_masses_keep_the_lower_key():
    kept = heaviest(np.ones((1, 6)), 3, recent=1)
    assert kept.keys.tolist() == [[0, 1, 5]]


def test_one_head_chooses_for_all():
    """TOVA: the last query's mass, averaged over heads."""
    k, _ = keys_and_values()
    q = queries(1)
    cache = filled()
    mass = tf.probe(q, cache, tf.key_mass(last=1, heads="all"), causal=True).key_mass
    kept = heaviest(mass[:, None], 8, lengths=cache.lengths)
    for n, w in enumerate(weights(q, k, LENGTHS)):
        best = np.argsort(-w.mean(axis=(0, 1)))[:8]
        assert kept.keys[n].tolist() == [sorted(best.tolist())]
    evict(cache, kept)
    decoded(cache, kept)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("pool", [1, 3, 7])
def test_snapkv_is_its_formula(pool, pooling):
    k, _ = keys_and_values()
    q, keep, window = queries(6), 12, 4
    kept = snapkv(q, filled(), keep, window=window, pool=pool, pooling=pooling)
    for n, w in enumerate(weights(q, k, LENGTHS)):
        prefix = LENGTHS[n] - window
        for h in range(KV_HEADS):
            votes = w[2 * h : 2 * h + 2, -window:, :prefix].sum(axis=(0, 1))
            near = []
            for j in range(prefix):
                some = votes[max(j - pool // 2, 0) : j + pool // 2 + 1]
                near.append(some.sum() if pooling == "mean" else some.max())
            votes = np.array(near)
            threshold = np.sort(votes)[-(keep - window)]
            got = kept.keys[n, h]
            assert got[-window:].tolist() == list(range(prefix, LENGTHS[n]))
            assert votes[got[:-window]].min() >= threshold * (
                1 - 1e-5
            )  # maxima of neighbours are often equal
            assert len(set(got)) == keep


def test_snapkv_of_arrays_and_of_a_cache_agree():
    k, _ = keys_and_values()
    q = queries(5)
    of_cache = snapkv(q, filled(), 9)
    of_arrays = snapkv(q, k, 9, kv_lengths=np.array(LENGTHS))
    assert np.array_equal(of_cache.keys, of_arrays.keys)
    cache, ids = paged()
    assert np.array_equal(of_cache.keys, snapkv(q, cache[ids], 9).keys)


def test_anchors_and_window_are_places():
    kept = anchors_and_window(LENGTHS, anchors=3, window=16)
    assert kept.counts.tolist() == [19, 17, 19]
    for n, end in enumerate(LENGTHS):
        expected = [j for j in range(end) if j < 3 or j >= end - 16]
        assert kept.keys[n, 0, : len(expected)].tolist() == expected
        assert (kept.keys[n, 0, len(expected) :] == -1).all()


def test_budgets_may_differ_between_sequences():
    mass = np.abs(made(BATCH, KV_HEADS, 40))
    kept = heaviest(mass, [5, 30, 1], lengths=LENGTHS)
    assert kept.counts.tolist() == [5, 17, 1]
    assert ((kept.keys >= 0).sum(axis=-1) == kept.counts[:, None]).all()


# ---- the loss --------------------------------------------------------------------------------------------------


def test_loss_is_the_mass_that_the_matrix_had_there():
    k, _ = keys_and_values()
    q = queries(9)
    mass = tf.probe(q, filled(), tf.key_mass(heads="group"), causal=True).key_mass
    kept = heaviest(mass, 8, lengths=LENGTHS)
    loss = kept.loss(q, filled(), causal=True)
    assert loss.shape == (BATCH, HEADS) and loss.dtype == np.float32
    for n, w in enumerate(weights(q, k, LENGTHS)):
        for h in range(HEADS):
            gone = sorted(set(range(LENGTHS[n])) - set(kept.keys[n, h // 2].tolist()))
            expected = w[h][:, gone].sum() / len(w[h])
            # Weights and their sum are each right to a few roundings for every key.
            assert abs(loss[n, h] - expected) <= LENGTHS[n] * np.finfo(np.float32).eps


def test_loss_counts_masks_and_score_options_and_leaves_sinks_out():
    k, _ = keys_and_values(dtype=np.float64)
    q, options = (
        queries(9, dtype=np.float64),
        {"softcap": 2.0, "scale": 0.7, "sinks": np.arange(4.0), "window": (20, 0)},
    )
    kept = anchors_and_window(LENGTHS, 2, 5)
    loss = kept.loss(q, k, kv_lengths=np.array(LENGTHS), causal=True, **options)
    for n, w in enumerate(weights(q, k, LENGTHS, **options)):
        gone = [j for j in range(LENGTHS[n]) if 2 <= j < LENGTHS[n] - 5]
        expected = w[..., gone].sum(axis=(1, 2)) / w.sum(axis=(1, 2))
        assert np.abs(loss[n] - expected).max() <= LENGTHS[n] * np.finfo(np.float64).eps


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_loss_falls_as_more_is_kept_and_ends_at_nothing(data):
    length, rows = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 8))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**32))
    q = made(1, kv_heads * group, rows, 4, seed=seed) * data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    k = made(1, kv_heads, length, 4, seed=seed + 1)
    recent = data.draw(st.integers(0, min(length, 3)))
    mass = tf.probe(q, k, tf.key_mass(heads="group"), causal=True).key_mass
    before = np.ones((1, kv_heads * group))
    for keep in range(max(recent, 1), length + 2):
        kept = heaviest(mass, keep, recent=recent)
        loss = kept.loss(q, k, causal=True)
        assert (loss >= 0).all() and (loss <= before).all()
        assert kept.counts.tolist() == [min(keep, length)]
        before = loss
    assert (loss == 0).all()


def test_a_head_without_keys_loses_nothing():
    q, k = made(1, 2, 3, 4), made(1, 2, 5, 4)
    kept = anchors_and_window(5, 1, 1)
    assert kept.loss(q, k, tf.prefix(0)).tolist() == [[0, 0]]


# ---- caches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [40, 41, 100])
def test_keeping_everything_changes_no_bit(keep):
    q = queries(6)
    cache, whole = filled(), filled()
    mass = tf.probe(q, cache, tf.key_mass(heads="group"), causal=True).key_mass
    report = evict(cache, heaviest(mass, keep, lengths=cache.lengths), q=q, causal=True)
    assert not report.loss.any() and not report.dropped.any()
    assert_same_bits(tf.attention(q, cache, causal=True), tf.attention(q, whole, causal=True))
    pages, ids = paged()
    shared = pages.fork(ids[0])
    evict(pages, heaviest(mass, keep, lengths=LENGTHS), ids=ids)
    assert_same_bits(tf.attention(q, pages[ids], causal=True), tf.attention(q, whole, causal=True))
    assert pages.pages_used == sum(-(-n // 4) for n in LENGTHS) and pages.lengths(shared) == [40]


@pytest.mark.parametrize("recent", [0, 4])
def test_a_step_has_the_bits_of_what_was_kept(recent):
    q = queries(6)
    mass = tf.probe(q, filled(), tf.key_mass(heads="group"), causal=True).key_mass
    kept = heaviest(mass, 11, recent=recent, lengths=LENGTHS)
    cache = filled()
    report = evict(cache, kept, q=q, causal=True)
    assert cache.lengths.tolist() == [11, 11, 11] and cache.seen_tokens.tolist() == LENGTHS
    assert report.dropped.tolist() == [29, 6, 18]
    assert_same_bits(report.loss, kept.loss(q, filled(), causal=True))
    decoded(cache, kept)
    for page in (1, 3, 4, 64):
        pages, ids = paged(page=page)
        report = evict(pages, kept, ids=ids, q=q, causal=True)
        assert np.allclose(report.loss, kept.loss(q, filled(), causal=True), rtol=1e-5)
        assert pages.lengths(ids).tolist() == [11, 11, 11] and pages.seen_tokens(ids).tolist() == LENGTHS
        assert pages.pages_used == BATCH * -(-11 // page)
        decoded(pages, kept, ids)


def test_rows_appended_later_are_in_order():
    """Several queries at once see what was kept, and of the new rows those before them."""
    k, v = keys_and_values()
    more_k, more_v, q = (
        made(BATCH, KV_HEADS, 3, DIM, seed=8),
        made(BATCH, KV_HEADS, 3, V_DIM, seed=9),
        queries(3),
    )
    kept = heaviest(np.abs(made(BATCH, KV_HEADS, 40)), 7, lengths=LENGTHS)
    cache = filled()
    pages, ids = paged()
    evict(cache, kept)
    evict(pages, kept, ids=ids)
    cache.append(more_k, more_v)
    pages.append(ids, more_k, more_v)
    assert cache.seen_tokens.tolist() == pages.seen_tokens(ids).tolist() == [n + 3 for n in LENGTHS]
    out = tf.attention(q, cache, causal=True)
    assert_same_bits(out, tf.attention(q, pages[ids], causal=True))
    for n in range(BATCH):
        rows = [
            np.concatenate([gathered(x, kept, n), more[n : n + 1]], axis=2)
            for x, more in ((k, more_k), (v, more_v))
        ]
        assert_same_bits(out[n : n + 1], tf.attention(q[n : n + 1], *rows, causal=True))


def test_masses_go_on_as_h2o_adds_them_up():
    """A cache of fixed size through 30 steps, against a list of rows that is pruned by hand."""
    k, v = keys_and_values(30)
    q = queries(30)
    cache = tf.KVCache(BATCH, KV_HEADS, DIM, V_DIM, capacity=9)
    mass = np.zeros((BATCH, KV_HEADS, 0))
    held = [[[] for _ in range(KV_HEADS)] for _ in range(BATCH)]
    sums = [[[] for _ in range(KV_HEADS)] for _ in range(BATCH)]
    for t in range(30):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        step = q[:, :, t : t + 1]
        seen = tf.probe(step, cache, tf.key_mass(heads="group"), causal=True).key_mass
        now = int(cache.lengths[0])
        mass = np.concatenate([mass, np.zeros((BATCH, KV_HEADS, 1))], axis=-1) + seen[..., :now]
        kept = heaviest(mass, 8, recent=4)
        evict(cache, kept)
        mass = kept.taken(mass)
        for n in range(BATCH):
            for h in range(KV_HEADS):
                rows, sum_ = held[n][h], sums[n][h]
                rows.append(t)
                w = naive_weights(
                    step[n, 2 * h : 2 * h + 2].astype(np.float64),
                    k[n, h : h + 1, rows].astype(np.float64).swapaxes(0, 1),
                )
                sum_[:] = np.append(sum_, 0) + w.mean(axis=0)[0]
                if len(rows) > 8:
                    gone = int(np.argmin(sum_[:-4]))
                    del rows[gone], sum_[gone]
    for n in range(BATCH):
        for h in range(KV_HEADS):
            assert np.array_equal(cache.k[n, h, :8], k[n, h, held[n][h]])
            assert np.array_equal(cache.v[n, h, :8], v[n, h, held[n][h]])
    assert cache.seen_tokens.tolist() == [30] * BATCH and cache.capacity == 9


# ---- pages that are shared -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_forks_keep_what_they_have(data):
    """Any sequences evict from any tree of forks, with as many free pages as were promised."""
    page = data.draw(st.integers(1, 5))
    cache = tf.PagedKVCache(1, 2, page=page, pages=data.draw(st.integers(8, 40)))
    arrays = {}
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(2, 12))):
        ids = list(arrays)
        what = data.draw(st.sampled_from(["open", "fork", "append", "keep", "keep"])) if ids else "open"
        try:
            if what == "open":
                arrays[cache.open()] = np.zeros((0, 2), np.float32)
            elif what == "fork":
                origin = data.draw(st.sampled_from(ids))
                arrays[cache.fork(origin)] = arrays[origin]
            elif what == "append":
                id = data.draw(st.sampled_from(ids))
                new = rng.normal(size=(data.draw(st.integers(1, 9)), 2)).astype(np.float32)
                cache.append(id, new[None, None], new[None, None])
                arrays[id] = np.concatenate([arrays[id], new])
            else:
                some = data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
                rows = [
                    sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)) if n else [])
                    for n in (len(arrays[id]) for id in some)
                ]
                keys = np.full((len(some), 1, max(map(len, rows))), -1)
                for n, own in enumerate(rows):
                    keys[n, 0, : len(own)] = own
                cache.keep(some, keys)
                arrays |= {id: arrays[id][own] for id, own in zip(some, rows, strict=True)}
        except tf.CacheFull:
            pass
        for id, held in arrays.items():
            stored = cache[id].stored()
            assert stored.lengths.tolist() == [len(held)]
            for memory in (stored.k, stored.v):
                assert np.array_equal(
                    memory[stored.table[0, : -(-len(held) // page)], 0].reshape(-1, 2)[: len(held)], held
                )
        holders = [
            sum(id_page == n for s in cache._sequences.values() for id_page in s.pages)
            for n in range(cache._pool.pages)
        ]
        assert holders == cache._pool.holders


def test_a_full_cache_says_so_and_keeps_what_it_has():
    cache, (a, *_) = paged([8, 1, 1], pages=4)
    b = cache.fork(a)
    keys = np.array([[[1, 2, 3, 4, 5]]])
    with pytest.raises(tf.CacheFull):
        cache.keep(a, keys)
    assert cache.lengths([a, b]).tolist() == [8, 8] and cache.pages_free == 0
    cache.free(b)
    cache.keep(a, keys)
    assert cache.lengths(a).tolist() == [5]


def test_pages_that_one_sequence_frees_are_taken_by_the_next():
    cache, (c, a, *_) = paged([8, 8, 0], pages=4)
    cache.fork(a)
    assert cache.pages_free == 0
    cache.keep([c, a], np.array([[[1, 2, 3, 4]]] * 2))
    assert cache.lengths([c, a]).tolist() == [4, 4] and cache.pages_free == 0


def test_rows_before_the_first_that_moves_come_along_from_a_shared_page():
    cache, (a, *_) = paged([6, 1, 1])
    b = cache.fork(a)
    k, v = keys_and_values()
    cache.v[...] = np.where(
        np.isin(np.arange(len(cache.v)), cache[a].stored().table[0])[:, None, None, None], cache.v, 7
    )
    cache.keep(a, np.array([[[0, 1, 3]]]))
    stored = cache[[a, b]].stored()
    assert np.array_equal(stored.v[stored.table[0, 0], :, :3], v[0, :, [0, 1, 3]].swapaxes(0, 1))
    assert np.array_equal(stored.k[stored.table[0, 0], :, :3], k[0, :, [0, 1, 3]].swapaxes(0, 1))
    assert np.array_equal(stored.v[stored.table[1, 0], :, :4], v[0, :, :4])


def test_leading_pages_that_stay_are_still_shared():
    cache, (a, *_) = paged([16, 1, 1])
    b = cache.fork(a)
    before = cache.pages_used
    cache.keep(a, np.array([[[0, 1, 2, 3, 4, 5, 6, 7, 10, 15]]]))
    assert cache.pages_used == before + 1
    assert cache[a].stored().table[0, :2].tolist() == cache[b].stored().table[0, :2].tolist()


# ---- afterwards ------------------------------------------------------------------------------------------------


def test_other_caches_can_read_where_the_next_token_stands():
    cache = filled()
    pages, ids = paged()
    for stored in (cache.stored(), pages[ids].stored()):
        assert stored.settled is None and stored.dropped is None
    evict(cache, anchors_and_window(LENGTHS, 2, 6))
    evict(pages, anchors_and_window(LENGTHS, 2, 6), ids=ids)
    for stored in (cache.stored(), pages[ids].stored()):
        assert (stored.lengths + stored.dropped).tolist() == LENGTHS and stored.settled.tolist() == [8, 8, 8]


def test_what_needs_an_order_that_is_gone_is_refused():
    cache = filled()
    evict(cache, anchors_and_window(LENGTHS, 2, 6))
    with pytest.raises(ValueError, match=r"q must have at most 1 rows for sequence 0.* got 2"):
        tf.attention(queries(2), cache, causal=True)
    with pytest.raises(ValueError, match="q must have at most 1 rows"):
        tf.probe(queries(2), cache, tf.entropy(), mask=tf.anchors(2, 3))
    assert tf.attention(queries(2), cache).shape == (
        BATCH,
        HEADS,
        2,
        V_DIM,
    )  # where all see all, nothing is missing
    assert tf.attention(queries(2), cache, causal=True, q_lengths=1).shape == (BATCH, HEADS, 2, V_DIM)
    pages, ids = paged()
    evict(pages, anchors_and_window(LENGTHS[:1], 2, 6), ids=ids[:1])
    with pytest.raises(ValueError, match="q must have at most 1 rows for sequence 1"):
        tf.attention(queries(2), pages[[ids[1], ids[0], ids[2]]], causal=True)
    assert tf.attention(queries(2)[:2], pages[ids[1:]], causal=True).shape == (2, HEADS, 2, V_DIM)


def test_truncation_stops_at_what_was_kept():
    pages, ids = paged()
    for cache, cut, seen in (
        (filled(), lambda c, n: c.truncate(n), lambda c: c.seen_tokens),
        (pages, lambda c, n: c.truncate(ids, n), lambda c: c.seen_tokens(ids)),
    ):
        evict(cache, anchors_and_window(LENGTHS, 2, 6), ids=None if cache is not pages else ids)
        more = keys_and_values(5)
        cache.append(*more) if cache is not pages else cache.append(ids, *more)
        cut(cache, [8, 9, 13])
        assert seen(cache).tolist() == [40, 18, 34]
        with pytest.raises(
            ValueError, match="lengths must not lie within what an eviction left, 1 to 7 at index 1; got 7"
        ):
            cut(cache, [8, 7, 13])
        cut(cache, [0, 9, 13])
        assert seen(cache).tolist() == [0, 18, 34]
        cut(cache, 0)
        assert seen(cache).tolist() == [0, 0, 0]
    cache = filled()
    evict(cache, anchors_and_window(LENGTHS, 2, 6))
    cache.reset()
    cache.append(*keys_and_values(3))
    assert tf.attention(queries(3), cache, causal=True).shape == (BATCH, HEADS, 3, V_DIM)


def test_files_remember(tmp_path):
    cache = filled()
    pages, ids = paged()
    evict(cache, anchors_and_window(LENGTHS, 2, 6))
    evict(pages, anchors_and_window(LENGTHS, 2, 6), ids=ids)
    b = pages.fork(ids[1])
    cache.snapshot(tmp_path / "one")
    pages.snapshot(tmp_path / "two")
    one, two = tf.KVCache.restore(tmp_path / "one"), tf.PagedKVCache.restore(tmp_path / "two")
    assert one.seen_tokens.tolist() == two.seen_tokens(ids).tolist() == LENGTHS and two.seen_tokens(b) == [17]
    assert_same_bits(tf.attention(queries(1), one, causal=True), tf.attention(queries(1), cache, causal=True))
    for again in (one, two[ids]):
        with pytest.raises(ValueError, match="q must have at most 1 rows"):
            tf.attention(queries(2), again, causal=True)
    with pytest.raises(ValueError, match="lengths must not lie within what an eviction left"):
        one.truncate(3)


def test_a_second_eviction_counts_on():
    cache = filled()
    pages, ids = paged()
    evict(cache, anchors_and_window(LENGTHS, 2, 10))
    evict(pages, anchors_and_window(LENGTHS, 2, 10), ids=ids)
    cache.append(*keys_and_values(2))
    pages.append(ids, *keys_and_values(2))
    kept = anchors_and_window(cache.lengths, 1, 4)
    evict(cache, kept)
    evict(pages, kept, ids=ids)
    assert cache.lengths.tolist() == pages.lengths(ids).tolist() == [5, 5, 5]
    assert cache.seen_tokens.tolist() == pages.seen_tokens(ids).tolist() == [n + 2 for n in LENGTHS]
    assert_same_bits(
        tf.attention(queries(1), cache, causal=True), tf.attention(queries(1), pages[ids], causal=True)
    )


# ---- tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_choose_alike_and_come_back(dtype):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    k, v = (torch.from_numpy(x).to(kind) for x in keys_and_values())
    q = torch.from_numpy(queries(5)).to(kind)
    cache = tf.KVCache(BATCH, KV_HEADS, DIM, V_DIM, like=k)
    cache.append(k, v, LENGTHS)
    mass = tf.probe(q, cache, tf.key_mass(heads="group"), causal=True).key_mass
    kept = heaviest(mass, 9, recent=2, lengths=cache.lengths)
    assert isinstance(kept.keys, torch.Tensor) and isinstance(kept.taken(mass), torch.Tensor)
    assert np.array_equal(kept.keys.numpy(), heaviest(mass.numpy(), 9, recent=2, lengths=LENGTHS).keys)
    snap = snapkv(q, cache, 9, window=3)
    assert isinstance(snap.cells(40), torch.Tensor)
    report = evict(cache, kept, q=q, causal=True)
    assert isinstance(report.loss, torch.Tensor) and report.loss.shape == (BATCH, HEADS)
    assert bool((report.loss > 0).all()) and bool((report.loss < 1).all())
    assert report.dropped.tolist() == [31, 8, 20]
    picked = torch.stack([k[0, h, kept.keys[0, h]] for h in range(KV_HEADS)])
    assert torch.equal(cache.k[0, :, :9], picked)
    assert "kept 27 of 86 keys; loss of attention mass 0." in repr(report)
    assert torch.equal(kept.cells(40).sum(-1), torch.full((BATCH, KV_HEADS), 9))


# ---- what is refused -------------------------------------------------------------------------------------------


MASS = np.ones((BATCH, KV_HEADS, 40), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: heaviest(MASS, 0), ValueError, "keep must be >= 1, got 0"),
        (lambda: heaviest(MASS, 2.5), TypeError, "keep must be an array|keep must be integers"),
        (lambda: heaviest(MASS, [1, 2]), ValueError, r"keep must be one integer or have shape \(3,\), got \(2,\)"),
        (lambda: heaviest(MASS, 4, recent=5), ValueError, "recent must be at most keep, 4; got 5"),
        (lambda: heaviest(MASS, 4, recent=-1), ValueError, "recent must be >= 0, got -1"),
        (lambda: heaviest(MASS, 4, lengths=41), ValueError, "lengths must be at most the 40 keys of mass, got 41"),
        (lambda: heaviest(MASS.astype(int), 4), TypeError, "mass must be floating numbers"),
        (lambda: heaviest(MASS[0, 0], 4), TypeError, r"mass must be floating numbers \(..., heads, Sk\)"),
        (lambda: heaviest(MASS * np.nan, 4), ValueError, "mass must not hold NaN"),
        (lambda: snapkv(queries(4), filled(), 3), ValueError, "keep must be at least the window, 4; got 3"),
        (lambda: snapkv(queries(4), filled(), 9, window=5), ValueError, "window must be at most the 4 rows of q_last"),
        (lambda: snapkv(queries(4), filled(), 9, pool=4), ValueError, "pool must be odd, got 4"),
        (lambda: snapkv(queries(4), filled(), 9, pooling="sum"), ValueError, "pooling must be 'mean' or 'max'"),
        (lambda: snapkv(queries(0), filled(), 9), ValueError, "q_last must have shape"),
        (lambda: snapkv("q", filled(), 9), ValueError, "q_last must have shape"),
        (lambda: anchors_and_window(9, -1, 2), ValueError, "anchors must be >= 0"),
        (lambda: anchors_and_window(9, 1, 0), ValueError, "window must be >= 1"),
        (lambda: anchors_and_window(1.5, 1, 1), TypeError, "lengths must be an array|lengths must be integers"),
        (lambda: evict(filled(), np.ones(3)), TypeError, "kept must be a choice such as heaviest"),
        (lambda: evict(MASS, anchors_and_window(9, 1, 1)), TypeError, "cache must be a KVCache or a PagedKVCache"),
        (lambda: evict(filled(), anchors_and_window(LENGTHS, 1, 1), ids=0), TypeError, "ids must be left out"),
        (lambda: evict(paged()[0], anchors_and_window(LENGTHS, 1, 1)), TypeError, "ids must name the sequences"),
        (
            lambda: evict(filled(), anchors_and_window([40, 17, 30], 1, 1)),
            ValueError,
            r"chosen from sequences of \[40, 17, 30\] keys, and the cache has \[40, 17, 29\]",
        ),
        (lambda: evict(filled(), anchors_and_window(LENGTHS, 1, 1), causal=True), TypeError, "which is missing"),
        (lambda: anchors_and_window(9, 1, 1).taken(MASS), ValueError, "x must have shape"),
        (lambda: anchors_and_window(LENGTHS, 1, 1).taken(MASS[..., :20]), ValueError, "x must span all keys"),
        (lambda: anchors_and_window(9, 1, 1).loss(queries(2), filled()), ValueError, "q must have shape"),
        (lambda: filled().keep([[[0]]] * 3), TypeError, "keys must be an array"),
        (lambda: filled().keep(MASS), TypeError, "keys must be integers, got float32"),
        (lambda: filled().keep(np.zeros((3, 4, 1), int)), ValueError, r"keys must have shape \(3, 2, n\)"),
        (lambda: filled().keep(np.array([[[1, 0]]] * 3)), ValueError, "keys must ascend.* in sequence 0"),
        (lambda: filled().keep(np.array([[[-1, 0]]] * 3)), ValueError, "keys must ascend, with -1 only at the end"),
        (lambda: filled().keep(np.array([[[3, -2]]] * 3)), ValueError, "keys must ascend, with -1 only at the end"),
        (lambda: filled().keep(np.array([[[20]]] * 3)), ValueError, "within the 17 of sequence 1, got 20"),
        (lambda: filled().keep(np.array([[[-1]]] * 3)), ValueError, "keep something of sequence 0"),
        (
            lambda: filled().keep(np.array([[[0, 1], [0, -1]]] * 3)),
            ValueError,
            r"as many in each head of a sequence, got \[2, 1\] in sequence 0",
        ),
        (
            lambda: paged(window=5)[0].keep([0], np.array([[[0]]])),
            ValueError,
            "keep must not be asked of a cache with a window",
        ),
        (lambda: paged()[0].keep([0, 0], np.array([[[0]]] * 2)), ValueError, "ids must differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_refused_eviction_leaves_the_cache_as_it_was():
    cache = filled()
    before = cache.k.copy()
    with pytest.raises(ValueError, match="scale must be finite"):
        evict(cache, anchors_and_window(LENGTHS, 1, 1), q=queries(2), scale=np.nan)
    with pytest.raises(ValueError, match="keys must ascend"):
        cache.keep(np.array([[[0, 5]], [[0, 5]], [[5, 0]]]))
    assert cache.lengths.tolist() == LENGTHS
    assert np.array_equal(cache.k[0, :, :40], before[0, :, :40])


# ---- with what else caches can do ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "int4"])
def test_codes_move_as_they_are(kind):
    pytest.importorskip("ml_dtypes")
    k, v = made(BATCH, KV_HEADS, 40, 8), made(BATCH, KV_HEADS, 40, 4)
    kept = heaviest(np.abs(made(BATCH, KV_HEADS, 40)), 7, lengths=LENGTHS)
    for group in (None, 2):
        cache = tf.KVCache(BATCH, KV_HEADS, 8, 4, quantised=kind, group=group)
        cache.append(k, v, LENGTHS)
        pages = tf.PagedKVCache(KV_HEADS, 8, 4, page=4, quantised=kind, group=group)
        ids = [pages.open() for _ in LENGTHS]
        pages.append(ids, k, v, LENGTHS)
        before = cache.stored()
        arrays = [x.copy() for x in (before.k, before.v, before.k_scale, before.v_scale)]
        evict(cache, kept)
        evict(pages, kept, ids=ids)
        after = cache.stored()
        for old, new in zip(arrays, (after.k, after.v, after.k_scale, after.v_scale), strict=True):
            for n in range(BATCH):
                for h in range(KV_HEADS):
                    assert_same_bits(new[n, h, :7], old[n, h, kept.keys[n, h]])
        q = made(BATCH, HEADS, 1, 8)
        assert_same_bits(tf.attention(q, cache, causal=True), tf.attention(q, pages[ids], causal=True))


def test_rotary_positions_go_on_after_an_eviction():
    from tilefold.caches.rotary import Rotary

    angles = np.arange(60)[:, None] / 10.0 ** np.arange(3)
    rotary = Rotary(np.cos(angles), np.sin(angles))
    k, v, q = made(BATCH, KV_HEADS, 40, DIM), made(BATCH, KV_HEADS, 40, V_DIM), queries(2)
    cache = tf.KVCache(BATCH, KV_HEADS, DIM, V_DIM)
    pages = tf.PagedKVCache(KV_HEADS, DIM, V_DIM, page=4)
    ids = [pages.open() for _ in LENGTHS]
    cache.append(k, v, LENGTHS, rotary=rotary)
    pages.append(ids, k, v, LENGTHS, rotary=rotary)
    kept = anchors_and_window(LENGTHS, 2, 6)
    evict(cache, kept)
    evict(pages, kept, ids=ids)
    cache.append(k[:, :, :2], v[:, :, :2], rotary=rotary)
    pages.append(ids, k[:, :, :2], v[:, :, :2], rotary=rotary)
    assert_same_bits(rotary.queries(q, cache), rotary.queries(q, pages[ids]))
    for n, length in enumerate(LENGTHS):
        places = np.arange(length, length + 2)
        assert_same_bits(cache.k[n, :, 8:10], rotary(k[n, :, :2], places))
        assert_same_bits(rotary.queries(q, cache)[n], rotary(q[n], places))
    assert_same_bits(tf.attention(q, cache, causal=True), tf.attention(q, pages[ids], causal=True))


def test_packed_queries_after_an_eviction_are_those_that_came_since():
    k, v = keys_and_values()
    pages, ids = paged()
    evict(pages, anchors_and_window(LENGTHS, 2, 6), ids=ids)
    pages.append(ids, k[:, :, :3], v[:, :, :3], [3, 1, 2])
    q = queries(4)
    packed = np.concatenate([q[0, :, :4], q[1, :, :2], q[2, :, :1]], axis=1)
    out = tf.attention(packed, pages[ids], causal=True, cu_seqlens_q=np.array([0, 4, 6, 7]))
    assert_same_bits(out[:, :4], tf.attention(q[:1], pages[ids[:1]], causal=True)[0])
    with pytest.raises(ValueError, match="q must have at most 2 rows for sequence 1"):
        tf.attention(packed, pages[ids], causal=True, cu_seqlens_q=np.array([0, 3, 6, 7]))
