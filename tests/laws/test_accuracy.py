"""How near the native core comes to float64: as near as PyTorch in float32, and to its output's rounding in 16 bits.

Errors are root mean squares over an output. What PyTorch's own kernel makes of the same numbers is the one yardstick,
where it is installed, since it does the same arithmetic; what it costs to round the exact result is the other. Machines
that multiply bf16 round the weights too, whose errors are as large as those of the output: √2 together.
"""

import numpy as np
import pytest
from budgets import judge

import tilefold as tf
from tilefold.dtypes import ROWS
from tilefold.naive import naive

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

LOGITS = ["random", "peaked", "rising", "falling"]
SIZES = [(300, 32), (1100, 128)]
SEEDS = range(5)


def numpy_type(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


def drawn(logits: str, seed: int, n: int, dim: int, dtype: str) -> list[np.ndarray]:
    """k and v of n rows and q of a seventh, whose scores are of order 1, far apart, or rise or fall by 60."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, n, dim)) for _ in range(3))
    if logits == "peaked":
        q *= 8
    elif logits != "random":
        q, slope = np.abs(q), 30 if logits == "rising" else -30
        k += slope * np.linspace(-1, 1, n)[:, None] / np.sqrt(dim)
    return [x.astype(numpy_type(dtype)) for x in (q[:, ::7], k, v)]


def error(x: np.ndarray, right: np.ndarray) -> float:
    return float(np.sqrt(((x.astype(np.float64) - right) ** 2).mean()))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_float32_is_as_near_as_pytorch(logits, size):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    ratios = []
    for seed in SEEDS:
        arrays = drawn(logits, seed, *size, "float32")
        right, _ = naive(*arrays, dtype=np.float64)
        peer = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(x)[None] for x in arrays))
        ours = tf.attention(*arrays, backend="native")
        ratios.append(error(ours, right) / error(peer[0].numpy(), right))
    assert np.median(ratios) <= 1.05, ratios
    assert max(ratios) <= 1.25, ratios


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_lose_nothing_but_their_rounding(dtype, logits, size):
    rounded = 1.0
    for seed in SEEDS[:2]:
        arrays = drawn(logits, seed, *size, dtype)
        isa = tf.explain(*arrays, backend="native").plan.isa
        if dtype == "bfloat16" and isa in ("avx512_bf16", "avx512_amx"):
            rounded = np.sqrt(2)
        right, _ = naive(*arrays, dtype=np.float64)
        floor = error(right.astype(arrays[0].dtype), right)
        ours = tf.attention(*arrays, backend="native")
        assert error(ours, right) <= 1.02 * rounded * floor


@pytest.mark.parametrize("dtype", list(ROWS))
@pytest.mark.parametrize("logits", LOGITS)
def test_halves_merge_to_the_whole(logits, dtype):
    """Wherever the keys are cut, at a segment's end or within a block, the error stays of the size of the whole's."""
    q, k, v = drawn(logits, 7, 1100, 64, dtype)
    right, right_lse = naive(q, k, v, dtype=np.longdouble)
    whole, whole_lse = tf.attention(q, k, v, return_lse=True, backend="native")
    for cuts in ([0, 1024, 1100], [0, 1, 1100], [0, 333, 500, 777, 1100], [0, 0, 550, 1100]):
        parts = [
            tf.attention(q, k[:, a:b], v[:, a:b], return_lse=True, backend="native")
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        out, lse = tf.merge(*parts)
        for e in (
            judge("out", out, [whole], right, dtype),
            judge("lse", lse, [whole_lse], right_lse, ROWS[dtype].accumulate),
        ):
            assert e.ok, (cuts, str(e))
