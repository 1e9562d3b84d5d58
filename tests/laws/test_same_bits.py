"""Same bits: what a row becomes depends on its own query and on the keys that it sees, and on nothing else.

Not on the rows and sequences around it, threads, tiles, splits, strides, how sequences are stored or how often they are
folded. Nor on how many rows its sequence has, where `invariant` asks for that: then decoding reproduces prefill.
Nothing here has a tolerance. This is the native core's promise; BLAS makes none.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import tilefold as tf
from tilefold.dtypes import ROWS

ISA = pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core").isa()

DTYPES = list(ROWS)


def numpy_type(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


def attend(q, k, v, **options) -> tuple[np.ndarray, np.ndarray]:
    return tf.attention(q, k, v, return_lse=True, backend="native", **options)


@dataclass
class Problem:
    """Arrays, and what the options are of rows i0 … i1 with the first `keys` keys, of one batch item or of all.

    Under a `cut` nobody looks beyond the diagonal, so that rows need no keys behind their own.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: Callable[[int, int, int, Any], dict[str, Any]]
    cut: bool

    def whole(self, invariant: bool = False) -> tuple[np.ndarray, np.ndarray]:
        return attend(self.q, self.k, self.v, invariant=invariant, **self.options(0, *self.lengths, ...))

    def rows(
        self, i0: int, i1: int, item: Any = ..., invariant: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same rows alone."""
        q_len, kv_len = self.lengths
        keys = max(kv_len - (q_len - i1), 0) if self.cut else kv_len
        q, k, v = self.q[item][..., i0:i1, :], self.k[item][..., :keys, :], self.v[item][..., :keys, :]
        return attend(q, k, v, invariant=invariant, **self.options(i0, i1, keys, item))

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q.shape[-2], self.k.shape[-2]


def made(name, dtype, heads, kv_heads, q_len, kv_len, dim=16, v_dim=16, lead=()) -> Problem:
    """A problem of the kind `name`, with logits that make some rows peaked."""
    if name == "documents":  # which has no names for queries that stand before the first key
        kv_len = max(kv_len, q_len)
    rng = np.random.default_rng([len(name), heads, q_len, kv_len, dim])
    q, k, v = (
        rng.standard_normal((*lead, *shape)).astype(numpy_type(dtype))
        for shape in ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, v_dim))
    )
    q *= q.dtype.type(2)
    cells = rng.random((*lead, heads, q_len, kv_len)) < 0.3 if name == "dense" else None
    bias = rng.standard_normal((*lead, 1, q_len, kv_len)) if name == "bias" else None
    if bias is not None:
        bias[rng.random(bias.shape) < 0.4] = -np.inf
        bias = bias.astype(ROWS[dtype].accumulate)
    ids = np.repeat([4, 1, 7, 2], -(-kv_len // 4))[:kv_len]
    per_head = {"alibi": rng.random((*lead, heads)) / 9, "sinks": rng.standard_normal(heads)}
    at = kv_len - q_len

    def options(i0: int, i1: int, keys: int, item: Any) -> dict[str, Any]:
        return {
            "plain": lambda: {},
            "causal": lambda: {"causal": True},
            "window": lambda: {"window": (37, 0)},
            "band": lambda: {"mask": tf.band(20, 5, at + i0)},
            "scores": lambda: {
                "causal": True, "softcap": 5.0, "scale": 0.4, "sinks": per_head["sinks"],
                "alibi": per_head["alibi"][item],
            },
            "documents": lambda: {"causal": True, "mask": tf.documents(ids[:keys])},
            "anchors": lambda: {"mask": tf.anchors(4, 50)},
            "dense": lambda: {"mask": cells[item][..., i0:i1, :keys]},
            "bias": lambda: {"causal": True, "bias": bias[item][..., i0:i1, :keys]},
            "predicate": lambda: {"mask": tf.from_predicate(lambda i, j: (i + i0 + 2 * j) % 3 != 0)},
            "by head": lambda: {
                "mask": tf.from_predicate(lambda _, h, i, j: (i + i0 + 2 * j + h) % 5 != 0, per_head=True)
            },
        }[name]()  # fmt: skip

    cut = name in ("causal", "window", "scores", "documents", "anchors", "bias")
    return Problem(q, k, v, options, cut)


KINDS = ["plain", "causal", "window", "band", "scores", "documents", "anchors", "dense", "bias", "predicate"]
KINDS.append("by head")
dims = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 80, 128]))


def is_steady(q_len: int, group: int, dtype: str) -> bool:
    """Whether a sequence has the bits of decoding without asking."""
    return ISA != "avx512_amx" or dtype in ("bfloat16", "float64") or q_len * group <= 64


@settings(max_examples=150)
@given(
    *(st.sampled_from(DTYPES), st.sampled_from(KINDS), st.sampled_from([1, 2]), st.integers(1, 6)),
    *(st.integers(1, 170), st.one_of(st.integers(0, 300), st.integers(1000, 1100)), dims, dims),
    *(st.integers(0, 10**6), st.integers(0, 10**6)),
)
def test_rows_alone_are_those_of_the_whole(dtype, kind, kv_heads, group, q_len, kv_len, dim, v_dim, a, b):
    """Any rows: one of them in the order of decoding, several in tiles, a tile that begins elsewhere."""
    problem = made(kind, dtype, kv_heads * group, kv_heads, q_len, kv_len, dim, v_dim)
    i0, i1 = a % q_len, 1 + b % q_len
    i0, i1 = min(i0, i1 - 1), max(i0 + 1, i1)
    for invariant in (True, False):
        out, lse = problem.whole(invariant)
        for first, last in ((i0, i1), (i0, i0 + 1)):
            if not invariant and is_steady(q_len, group, dtype) != is_steady(last - first, group, dtype):
                continue
            rows = slice(first, last)
            alone = problem.rows(first, last, invariant=invariant)
            assert_same_bits(alone, (out[:, rows], lse[:, rows]), f"rows {first}…{last}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-30, 1e-7])
def test_rows_alone_where_numbers_vanish(size, dtype):
    """Values near the end of a type's range: products that underflow leave zeros, whose sign is a bit too."""
    x = made("causal", dtype, 2, 1, 100, 100)
    with np.errstate(under="ignore"):
        x.v = (x.v.astype(np.float64) * size).astype(x.v.dtype)
    x.options = lambda *_: {"window": (3, 0)}
    out, lse = x.whole(invariant=True)
    for row in range(100):
        here = slice(row, row + 1)
        assert_same_bits(x.rows(row, row + 1, invariant=True), (out[:, here], lse[:, here]), f"row {row}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_alone_under_a_bias_of_subnormal_halves(dtype):
    """Few rows are folded where a machine takes subnormal floats for 0, and many where it does not."""
    q = np.zeros((1, 40, 16), numpy_type(dtype))
    bias = np.random.default_rng(0).integers(1, 1024, (40, 50)).astype(np.uint16).view(np.float16)
    whole = attend(q, q[:, [0] * 50], q[:, [0] * 50], bias=bias, invariant=True)
    for i in range(40):
        alone = attend(q[:, :1], q[:, [0] * 50], q[:, [0] * 50], bias=bias[i : i + 1], invariant=True)
        assert_same_bits(alone, tuple(x[:, i : i + 1] for x in whole), i)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_item_is_what_it_is_alone(kind, dtype):
    """At any place of the batch, and for one row as for many."""
    for q_len, kv_len in ((1, 1050), (2, 70), (70, 90)):
        problem = made(kind, dtype, 4, 2, q_len, kv_len, lead=(2, 3))
        out, lse = problem.whole()
        for item in np.ndindex(2, 3):
            assert_same_bits(problem.rows(0, q_len, item), (out[item], lse[item]), f"item {item}")


KV_LENGTHS = [1, 2, 31, 33, 1023, 1024, 1025, 2300]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_reproduces_prefill(kind, dtype):
    """The last rows of a prefill, decoded: 1 to 8 rows, 1 to 8 heads on a key head, keys around every boundary."""
    for n, kv_len in enumerate(KV_LENGTHS):
        group, (dim, v_dim) = 2 ** (n % 4), [(64, 64), (33, 17), (40, 24)][n % 3]
        if kind == "by head":  # evaluated head by head
            group = min(group, 2)
        problem = made(kind, dtype, group, 1, min(kv_len, 150), kv_len, dim, v_dim)
        out, lse = problem.whole(invariant=True)
        q_len = problem.lengths[0]
        for rows in (1, 2, 3, 5, 8):
            if rows <= q_len:
                last = out[:, q_len - rows :], lse[:, q_len - rows :]
                what = f"the last {rows} of {kv_len}, {group} heads, dim {dim}"
                assert_same_bits(problem.rows(q_len - rows, q_len, invariant=True), last, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_decoding_any_group_reproduces_prefill(heads, dtype):
    for kv_len in KV_LENGTHS:
        problem = made("causal", dtype, heads, 1, min(kv_len, 40), kv_len, 40, 24)
        out, lse = problem.whole(invariant=True)
        q_len = problem.lengths[0]
        for rows in (1, 2, 3, 5, 8):
            if rows <= q_len:
                last = out[:, q_len - rows :], lse[:, q_len - rows :]
                alone = problem.rows(q_len - rows, q_len, invariant=True)
                assert_same_bits(alone, last, f"the last {rows} of {kv_len}")


# Problems that fall into many pieces of each kind: tiles, segments of keys, sequences, panels of a mask.
def many_pieces(dtype: str) -> dict[str, Callable[[], Any]]:
    tiles = made("causal", dtype, 4, 2, 500, 600, 64, 64)
    few = made("scores", dtype, 4, 1, 2, 9000, 64, 48)
    batch = made("plain", dtype, 2, 1, 130, 200, 32, 32, lead=(7,))
    cells = made("by head", dtype, 2, 1, 300, 1100, 32, 32)
    ends = {"cu_seqlens_q": np.cumsum([0, 200, 1, 0, 299]), "cu_seqlens_k": np.cumsum([0, 200, 60, 3, 337])}
    return {
        "tiles": tiles.whole,
        "segments": few.whole,
        "batch": batch.whole,
        "panels": cells.whole,
        "packed": lambda: attend(tiles.q, tiles.k, tiles.v, causal=True, **ends),
        "padded": lambda: attend(batch.q, batch.k, batch.v, kv_lengths=np.array([0, 200, 7, 9, 199, 60, 1])),
    }


@pytest.fixture
def set_threads():
    yield tf.set_num_threads
    tf.set_num_threads(None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads(dtype, set_threads):
    set_threads(1)
    expected = {name: fold() for name, fold in many_pieces(dtype).items()}
    for threads in range(2, 10):
        set_threads(threads)
        for name, fold in many_pieces(dtype).items():
            assert_same_bits(fold(), expected[name], f"{name} on {threads} threads")


def test_threads_were_really_there(set_threads):
    """Of the problem above; without them it would show nothing."""
    x = made("causal", "float32", 4, 2, 500, 600, 64, 64)
    found = []
    for threads in (1, 2, 5):
        set_threads(threads)
        found.append(tf.explain(x.q, x.k, x.v, causal=True, backend="native").plan.workers)
    assert found == [1, 2, 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_time(dtype):
    """Again, and from several threads of Python at once."""
    folds = many_pieces(dtype)
    expected = {name: fold() for name, fold in folds.items()}
    with ThreadPoolExecutor(4) as pool:
        again = [(name, pool.submit(fold)) for _ in range(4) for name, fold in folds.items()]
        for name, result in again:
            assert_same_bits(result.result(), expected[name], name)


Q_SIZES, KV_SIZES = [3, 0, 60, 1, 131], [1100, 40, 60, 0, 131]
STORED = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (30, 2)},
    "scores": {"causal": True, "softcap": 5.0, "alibi": [0.1, 0.2], "sinks": np.array([0.3, -0.2])},
    "chunked": {"mask": tf.chunked(16)},
    "anchors": {"mask": tf.anchors(2, 20)},
    "predicate": {"mask": tf.from_predicate(lambda i, j: (i + 2 * j) % 3 != 0)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", STORED)
def test_padded_packed_and_alone(kind, dtype):
    rng = np.random.default_rng(0)
    n, options = len(Q_SIZES), STORED[kind]
    shapes = ((n, 2, max(Q_SIZES), 24), (n, 1, max(KV_SIZES), 24), (n, 1, max(KV_SIZES), 40))
    q, k, v = (rng.standard_normal(shape).astype(numpy_type(dtype)) for shape in shapes)

    def joined(x, sizes):
        return np.concatenate([x[b, :, :m] for b, m in enumerate(sizes)], axis=1)

    padded = attend(q, k, v, q_lengths=np.array(Q_SIZES), kv_lengths=np.array(KV_SIZES), **options)
    packed = attend(
        *(joined(x, sizes) for x, sizes in ((q, Q_SIZES), (k, KV_SIZES), (v, KV_SIZES))),
        cu_seqlens_q=np.cumsum([0, *Q_SIZES]),
        cu_seqlens_k=np.cumsum([0, *KV_SIZES]),
        **options,
    )
    alone = [
        attend(q[b, :, :m], k[b, :, :t], v[b, :, :t], **options)
        for b, (m, t) in enumerate(zip(Q_SIZES, KV_SIZES, strict=True))
    ]
    each = tuple(np.concatenate([result[part] for result in alone], axis=1) for part in (0, 1))
    assert_same_bits(packed, each, "packed")
    assert_same_bits(tuple(joined(x, Q_SIZES) for x in padded), each, "padded")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_plan(kind, dtype):
    """Other tiles of queries, keys in one piece or in many, other threads: passed in as a plan."""
    for q_len, kv_len, group in ((1, 2300, 3), (90, 1100, 2)):
        x = made(kind, dtype, group, 1, q_len, kv_len, 24, 40)
        options = x.options(0, *x.lengths, ...)
        expected = attend(x.q, x.k, x.v, **options)
        plan = tf.explain(x.q, x.k, x.v, return_lse=True, backend="native", **options).plan
        for n, block_q in enumerate((1, 3, 8, 17, 48, 1000)):
            for splits in (1, 2):
                other = replace(plan, block_q=block_q, splits=splits, workers=1 + n % 3)
                got = tf.attention(x.q, x.k, x.v, return_lse=True, plan=other, **options)
                assert_same_bits(got, expected, f"{q_len} rows, block_q {block_q}, {splits} splits")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_distances_that_the_sums_do_not_hold(dtype):
    """Beyond 2^24 a float32 skips whole numbers; a decoded row rounds its distances as the prefill did."""
    rng, q_len, seen = np.random.default_rng(0), 40, 130
    for kv_len in (2**24 + q_len, 2**25 + 77):
        q = rng.standard_normal((1, q_len, 8)).astype(dtype)
        k = np.zeros((1, kv_len, 8), dtype)  # takes no memory where nobody looks
        k[:, :seen] = rng.standard_normal((1, seen, 8))
        options = {"mask": tf.prefix(seen), "alibi": [1e-3], "invariant": True}
        out, lse = attend(q, k, k, **options)
        for i in range(0, q_len, 3):
            keys = k[:, : kv_len - q_len + i + 1]
            row = attend(q[:, i : i + 1], keys, keys, **options)
            assert_same_bits(row, (out[:, i : i + 1], lse[:, i : i + 1]), f"query {i} of {kv_len} keys")


def odd(x):
    """The same from an address that is no multiple of more than its item size."""
    room = np.zeros(x.size + 1, x.dtype)
    room[1:] = x.ravel()
    return room[1:].reshape(x.shape)


def spread(x):
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


ORDERS = {
    "bshd": lambda x: np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2),
    "bhds": lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
    "fortran": np.asfortranarray,
    "reversed": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
    "strided": spread,
    "odd": odd,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_any_memory_order(order, dtype):
    """Of all three arrays, of one of them, and of the output."""
    for q_len, kv_len, dim in ((1, 1100, 64), (2, 70, 33), (70, 90, 64), (70, 90, 33)):
        x = made("causal", dtype, 4, 2, q_len, kv_len, dim, dim + 1, lead=(2,))
        arrays, expected = [x.q, x.k, x.v], x.whole()
        move = ORDERS[order]
        assert_same_bits(attend(*map(move, arrays), causal=True), expected, "all three")
        for n in range(3):
            some = [move(a) if m == n else a for m, a in enumerate(arrays)]
            assert_same_bits(attend(*some, causal=True), expected, "qkv"[n])
        out = move(np.full_like(expected[0], np.nan))
        assert_same_bits(attend(*arrays, causal=True, out=out), expected, "out")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_invariant_is_so_where_nobody_asks(kind, dtype):
    """Few rows, and any number of types that are multiplied as they are: asking is accepted and changes nothing."""
    for q_len in (1, 32, 60):
        if not is_steady(q_len, 2, dtype):
            continue
        x = made(kind, dtype, 4, 2, q_len, 1100)
        options = x.options(0, *x.lengths, ...)
        assert_same_bits(attend(x.q, x.k, x.v, invariant=True, **options), x.whole(), q_len)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [16, 17])
def test_explain_says_where_bits_are_those_of_many_rows(q_len, dtype):
    """Four heads on a key head: 64 rows are few."""
    x = made("plain", dtype, 8, 2, q_len, 70)
    for invariant in (False, True):
        plan = tf.explain(x.q, x.k, x.v, backend="native", invariant=invariant).plan
        many = not (invariant or is_steady(q_len, 4, dtype))
        assert ("sums of bfloat16" in plan.note) == many


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [*ORDERS, None])
def test_the_call_without_options_takes_no_other_way(order, dtype):
    """A repeated call that asks for nothing is recognised without being checked again."""
    for options in ({}, {"causal": True}, {"scale": 0.3}, {"softcap": 2.0}):
        x = made("plain", dtype, 4, 2, 60, 70, lead=(2,))
        arrays = [x.q, x.k, x.v] if order is None else [ORDERS[order](a) for a in (x.q, x.k, x.v)]
        expected = attend(*arrays, **options)
        for _ in range(3):
            got = tf.attention(*arrays, return_lse=True, **options)
            assert_same_bits(got, expected, options)
            assert [a.strides for a in got] == [a.strides for a in expected]
            assert_same_bits(tf.attention(*arrays, **options), expected[0], options)
            for a in arrays:  # the same call with other numbers
                a *= a.dtype.type(0.5)
            expected = attend(*arrays, **options)


def test_the_comparison_can_fail():
    x = np.array([1.0, 2.0, np.nan])
    assert_same_bits(x, x.copy())
    for y in (np.nextafter(x, 9), x.astype(np.float32), x[:2], np.array([1.0, 2.0, 3.0])):
        with pytest.raises(AssertionError):
            assert_same_bits(x, y)
    with pytest.raises(AssertionError):
        assert_same_bits(np.array([0.0]), np.array([-0.0]))
