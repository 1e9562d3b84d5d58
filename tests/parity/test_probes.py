"""Every statistic of every case of the zoo, on every backend, against the whole matrix in a wider type."""

import numpy as np
import pytest
from cases import ZOO
from probe_oracle import Oracle

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.bench.budgets import FEW, judge, reference_type
from tilefold.bench.case import Built, Case
from tilefold.dtypes import ROWS

NAMES = [b.name for b in BACKENDS]
REGION = tf.window(9, 2) | tf.prefix(3)
LAST, DISCOUNT, BINS, BLOCK, K = 7, 0.9, (5, 7), 16, 5


def statistics(kv_len: int = K, q_len: int = LAST) -> list[tf.probes.Statistic]:
    listed = [tf.topk(min(K, kv_len))] if kv_len else []
    recent = [tf.key_mass(last=min(LAST, q_len)).named("recent")] if q_len else []
    return [
        *listed,
        *recent,
        tf.entropy(),
        tf.effective_keys(),
        tf.max_logit(),
        tf.max_weight(),
        tf.mean_distance(),
        tf.mass_in(near=REGION, first=slice(1, 40)),
        tf.key_mass(),
        tf.key_mass(discount=DISCOUNT).named("fading"),
        tf.key_max(),
        tf.heatmap(*BINS, pool="sum"),
        tf.heatmap(*BINS, pool="max").named("peaks"),
        tf.block_mass(BLOCK),
    ]


def expected(o: Oracle, seen: tf.Seen) -> dict[str, np.ndarray]:
    """What each must be, from the matrices of `o`; shapes of blocks as they were found."""
    bins = seen.heatmap.shape[:-3]
    blocks, heads = seen.block_mass.shape, o.call.problem.heads
    return {
        "entropy": o.entropy(),
        "max_logit": o.max_logit(),
        "max_weight": o.max_weight(),
        "mean_distance": o.mean_distance(),
        "mass_in.near": o.mass_in(REGION),
        "mass_in.first": o.mass_in(tf.prefix(40) & ~tf.prefix(1)),
        "topk.weights": o.topk(min(K, o.call.problem.kv_len)),
        "key_mass": o.key_mass(),
        "recent": o.key_mass(last=min(LAST, o.call.problem.q_len)),
        "fading": o.key_mass(discount=DISCOUNT),
        "key_max": o.key_max(),
        "heatmap": o.bins(*BINS, "sum").reshape(*bins, heads, *BINS),
        "peaks": o.bins(*BINS, "max").reshape(*bins, heads, *BINS),
        "block_mass": o.blocks(BLOCK, *blocks[-2:]).reshape(*blocks[:-3], heads, *blocks[-2:]),
    }


def found(seen: tf.Seen, name: str, squeezed: bool) -> np.ndarray:
    x = seen
    for part in name.split("."):
        x = getattr(x, part)
    return x[None] if squeezed else x


def probed(a: Built, backend: str, *what: tf.probes.Statistic) -> tf.Seen:
    try:
        return tf.probe(a.q, a.k, *what, backend=backend, **a.options)
    except tf.BackendRefused as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("text", ZOO)
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.usefixtures("poisoned")
def test_statistics_are_those_of_the_matrix(backend, text):
    case = Case.parse(text)
    a, acc = case.build(), ROWS[case.dtype].accumulate
    squeezed = case.lead is None
    seen = probed(a, backend, *statistics(*(min(n, 7) for n in (a.k.shape[-2], a.q.shape[-2]))))
    wide = reference_type(acc)
    right = expected(Oracle(a.q, a.k, a.options, wide), _lifted(seen, squeezed))
    honest = [
        expected(Oracle(a.q, a.k, a.options, acc, rebuilt), _lifted(seen, squeezed))
        for rebuilt in (False, True)
    ]
    for n in range(FEW):
        b = a.nudged(acc, n)
        honest.append(expected(Oracle(b.q, b.k, b.options, wide), _lifted(seen, squeezed)))
    wrong = []
    for name, reference in right.items():
        if not hasattr(seen, name.partition(".")[0]):
            continue
        got = found(seen, name, squeezed)
        assert got.dtype == acc
        error = judge(name, got, [h[name] for h in honest], reference, acc)
        if not error.ok:
            wrong.append(str(error))
        if name == "topk.weights":
            wrong += _keys_of_the_top(a, seen, squeezed, wide, error.budget)
    spread = found(seen, "effective_keys", squeezed)
    np.testing.assert_array_equal(spread[spread != 0], np.exp(found(seen, "entropy", squeezed))[spread != 0])
    np.testing.assert_array_equal(spread == 0, np.isneginf(Oracle(a.q, a.k, a.options, wide).lse()))
    assert not wrong, "\n".join([f'tilefold case "{text}"', *wrong])


def _lifted(seen: tf.Seen, squeezed: bool) -> tf.Seen:
    return tf.Seen(heatmap=found(seen, "heatmap", squeezed), block_mass=found(seen, "block_mass", squeezed))


