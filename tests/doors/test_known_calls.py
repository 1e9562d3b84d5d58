"""A step of decoding that was understood once is not asked again: what says where sequences lie is read anew each time.

Held against the same call with ``backend="native"``, which is always looked at in full: same bits, memory order and
errors, while lengths, block tables and the memory of a cache change between the calls. Whether a call was looked at
is counted, not timed. Every test runs on arrays and on tensors.
"""

import threading
from dataclasses import replace

import numpy as np
import pytest
from bits import assert_same_bits

import tilefold as tf
from tilefold import call as calls
from tilefold import shortcut
from tilefold.layouts import Stored

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

BATCH, HEADS, KV_HEADS, DIM, V_DIM, ROOM = 3, 4, 2, 16, 9, 40


@pytest.fixture(params=["arrays", "tensors"])
def way(request, monkeypatch):
    """What makes an argument of an array; nothing is known yet."""
    if request.param == "arrays":
        monkeypatch.setattr(shortcut, "_known", {})
        yield lambda x: x
        return
    torch = pytest.importorskip("torch")
    from tilefold.arrays.torch import calls as door
    from tilefold.arrays.torch.tensors import leave

    monkeypatch.setattr(door, "_known", type(door._known)(*door.MADE_OF))
    with torch.no_grad():
        yield leave


@pytest.fixture
def looked_at(monkeypatch):
    """How many calls were looked at in full, and at what."""
    seen = []
    understand = calls.understand

    def counted(*given, **options):
        seen.append(given[0].shape)
        return understand(*given, **options)

    monkeypatch.setattr(calls, "understand", counted)
    return seen


def array(x):
    """A result as NumPy has it."""
    return x if isinstance(x, np.ndarray) else enter(x)


def enter(x):
    from tilefold.arrays.torch.tensors import enter

    return enter("x", x)


def some(*shape, dtype="float32", seed=0):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return np.random.default_rng([len(shape), seed]).standard_normal(shape).astype(dtype)


def qkv(q_len=2, kv_len=ROOM, dtype="float32", seed=0):
    return [
        some(BATCH, heads, rows, dim, dtype=dtype, seed=seed + n)
        for n, (heads, rows, dim) in enumerate(
            [(HEADS, q_len, DIM), (KV_HEADS, kv_len, DIM), (KV_HEADS, kv_len, V_DIM)]
        )
    ]


def agree(got, expected):
    """Same bits in the same memory order."""
    got, expected = (x if isinstance(x, tuple) else (x,) for x in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b)
        a, b = array(a), array(b)
        assert a.strides == b.strides
        assert_same_bits(a, b)


def known(looked_at, *given, **options):
    """The result of a call that is not looked at in full, held against one that is."""
    before = len(looked_at)
    got = tf.attention(*given, **options)
    assert len(looked_at) == before, "it was looked at in full"
    agree(got, tf.attention(*given, **options, backend="native"))
    return got


class Held:
    """A cache of anybody's, which holds what it was given."""

    def __init__(self, *given, **more):
        self.held = Stored(*given, **more)

    def stored(self):
        return self.held


# ---- what is known ---------------------------------------------------------------------------------------------


def lengths(way, dtype):
    q, k, v = (way(x) for x in qkv(dtype=dtype))
    return (q, k, v), {"kv_lengths": np.array([40, 1, 17]), "q_lengths": way(np.array([2, 1, 0], np.int32))}


def packed(way, dtype):
    q, k, v = (x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3]) for x in qkv(dtype=dtype))
    ends = {"cu_seqlens_q": np.array([0, 1, 1, 6]), "cu_seqlens_k": np.array([0, 50, 51, 120], np.int32)}
    return tuple(way(x) for x in (q, k, v)), {name: way(x) for name, x in ends.items()}


def stretch(way, dtype):
    q, k, v = (way(x) for x in qkv(dtype=dtype))
    cache = tf.KVCache(BATCH, KV_HEADS, DIM, V_DIM, like=k)
    cache.append(k, v, [40, 3, 17])
    return (q, cache), {}


def pages(way, dtype, **settings):
    q, k, v = (way(x) for x in qkv(dtype=dtype))
    cache = tf.PagedKVCache(KV_HEADS, DIM, V_DIM, page=8, like=k, **settings)
    ids = [cache.open() for _ in range(BATCH)]
    for n in range(0, ROOM, 5):
        cache.append(ids, k[:, :, n : n + 5], v[:, :, n : n + 5], [5, 1, 3])
    return (q, cache[ids]), {}


