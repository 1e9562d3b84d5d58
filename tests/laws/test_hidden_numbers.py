"""Masked means ignored: a NaN or infinity behind a mask reaches no output of the native core, to the bit.

Where it is seen it must show, in exactly the places where the oracle has it. A row that sees none keeps its bits,
whatever its neighbours see: a tile that finds NaN is folded once more, carefully, and that must not show either.
"""

from functools import cache

import numpy as np
import pytest
from bits import assert_same_bits

import tilefold as tf
from tilefold.dtypes import ROWS
from tilefold.naive import naive, naive_weights

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

INF, NAN = np.inf, np.nan
DTYPES = list(ROWS)
SIZES = [(1, 1050), (2, 70), (3, 1030), (40, 90), (60, 1040), (180, 200)]  # rows of decoding, and tiles


def numpy_type(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


def packed(q_len: int, kv_len: int) -> dict:
    """The call's rows as three sequences, of which the second has no keys."""
    return {
        "cu_seqlens_q": np.array([0, q_len // 2, q_len // 2, q_len]),
        "cu_seqlens_k": np.array([0, kv_len // 3, kv_len // 3, kv_len]),
    }


# How a call hides keys, some from everyone and some from a few rows.
HIDING = {
    "window": lambda q, k: {"window": (20, 0)},
    "band": lambda q, k: {"mask": tf.band(9, 3, k - q - 5)},
    "causal": lambda q, k: {"causal": True},
    "spans": lambda q, k: {"mask": tf.documents(np.arange(k) * 5 // k), "causal": True},
    "more spans": lambda q, k: {"mask": tf.anchors(3, 15)},
    "cells": lambda q, k: {"mask": np.random.default_rng(1).random((2, q, k)) < 0.1},
    "cells of a column": lambda q, k: {"mask": np.arange(k)[None] % 7 == 2},
    "predicate": lambda q, k: {"mask": tf.from_predicate(lambda i, j: (i + j) % 5 == 0)},
    "bias": lambda q, k: {"bias": np.where(np.random.default_rng(1).random((q, k)) < 0.1, 0.5, -INF)},
    "bias, softcap, alibi, sinks": lambda q, k: {
        "bias": np.where(np.random.default_rng(1).random((1, k)) < 0.3, 0.5, -INF), "softcap": 3.0,
        "alibi": [0.01, 0.02], "sinks": np.array([0.5, 1.0]),
    },
    "lengths": lambda q, k: {"kv_lengths": k - k // 3},
    "lengths, causal": lambda q, k: {"kv_lengths": k - k // 3, "q_lengths": q - q // 4, "causal": True},
    "packed": packed,
}  # fmt: skip

# What is written into the keys and values of some rows.
POISONS = {
    "NaN value": (lambda k, v: v.fill(NAN)),
    "infinite value": (lambda k, v: v[..., 0].fill(INF)),
    "negative infinite value": (lambda k, v: v[..., 1].fill(-INF)),
    "NaN key": (lambda k, v: k.fill(NAN)),
    "infinite key": (lambda k, v: k[..., 0].fill(INF)),
    "NaN key, infinite value": (lambda k, v: (k.fill(NAN), v.fill(INF))),
}


def poisoned(k: np.ndarray, v: np.ndarray, keys: np.ndarray, poison: str) -> tuple[np.ndarray, np.ndarray]:
    k, v = k.copy(), v.copy()
    rows = k[:, keys], v[:, keys]  # copies
    POISONS[poison](*rows)
    k[:, keys], v[:, keys] = rows
    return k, v


def attend(*arrays, **options) -> tuple[np.ndarray, np.ndarray]:
    return tf.attention(*arrays, return_lse=True, backend="native", **options)


class Problem:
    """Two heads on one key head: their results with clean numbers, and who sees what."""

    def __init__(self, hiding: str, dtype: str, q_len: int, kv_len: int) -> None:
        self.name = hiding, q_len, kv_len
        self.arrays = [x.astype(numpy_type(dtype)) for x in drawn(q_len, kv_len)]
        self.options = HIDING[hiding](q_len, kv_len)
        if "bias" in self.options:
            self.options["bias"] = self.options["bias"].astype(ROWS[dtype].accumulate)
        self.clean = attend(*self.arrays, **self.options)
        self.seen = seen(*self.name)

    def check(self, keys: np.ndarray, poison: str) -> None:
        q, k, v = self.arrays
        k, v = poisoned(k, v, keys, poison)
        got, what = attend(q, k, v, **self.options), f"{poison} in keys {keys} of {q.shape[1]} x {k.shape[1]}"
        touched = self.seen[..., keys].any(axis=-1)
        rest = tuple(x[~touched] for x in got), tuple(x[~touched] for x in self.clean)
        assert_same_bits(*rest, f"rows that see no {what}")
        if touched.any():
            for name, x, y in zip(("out", "lse"), got, right(*self.name, tuple(keys), poison), strict=True):
                assert np.array_equal(special(x), y), f"NaN or infinity in other places of {name}: {what}"


def drawn(q_len: int, kv_len: int) -> list[np.ndarray]:
    rng = np.random.default_rng(q_len)
    return [rng.standard_normal(shape) for shape in ((2, q_len, 8), (1, kv_len, 8), (1, kv_len, 5))]


@cache
def seen(hiding: str, q_len: int, kv_len: int) -> np.ndarray:
    q, k, _ = (np.zeros_like(x) for x in drawn(q_len, kv_len))
    return naive_weights(q, k, **HIDING[hiding](q_len, kv_len)) > 0


@cache
def right(hiding: str, q_len: int, kv_len: int, keys: tuple[int, ...], poison: str) -> list[np.ndarray]:
    """Where the oracle has NaN and infinities; numbers of any type have them in the same places."""
    q, k, v = drawn(q_len, kv_len)
    k, v = poisoned(k, v, np.array(keys), poison)
    return [special(x) for x in naive(q, k, v, **HIDING[hiding](q_len, kv_len))]


def special(x: np.ndarray) -> np.ndarray:
    """0 for a number; others for NaN, infinity and negative infinity."""
    return np.isnan(x) + 2 * np.isposinf(x) + 3 * np.isneginf(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hiding", HIDING)
def test_what_nobody_sees_reaches_nothing(hiding, dtype):
    for q_len, kv_len in SIZES:
        problem = Problem(hiding, dtype, q_len, kv_len)
        hidden = np.flatnonzero(~problem.seen.any(axis=(0, 1)))
        for poison in POISONS if hidden.size else ():
            problem.check(hidden, poison)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hiding", HIDING)
def test_what_some_see_reaches_them_and_nobody_else(hiding, dtype):
    for n, (q_len, kv_len) in enumerate(SIZES):
        problem = Problem(hiding, dtype, q_len, kv_len)
        sight = problem.seen.sum(axis=(0, 1))
        some = np.flatnonzero((sight > 0) & (sight < 2 * q_len))
        some = some if some.size else np.flatnonzero(sight)
        rng = np.random.default_rng(n)
        for poison in list(POISONS)[n % 2 :: 2]:
            if some.size:
                problem.check(np.unique(rng.choice(some, 2)), poison)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hiding", HIDING)
def test_a_poisoned_query_is_alone(hiding, dtype):
    """Its neighbours keep their bits; if it sees a key it is NaN, else it is empty."""
    for q_len, kv_len in SIZES[1:4]:
        problem = Problem(hiding, dtype, q_len, kv_len)
        q, k, v = problem.arrays
        row = q_len - 2
        q[:, row] = NAN
        out, lse = attend(q, k, v, **problem.options)
        others = np.arange(q_len) != row
        clean = tuple(x[:, others] for x in problem.clean)
        assert_same_bits((out[:, others], lse[:, others]), clean, f"rows of {q_len} x {kv_len} beside NaN")
        sees = problem.seen[:, row].any(axis=-1)
        assert np.isnan(out[sees, row]).all() and np.isnan(lse[sees, row]).all()
        assert (out[~sees, row] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 3, 60, 100])
def test_a_seen_value_counts_even_where_its_score_has_overflowed_to_nothing(q_len, dtype):
    """A visible score of -inf has weight 0, and 0 times NaN is NaN: that key is not hidden, whatever others hide."""
    q, k, v = (np.ones((1, n, 8), numpy_type(dtype)) for n in (q_len, q_len + 1, q_len + 1))
    k[:, 1, 0], v[:, 1] = -INF, NAN
    out, lse = attend(q, k, v, causal=True)
    assert np.isnan(out).all()
    assert np.isfinite(lse).all()


def test_every_way_of_hiding_hides_something_and_shows_something():
    """Or the tests above would show nothing."""
    for hiding in HIDING:
        sights = [seen(hiding, *size) for size in SIZES]
        assert any(not x.all() for x in sights), hiding
        assert all(x.any() for x in sights), hiding
    quiet = [h for h in HIDING if all(seen(h, *size).any(axis=(0, 1)).all() for size in SIZES)]
    assert quiet == ["causal"], "the only one under which somebody sees every key"