def _keys_of_the_top(a: Built, seen: tf.Seen, squeezed: bool, wide: np.dtype, budget: float) -> list[str]:
    """The keys in each list are different ones that the row sees, in the order of their weights; the list is full where
    there are enough of them."""
    o = Oracle(a.q, a.k, a.options, wide)
    weights, keys = (found(seen, f"topk.{part}", squeezed) for part in ("weights", "keys"))
    whole, visible = o.weights(), o.seen()
    wrong: list[str] = []
    if not whole.size:
        return wrong
    flat = (x.reshape(-1, x.shape[-1]) for x in (weights, keys, whole, visible))
    for row, (w, j, every, sees) in enumerate(zip(*flat, strict=True)):
        if np.isnan(every).any():
            continue
        there = j >= 0
        count = min(len(j), int((sees & (every > 0)).sum()))
        if there.sum() < count or len(set(j[there])) != there.sum() or not sees[j[there]].all():
            wrong.append(f"topk: row {row} names keys {j}")
        elif (np.diff(w) > 0).any() or w[~there].any():
            wrong.append(f"topk: row {row} has weights {w}")
        elif (np.abs(w[there] - every[j[there]]) > budget).any():
            wrong.append(f"topk: row {row} says {w[there]}, and these keys have {every[j[there]]}")
    return wrong[:3]


@pytest.mark.parametrize("backend", NAMES)
def test_of_equal_scores_the_lower_key_comes_first(backend):
    k = np.random.default_rng(1).normal(size=(1, 3000, 16)).astype(np.float32)
    k[:, 1:] = k[:, :1]
    k[:, ::700] *= 2
    q = np.abs(k[:, :3])
    q = np.where(k[:, :1] > 0, q, -q)
    a = Built(q, k, k, {}, q, q)
    keys = probed(a, backend, tf.topk(8)).topk.keys
    assert (keys == [0, 700, 1400, 2100, 2800, 1, 2, 3]).all()


@pytest.mark.parametrize(
    "text", ["float32 h4/2 q70 k90 d8 causal", "float64 b2 h2 q40 k90 d8 sinks", "float32 2d q30 k40 d8"]
)
@pytest.mark.parametrize("backend", NAMES)
def test_pieces_of_the_matrix(backend, text):
    case = Case.parse(text)
    a = case.build()
    seen = probed(a, backend, tf.rows([3, -1, 3]), tf.block(q=slice(5, 21), k=slice(-30, None)))
    acc, squeezed = ROWS[case.dtype].accumulate, case.lead is None
    right = Oracle(a.q, a.k, a.options, reference_type(acc)).weights()
    honest = [Oracle(a.q, a.k, a.options, acc, rebuilt).weights() for rebuilt in (False, True)]
    for name, part in (("rows", np.s_[..., [3, -1, 3], :]), ("block", np.s_[..., 5:21, -30:])):
        error = judge(name, found(seen, name, squeezed), [h[part] for h in honest], right[part], acc)
        assert error.ok, str(error)


@pytest.mark.parametrize("backend", NAMES)
def test_heads_are_reduced_as_they_are_asked_for(backend):
    a = Case.parse("float64 b2 h6/2 q30 k40 d8 causal").build()
    for make, pool in ((tf.key_mass, np.mean), (tf.max_logit, np.max), (tf.entropy, np.mean)):
        each, group, every = (
            vars(probed(a, backend, make(heads=heads)))[make.__name__] for heads in ("each", "group", "all")
        )
        np.testing.assert_allclose(group, pool(each.reshape(2, 2, 3, -1), axis=2))
        np.testing.assert_allclose(every, pool(each, axis=1))


@pytest.mark.parametrize("backend", NAMES)
def test_statistics_ride_with_attention(backend):
    """The output is that of a call without them, and what is seen is what `probe` sees."""
    a = Case.parse("float32 b2 h4/2 q130 k1500 d16 causal sinks softcap=5").build()
    try:
        out, lse, seen = tf.attention(a.q, a.k, a.v, probes=statistics(), backend=backend, **a.options)
    except tf.BackendRefused as refused:
        pytest.skip(str(refused))
    plain = tf.attention(a.q, a.k, a.v, return_lse=True, backend=backend, **a.options)
    alone = probed(a, backend, *statistics())
    np.testing.assert_array_equal(out, plain[0])
    np.testing.assert_array_equal(lse, plain[1])
    for name in ("entropy", "topk.keys", "mass_in.near", "key_mass", "heatmap"):
        np.testing.assert_array_equal(found(seen, name, False), found(alone, name, False))


def test_jax_arrays_come_back_as_jax_arrays():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    a = Case.parse("float32 h2 q20 k30 d8").build()
    q, k = (jax.numpy.asarray(x) for x in (a.q, a.k))
    seen, plain = (
        tf.probe(*given, tf.topk(3), tf.mass_in(first=slice(0, 2)), tf.heatmap(2, 3))
        for given in ((q, k), (a.q, a.k))
    )
    for x, y in (
        (seen.topk.keys, plain.topk.keys),
        (seen.mass_in.first, plain.mass_in.first),
        (seen.heatmap, plain.heatmap),
    ):
        assert isinstance(x, jax.Array)
        np.testing.assert_array_equal(np.asarray(x), y)