def window(way, dtype):
    given, _ = pages(way, dtype, window=10)
    return given, {"window": (7, None)}


def codes(kind, layout, scaled):
    def made(way, dtype):
        if dtype == "float64":
            pytest.skip("float64 has no codes")
        pytest.importorskip("ml_dtypes")
        q, k, v = qkv(dtype=dtype)
        v = np.concatenate([v, v[..., :3]], axis=-1)  # dims that go into groups
        table = None
        if layout == "pages":
            table = np.random.default_rng(0).permutation(5 * BATCH).reshape(BATCH, 5)
            parts = (x.reshape(BATCH, KV_HEADS, 5, 8, -1).swapaxes(1, 2) for x in (k, v))
            k, v = (x.reshape(5 * BATCH, KV_HEADS, 8, -1) for x in parts)
        groups = 4 if scaled == "groups" else None
        (k, k_scale), (v, v_scale) = (tf.caches.quantise(x, kind, group=groups) for x in (k, v))
        if scaled == "page":
            k_scale, v_scale = (np.ascontiguousarray(x[..., 0]) for x in (k_scale, v_scale))
        return (way(q), Held(k, v, np.array([40, 3, 17]), table, k_scale=k_scale, v_scale=v_scale)), {}

    return made


LAYOUTS = {
    "lengths": lengths,
    "packed": packed,
    "stretch": stretch,
    "pages": pages,
    "window": window,
    **{
        f"{kind} in {layout}, scales of a {scaled}": codes(kind, layout, scaled)
        for kind, layout, scaled in [
            ("int8", "stretch", "row"),
            ("int8", "pages", "page"),
            ("float8_e4m3fn", "pages", "row"),
            ("int4", "pages", "groups"),
            ("int4", "stretch", "groups"),
        ]
    },
}
OPTIONS = {
    "none": {},
    "causal, lse": {"causal": True, "return_lse": True},
    "window": {"window": (5, 0), "scale": 0.3, "softcap": 2.0},
    "slopes and sinks": {"alibi": np.linspace(0, 0.5, HEADS), "sinks": np.float32([-np.inf, 0, 1, 2])},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_second_call_gives_the_first_result(way, looked_at, dtype, layout, options):
    given, more = LAYOUTS[layout](way, dtype)
    if layout == "window" and "window" not in options:
        more = more | {"window": (7, 0)}
    more |= options
    first = tf.attention(*given, **more)
    assert len(looked_at) == 1
    agree(known(looked_at, *given, **more), first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_lie_in_memory_as_queries_do(way, looked_at, dtype):
    """Padding among them, which is written without a look at the strides."""
    q, k, v = (way(x.swapaxes(1, 2).copy().swapaxes(1, 2)) for x in qkv(q_len=5, dtype=dtype))
    for ends in (np.array([5, 0, 2]), np.array([1, 5, 5]), np.array([0, 0, 0]), np.array([5, 5, 5])):
        options = {"q_lengths": ends, "kv_lengths": 7, "causal": True, "return_lse": True}
        if not looked_at:
            tf.attention(q, k, v, **options)
        out, lse = known(looked_at, q, k, v, **options)
        for n, end in enumerate(ends):
            assert not array(out)[n, :, end:].any()
            assert (array(lse)[n, :, end:] == -np.inf).all()


def test_one_head_alone_and_odd_scalars_are_looked_at_each_time(way, looked_at):
    q, k, v = (way(x) for x in qkv())
    for given, options in (
        ((q[0, 0], k[0, 0], v[0, 0]), {"kv_lengths": 3}),
        ((q, k, v), {"kv_lengths": np.int64(3)}),
        ((q, k, v), {"kv_lengths": 3, "scale": 1}),
        ((q, k, v), {"window": [3, 0]}),
        ((q, k, v), {"window": (np.int64(3), 0)}),
    ):
        before = len(looked_at)
        first = tf.attention(*given, **options)
        agree(tf.attention(*given, **options), first)
        assert len(looked_at) == before + 2


# ---- what may change between two calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "int16", "uint64"])
@pytest.mark.parametrize("kind", ["like q", "array", "strided", "read-only", "one"])
def test_lengths_are_read_anew(way, looked_at, dtype, kind):
    q, k, v = (way(x) for x in qkv())

    def made(values):
        x = np.array(values, dtype)
        if kind == "like q":
            return way(x)
        if kind == "strided":
            return np.repeat(x, 2)[::2]
        if kind == "one":
            return way(np.array(x[0]))
        if kind == "read-only":
            x.flags.writeable = False
        return x

    rng = np.random.default_rng(0)
    tf.attention(q, k, v, causal=True, kv_lengths=made([1, 2, 3]), q_lengths=made([1, 2, 1]))
    for _ in range(10):
        ends = {
            "kv_lengths": made(rng.integers(0, ROOM + 1, BATCH)),
            "q_lengths": made(rng.integers(0, 3, BATCH)),
        }
        known(looked_at, q, k, v, causal=True, **ends)
    for n in (0, 7, ROOM):
        known(looked_at, q, k, v, causal=True, kv_lengths=n, q_lengths=2)


def test_lengths_are_read_anew_where_they_lie(way, looked_at):
    """The caller's own array, written to between the calls."""
    q, k, v = (way(x) for x in qkv())
    ends = way(np.array([3, 2, 1]))
    tf.attention(q, k, v, kv_lengths=ends)
    for n in range(5):
        ends[...] = n
        known(looked_at, q, k, v, kv_lengths=ends)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_per_head_are_read_anew(way, looked_at, dtype):
    """Float16 of all sizes among them: what the core makes of them is what NumPy makes of them."""
    q, k, v = (way(x) for x in qkv())
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = np.random.default_rng(0).permutation(numbers[np.isfinite(numbers)])
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    numbers = np.concatenate([numbers[:200], np.float16([2.0**-24, -(2.0**-14), 65504, -0.0])]).astype(dtype)

    def made(x):
        x = way(x.copy())
        return (
            x if array(x).dtype.name != "bfloat16" or not isinstance(x, np.ndarray) else x.astype(np.float32)
        )

    for options in ({"kv_lengths": 9}, {"causal": True}):
        tf.attention(q, k, v, alibi=made(numbers[:HEADS]), sinks=made(numbers[:HEADS]), **options)
        for n in range(0, len(numbers), HEADS):
            some = numbers[n : n + HEADS]
            known(looked_at, q, k, v, alibi=made(some), sinks=made(some[::-1]), return_lse=False, **options)
        many = made(numbers[: BATCH * HEADS].reshape(BATCH, HEADS))
        known(looked_at, q, k, v, alibi=many, sinks=made(numbers[:HEADS]), **options)
    for wrong, says in ((np.nan, "NaN"), (np.inf, "inf")):
        bad = numbers[:HEADS].astype(np.float32)
        bad[1] = wrong
        for name in ("alibi", "sinks"):
            given = {"alibi": made(numbers[:HEADS]), "sinks": made(numbers[:HEADS])} | {name: made(bad)}
            with pytest.raises(ValueError, match=f"{name} must not hold .*{says}"):
                tf.attention(q, k, v, causal=True, **given)
    with pytest.raises(ValueError, match="sinks must have shape"):
        tf.attention(q, k, v, causal=True, alibi=many, sinks=many)


def test_leading_dimensions(way, looked_at):
    q, k, v = (
        way(some(2, 3, heads, rows, DIM)) for heads, rows in ((HEADS, 2), (KV_HEADS, 9), (KV_HEADS, 9))
    )
    tf.attention(q, k, v, kv_lengths=np.ones((2, 3), int))
    ends = np.arange(6).reshape(3, 2).T
    known(looked_at, q, k, v, kv_lengths=way(ends.copy()))
    known(looked_at, q, k, v, kv_lengths=ends)
    for wrong in (ends.T, ends.reshape(-1), ends[:1]):
        with pytest.raises(ValueError, match=r"kv_lengths must have the leading shape \(2, 3\)"):
            tf.attention(q, k, v, kv_lengths=wrong)


@pytest.mark.parametrize("settings", [{}, {"window": 12}, {"window": 12, "anchors": 4}], ids=str)
def test_sequences_come_grow_fork_and_go(way, looked_at, settings):
    """What is known is the shape of a step; each result is that of the pages as they are now."""
    rng = np.random.default_rng(1)
    cache = tf.PagedKVCache(KV_HEADS, DIM, V_DIM, page=4, like=way(some(1)), **settings)
    ids = [cache.open() for _ in range(BATCH)]
    options = {"causal": True, "return_lse": True} | ({"window": (9, 0)} if settings else {})
    hits = 0
    for step in range(60):
        rows = (way(some(BATCH, KV_HEADS, 1, dim, seed=step)) for dim in (DIM, V_DIM))
        cache.append(ids, *rows)
        if step % 9 == 8:
            cache.truncate(ids[0], int(cache.lengths(ids[0])[0]) - 1)
        if step % 13 == 12:
            other = cache.fork(ids[rng.integers(BATCH)])
            cache.free(ids.pop(0))
            ids.append(other)
        if step % 17 == 16:
            ids.reverse()
        q = way(some(BATCH, HEADS, 1, DIM, seed=step))
        before = len(looked_at)
        got = tf.attention(q, cache[ids], **options)
        hits += len(looked_at) == before
        agree(got, tf.attention(q, cache[ids], **options, backend="native"))
    assert hits > 40


def test_growing_gives_no_stale_answer(way, looked_at):
    cache = tf.KVCache(BATCH, KV_HEADS, DIM, V_DIM, like=way(some(1)))
    shapes = set()
    for step in range(70):
        cache.append(*(way(some(BATCH, KV_HEADS, 1, dim, seed=step)) for dim in (DIM, V_DIM)))
        q = way(some(BATCH, HEADS, 1, DIM, seed=step))
        before = len(looked_at)
        got = tf.attention(q, cache, causal=True)
        assert (len(looked_at) == before) == (cache.capacity in shapes)
        shapes.add(cache.capacity)
        agree(got, tf.attention(q, cache, causal=True, backend="native"))
    assert sorted(shapes) == [16, 32, 64, 128]
    cache.truncate([3, 70, 1])
    known(looked_at, q, cache, causal=True)
    cache.reset()
    assert not array(known(looked_at, q, cache, causal=True)).any()


@pytest.mark.parametrize("layout", ["pages", "window"])
def test_what_is_forgotten_is_refused_however_well_the_call_is_known(way, looked_at, layout):
    (q, view), _ = window(way, "float32")
    tf.attention(q, view, window=(7, 0))
    known(looked_at, q, view, window=(7, 0))
    for wide in ((25, 0), (None, 0), None):
        for _ in range(2):
            with pytest.raises(ValueError, match="the cache has forgotten keys 0 to 25 of sequence 0"):
                tf.attention(q, view, **({} if wide is None else {"window": wide}))
    # The window is known to fit; then the cache forgets more than it leaves.
    stored = view.stored()
    held = Held(
        *(way(x) if layout == "window" else x for x in (stored.k, stored.v)), stored.lengths, stored.table
    )
    held.held = replace(held.held, first=np.zeros(BATCH, int))
    tf.attention(q, held, window=(7, 0))
    held.held = replace(held.held, first=stored.first)
    known(looked_at, q, held, window=(7, 0))
    held.held = replace(held.held, first=stored.lengths - np.array([1, 9, 9]))
    with pytest.raises(ValueError, match="the cache has forgotten keys 0 to 38 of sequence 0"):
        tf.attention(q, held, window=(7, 0))
    held.held = replace(held.held, first=np.full(BATCH, 2**64 - 1, np.uint64))
    with pytest.raises(
        ValueError, match="the cache has forgotten keys 0 to 18446744073709551614 of sequence 0"
    ):
        tf.attention(q, held, window=(7, 0))
    held.held = replace(held.held, first=stored.lengths - np.array([1, 9, 9]), kept=39)
    known(looked_at, q, held, window=(7, 0))


# ---- what is told apart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
def test_calls_that_alternate_keep_apart(way, looked_at, backwards):
    """Each differs from others in one thing; all are known after one round, and stay right in the next ones."""
    q, k, v = (way(x) for x in qkv())
    ends = way(np.array([7, 2, 40]))
    few, slopes = way(np.array([1, 2, 0])), way(np.linspace(0.1, 0.4, HEADS))
    (p, held), _ = pages(way, "float32")
    (_, one), _ = stretch(way, "float32")
    (_, kept), _ = window(way, "float32")
    (a, b, c), cu = packed(way, "float32")
    memory, table = [held.cache.k, held.cache.v], held.stored().table
    more = {name: way(np.array([0, *array(x)])) for name, x in cu.items()}
    given = [
        ((q, k, v), {}),
        ((q, k, v), {"kv_lengths": ends}),
        ((q, k, v), {"q_lengths": few}),
        ((q, k, v), {"q_lengths": few, "kv_lengths": ends}),
        ((q, k, v), {"kv_lengths": ends, "causal": True}),
        ((q, k, v), {"kv_lengths": ends, "return_lse": True}),
        ((q, k, v), {"window": (3, 0)}),
        ((q, k, v), {"window": (0, 3)}),
        ((q, k, v), {"window": (3, None)}),
        ((q, k, v), {"window": (3, 0), "kv_lengths": ends}),
        ((q, k, v), {"scale": 0.5, "kv_lengths": ends}),
        ((q, k, v), {"softcap": 0.5, "kv_lengths": ends}),
        ((q, k[:, :, :, :], v[..., :8]), {"kv_lengths": ends}),
        ((q[:, :, :1], k, v), {"kv_lengths": ends}),
        ((q, k, v), {"alibi": slopes}),
        ((q, k, v), {"sinks": slopes}),
        ((q, k, v), {"alibi": slopes, "sinks": slopes}),
        ((q, one), {"sinks": slopes}),
        ((q, one), {}),
        ((p, held), {}),
        ((p, held), {"q_lengths": few}),
        ((p, kept), {"window": (7, 0)}),
        ((p, Held(*memory, 3, table[:, :1])), {}),
        ((p, Held(*memory, 3, table[:, :2])), {}),
        ((a, b, c), cu),
        ((a, b, c), more),
        ((a, b, c), {}),
    ]  # fmt: skip
    given = given[::-1] if backwards else given
    expected = [tf.attention(*each, **options, backend="native") for each, options in given]
    for n, (each, options) in enumerate(given, len(given) + 1):
        tf.attention(*each, **options)
        assert len(looked_at) == n
    before = len(looked_at)
    for _ in range(2):
        for (each, options), right in zip(given, expected, strict=True):
            agree(tf.attention(*each, **options), right)
    assert len(looked_at) == before


def test_other_options_are_not_forgotten(way, looked_at):
    """A call that has one more of them than a known one is looked at, and heeds it."""
    q, k, v = (way(x) for x in qkv())
    (p, held), _ = pages(way, "float32")
    hides = way(np.arange(ROOM) % 3 > 0)
    plan = tf.explain(q, k, v, kv_lengths=7, causal=True).plan
    for given, base in (((q, k, v), {"kv_lengths": 7, "causal": True}), ((p, held), {"causal": True})):
        tf.attention(*given, **base)
        right = known(looked_at, *given, **base)
        others = [
            {"mask": hides},
            {"mask": tf.window(1, 0)},
            {"bias": way(np.linspace(-1, 1, ROOM))},
            {"invariant": True},
            {"backend": "numpy"},
            {"out": way(np.full_like(array(right), np.nan))},
        ]
        for n, more in enumerate(others + ([{"plan": plan}] if given[0] is q else [])):
            before = len(looked_at)
            got = tf.attention(*given, **base, **more)
            assert len(looked_at) == before + 1
            agree(got, tf.attention(*given, **base, **({"backend": "native"} | more)))
            assert (n < 3) == (np.abs(array(got) - array(right)).max() > 0.01), more
        known(looked_at, *given, **base)


def test_float64_sinks_may_be_larger_than_any_float32(way, looked_at):
    q, k, v = (way(x) for x in qkv(dtype="float64"))
    sinks = np.array([0.0, 1e39, -1e300, -np.inf])
    tf.attention(q, k, v, kv_lengths=7, sinks=sinks)
    known(looked_at, q, k, v, kv_lengths=7, sinks=sinks)


def test_codes_that_cross_as_the_same_bytes_keep_apart(way):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q = way(some(BATCH, HEADS, 1, DIM))
    raw = np.random.default_rng(0).integers(0, 120, (BATCH, KV_HEADS, 8, DIM), np.uint8)
    scale = np.ones((BATCH, KV_HEADS, 8), np.float32)
    kinds = [raw.view(np.int8), raw.view(ml_dtypes.float8_e4m3fn)]
    caches = [Held(x, x, np.full(BATCH, 5), k_scale=scale, v_scale=scale) for x in kinds]
    expected = [tf.attention(q, cache, backend="native") for cache in caches]
    for _ in range(3):
        for cache, right in zip(caches, expected, strict=True):
            agree(tf.attention(q, cache), right)
    for keys, values in (kinds, kinds[::-1], (kinds[1], raw), (raw, kinds[1])):
        with pytest.raises(TypeError, match="k and v must be stored in one type, got k "):
            tf.attention(q, Held(keys, values, np.full(BATCH, 5), k_scale=scale, v_scale=scale))


def test_a_cascade_is_looked_at_each_time(way, looked_at):
    """Whether it pays depends on what the sequences share at the moment."""
    (q, view), _ = pages(way, "float32")
    tf.attention(q, view)
    asked = view.cache.view(view.ids, cascade=True)
    for n in range(2, 5):
        tf.attention(q, asked)
        assert len(looked_at) == n


def test_a_cache_that_evicted_is_looked_at_each_time(way):
    """Queries that stand before what was evicted are refused, also where a call like theirs was known before."""
    q, rows = way(some(1, HEADS, 3, DIM)), way(some(1, KV_HEADS, 8, DIM))
    cache = tf.KVCache(1, KV_HEADS, DIM, like=rows)
    cache.append(rows, rows)
    for _ in range(2):
        tf.attention(q, cache, causal=True)
    cache.keep(np.arange(0, 8, 2)[None, None])
    for _ in range(2):
        with pytest.raises(
            ValueError, match="q must have at most 1 rows for sequence 0, whose cache evicted keys"
        ):
            tf.attention(q, cache, causal=True)


def test_integers_are_no_bfloat16(way):
    """Though its bits cross as these."""
    q = way(some(BATCH, HEADS, 1, DIM, dtype="bfloat16"))
    rows = some(BATCH, KV_HEADS, 8, DIM, dtype="bfloat16")
    tf.attention(q, Held(rows, rows, np.full(BATCH, 5)))
    bits = rows.view(np.uint16)
    for memory in (bits, way(rows)):
        wrong = Held(bits, memory, np.full(BATCH, 5))
        with pytest.raises(TypeError, match="must be float16, bfloat16, float32 or float64, got uint16"):
            tf.attention(q, wrong)


def test_every_part_of_a_cache_is_part_of_what_is_known():
    """A field that a known call does not look at would be ignored without a word. Where the last two are given a call
    is looked at in full."""
    assert [*Stored.__dataclass_fields__] == [
        *("k", "v", "lengths", "table", "first", "kept", "cascade", "k_scale", "v_scale"),
        *("settled", "dropped"),
    ]


def test_what_is_known_is_bounded(way, monkeypatch):
    monkeypatch.setattr(shortcut, "MOST", 3)
    shortcut._known.clear()
    q = way(some(1, 1, 1, 1))
    for n in range(1, 1100):
        x = np.zeros((1, 1, n, 1), np.float32)
        tf.attention(q, Held(x, x, 1))
    from tilefold.arrays.torch import calls as door

    assert len(shortcut._known) <= 3 and len(door._known) <= 1024


# ---- what is wrong -----------------------------------------------------------------------------------------------

TABLE = np.array([[0, 1], [2, 3], [4, 5]])
WRONG = {  # what replaces a part of the cache, and what is said of it
    "page beyond": ({"table": TABLE + 1}, ValueError, "must name pages 0 to 5, or -1 for none; got 1 to 6"),
    "page below -1": ({"table": TABLE - 2}, ValueError, "must name pages 0 to 5, or -1 for none; got -2 to 3"),
    "table of floats": ({"table": TABLE * 1.0}, TypeError, "must be integers .batch, n., got float64 .3, 2."),
    "table of booleans": ({"table": TABLE > 2}, TypeError, "must be integers .batch, n., got bool"),
    "table of three dimensions": ({"table": TABLE[None]}, (TypeError, ValueError), "must be integers|holds 1"),
    "table as a list": ({"table": TABLE.tolist()}, TypeError, "the block table must be an array"),
    "table of fewer sequences": ({"table": TABLE[:2]}, ValueError, "the cache holds 2 sequences, q has 3"),
    "table of more sequences": ({"table": np.repeat(TABLE, 2, 0)}, ValueError, "the cache holds 6 sequences, q has 3"),
    "page of 2^63": ({"table": TABLE + 2**62}, ValueError, "must name pages 0 to 5"),
    "lengths beyond": ({"lengths": np.array([3, 9, 1])}, ValueError, "kv_lengths must lie within 0 and 8, got 1 to 9"),
    "lengths negative": ({"lengths": np.array([3, -1, 1])}, ValueError, "must lie within 0 and 8, got -1 to 3"),
    "lengths of floats": ({"lengths": np.ones(3)}, TypeError, "kv_lengths must be integers, got float64"),
    "lengths of booleans": ({"lengths": np.ones(3, bool)}, TypeError, "kv_lengths must be integers, got bool"),
    "lengths of others": ({"lengths": np.ones(2, int)}, ValueError, "kv_lengths must have the leading shape .3,."),
    "lengths of 2^64": (
        {"lengths": np.full(3, 2**64 - 1, np.uint64)}, ValueError, "kv_lengths must lie within 0 and 8"
    ),
    "length of 2^70": ({"lengths": 2**70}, ValueError, "kv_lengths must lie within 0 and 8"),
    "length that is no integer": ({"lengths": 1.5}, TypeError, "kv_lengths must be an array"),
    "length that is a flag": ({"lengths": True}, TypeError, "kv_lengths must be integers, got bool"),
    "values of another type": ({"v": np.zeros((6, 2, 4, 16))}, TypeError, "q and the cache must have one dtype"),
    "keys of another size": ({"k": np.zeros((6, 2, 4, 15), np.float32)}, ValueError, "the same last dimension"),
    "keys of fewer pages": ({"k": np.zeros((5, 2, 4, 16), np.float32)}, ValueError, "must have the same pages"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("as_given", [False, True], ids=["arrays", "like q"])
def test_a_known_call_is_refused_as_the_first_would_be(way, looked_at, what, as_given):
    wrong, error, says = WRONG[what]

    def given(x):
        return way(x) if as_given and isinstance(x, np.ndarray) and x.dtype != np.uint64 else x

    q = way(some(BATCH, HEADS, 1, DIM))
    rows = some(6, KV_HEADS, 4, DIM)
    right = Stored(*(given(x) for x in (rows, rows, np.array([8, 3, 0]), TABLE)))
    cache = Held(right.k, right.v, right.lengths, right.table)
    tf.attention(q, cache, causal=True)
    known(looked_at, q, cache, causal=True)
    cache.held = replace(right, **{name: given(x) for name, x in wrong.items()})
    for _ in range(2):
        with pytest.raises(error, match=says):
            tf.attention(q, cache, causal=True)
    cache.held = right
    known(looked_at, q, cache, causal=True)


@pytest.mark.parametrize("name", ["kv_lengths", "cu_seqlens_k"])
def test_a_known_cache_still_knows_its_lengths(way, name):
    (q, cache), _ = stretch(way, "float32")
    for _ in range(2):
        tf.attention(q, cache)
        with pytest.raises(
            TypeError, match=f"{name} must not be given with a cache, which knows its lengths"
        ):
            tf.attention(q, cache, **{name: np.array([0, 1, 2])})


def test_scales_that_do_not_fit_are_refused(way, looked_at):
    q = way(some(BATCH, HEADS, 1, DIM))
    rows = np.ones((6, KV_HEADS, 4, DIM), np.int8)
    scale = np.ones((6, KV_HEADS, 4), np.float32)
    cache = Held(rows, rows, np.array([8, 3, 0]), TABLE, k_scale=scale, v_scale=scale)
    right = cache.held
    tf.attention(q, cache)
    known(looked_at, q, cache)
    for wrong, error, says in (
        (None, TypeError, "k_scale must be given where keys and values are int8"),
        (scale[:5], ValueError, "k_scale must have shape"),
        (scale.astype(float), TypeError, "k_scale must be float32, got float64"),
        (scale[..., :3], ValueError, "k_scale must have shape"),
        (scale.astype(np.float16), TypeError, "k_scale must be float32, got float16"),
    ):
        cache.held = replace(right, k_scale=wrong)
        with pytest.raises(error, match=says):
            tf.attention(q, cache)
    cache.held = replace(right, k_scale=odd(scale))
    agree(tf.attention(q, cache), tf.attention(q, cache, backend="native"))
    cache.held = right
    known(looked_at, q, cache)


def odd(x):
    """The same numbers at addresses that are no multiples of their size."""
    raw = np.empty(x.nbytes + 1, np.uint8)
    raw[1:] = x.reshape(-1).view(np.uint8)
    return raw[1:].view(x.dtype).reshape(x.shape)


def test_misaligned_arrays_of_known_shapes_are_copied(way):
    q, k, v = qkv()
    ends = np.array([7, 2, 40])
    right = tf.attention(way(q), way(k), way(v), kv_lengths=ends)
    agree(tf.attention(way(q), Held(odd(k), v, ends)), right)
    agree(tf.attention(way(q), Held(k, v, ends)), right)
    agree(tf.attention(way(q), Held(k, odd(v), odd(ends))), right)


def test_a_cache_that_gives_something_else(way):
    class Broken:
        def stored(self):
            return None

    with pytest.raises(
        TypeError, match=r"a cache's stored\(\) must give tilefold\.layouts\.Stored, got NoneType"
    ):
        tf.attention(way(some(1, 1, 1, 1)), Broken())


def test_gradients_are_refused_through_a_known_cache():
    torch = pytest.importorskip("torch")
    (q, cache), _ = stretch(torch.from_numpy, "float32")
    with torch.no_grad():
        tf.attention(q, cache)
    tf.attention(q, cache)
    with pytest.raises(ValueError, match="a gradient cannot be asked for beside a KVCache"):
        tf.attention(q.requires_grad_(), cache)


def test_negated_views_are_not_what_their_memory_says():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in qkv())
    twice = torch.complex(k, -k).conj()
    assert twice.imag.is_neg() and torch.equal(twice.imag, k)
    ends = np.array([7, 2, 40])
    right = tf.attention(q, k, v, kv_lengths=ends)
    for _ in range(2):
        assert torch.equal(tf.attention(q, twice.real, v, kv_lengths=ends), right)
        for given in ((twice.imag, v), (k, twice.imag[..., :V_DIM])):
            expected = tf.attention(q, *(x.resolve_neg() for x in given), kv_lengths=ends, backend="native")
            assert torch.equal(tf.attention(q, *given, kv_lengths=ends), expected)
            assert torch.equal(tf.attention(q, Held(*given, ends)), expected)


def test_gradients_of_sinks_are_not_lost():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in qkv())
    sinks = torch.zeros(HEADS)
    for _ in range(2):
        assert not tf.attention(q, k, v, sinks=sinks).requires_grad
    sinks.requires_grad_()
    tf.attention(q, k, v, sinks=sinks).sum().backward()
    assert sinks.grad.abs().min() > 0
    with pytest.raises(ValueError, match="alibi must not require a gradient"):
        tf.attention(q, k, v, alibi=sinks)


def test_gradients_through_lengths_are_not_lost():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in qkv())
    ends = torch.tensor([7, 2, 40])
    for _ in range(2):
        assert not tf.attention(q, k, v, kv_lengths=ends).requires_grad
    v.requires_grad_()
    tf.attention(q, k, v, kv_lengths=ends).sum().backward()
    assert v.grad[1, :, 2:].abs().max() == 0 < v.grad[1, :, :2].abs().max()


# ---- threads -----------------------------------------------------------------------------------------------------


def test_many_threads_call_at_once(way):
    """Sequences of one cache, and lengths of one batch, in eight threads; each reads its own."""
    (q, view), _ = pages(way, "float32")
    x, k, v = (way(a) for a in qkv(seed=5))
    views = [view.cache[view.ids[n % 3], view.ids[(n + 1) % 3], view.ids[n % 2]] for n in range(8)]
    ends = [np.array([n, 5 * n, ROOM - n]) for n in range(8)]
    expected = [
        (tf.attention(q, view, causal=True), tf.attention(x, k, v, kv_lengths=end))
        for view, end in zip(views, ends, strict=True)
    ]
    wrong = []

    def call(n):
        for _ in range(40):
            got = tf.attention(q, views[n], causal=True), tf.attention(x, k, v, kv_lengths=ends[n])
            if any(array(a).tobytes() != array(b).tobytes() for a, b in zip(got, expected[n], strict=True)):
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_lengths_that_another_thread_writes_are_never_read_beyond_the_keys(way):
    """Either the copy was right, and so is the result, or it was wrong, and it was refused."""
    q, k, v = (way(x) for x in qkv())
    ends = np.array([1, 2, 3])
    right = array(tf.attention(q, k, v, kv_lengths=ends)).tobytes()
    over = threading.Event()

    def meddle():
        while not over.is_set():
            ends[0] = 2**40
            ends[0] = 1

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(300):
            try:
                assert array(tf.attention(q, k, v, kv_lengths=ends)).tobytes() == right
            except ValueError as error:
                assert "kv_lengths must lie within 0 and 40" in str(error)
    finally:
        over.set()
        thread.join()
