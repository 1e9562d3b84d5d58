"""Attention over codes is attention over the numbers that they stand for, whatever the types, the pages, the rows and
the mask: the same bits on the native core where `invariant` asks for them; else, and on NumPy, within the budget.
Unused rows hold NaN scales, which reach nothing.

What a code stands for is computed here, code by code in double precision, without the library.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from bits import assert_same_bits
from budgets import judge, rounds_weights

import tilefold as tf
from tilefold.caches import cascade, dequantise, quantise
from tilefold.dtypes import CODES, ROWS, code_of
from tilefold.layouts import Stored
from tilefold.naive import naive

ml_dtypes = pytest.importorskip("ml_dtypes", reason="float8_e4m3fn needs ml_dtypes")

TYPES = ("float16", "bfloat16", "float32")
KINDS = tuple(CODES)
LENGTHS = (75, 0, 41)  # of three sequences
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "softcap, sinks": {"causal": True, "softcap": 3.0, "sinks": [0.5, -1.0, 0.0, 2.0]},
    "alibi": {"alibi": [0.5, 0.25, 0.01, 0.002]},
}


@dataclass
class Cache:
    """What a cache keeps: a call asks for nothing else."""

    held: Stored

    def stored(self) -> Stored:
        return self.held


def meant(kind: str) -> np.ndarray:
    """What each of 256 bytes stands for; (256, 2) for int4."""
    byte = np.arange(256)
    if kind == "int8":
        return np.where(byte < 128, byte, byte - 256).astype(float)
    if kind == "int4":
        halves = np.stack([byte & 15, byte >> 4], axis=-1)
        return np.where(halves < 8, halves, halves - 16).astype(float)
    e, m = byte >> 3 & 15, byte & 7
    size = np.where(e > 0, (8.0 + m) * 2.0 ** (e - 10), m * 2.0**-9)
    size[(byte & 127) == 127] = np.nan
    return np.where(byte < 128, size, -size)


def numbers(codes: np.ndarray, scales: np.ndarray, kind: str, dtype: str) -> np.ndarray:
    """Codes ``(..., n)`` times scales ``(..., groups)``: rounded to float32, then to `dtype`."""
    return exact_numbers(codes, scales, kind).astype(np.float32).astype(numpy_type(dtype))


def exact_numbers(codes: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """The same as they are, in double."""
    exact = meant(kind)[codes.view(np.uint8)].reshape(*codes.shape[:-1], -1)
    return exact * np.repeat(scales.astype(float), exact.shape[-1] // scales.shape[-1], axis=-1)


def numpy_type(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name)) if name in ("bfloat16", "float8_e4m3fn") else np.dtype(name)


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Any codes that stand for a number."""
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // CODES[kind].each), np.uint8)
    if kind == "float8_e4m3fn":
        codes[(codes & 127) == 127] = 0x6B
    return codes.view(numpy_type(CODES[kind].array))


def scales_of(rng: np.random.Generator, shape: tuple[int, ...], each: str, groups: int) -> np.ndarray:
    """Scales for rows ``(pages, kv_heads, page)``: per row, per page, or per group of dims."""
    shape = {"row": shape, "page": shape[:2], "group": (*shape, groups)}[each]
    return rng.uniform(0.001, 0.02, shape).astype(np.float32)


