"""Distances, positions, windows and values as large as they get: nothing is counted in 32 bits, and nothing wraps.

The arrays lie in files that are holes but for their elements, so that gigabytes between these take no memory.
"""

import sys

import numpy as np
import pytest
from budgets import judge, reference_type

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.dtypes import ROWS
from tilefold.naive import naive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files may have no holes")

NAMES = [b.name for b in BACKENDS if b.why_not(tf.explain(*np.zeros((3, 1, 1, 1))).problem) is None]
STEP = 2**31 + 1  # elements
FAR = 2**62


@pytest.fixture
def hole(tmp_path):
    """Makes arrays of zeros of any size."""
    made = []

    def make(shape, dtype):
        path = tmp_path / f"hole{len(made)}"
        made.append(np.memmap(path, np.uint8, "w+", shape=int(np.prod(shape)) * np.dtype(dtype).itemsize))
        path.unlink()
        return made[-1].view(np.ndarray).view(dtype).reshape(shape)

    return make


def random(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def spread(hole, x, axis):
    """The same numbers, those along `axis` so many elements apart."""
    others = [n for other, n in enumerate(x.shape) if other != axis]
    assert np.prod(others) < STEP
    room = hole((x.shape[axis], STEP), x.dtype)
    near = room[:, : int(np.prod(others))].reshape(x.shape[axis], *others)
    view = np.moveaxis(near, 0, axis)
    assert abs(view.strides[axis]) == STEP * x.itemsize
    view[...] = x
    return view


def arrays(dtype):
    """What a call takes: 2 heads, 3 queries, 4 keys, 3 dims."""
    x = {name: random((2, n, 3), dtype, n) for name, n in (("q", 3), ("k", 4), ("v", 4), ("dout", 3))}
    x["bias"] = random((2, 3, 4), np.float32)
    x["mask"] = np.random.default_rng(1).random((2, 3, 4)) < 0.6
    return x


def both_ways(x, backend, out=None):
    x = dict(x)
    dout = x.pop("dout")
    out, lse = tf.attention(**x, out=out, return_lse=True, backend=backend)
    return out, lse, *tf.attention_grad(**x, out=out, lse=lse, dout=dout, backend=backend)[:4]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["heads", "rows", "columns"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "bias", "mask", "out"])
def test_strides_beyond_2_to_the_31(hole, name, axis, dtype, backend):
    """A copy of nothing but the elements gives the same bits."""
    x = arrays(dtype)
    expected = both_ways(x, backend)
    if name == "out":
        out = spread(hole, np.full((2, 3, 3), np.nan, dtype), axis)
        got = both_ways(x, backend, out)
        assert got[0] is out
    else:
        got = both_ways(x | {name: spread(hole, x[name], axis)}, backend)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("keys", [2**31 + 100, 2**32 + 100], ids=["2^31", "2^32"])
def test_positions(hole, keys, backend):
    """The last queries of very many keys see their window and no more, from positions that 32 bits do not hold."""
    k, v = hole((1, keys, 1), np.float16), hole((1, keys, 2), np.float16)
    k[:, -50:], v[:, -50:] = random((1, 50, 1), np.float16, 1), random((1, 50, 2), np.float16, 2)
    q = random((1, 3, 1), np.float16)
    near = {"causal": True, "window": (5, 0), "alibi": [0.3], "backend": backend}
    got = tf.attention(q, k, v, **near, return_lse=True)
    expected = tf.attention(q, k[:, -50:], v[:, -50:], **near, return_lse=True)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", NAMES)
