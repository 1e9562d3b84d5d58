"""Same bits for gradients: dq adds keys upwards, dk and dv add queries upwards, whoever computes which part of them.

So they do not depend on threads, on how often they are computed, on strides, on the other sequences of a batch, or on
whether these are packed. Nothing here has a tolerance. This is the native core's promise; BLAS makes none.
"""

from typing import Any

import numpy as np
import pytest
from bits import assert_same_bits

import tilefold as tf
from tilefold.dtypes import ROWS

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (200, 3)},
    "scores": {
        "causal": True,
        "softcap": 5.0,
        "alibi": [0.01, 0.02, 0.03, 0.04],
        "sinks": [0.1, 0.2, -1.0, 2.0],
    },
    "predicate": {"mask": tf.from_predicate(lambda i, j: (i + 2 * j) % 3 != 0)},
}


def problem(dtype: str, lead: tuple[int, ...] = (), q_len: int = 300, kv_len: int = 1200) -> list[np.ndarray]:
    """q, k, v, dout; two heads for each key head, three segments of keys."""
    name = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    rng = np.random.default_rng([q_len, kv_len])
    shapes = (4, q_len, 24), (2, kv_len, 24), (2, kv_len, 40), (4, q_len, 40)
    return [rng.standard_normal((*lead, *shape)).astype(name) for shape in shapes]


def gradients(q, k, v, dout, **options) -> tuple[np.ndarray, ...]:
    out, lse = tf.attention(q, k, v, **options, return_lse=True, backend="native")
    dlse = np.full_like(lse, 0.25)
    grads = tf.attention_grad(q, k, v, out, lse, dout, dlse, **options, backend="native")
    return tuple(x for x in grads if x is not None)


def compare(got, expected, what: object) -> None:
    for name, x, y in zip(("dq", "dk", "dv", "dbias or dsinks", "dsinks"), got, expected, strict=False):
        assert_same_bits(x, y, f"{name}, {what}")


@pytest.fixture
def threads():
    """Sets the number of threads; at the end it is what it was."""
    yield tf.set_num_threads
    tf.set_num_threads(None)


@pytest.mark.parametrize("dtype", list(ROWS))
@pytest.mark.parametrize("kind", OPTIONS)
def test_any_number_of_threads(threads, kind, dtype):
    arrays = problem(dtype)
    threads(1)
    expected = gradients(*arrays, **OPTIONS[kind])
    for count in (2, 3, 5, 9, 2):
        threads(count)
        compare(gradients(*arrays, **OPTIONS[kind]), expected, f"{count} threads")


@pytest.mark.parametrize("shape", [(4, 300, 1200), (1, 300, 1200), (4, 1, 1200), (4, 300, 1), (1, 1)])
def test_any_number_of_threads_with_a_bias_that_is_shared(threads, shape):
    """What it is summed over is added up by one worker, in order."""
    arrays = problem("float32", lead=(3,))
    bias = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    threads(1)
    expected = gradients(*arrays, bias=bias, causal=True)
    assert np.isfinite(expected[3]).all()
    for count in (2, 4, 7):
        threads(count)
        compare(gradients(*arrays, bias=bias, causal=True), expected, f"{count} threads")


@pytest.mark.parametrize("kind", ["plain", "causal", "window", "scores"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_place_in_a_batch(kind, dtype):
    options = OPTIONS[kind] | ({"sinks": None} if "sinks" in OPTIONS[kind] else {})
    batch = problem(dtype, lead=(5,))
    whole = gradients(*batch, **options)
    for n in range(5):
        alone = gradients(*(x[n] for x in batch), **options)
        compare(tuple(x[n] for x in whole), alone, f"item {n}")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_packed_or_apart(dtype):
    lengths = [(300, 1200), (0, 40), (48, 700), (7, 513)]
    parts = [problem(dtype, (), *both) for both in lengths]
    packed = [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)]
    q_ends, kv_ends = np.cumsum([(0, 0), *lengths], axis=0).T
    dq, dk, dv = gradients(*packed, causal=True, cu_seqlens_q=q_ends, cu_seqlens_k=kv_ends)
    for n, part in enumerate(parts):
        rows, keys = slice(q_ends[n], q_ends[n + 1]), slice(kv_ends[n], kv_ends[n + 1])
        compare((dq[:, rows], dk[:, keys], dv[:, keys]), gradients(*part, causal=True), f"sequence {n}")


@pytest.mark.parametrize("dtype", list(ROWS))
def test_any_strides(dtype):
    arrays = problem(dtype)
    other = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in arrays]
    gaps = [np.repeat(x, 2, axis=-1)[..., ::2] for x in arrays]
    expected = gradients(*arrays, causal=True)
    for moved in (other, gaps):
        compare(gradients(*moved, causal=True), expected, "other strides")


@pytest.mark.parametrize("kind", ["causal", "window", "predicate"])
def test_what_nobody_sees_changes_no_bit(kind):
    """NaN in a key that a row does not see, and in a row that sees no key: other gradients keep their bits."""
    q, k, v, dout = problem(
        "float32", q_len=900, kv_len=700
    )  # the first 200 rows of a causal call see nothing
    options = OPTIONS[kind]
    expected = gradients(q, k, v, dout, **options)
    if kind == "predicate":
        mask = tf.from_predicate(lambda i, j: ((i + 2 * j) % 3 != 0) & (j != 650))
        options = {"mask": mask}
        expected = gradients(q, k, v, dout, **options)
        k[:, 650], v[:, 650] = np.nan, np.inf
    else:
        q[:, :100], dout[:, :100] = np.nan, np.inf
    got = gradients(q, k, v, dout, **options)
    assert all(np.isfinite(x).all() for x in got)
    compare(got, expected, kind)