@dataclass
class Twins:
    """The same keys and values as codes in pages, which lie anyhow, and as plain arrays behind `lengths`."""

    q: np.ndarray
    cache: Cache
    k: np.ndarray
    v: np.ndarray
    exact: list[np.ndarray]  # k and v before they were rounded
    lengths: np.ndarray

    @classmethod
    def made(
        cls, kind: str, dtype: str, page: int, q_len: int, each: str = "row", heads: int = 4, kv_heads: int = 2,
        dim: int = 64, v_dim: int = 48, seed: int = 0,
    ) -> "Twins":  # fmt: skip
        rng = np.random.default_rng([seed, page, q_len, dim])
        used = -(-max(LENGTHS) // page)
        pages = len(LENGTHS) * used + 2
        table = rng.permutation(pages)[: len(LENGTHS) * used].reshape(len(LENGTHS), used)
        holds = np.zeros((pages, page), bool)
        for row, length in zip(table, LENGTHS, strict=True):
            for n, number in enumerate(row):
                holds[number, : max(length - n * page, 0)] = True
            row[-(-length // page) :] = -1
        stored, dense, exact = [], [], []
        for width in (dim, v_dim):
            codes = random_codes(rng, (pages, kv_heads, page, width), kind)
            scales = scales_of(rng, (pages, kv_heads, page), each, width // 16)
            if each == "page":
                scales[~holds.any(axis=1)] = np.nan
            else:
                np.moveaxis(scales, 1, 2)[~holds] = np.nan
            of_rows = scales.reshape(*scales.shape, *[1] * (4 - scales.ndim))
            of_rows = np.broadcast_to(of_rows, (pages, kv_heads, page, of_rows.shape[-1]))
            for to, all_rows in (
                (dense, numbers(codes, of_rows, kind, dtype)),
                (exact, exact_numbers(codes, of_rows, kind)),
            ):
                rows = all_rows[np.maximum(table, 0)]
                to.append(rows.swapaxes(1, 2).reshape(len(LENGTHS), kv_heads, -1, width))
            stored += [codes, scales]
        lengths = np.array(LENGTHS)
        q = rng.standard_normal((len(LENGTHS), heads, q_len, dim)).astype(numpy_type(dtype))
        k, k_scale, v, v_scale = stored
        return cls(
            q,
            Cache(Stored(k, v, lengths, table, None, k_scale=k_scale, v_scale=v_scale)),
            *dense,
            exact,
            lengths,
        )

    def both(self, **options: Any) -> tuple[Any, Any]:
        """(out, lse) over codes, in the bits of numbers, and over numbers."""
        return (
            tf.attention(self.q, self.cache, return_lse=True, invariant=True, **options),
            tf.attention(
                self.q, self.k, self.v, kv_lengths=self.lengths, return_lse=True, invariant=True, **options
            ),
        )


native = pytest.mark.usefixtures("core")


@pytest.fixture
def core() -> None:
    pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_codes_have_the_bits_of_their_numbers(dtype, kind):
    for page in (1, 5, 16, 80):
        for q_len in (1, 3, 40):
            twins = Twins.made(kind, dtype, page, q_len)
            for name, options in MASKS.items():
                assert_same_bits(
                    *twins.both(backend="native", **options), f"{name}, page {page}, {q_len} rows"
                )


@native
@pytest.mark.parametrize("each", ["row", "page", "group"])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_per_row_page_and_group(kind, each):
    for dtype in TYPES:
        for dim, v_dim in ((64, 48), (16, 80), (128, 160)):
            for heads, kv_heads in ((4, 4), (6, 2), (5, 1)):
                twins = Twins.made(kind, dtype, 7, 2, each, heads, kv_heads, dim, v_dim)
                assert_same_bits(
                    *twins.both(backend="native", causal=True), f"{dtype} h{heads}/{kv_heads} d{dim} v{v_dim}"
                )


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_code(dtype, kind):
    """All 256 bytes as values that one query sees alone, in rows of every width up to three vectors."""
    byte = np.arange(256, dtype=np.uint8).view(numpy_type(CODES[kind].array))
    scale = np.full((256, 1, 1), 0.0078, np.float32)
    for width in range(1, 49):
        codes = np.repeat(byte, width).reshape(256, 1, 1, width)
        dim = width * CODES[kind].each
        cache = Cache(
            Stored(codes, codes, np.ones(256, int), np.arange(256)[:, None], k_scale=scale * 0, v_scale=scale)
        )
        q = np.zeros((256, 1, 1, dim), numpy_type(dtype))
        right = numbers(codes, scale[..., None], kind, dtype)
        spoilt = np.isnan(right)
        for invariant in (False, True):
            out = tf.attention(q, cache, backend="native", invariant=invariant)
            assert np.isnan(out[spoilt]).all() and (out[~spoilt] == right[~spoilt]).all(), width


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("each", ["row", "page", "group"])
@pytest.mark.parametrize("page", [5, 16])
def test_any_strides(page, each, kind):
    """Codes and scales reversed, in other orders of axes and with gaps."""
    twins = Twins.made(kind, "float32", page, 3, each)
    held = twins.cache.held
    right = tf.attention(twins.q, twins.cache, return_lse=True, backend="native")
    for order in ((0, 1, 2, 3), (2, 0, 1, 3), (3, 1, 0, 2)):
        for step in (1, -1, 3):
            axes = {4: order, 3: tuple(a for a in order if a < 3), 2: (0, 1)}
            moved = [_laid(x, axes[x.ndim], step) for x in (held.k, held.v, held.k_scale, held.v_scale)]
            cache = Cache(Stored(*moved[:2], held.lengths, held.table, k_scale=moved[2], v_scale=moved[3]))
            assert_same_bits(
                tf.attention(twins.q, cache, return_lse=True, backend="native"), right, f"{order} {step}"
            )


def _laid(x: np.ndarray, order: tuple[int, ...], step: int) -> np.ndarray:
    """The same numbers, with axes in the order `order` in memory and every `step`-th element of the last one in use."""
    back = np.argsort(order)
    there = x.transpose(order)
    memory = np.zeros((*there.shape[:-1], there.shape[-1] * abs(step)), x.dtype)
    lies = memory[..., ::step]
    lies[...] = there
    assert lies.strides[-1] == step * x.itemsize
    return lies.transpose(back)


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("q_len", [1, 4, 40])
def test_plans_threads_and_splits_change_nothing(q_len, kind):
    twins = Twins.made(kind, "bfloat16", 16, q_len)
    plan = tf.explain(twins.q, twins.cache, return_lse=True, backend="native").plan
    right = tf.attention(twins.q, twins.cache, return_lse=True, backend="native")
    for changes in ({"block_q": 1}, {"block_q": 8, "workers": 3}, {"splits": 2, "workers": 2}):
        other = type(plan)(**{name: getattr(plan, name) for name in plan.__slots__} | changes)
        assert_same_bits(tf.attention(twins.q, twins.cache, return_lse=True, plan=other), right, changes)


def judge_attention(
    got: Any, twins: Twins, kv: list[np.ndarray], dtype: str, options: Any, name: str
) -> None:
    """(out, lse) against the plain method over the numbers `kv`."""
    acc, narrow = ROWS[dtype].accumulate, rounds_weights(dtype)
    options = options | {"kv_lengths": twins.lengths}
    right = naive(twins.q.astype(float), *(x.astype(float) for x in kv), **options, dtype=np.float64)
    arrays = [x.astype(np.float32) for x in (twins.q, *kv)]
    plain = naive(*arrays, **options, dtype=acc)
    rounded = naive(*arrays, **options, dtype=acc, weights_dtype=narrow)[0] if narrow else None
    for what, x, y, z, to in zip(("out", "lse"), got, plain, right, (dtype, acc), strict=True):
        error = judge(what, x, [y], z, to, rounded if what == "out" else None)
        assert error.ok, f"{name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_numpy_is_within_the_budget(dtype, kind):
    for page, q_len, each in ((1, 1, "row"), (16, 40, "group"), (80, 3, "page")):
        twins = Twins.made(kind, dtype, page, q_len, each)
        for name, options in MASKS.items():
            got = tf.attention(twins.q, twins.cache, return_lse=True, backend="numpy", **options)
            judge_attention(got, twins, [twins.k, twins.v], dtype, options, f"{name}, {page}, {q_len} rows")


def multiplies_codes(twins: Twins) -> bool:
    """Whether this machine folds these few rows in other bits than those of numbers."""
    got = [
        tf.attention(twins.q, twins.cache, backend="native", return_lse=True, invariant=x)[1]
        for x in (False, True)
    ]
    return not np.array_equal(*got)


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_are_within_the_budget(dtype, kind):
    """Where codes are multiplied as they lie their numbers are not rounded to the type of the queries."""
    for page, q_len, heads, kv_heads, dim, v_dim, each in (
        (16, 1, 4, 2, 64, 48, "row"), (5, 2, 4, 1, 128, 160, "row"), (16, 1, 8, 1, 130, 66, "page"),
        (80, 3, 2, 2, 32, 256, "row"), (7, 1, 5, 5, 20, 8, "page"), (48, 2, 6, 2, 64, 64, "group"),
    ):  # fmt: skip
        twins = Twins.made(kind, dtype, page, q_len, each, heads, kv_heads, dim, v_dim)
        kv = twins.exact if multiplies_codes(twins) else [twins.k, twins.v]
        for name, options in MASKS.items():
            if len(options.get("sinks", options.get("alibi", [0] * heads))) != heads:
                continue
            got = tf.attention(twins.q, twins.cache, return_lse=True, backend="native", **options)
            judge_attention(got, twins, kv, dtype, options, f"{name}, page {page}, {q_len} rows of {dim}")


@native
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_of_any_size(dtype, kind):
    """Rows from tiny to huge, and keys of which one outweighs all others, in one block."""
    rng = np.random.default_rng(7)
    twins = Twins.made(kind, dtype, 16, 1)
    held = twins.cache.held
    for scales, least, most in ((held.k_scale, -9, 2), (held.v_scale, -20, 8)):
        scales *= (2.0 ** rng.uniform(least, most, scales.shape)).astype(np.float32)
    k, v = (
        exact_numbers(codes, scales[..., None], kind)[np.maximum(held.table, 0)].swapaxes(1, 2)
        for codes, scales in ((held.k, held.k_scale), (held.v, held.v_scale))
    )
    twins.exact = [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v)]
    kv = [x.astype(np.float32).astype(twins.q.dtype) for x in twins.exact]
    kv = twins.exact if multiplies_codes(twins) else kv
    got = tf.attention(twins.q, twins.cache, return_lse=True, backend="native")
    judge_attention(got, twins, kv, dtype, {}, "any size")


@native
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_spoils_no_other(kind):
    """Queries, and scales of keys and of values, of NaN and infinity: few rows, of which the others keep their bits."""
    for spoilt in ("q", "k_scale", "v_scale"):
        for what in (np.nan, np.inf):
            twins = Twins.made(kind, "float32", 16, 4)
            clean = tf.attention(twins.q, twins.cache, causal=True, backend="native")
            held = twins.cache.held
            if spoilt == "q":
                twins.q[0, 1, 2, 5] = what
            else:
                getattr(held, spoilt)[held.table[0, 4], 0, 73 % 16] = what  # of the last key but one
            out = tf.attention(twins.q, twins.cache, causal=True, backend="native")
            other = tf.attention(twins.q, twins.cache, causal=True, backend="native", invariant=True)
            odd = ~np.isfinite(out)
            assert (odd == ~np.isfinite(other)).all(), (spoilt, what)
            sees = np.zeros(out.shape[:3], bool)
            sees[0, 1 if spoilt == "q" else slice(2), 2 : 3 if spoilt == "q" else None] = True
            assert odd.any() and not odd[~sees].any(), (spoilt, what)
            assert_same_bits(out[~sees], clean[~sees], (spoilt, what))


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_a_cache_without_a_table_is_a_page_per_sequence(backend, request):
    if backend == "native":
        request.getfixturevalue("core")
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 2, 2, 33, 32)).astype(np.float32)
    q = rng.standard_normal((2, 4, 5, 32)).astype(np.float32)
    (k_codes, k_scale), (v_codes, v_scale) = quantise(k, "int8"), quantise(v, "int8", group=16)
    lengths = np.array([33, 9])
    cache = Cache(Stored(k_codes, v_codes, lengths, k_scale=k_scale, v_scale=v_scale))
    got = tf.attention(q, cache, causal=True, return_lse=True, backend=backend)
    dense = dequantise(k_codes, k_scale), dequantise(v_codes, v_scale)
    right = tf.attention(q, *dense, causal=True, kv_lengths=lengths, return_lse=True, backend=backend)
    assert_same_bits(got, right)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_pages_that_are_folded_once_for_all(kind, monkeypatch):
    """Sequences that share all pages but their last, in a cascade: over codes, and over their numbers in pages."""
    monkeypatch.setattr(cascade, "PAYS", -(2**40))
    rng = np.random.default_rng(1)
    codes = random_codes(rng, (7, 2, 16, 32), kind)
    scales = scales_of(rng, (7, 2, 16), "group", 2)
    q = rng.standard_normal((3, 4, 2, 32)).astype(np.float32)
    table, lengths = np.array([[2, 6, 0], [2, 6, 3], [2, 6, 5]]), np.array([47, 40, 33])
    rows = numbers(codes, scales, kind, "float32")
    over_codes = Cache(Stored(codes, codes, lengths, table, cascade=True, k_scale=scales, v_scale=scales))
    over_numbers = Cache(Stored(rows, rows, lengths, table, cascade=True))
    assert (
        tf.explain(q, over_codes, causal=True).shared == tf.explain(q, over_numbers, causal=True).shared == 32
    )
    assert_same_bits(*(tf.attention(q, x, causal=True, return_lse=True) for x in (over_codes, over_numbers)))


@native
def test_nan_in_a_key_that_is_seen_reaches_those_who_see_it():
    twins = Twins.made("int8", "float32", 16, 40)
    held = twins.cache.held
    page = held.table[0, 4]
    held.k_scale[page, :, 74 % 16] = np.nan  # the last key of the first sequence
    out = tf.attention(twins.q, twins.cache, causal=True, backend="native")
    spoilt = np.isnan(out).any(axis=(1, 3))
    assert spoilt[0].tolist() == [False] * 39 + [True] and not spoilt[1:].any()


def test_dequantise_gives_what_attention_computes_with():
    rng = np.random.default_rng(5)
    for kind in KINDS:
        for dtype in TYPES:
            codes = random_codes(rng, (3, 7, 32), kind)
            scales = rng.uniform(0.001, 0.02, (3, 7, 4)).astype(np.float32)
            assert_same_bits(dequantise(codes, scales, dtype), numbers(codes, scales, kind, dtype), kind)
            assert code_of(codes.dtype) is CODES[kind]
