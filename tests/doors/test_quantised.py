"""What `quantise` and `dequantise` promise, in arrays and tensors, and what is said of codes that cannot be read.

The nearest code is found here by looking at all of them; errors are held against half a step of the type.
"""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from bits import assert_same_bits

import tilefold as tf
from tilefold.arrays import enter
from tilefold.caches import dequantise, quantise
from tilefold.dtypes import CODES
from tilefold.layouts import Stored

ml_dtypes = pytest.importorskip("ml_dtypes", reason="float8_e4m3fn needs ml_dtypes")

ROOT = Path(__file__).parents[2]
KINDS = tuple(CODES)
TYPES = [np.dtype(name) for name in ("float16", ml_dtypes.bfloat16, "float32", "float64")]
TINY = float(np.finfo(np.float32).tiny)


class Cache:
    def __init__(self, *held, **scales):
        self.held = Stored(*held, **scales)

    def stored(self):
        return self.held


def steps(kind):
    """All numbers that codes within +-`largest` stand for, ascending, and whether each is even."""
    if kind != "float8_e4m3fn":
        n = np.arange(-CODES[kind].largest, CODES[kind].largest + 1)
        return n, n % 2 == 0
    byte = np.arange(256, dtype=np.uint8)
    values = byte.view(ml_dtypes.float8_e4m3fn).astype(float)
    byte, values = byte[np.isfinite(values) & (byte != 128)], values[np.isfinite(values) & (byte != 128)]
    order = np.argsort(values)
    return values[order], byte[order] % 2 == 0


def unpacked(codes, kind):
    """Codes as numbers."""
    if kind != "int4":
        return codes.astype(float)
    halves = np.stack([codes & 15, codes >> 4], axis=-1).astype(int).reshape(*codes.shape[:-1], -1)
    return np.where(halves < 8, halves, halves - 16).astype(float)


