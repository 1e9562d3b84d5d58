"""What must hold of statistics of weights, whatever the problem: sums, bounds and order; and the same bits however the
core is asked.

Problems are drawn as in test_any_problem.py.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bits import assert_same_bits
from drawn import cases
from hypothesis import given, settings
from hypothesis import strategies as st

import tilefold as tf
from tilefold.bench.case import Case
from tilefold.dtypes import ROWS
from tilefold.naive import naive_weights

pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")


def rounding(dtype: str, terms: int) -> float:
    """How far a sum of so many weights may be off, each rounded in the accumulate type, from a rounded lse."""
    return 40 * (1 + terms) ** 0.5 * ROWS[ROWS[dtype].accumulate].roundoff


@settings(max_examples=100)
@given(cases(), st.sampled_from(tf.probes.statistic.HEADS))
def test_sums_bounds_and_order(text, heads):
    case = Case.parse(text)
    if "packed" in case.words:
        heads = "each"
    a = case.build()
    kv_len = a.k.shape[-2]
    lists = [tf.topk(min(kv_len, 4))] if kv_len else []
    seen = tf.probe(
        a.q, a.k, tf.entropy(), tf.max_weight(), tf.mass_in(first=tf.prefix(3), rest=~tf.prefix(3)), tf.key_mass(),
        tf.key_max(), tf.heatmap(3, 5, pool="sum"), tf.block_mass(8),
        tf.heatmap(3, 5, pool="sum", heads=heads).named("reduced"), *lists, **a.options,
    )  # fmt: skip
    exact = naive_weights(a.q, a.k, dtype=np.float64, **a.options)
    rows = exact.sum(axis=-1)
    if not np.isfinite(rows).all():
        return
    off = rounding(case.dtype, kv_len) * max(1, np.abs(np.log(exact[exact > 0])).max(initial=0))
    whole = rows.sum(axis=-1)
    slack = off * np.maximum(whole, 1)
    assert (np.abs(seen.mass_in.first + seen.mass_in.rest - rows) <= off).all()
    assert (np.abs(seen.key_mass.sum(axis=-1, dtype=float) - whole) <= slack).all()
    for name in ("heatmap", "block_mass"):
        sums = getattr(seen, name).sum(axis=(-1, -2), dtype=float)
        if "packed" in case.words:
            sums = sums.sum(axis=0)
        assert (np.abs(sums - whole) <= slack).all(), name
    mean = {"each": whole, "all": whole.mean(axis=-1)}.get(heads)
    if mean is not None and "packed" not in case.words:
        assert (np.abs(seen.reduced.sum(axis=(-1, -2), dtype=float) - mean) <= slack.max(initial=0)).all()
    outcomes = (exact > 0).sum(axis=-1) + (1 if "sinks" in case.words else 0)
    assert (seen.entropy >= 0).all()
    assert (seen.entropy <= np.log(np.maximum(outcomes, 1)) + off).all()
    assert (seen.max_weight.max(axis=-1, initial=0) <= seen.key_max.max(axis=-1, initial=0) + off).all()
    assert (
        np.abs(seen.key_max.max(axis=-1, initial=0) - seen.max_weight.max(axis=-1, initial=0)) <= off
    ).all()
    if lists:
        weights, keys = seen.topk
        assert (np.diff(weights) <= 0).all()
        assert (np.abs(weights[..., 0] - seen.max_weight) <= off).all()
        assert ((keys >= 0) | (weights == 0)).all()
        some = np.take_along_axis(exact, np.maximum(keys, 0), -1)
        assert (np.abs(np.where(keys >= 0, some, 0) - weights) <= off).all()


# ---- same bits ------------------------------------------------------------------------------------------------

native = pytest.mark.skipif(not tf.backends.cpu.CORE, reason="tilefold was installed without its native core")
ALL = (
    tf.entropy(),
    tf.max_logit(),
    tf.mean_distance(),
    tf.mass_in(first=slice(0, 4), near=tf.window(9, 0)),
    tf.topk(5),
    tf.key_mass(),
    tf.key_mass(discount=0.99).named("fading"),
    tf.key_max(),
    tf.heatmap(7, 9),
    tf.block_mass(100),
    tf.rows([3, -2]),
)
OVER_ROWS = ("entropy", "max_logit", "mean_distance", "mass_in", "topk")


def flat(seen: tf.Seen) -> dict[str, np.ndarray]:
    found = {}
    for name, x in vars(seen).items():
        parts = x._asdict() if isinstance(x, tuple) else vars(x) if hasattr(x, "__dict__") else {"": x}
        found.update((f"{name} {part}", array) for part, array in parts.items())
    return found


def assert_alike(got: tf.Seen, expected: tf.Seen, at: object = ..., what: str = "") -> None:
    for (name, x), y in zip(flat(got).items(), flat(expected).values(), strict=True):
        assert_same_bits(x, y[at], f"{name}, {what}")


def arrays(dtype: str, *shape: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal(shape), rng.standard_normal((*shape[:-2], kv_len, shape[-1]))
    return (2 * q).astype(dtype), k.astype(dtype)


@native
@pytest.mark.parametrize("dtype", list(ROWS))
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 5.0}, {"window": (700, 20)}], ids=str)
def test_threads_batch_and_repetition_do_not_matter(dtype, options):
    q, k = arrays(dtype, 3, 2, 330, 16, kv_len=2300)
    whole = tf.probe(q, k, *ALL, **options)
    before = tf.get_num_threads()
    try:
        for threads in (1, 3, 7):
            tf.set_num_threads(threads)
            assert_alike(tf.probe(q, k, *ALL, **options), whole, what=f"{threads} threads")
    finally:
        tf.set_num_threads(before)
    assert_alike(tf.probe(q[1], k[1], *ALL, **options), whole, 1, "alone")
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(lambda _: tf.probe(q, k, *ALL, **options), range(4)):
            assert_alike(again, whole, what="four callers at once")


@native
@pytest.mark.parametrize("dtype", list(ROWS))
def test_packed_sequences_are_seen_as_if_alone(dtype):
    q, k = arrays(dtype, 2, 400, 16, kv_len=1500)
    ends_q, ends_k = [0, 130, 131, 400], [0, 1100, 1200, 1500]
    what = [s for s in ALL if s.name != "rows"]
    packed = tf.probe(q, k, *what, cu_seqlens_q=np.array(ends_q), cu_seqlens_k=np.array(ends_k), causal=True)
    for n in range(3):
        i, j = slice(*ends_q[n : n + 2]), slice(*ends_k[n : n + 2])
        alone = flat(tf.probe(q[:, i], k[:, j], *what, causal=True))
        for name, x in flat(packed).items():
            if name.startswith(OVER_ROWS):
                here = x[:, i] - (j.start if name == "topk keys" else 0)
                here = np.where(x[:, i] < 0, -1, here) if name == "topk keys" else here
            elif name.startswith("key") or name.startswith("fading"):
                here = x[:, j]
            else:
                here = x[n][..., : alone[name].shape[-2], : alone[name].shape[-1]]
            assert_same_bits(here, alone[name], f"{name} of sequence {n}")


@native
@pytest.mark.parametrize("page", [1, 16, 100, 512])
def test_pages_do_not_matter(page):
    q, k = arrays("float32", 2, 4, 3, 16, kv_len=1300)
    k = np.ascontiguousarray(k[:, :2])
    cache = tf.PagedKVCache(2, 16, page=page, dtype="float32")
    ids, lengths = [cache.open(), cache.open()], [1300, 77]
    for n in (1, 0):
        cache.append([ids[n]], k[n : n + 1, :, : lengths[n]], k[n : n + 1, :, : lengths[n]])
    what = [s for s in ALL if s.name in OVER_ROWS or s.name in ("key_mass", "key_max", "fading")]
    seen = flat(tf.probe(q, cache[ids], *what, causal=True))
    for n in range(2):
        alone = flat(tf.probe(q[n], k[n, :, : lengths[n]], *what, causal=True))
        for name, x in seen.items():
            over_rows = name.startswith(OVER_ROWS)
            assert_same_bits(
                x[n] if over_rows else x[n][:, : lengths[n]], alone[name], f"{name} of sequence {n}"
            )
            assert over_rows or not x[n][:, lengths[n] :].any()


@native
def test_a_row_alone_is_seen_as_in_the_whole():
    """Decoding: the statistics of a step are those of its row in prefill."""
    q, k = arrays("float32", 4, 900, 32, kv_len=1100)
    what = [s for s in ALL if s.name in OVER_ROWS]
    whole = tf.probe(q, k, *what, causal=True, invariant=True)
    for i in (0, 333, 899):
        step = tf.probe(q[:, i : i + 1], k[:, : 1100 - 899 + i], *what, causal=True, invariant=True)
        assert_alike(step, whole, np.s_[:, i : i + 1], f"row {i}")
