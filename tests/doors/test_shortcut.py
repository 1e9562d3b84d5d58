"""A call that was understood once is not asked again, and nothing else may change: same results, same errors."""

import numpy as np
import pytest

import tilefold as tf
from tilefold import shortcut

pytestmark = pytest.mark.skipif(
    "native" not in tf.explain(*np.ones((3, 1, 2, 4), np.float32)).plan.backend, reason="no native core"
)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(shortcut, "_known", {})


def qkv(dtype=np.float32, shape=(2, 40, 16)):
    return np.random.default_rng(0).normal(size=(3, *shape)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_the_second_call_gives_the_first_result(dtype, options, order):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v = qkv(np.dtype(dtype))
    if order == "bshd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (q, k, v))
    first = tf.attention(q, k, v, **options, return_lse=True)
    assert len(shortcut._known) == 1
    again = tf.attention(q, k, v, **options, return_lse=True)
    for a, b in zip(first, again, strict=True):
        assert a.dtype == b.dtype
        assert a.strides == b.strides
        assert a.tobytes() == b.tobytes()
    assert tf.attention(q, k, v, **options).tobytes() == first[0].tobytes()


def test_new_numbers_in_known_shapes_give_new_results():
    q, k, v = qkv()
    tf.attention(q, k, v)
    assert np.allclose(tf.attention(q, k, 2 * v), 2 * tf.attention(q, k, v))
    assert len(shortcut._known) == 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"causal": False}, {"causal": 0}),
        ({"scale": 1.0}, {"scale": True}),
        ({"softcap": 1.0}, {"softcap": True}),
        ({"return_lse": True}, {"return_lse": 1}),
        ({}, {"dropout": 0.1}),
    ],
    ids=str,
)
def test_equal_is_not_the_same(right, wrong):
    """1 == True, but what is refused the first time is refused the second time too."""
    q, k, v = qkv()
    tf.attention(q, k, v, **right)
    with pytest.raises(TypeError, match=next(iter(wrong))):
        tf.attention(q, k, v, **wrong)


def test_a_misaligned_array_of_known_shape_is_copied():
    q, k, v = qkv()
    right = tf.attention(q, k, v)
    raw = np.empty(q.nbytes + 1, np.uint8)
    raw[1:] = q.reshape(-1).view(np.uint8)
    odd = raw[1:].view(np.float32).reshape(q.shape)
    assert not odd.flags.aligned
    assert tf.attention(odd, k, v).tobytes() == right.tobytes()


def test_threads_are_part_of_what_is_known():
    q, k, v = qkv(shape=(4, 600, 32))
    try:
        tf.set_num_threads(1)
        one = tf.attention(q, k, v)
        tf.set_num_threads(2)
        assert tf.get_num_threads() == 2
        assert tf.attention(q, k, v).tobytes() == one.tobytes()
        assert len(shortcut._known) == 2
    finally:
        tf.set_num_threads(None)


def test_what_is_known_is_bounded(monkeypatch):
    monkeypatch.setattr(shortcut, "MOST", 3)
    for n in range(1, 9):
        tf.attention(*qkv(shape=(1, n, 4)))
    assert len(shortcut._known) <= 3