def test_cumulative_lengths_beyond_2_to_the_32(hole, backend):
    """Of keys: each query row is written, so that as many of them take their memory."""
    keys = 2**32 + 100
    k, v = hole((1, keys, 1), np.float16), hole((1, keys, 2), np.float16)
    k[:, -20:], v[:, -20:] = random((1, 20, 1), np.float16, 1), random((1, 20, 2), np.float16, 2)
    q = random((1, 3, 1), np.float16)
    ends = {"cu_seqlens_q": np.array([0, 0, 3]), "cu_seqlens_k": np.array([0, keys - 20, keys])}
    got = tf.attention(q, k, v, **ends, causal=True, return_lse=True, backend=backend)
    expected = tf.attention(q, k[:, -20:], v[:, -20:], causal=True, return_lse=True, backend=backend)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("huge", "same"),
    [
        (tf.window(FAR, FAR), tf.window(None, None)),
        (tf.window(2**63 - 1, 0), tf.window(None, 0)),
        (tf.window(2**70, 3), tf.window(None, 3)),
        (tf.window(2, FAR), tf.window(2, None)),
        (tf.band(FAR, FAR, FAR), tf.band(0, None, 0)),
        (tf.band(FAR, 1 - FAR, FAR), tf.band(0, 1, 0)),
        (tf.band(-FAR, 2**63, -FAR), tf.band(0, None, 0)),
        (tf.band(-FAR, None, 0), tf.prefix(0)),
        (tf.band(None, -FAR, FAR), tf.causal(align="top-left")),
        (tf.prefix(2**70), tf.window(None, None)),
        (tf.anchors(2**70, 0), tf.causal()),
        (tf.chunked(2**70), tf.window(None, None)),
    ],
    ids=str,
)
def test_windows(huge, same, backend):
    q, k, v = (
        random((2, 5, 4), np.float32),
        random((2, 9, 4), np.float32, 1),
        random((2, 9, 3), np.float32, 2),
    )
    got = both_ways({"q": q, "k": k, "v": v, "mask": huge, "dout": q[..., :3]}, backend)
    expected = both_ways({"q": q, "k": k, "v": v, "mask": same, "dout": q[..., :3]}, backend)
    for a, b in zip(got[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(a, b)


LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127, "float32": (2 - 2.0**-23) * 2.0**127}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


def typed(name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    return np.dtype(name)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("sizes", [LARGEST, SMALLEST], ids=["largest", "smallest"])
@pytest.mark.parametrize("rows", [5, 100])
def test_extreme_values(rows, sizes, dtype, backend):
    """Values at either end of a type, of either sign, within the budget that the textbook has in a wider type."""
    acc = ROWS[dtype].accumulate
    rng = np.random.default_rng(0)
    q, k = (random((2, n, 8), np.float32, n).astype(typed(dtype)) for n in (rows, 40))
    v = (rng.choice([-1.0, 1.0], (2, 40, 6)) * sizes[dtype]).astype(typed(dtype))
    if sizes is LARGEST and dtype != "float16":  # a sum of two would not fit: one key has all the weight
        q[..., 0], k[..., 0], k[:, 7, 0] = 100, -100, 100
    got = tf.attention(q, k, v, backend=backend)
    right, plain = (naive(q, k, v, dtype=to)[0] for to in (reference_type(acc), acc))
    error = judge("out", got, [plain], right, dtype)
    assert error.ok, error


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_extreme_queries_and_keys(dtype, backend):
    """Products of the smallest are 0 to any sum, so weights are equal; of the largest in float16 one key wins."""
    tiny, huge = typed(dtype).type(SMALLEST[dtype]), LARGEST[dtype]
    v = random((1, 6, 4), np.float32).astype(typed(dtype))
    q, k = np.full((1, 3, 8), tiny), np.full((1, 6, 8), tiny)
    out, lse = tf.attention(q, k, v, return_lse=True, backend=backend)
    right = naive(q, k, v, dtype=np.float64)
    assert judge("out", out, [naive(q, k, v, dtype=np.float32)[0]], right[0], dtype).ok
    assert judge("lse", lse, [naive(q, k, v, dtype=np.float32)[1]], right[1], "float32").ok
    if dtype == "float16":
        q[...], k[...], k[:, 4] = huge, -huge, huge
        np.testing.assert_array_equal(
            tf.attention(q, k, v, backend=backend), np.broadcast_to(v[:, 4:5], (1, 3, 4))
        )


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("rows", [5, 100])
def test_the_largest_keys_meet_the_smallest_queries(rows, backend):
    """Products of order 1 of factors at the ends of the range, some of which are infinite in fewer bits."""
    q, k, v = (random((2, n, 8), np.float32, n) for n in (rows, 40, 41))
    v = v[:, :40]
    q[..., 0], k[..., 0] = 2.0**-126, np.where(k[..., 0] < 0, -1, 1) * LARGEST["float32"]
    out, lse = tf.attention(q, k, v, return_lse=True, backend=backend)
    right, plain = (naive(q, k, v, dtype=to) for to in (np.float64, np.float32))
    for name, got, honest, exact in zip(("out", "lse"), (out, lse), plain, right, strict=True):
        error = judge(name, got, [honest], exact, "float32")
        assert error.ok, error


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("rows", [3, 100])
def test_values_whose_sum_does_not_fit(rows, backend):
    """A state is divided at the end, so that it may overflow where the mean would not; the result says so."""
    q, k = np.zeros((1, rows, 8), np.float32), np.zeros((1, 5, 8), np.float32)
    v = np.full((1, 5, 2), LARGEST["float32"], np.float32)
    v[..., 1] = 1
    out = tf.attention(q, k, v, backend=backend)
    assert np.isposinf(out[..., 0]).all()
    assert (out[..., 1] == 1).all()
    assert np.isfinite(tf.attention(q, k, v / 8, backend=backend)).all()