def some(shape=(3, 2, 40, 64), dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- quantise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_code_halves_to_even(kind, dtype):
    x = some(dtype=dtype)
    codes, scales = quantise(x, kind)
    assert codes.shape == (*x.shape[:-1], 64 // CODES[kind].each) and codes.dtype.name == CODES[kind].array
    assert (scales.shape, scales.dtype) == (x.shape[:-1], np.float32)
    ratios = x.astype(np.float32) / scales[..., None]
    values, even = steps(kind)
    away = np.abs(ratios[..., None].astype(float) - values)
    nearest = away.min(axis=-1, keepdims=True)
    right = values[np.argmax((away == nearest) * (1 + even), axis=-1)]
    assert (unpacked(codes, kind) == right).all()
    assert (np.abs(unpacked(codes, kind)).max(axis=-1) == CODES[kind].largest).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_halves_are_rounded_to_even(kind):
    largest = CODES[kind].largest
    halves = np.arange(-largest + 0.5, largest)
    x = np.array([*halves, largest, *([0] if len(halves) % 2 == 0 else [])], np.float32)
    codes, scale = quantise(x, kind)
    assert scale == 1
    assert (unpacked(codes, kind)[: len(halves)] == np.rint(halves)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_scales_of_their_own(kind):
    x = some((5, 48)) * np.repeat(10.0 ** np.arange(-3, 3), 8).astype(np.float32)
    codes, scales = quantise(x, kind, group=8)
    assert scales.shape == (5, 6)
    for n in range(6):
        alone, scale = quantise(x[:, 8 * n : 8 * n + 8], kind)
        assert (scales[:, n] == scale).all()
        width = 8 // CODES[kind].each
        assert (codes[:, width * n : width * (n + 1)].view(np.uint8) == alone.view(np.uint8)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_next_to_nothing(kind):
    x = np.zeros((3, 8), np.float32)
    x[1] = 1e-42
    x[2, 3] = TINY * CODES[kind].largest / CODES[kind].least
    codes, scales = quantise(x, kind)
    assert scales.tolist() == [0, 0, TINY / CODES[kind].least]
    assert (dequantise(codes, scales)[:2] == 0).all()
    assert_same_bits(dequantise(codes, scales)[2], x[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_for_a_page_is_one_for_a_long_row(kind):
    pages = some((3, 2, 5, 8))
    codes, scales = quantise(pages.reshape(3, 2, 40), kind)
    codes = codes.reshape(3, 2, 5, -1)
    right = dequantise(codes, np.repeat(scales[..., None], 5, axis=-1))
    cache = Cache(codes, codes, np.array([1]), np.array([[2]]), k_scale=scales, v_scale=scales)
    out = tf.attention(np.ones((1, 2, 9, 8), np.float32), cache)  # one key: its value
    assert_same_bits(out, np.repeat(right[2:, :, :1], 9, axis=2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_again_stays_as_it_is(kind):
    codes, scales = quantise(some(), kind, group=16)
    again = quantise(dequantise(codes, scales), kind, group=16)
    assert (again[0].view(np.uint8) == codes.view(np.uint8)).all()
    np.testing.assert_array_max_ulp(again[1], scales, maxulp=1)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_memory_order(kind, order):
    x = some((4, 6, 16))
    right = quantise(x, kind, group=8)
    laid = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    for view, expected in ((laid, right), (x[::-1, ::-1], tuple(a[::-1, ::-1] for a in right))):
        codes, scales = quantise(view, kind, group=8)
        assert (codes.view(np.uint8) == expected[0].view(np.uint8)).all() and (scales == expected[1]).all()
    there = [np.asfortranarray(a) for a in right]
    assert_same_bits(dequantise(*there), dequantise(*right))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (8,)])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_nothing_and_of_one_row(kind, shape):
    x = some(shape)
    codes, scales = quantise(x, kind)
    assert scales.shape == shape[:-1]
    assert dequantise(codes, scales).shape == shape


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "sentence"),
    [
        (([1.0],), {}, TypeError, r"x must be an array \(NumPy, or anything with __dlpack__\), got list"),
        ((np.ones((2, 4), np.int8),), {}, TypeError, "x must be float16, bfloat16, float32 or float64, got int8"),
        ((np.ones(()),), {}, ValueError, "x must have at least one dimension"),
        ((np.ones((2, 4)), 8), {}, TypeError, "kind must be the name of a type, got int"),
        ((np.ones((2, 4)), "int2"), {}, ValueError, "kind must be 'int8', 'float8_e4m3fn', 'int4', got 'int2'"),
        ((np.array([[1, np.nan]]),), {}, ValueError, "x must be finite in float32, got NaN or infinity"),
        ((np.array([[1, -np.inf]]),), {}, ValueError, "x must be finite in float32, got NaN or infinity"),
        ((np.array([[1, 1e39]]),), {}, ValueError, "x must be finite in float32, got NaN or infinity"),
        ((np.ones((2, 6)),), {"group": 4}, ValueError, "group must divide the 6 dims of x, got 4"),
        ((np.ones((2, 6)),), {"group": 0}, ValueError, "group must be"),
        ((np.ones((2, 6)),), {"group": 2.0}, TypeError, "group must be"),
        ((np.ones((2, 7)), "int4"), {}, ValueError, "x must have an even number of dims for int4, got 7"),
        ((np.ones((2, 6)), "int4"), {"group": 3}, ValueError, "group must be even for int4, got 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised(arguments, options, kind, sentence):
    with pytest.raises(kind, match=f"^{sentence}"):
        quantise(*arguments, **options)


@pytest.mark.parametrize(
    ("codes", "scales", "dtype", "kind", "sentence"),
    [
        (np.ones((2, 4)), np.ones(2, np.float32), "float32", TypeError, "codes must be an array of float8_"),
        (np.ones((2, 4), np.int8), np.ones(2), "float32", TypeError, "scales must be float32, got float64"),
        (np.ones((2, 4), np.int8), np.ones(3, np.float32), "float32", ValueError, r"scales must have the shape \(2,\)"),
        (np.ones((2, 4), np.int8), np.ones((2, 3), np.float32), "float32", ValueError, "scales must have .* 4 dims"),
        (np.ones((2, 4), np.int8), np.ones(2, np.float32), "float64", TypeError, "dtype must be float16, bfloat16 or"),
        (np.ones((2, 4), np.int8), np.ones(2, np.float32), "int8", TypeError, "dtype must be float16, bfloat16 or"),
        (np.ones((2, 4), np.int8), np.ones(2, np.float32), "half", TypeError, ""),
        (np.ones((2, 4), np.int8), np.ones(2, np.float32), "none", TypeError, "there is no type 'none'"),
    ],
)  # fmt: skip
def test_what_cannot_be_dequantised(codes, scales, dtype, kind, sentence):
    if dtype == "half":  # another name of float16
        assert dequantise(codes, scales, dtype).dtype == np.float16
        return
    with pytest.raises(kind, match=f"^{sentence}"):
        dequantise(codes, scales, dtype)


# ---- tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_tensors_give_the_codes_of_arrays(name, kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = torch.from_numpy(some()).to(getattr(torch, name))
    codes, scales = quantise(x, kind, group=32)
    right = quantise(enter("x", x), kind, group=32)
    assert codes.dtype == getattr(torch, CODES[kind].array)
    for tensor, array in zip((codes, scales), right, strict=True):
        assert (enter("x", tensor).view(np.uint8) == array.view(np.uint8)).all()
    for dtype in (name, x.dtype):
        back = dequantise(codes, scales, dtype)
        assert back.dtype == x.dtype
        assert_same_bits(enter("x", back), dequantise(*right, enter("x", x).dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_tensors_over_codes(kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    q, x = torch.from_numpy(some((2, 4, 3, 64))), torch.from_numpy(some((5, 2, 16, 64), seed=1))
    codes, scales = quantise(x, kind)
    table, lengths = torch.tensor([[3, 0], [1, -1]]), torch.tensor([30, 7])
    tensors = Cache(codes, codes, lengths, table, k_scale=scales, v_scale=scales)
    arrays = Cache(
        *(enter("x", a) for a in (codes, codes, lengths, table)),
        k_scale=scales.numpy(),
        v_scale=scales.numpy(),
    )
    with torch.no_grad():
        out = tf.attention(q, tensors, causal=True)
    assert isinstance(out, torch.Tensor)
    assert_same_bits(out.numpy(), tf.attention(q.numpy(), arrays, causal=True))


def test_float8_is_known_once_ml_dtypes_is(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="float8_e4m3fn tensors need the package ml_dtypes"):
        dequantise(torch.zeros(2, 4, dtype=torch.float8_e4m3fn), torch.zeros(2))


# ---- codes that attention cannot read --------------------------------------------------------------------------

Q = np.ones((2, 4, 1, 8), np.float32)
CODE = np.ones((3, 2, 5, 8), np.int8)
PAIRS = np.ones((3, 2, 5, 4), np.uint8)
SCALE = np.ones((3, 2, 5), np.float32)
LENGTHS, TABLE = np.array([4, 2]), np.array([[0], [2]])


def refusal(q=Q, k=CODE, v=CODE, table=TABLE, **scales):
    scales = {"k_scale": SCALE, "v_scale": SCALE} | scales
    with pytest.raises((TypeError, ValueError)) as refused:
        tf.attention(q, Cache(k, v, LENGTHS, table, **scales))
    return f"{refused.type.__name__}: {refused.value}"


SHAPES = "must have shape (pages, kv_heads) = (3, 2), (pages, kv_heads, page) = (3, 2, 5), or one more axis of groups"


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_of_another_shape_or_type(name):
    assert refusal(**{name: None}) == f"TypeError: {name} must be given where keys and values are int8"
    assert refusal(**{name: SCALE.astype(float)}) == f"TypeError: {name} must be float32, got float64"
    for shape in (
        (),
        (3,),
        (2, 3),
        (3, 2, 4),
        (5, 2, 3),
        (3, 2, 5, 3),
        (3, 2, 5, 0),
        (3, 1, 5),
        (1, 2, 5),
        (3, 2, 5, 2, 1),
    ):
        said = refusal(**{name: np.ones(shape, np.float32)})
        assert said == f"ValueError: {name} {SHAPES} that divide 8 dims into parts; got {shape}"
    said = refusal(k=PAIRS, v=PAIRS, **{name: np.ones((3, 2, 5, 8), np.float32)})
    assert (
        said
        == f"ValueError: {name} {SHAPES} that divide 8 dims into parts of an even number of dims; got (3, 2, 5, 8)"
    )


def test_types_that_do_not_go_together():
    assert refusal(q=Q.astype(float)) == (
        "TypeError: q must be float16, bfloat16 or float32 with keys and values of int8, got float64"
    )
    assert refusal(v=PAIRS) == "TypeError: k and v must be stored in one type, got k int8, v uint8"
    floats = CODE.astype(np.float32)
    assert refusal(k=floats, v=floats) == (
        "TypeError: k must be int8, float8_e4m3fn, uint8 (int4) where it has a scale, got float32"
    )
    assert refusal(k=CODE.astype(np.int16)) == (
        "TypeError: k must be int8, float8_e4m3fn, uint8 (int4) where it has a scale, got int16"
    )
    assert refusal(k=floats, v=CODE, k_scale=None, v_scale=None).startswith("TypeError: v must be float16, ")


def test_shapes_that_do_not_go_together():
    assert refusal(k=CODE[..., :6], v=CODE).startswith(
        "ValueError: q and the cache must have the same last dimension"
    )
    assert refusal(k=PAIRS[..., :3], v=PAIRS).endswith("k (3, 2, 5, 3), two dims to a byte")
    assert refusal(k=CODE[0], v=CODE[0]).startswith(
        "ValueError: with pages q must be (batch, heads, length, dim)"
    )
    assert refusal(v=CODE[:2]).startswith("ValueError: k and v must have the same pages")
    assert refusal(table=np.array([[0]])) == "ValueError: the cache holds 1 sequences, q has 2"
    assert refusal(table=None) == "ValueError: the cache holds 3 sequences, q has 2"


def test_codes_have_no_gradients():
    cache = Cache(CODE, CODE, LENGTHS, TABLE, k_scale=SCALE, v_scale=SCALE)
    out, lse = tf.attention(Q, cache, return_lse=True)
    with pytest.raises(tf.BackendRefused, match="keys and values in pages have no gradients"):
        tf.attention_grad(Q, cache, None, out, lse, out)


# ---- explain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "scale", "name", "nbytes"),
    [
        (CODE, SCALE, "int8", 2 * 6 * 2 * (8 + 4)),
        (CODE.view(ml_dtypes.float8_e4m3fn), SCALE, "float8_e4m3fn", 2 * 6 * 2 * (8 + 4)),
        (PAIRS, np.ones((3, 2, 5, 2), np.float32), "int4", 2 * 6 * 2 * (4 + 8)),
        (CODE, SCALE[..., 0], "int8", 2 * 2 * (6 * 8 + 2 * 4)),
    ],
)
def test_explain_names_the_type_and_its_bytes(k, scale, name, nbytes):
    why = tf.explain(Q, Cache(k, k, LENGTHS, TABLE, k_scale=scale, v_scale=scale))
    assert (why.problem.kv_dtype, why.kv_bytes) == (name, nbytes)
    assert why.bytes == nbytes + 2 * Q.nbytes
    assert f" kv={name} " in str(why) and f"keys and values {nbytes} B of {name} and scales" in str(why)


def test_explain_of_plain_arrays_counts_them_whole():
    why = tf.explain(Q, Q, Q)
    assert (why.kv_bytes, why.bytes) == (2 * Q.nbytes, 4 * Q.nbytes)
    assert "kv=" not in str(why) and str(why).endswith(f"keys and values {2 * Q.nbytes} B of float32")


# ---- what the page says ----------------------------------------------------------------------------------------


def test_the_table_of_errors_is_what_its_command_prints():
    """All of docs/quantised.md but the columns of real vectors, which need a model and the texts of one Python."""
    place = ROOT / "examples" / "quantised.py"
    spec = importlib.util.spec_from_file_location("quantised_example", place)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    page = (ROOT / "docs" / "quantised.md").read_text()
    (shown,) = re.findall(f"{example.BEGIN}\n(.*?)\n{example.END}", page, re.DOTALL)
    shape = 12, example.KEYS, 32
    real = np.random.default_rng(1).standard_normal((3, *shape), np.float32)

    def cells(line):
        name, bits, _, _, *random = (cell.strip() for cell in line.strip("|").split("|"))
        return name, bits, random

    printed = [cells(line) for line in example.table(real)]
    assert len(printed) == 2 + len(example.WAYS)
    assert printed == [cells(line) for line in shown.splitlines()]
