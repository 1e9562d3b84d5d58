"""Rotary positions: rows are turned as complex numbers are, in float32 or wider with one rounding, and a cache's keys
and queries to where they stand.

The formula here is a product of complex numbers in double precision; how far a result may be off follows from the
roundings that are allowed. What caches hold is compared bit by bit.
"""

import numpy as np
import pytest
from bits import assert_same_bits

import tilefold as tf
from tilefold.caches import Rotary, dequantise, quantise
from tilefold.dtypes import ROWS

HEADS, DIM = 2, 12
LAST = 200  # positions


def numpy_type(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


def tables(dim=DIM, dtype="float32"):
    """Angles of all sizes, so that every position and pair differs from every other one."""
    angles = np.random.default_rng(dim).uniform(-4, 4, (LAST, dim // 2))
    return np.cos(angles).astype(numpy_type(dtype)), np.sin(angles).astype(numpy_type(dtype))


def rows(*shape, dtype="float32", seed=0):
    return np.random.default_rng([*shape, seed]).standard_normal(shape).astype(numpy_type(dtype))


def pairs_of(dim, interleaved):
    """(first, second) dim of each pair."""
    half = dim // 2
    return [(2 * p, 2 * p + 1) if interleaved else (p, p + half) for p in range(half)]


def turned(x, at, cos, sin, interleaved):
    """(exact, allowed): x (..., S, dim) turned in double precision, and how far a result may be from that."""
    wide, row = np.asarray(x, np.float64), ROWS[x.dtype.name]
    exact, sizes = wide.copy(), np.zeros_like(wide)
    for p, (i, j) in enumerate(pairs_of(2 * cos.shape[1], interleaved)):
        c, s = np.asarray(cos[at, p], np.float64), np.asarray(sin[at, p], np.float64)
        product = (wide[..., i] + 1j * wide[..., j]) * (c + 1j * s)
        exact[..., i], exact[..., j] = product.real, product.imag
        sizes[..., i] = abs(wide[..., i] * c) + abs(wide[..., j] * s)
        sizes[..., j] = abs(wide[..., i] * s) + abs(wide[..., j] * c)
    sums = ROWS[row.accumulate]
    # two products and their sum, each rounded once, in the type of the sums; then one rounding to the type of the rows
    once = 0 if sums is row else row.roundoff * abs(exact) + row.least
    return exact, 2.01 * sums.roundoff * sizes + once + 4 * sums.least


@pytest.mark.parametrize("rotary_dim", [DIM, 8, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", list(ROWS))
def test_pairs_are_turned_as_complex_numbers(dtype, interleaved, rotary_dim):
    cos, sin = tables(rotary_dim, dtype)
    x, at = rows(3, HEADS, 50, DIM, dtype=dtype), np.random.default_rng(1).integers(0, LAST, 50)
    kept = x.copy()
    got = Rotary(cos, sin, interleaved=interleaved)(x, at)
    exact, allowed = turned(x, at, cos, sin, interleaved)
    assert got.dtype == x.dtype and (abs(got.astype(np.float64) - exact) <= allowed).all()
    assert_same_bits(got[..., rotary_dim:], x[..., rotary_dim:])
    assert_same_bits(x, kept)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_rounded_once(dtype):
    """The tolerance above would not let products through that were rounded to the type of the rows."""
    cos, sin = tables(dtype=dtype)
    x, at = rows(3, HEADS, 50, DIM, dtype=dtype), np.arange(50)
    exact, allowed = turned(x, at, cos, sin, False)
    half = DIM // 2
    a, b, c, s = x[..., :half], x[..., half:], cos[at], sin[at]
    narrow = np.concatenate([a * c - b * s, a * s + b * c], axis=-1)
    assert narrow.dtype == x.dtype and (abs(narrow.astype(np.float64) - exact) > allowed).any()


def test_positions_of_each_sequence():
    rotary = Rotary(*tables())
    x = rows(2, HEADS, 5, DIM)
    at = np.array([[0, 7, 7, 3, 199], [4, 5, 6, 7, 8]])
    got = rotary(x, at)
    for n in range(2):
        assert_same_bits(got[n], rotary(x[n], at[n]))
    assert_same_bits(rotary(x, at[1])[1], got[1])


def test_scores_depend_on_differences_of_positions():
    """What rotary positions are for: moving all rows along changes no score but by rounding."""
    angles = np.outer(np.arange(LAST), 10.0 ** -np.arange(DIM // 2))
    rotary = Rotary(np.cos(angles), np.sin(angles))
    q, k, v = (rows(1, HEADS, 40, DIM, dtype="float64", seed=n) for n in range(3))
    at = np.arange(40)
    here, there = (tf.attention(rotary(q, at + n), rotary(k, at + n), v, causal=True) for n in (0, 150))
    np.testing.assert_allclose(here, there, rtol=0, atol=1000 * ROWS["float64"].roundoff)
    assert abs(here - tf.attention(q, k, v, causal=True)).max() > 0.1


@pytest.mark.parametrize("shape", [(0, HEADS, 3, DIM), (2, HEADS, 0, DIM), (2, HEADS, 3, 0)])
def test_rows_of_nothing(shape):
    rotary = Rotary(*tables(min(shape[-1], DIM)))
    assert rotary(np.zeros(shape, np.float32), np.zeros(shape[2], int)).shape == shape


# ---- caches ----------------------------------------------------------------------------------------------------

STORES = ("one stretch", "pages", "one stretch of codes", "pages of codes")


def store(kind, batch):
    """(cache, append, view)."""
    way = {"quantised": "int8"} if kind.endswith("codes") else {}
    if kind.startswith("one stretch"):
        cache = tf.KVCache(batch, HEADS, DIM, **way)
        return cache, cache.append, cache
    cache = tf.PagedKVCache(HEADS, DIM, page=4, **way)
    ids = [cache.open() for _ in range(batch)]
    return cache, lambda *given, **more: cache.append(ids, *given, **more), cache[ids]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", STORES)
def test_keys_are_turned_to_the_positions_that_they_take(kind, interleaved):
    """Prompts padded, a few steps and a chunk packed: the bits of keys that were turned beforehand."""
    rotary = Rotary(*tables(8), interleaved=interleaved)
    every = [[rows(1, HEADS, n, DIM, seed=seed) for seed in (0, 1)] for n in (20, 9, 33)]
    at, (_, append, view) = np.zeros(3, int), store(kind, 3)
    for new in ([7, 0, 20], [1, 1, 1], [1, 1, 1], [11, 7, 11]):
        padded = [np.full((3, HEADS, max(new), DIM), np.nan, np.float32) for _ in "kv"]
        for n, count in enumerate(new):
            for x, y in zip(padded, every[n], strict=True):
                x[n, :, :count] = y[0, :, at[n] : at[n] + count]
        if new[0] == 1:
            append(*(x[:, :, 0].swapaxes(0, 1) for x in padded), cu_seqlens=np.arange(4), rotary=rotary)
        elif new[0] == 11:
            packed = [
                np.concatenate([x[n, :, :count] for n, count in enumerate(new)], axis=1) for x in padded
            ]
            append(*packed, cu_seqlens=np.cumsum([0, *new]), rotary=rotary)
        else:
            append(*padded, new, rotary=rotary)
        at += new
    q = rows(3, 2 * HEADS, 6, DIM)
    got = tf.attention(rotary.queries(q, view), view, causal=True)
    for n, (k, v) in enumerate(every):
        k = rotary(k, np.arange(at[n]))
        if kind.endswith("codes"):
            k, v = (dequantise(*quantise(x)) for x in (k, v))
        alone = rotary(q[n : n + 1], np.arange(at[n] - 6, at[n]))
        assert_same_bits(got[n : n + 1], tf.attention(alone, k, v, causal=True))


def test_positions_go_on_where_a_fork_or_a_truncation_left_off():
    rotary = Rotary(*tables())
    k, v = (rows(1, HEADS, 20, DIM, seed=n) for n in range(2))
    cache = tf.PagedKVCache(HEADS, DIM, page=4, window=50)
    a = cache.open()
    cache.append(a, k[:, :, :10], v[:, :, :10], rotary=rotary)
    b = cache.fork(a)
    cache.truncate(b, 7)
    cache.append(b, k[:, :, 7:], v[:, :, 7:], rotary=rotary)
    q = np.ones((1, HEADS, 1, DIM), np.float32)
    right = tf.attention(q, rotary(k, np.arange(20)), v)
    assert_same_bits(tf.attention(q, cache[b], window=(49, 0)), right)


@pytest.mark.parametrize("kind", STORES[:2])
def test_padded_and_packed_queries_stand_at_the_end(kind):
    rotary = Rotary(*tables())
    _, append, view = store(kind, 3)
    append(rows(3, HEADS, 30, DIM), rows(3, HEADS, 30, DIM, seed=1), [30, 9, 4], rotary=rotary)
    q = rows(3, HEADS, 5, DIM)
    counts = [5, 1, 0]
    got = rotary.queries(q, view, q_lengths=counts)
    packed = np.concatenate([q[n, :, :count] for n, count in enumerate(counts)], axis=1)
    row = rotary.queries(packed, view, cu_seqlens_q=np.array([0, 5, 6, 6]))
    for n, (count, end) in enumerate(zip(counts, (30, 9, 4), strict=True)):
        right = rotary(q[n, :, :count], np.arange(end - count, end))
        assert_same_bits(got[n, :, :count], right)
        assert_same_bits(got[n, :, count:], q[n, :, count:])
        assert_same_bits(row[:, sum(counts[:n]) : sum(counts[: n + 1])], right)


def test_a_position_beyond_the_tables_leaves_the_cache_as_it_was():
    rotary = Rotary(*tables())
    for kind in STORES:
        cache, append, view = store(kind, 1)
        k = rows(1, HEADS, 150, DIM)
        append(k, k, rotary=rotary)
        before = cache.k.copy()
        with pytest.raises(
            ValueError, match="cos must have a row for each position of k, 150 to 299; got 200 rows"
        ):
            append(k, k, rotary=rotary)
        assert view.stored().lengths.tolist() == [150]
        assert_same_bits(cache.k[..., :1], before[..., :1])
        append(k, k, 50, rotary=rotary)  # of the padding no position is asked for


# ---- tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ROWS))
def test_tensors_are_turned_as_arrays(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    dtype, at = numpy_type(name), np.arange(9)
    cos, sin = (torch.from_numpy(x.astype(np.float64)).to(getattr(torch, name)) for x in tables(dtype=name))
    x = torch.from_numpy(rows(1, HEADS, 9, DIM).astype(np.float64)).to(getattr(torch, name))
    rotary = Rotary(cos, sin)
    got = rotary(x, torch.from_numpy(at))
    right = Rotary(*tables(dtype=name))(rows(1, HEADS, 9, DIM).astype(np.float64).astype(dtype), at)
    assert got.dtype == x.dtype
    assert (got.double().numpy() == right.astype(np.float64)).all()
    cache = tf.KVCache(1, HEADS, DIM, like=x)
    cache.append(x, x, rotary=rotary)
    assert torch.equal(cache.k[:, :, :9], got) and torch.equal(rotary.queries(x, cache), got)


def test_hugging_face_turns_the_same_way():
    """Llama's own function on tables of the same model, in float32: the same bits."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    llama = pytest.importorskip(
        "transformers.models.llama.modeling_llama", reason="transformers is not installed"
    )
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=LAST)
    q, k = (torch.from_numpy(rows(1, 2, 50, 32, seed=n)) for n in range(2))
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(LAST)[None])
    rotary = Rotary(cos[0, :, :16], sin[0, :, :16])
    right = llama.apply_rotary_pos_emb(q, k, cos[:, :50], sin[:, :50])
    for x, y in zip((q, k), right, strict=True):
        assert torch.equal(rotary(x, torch.arange(50)), y)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_flash_attn_and_caches_turn_alike(name, interleaved):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("ml_dtypes", reason="bfloat16 tensors need ml_dtypes")
    from tilefold.drop_in.flash_attn import flash_attn_with_kvcache

    dtype = getattr(torch, name)
    cos, sin = (torch.from_numpy(x).to(dtype) for x in tables())
    q, k, v = (torch.from_numpy(rows(2, HEADS, 3, DIM, seed=n)).to(dtype) for n in range(3))
    early = torch.from_numpy(rows(2, HEADS, 20, DIM, seed=3)).to(dtype)
    rotary = Rotary(cos, sin, interleaved=interleaved)
    cache = tf.KVCache(2, HEADS, DIM, like=k)
    cache.append(early, early)
    cache.append(k, v, rotary=rotary)
    out = tf.attention(rotary.queries(q, cache), cache, causal=True)
    whole = torch.zeros(2, 2, 32, HEADS, DIM, dtype=dtype)
    whole[:, :, :20] = early.transpose(1, 2)
    theirs = flash_attn_with_kvcache(
        *(x.transpose(1, 2) if x is q else x for x in (q, *whole)), k.transpose(1, 2), v.transpose(1, 2), cos, sin,
        cache_seqlens=20, causal=True, rotary_interleaved=interleaved,
    )  # fmt: skip
    assert torch.equal(theirs, out.transpose(1, 2))
    assert torch.equal(whole[0, :, :23].transpose(1, 2), cache.k[:, :, :23])


# ---- errors ----------------------------------------------------------------------------------------------------

COS, SIN = tables()
X = rows(2, HEADS, 3, DIM)


def held():
    cache = tf.KVCache(2, HEADS, DIM)
    cache.append(X, X)
    return cache


WRONG = {
    "cos must be an array": lambda: Rotary([1.0], SIN),
    "cos must have shape (positions, rotary_dim / 2), got (200,)": lambda: Rotary(COS[:, 0], SIN),
    "sin must have shape (200, 6), got (199, 6)": lambda: Rotary(COS, SIN[1:]),
    "cos must be float16, bfloat16, float32 or float64, got int64": lambda: Rotary(COS.astype(int), SIN),
    "interleaved must be True or False, got int": lambda: Rotary(COS, SIN, interleaved=1),
    "x must have shape (..., heads, S, dim), got (12,)": lambda: Rotary(COS, SIN)(
        X[0, 0, 0], np.zeros(1, int)
    ),
    "positions must be integers, got float64": lambda: Rotary(COS, SIN)(X, np.zeros(3)),
    "positions must have shape (3,) or (2, 3), got (2,)": lambda: Rotary(COS, SIN)(X, np.zeros(2, int)),
    "cos must have at most 5 columns, half of x's dims; got 6": lambda: Rotary(COS, SIN)(
        X[..., :11], np.zeros(3, int)
    ),
    "cos must have a row for each position of x, -1 to 1; got 200 rows": lambda: Rotary(COS, SIN)(
        X, np.arange(-1, 2)
    ),
    "cos must have a row for each position of x, 198 to 200": lambda: Rotary(COS, SIN)(
        X, np.arange(198, 201)
    ),
    "cos must have a row for each position of q, -1 to 2": lambda: Rotary(COS, SIN).queries(
        rows(2, HEADS, 4, DIM), held()
    ),
    "q must have shape (batch, heads, Sq, dim) with batch 2, got (1, 2, 3, 12)": lambda: Rotary(
        COS, SIN
    ).queries(X[:1], held()),
    "q_lengths must be at most 3, the rows of q; got 4": lambda: Rotary(COS, SIN).queries(
        X, held(), q_lengths=[4, 1]
    ),
    "with cu_seqlens_q q must be (heads, total, dim), got (2, 2, 3, 12)": lambda: Rotary(COS, SIN).queries(
        X, held(), cu_seqlens_q=np.array([0, 3])
    ),
    "cu_seqlens_q must count the 2 sequences of the cache, got 1": lambda: Rotary(COS, SIN).queries(
        X[0], held(), cu_seqlens_q=np.array([0, 3])
    ),
    "cu_seqlens_q and q_lengths exclude each other": lambda: Rotary(COS, SIN).queries(
        X[0], held(), cu_seqlens_q=np.array([0, 3, 3]), q_lengths=1
    ),
    "rotary must be a tilefold.caches.Rotary, got tuple": lambda: held().append(X, X, rotary=(COS, SIN)),
}


@pytest.mark.parametrize(("says", "call"), WRONG.items(), ids=WRONG)
def test_each_mistake_has_its_sentence(says, call):
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert says in str(raised.value)
