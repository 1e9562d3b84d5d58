"""Memory grows like n, in fresh processes: bytes per token are constant from 1k to 64k, and the count is true.

NumPy's buffers are seen by tracemalloc. The native core's are not: the allocator that serves it counts them, and the
count is held against what the operating system says.
"""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.call import Call, Options, understand
from tilefold.dtypes import ROWS

BY_NAME = {b.name: b for b in BACKENDS}
NAMES = [b.name for b in BACKENDS if b.why_not(tf.explain(*np.zeros((3, 1, 1, 1))).problem) is None]
HAS_NATIVE = "native" in NAMES
MIB = 2**20

MEASURE = """
import json, resource, sys, tracemalloc
import numpy as np
import tilefold as tf
from tilefold.call import Options, understand
from tilefold.problem import Want

n, what, mode, dim, dtype, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:7]
if dtype == "bfloat16":
    import ml_dtypes

def drawn(n):
    "Filled piece by piece, so that nothing larger was ever there to hide behind."
    x = np.empty((1, n, dim), dtype)
    for start in range(0, n, 256):
        part = x[:, start : start + 256]
        part[...] = np.random.default_rng(start).standard_normal(part.shape, dtype=np.float32)
    return x

def resident():
    "The peak of this process; the usual ru_maxrss begins with that of the process that started it."
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def go(n):
    q, k, v = (drawn(n) for _ in range(3))
    options = {"causal": dict(causal=True), "window": dict(window=(127, 0)), "anchors": dict(mask=tf.anchors(4, 127)),
               "predicate": dict(mask=tf.from_predicate(lambda i, j: (i + j) % 2 == 0), window=(127, 0)),
               "wide": dict(window=(1023, 0)), "full": {}, "backward": dict(window=(127, 0))}[what]
    before = resident()
    if mode == "traced":
        tracemalloc.start()
    call = understand(q, k, v, Options(**options), want=Want.LSE, backend=backend)
    call.allocate()
    counted = call.fold()
    if what == "backward":
        grad = understand(q, k, v, Options(**options), want=Want.LSE | Want.GRAD, backend=backend)
        counted = max(counted, grad.plan.workspace_bytes)
        tf.attention_grad(q, k, v, call.out, call.lse, call.out, backend=backend, **options)
    peak = tracemalloc.get_traced_memory()[1] if mode == "traced" else resident() - before
    tracemalloc.stop()
    return {"peak": peak, "counted": counted, "results": call.out.nbytes + call.lse.nbytes,
            "plan": call.plan.workspace_bytes}

go(256)  # what a first call costs once
print(json.dumps(go(n)))
"""


def measured(
    n: int, what: str, mode: str, backend: str, dim: int = 16, dtype: str = "float32"
) -> dict[str, int]:
    """Peak bytes beyond the inputs of one call in a process of its own, and what its kernel counted."""
    run = [sys.executable, "-W", "ignore", "-c", MEASURE, str(n), what, mode, str(dim), dtype, backend]
    return json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def peak(n: int, what: str, backend: str) -> int:
    """Everything that one call held: what is traced, and what the native core took."""
    found = measured(n, what, "traced", backend)
    return found["peak"] + (found["counted"] if backend == "native" else 0)


@pytest.mark.parametrize("what", ["window", "anchors", "predicate", "backward"])
@pytest.mark.parametrize("backend", NAMES)
def test_bytes_per_token_are_constant(backend, what):
    sizes = [4096, 16384, 65536]
    peaks = [peak(n, what, backend) for n in sizes]
    slopes = [(b - a) / (m - n) for a, b, n, m in zip(peaks, peaks[1:], sizes, sizes[1:], strict=False)]
    assert slopes[1] < 1.1 * slopes[0] + 4, (peaks, slopes)
    assert slopes[1] < {"backward": 8}.get(what, 1) * (16 + 1) * 4 * 1.2, (
        "more than out and lse (and the gradients)"
    )


@pytest.mark.parametrize("backend", NAMES)
def test_causal_from_1k_to_64k(backend):
    """The whole triangle. What is held beyond the output does not grow once a tile is full.

    What is packed in pieces does, but not beyond 16 MiB. NumPy goes a quarter of the way: that its tiles are full is
    enough, and what it does takes time.
    """
    far = 65536 if backend == "native" else 16384
    peaks = {n: peak(n, "causal", backend) for n in (1024, 8192, far)}
    results = {n: n * 17 * 4 for n in peaks}
    more = (peaks[far] - results[far]) - (peaks[8192] - results[8192])
    in_pieces = tf.explain(*np.zeros((3, 1, 100, 16), np.float32), backend=backend).plan.isa == "avx512_amx"
    if in_pieces:
        assert max(peaks[n] - results[n] for n in peaks) < 17 * MIB, peaks
    assert (more if in_pieces else abs(more)) < 0.2e6, peaks


def test_64k_tokens_take_under_64_mib():
    """Resident memory, which also sees what BLAS keeps for itself."""
    found = measured(65536, "wide", "resident", "numpy", dim=64)
    assert found["results"] < found["peak"] < 64 * MIB


@pytest.mark.skipif(not HAS_NATIVE, reason="the native core is not installed")
@pytest.mark.parametrize(
    ("dtype", "what"), [("float32", "causal"), ("float16", "wide"), ("bfloat16", "full")]
)
def test_64k_tokens_take_what_the_native_core_counted(dtype, what):
    """The operating system agrees with the count, 8 MiB for everything else: threads, stacks, the interpreter."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    found = measured(65536, what, "resident", "native", dim=64, dtype=dtype)
    assert found["counted"] == found["plan"]
    assert found["peak"] <= found["counted"] + found["results"] + 8 * MIB, found
    assert found["peak"] >= 0.5 * (found["counted"] + found["results"]), "or nothing was measured"
    assert found["peak"] < 64 * MIB


def arrays(n: int, dtype: str, heads=2, kv_heads: int | None = None, rows: int | None = None, dim=64):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16
    rng, kv_heads = np.random.default_rng(0), heads if kv_heads is None else kv_heads
    shapes = (heads, n if rows is None else rows, dim), (kv_heads, n, dim), (kv_heads, n, dim)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def resized(backend: str, q, k, v, config: tf.FlashConfig) -> Call:
    """The call that `flash_attention` makes, on a backend of one's choice."""
    call = understand(q, k, v, Options(causal=config.causal, scale=config.scale), backend=backend)
    call.plan = BY_NAME[backend].resize(call.plan, config.block_q, config.block_kv)
    call.allocate()
    return call


@pytest.mark.parametrize("n", [512, 2048, 5000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_numpy_counts_what_was_allocated(n, causal, dtype):
    """Within 10 % of tracemalloc's peak."""
    call = resized("numpy", *arrays(n, dtype, heads=1), tf.FlashConfig(256, 512, 0.125, causal))
    call.fold()
    tracemalloc.start()
    counted = call.fold()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(counted - traced) < 0.1 * traced, (counted, traced)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native core is not installed")
@pytest.mark.parametrize("n", [1, 512, 3000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", list(ROWS))
def test_memory_bytes_is_what_the_plan_predicted(n, causal, dtype):
    q, k, v = arrays(n, dtype, heads=1)
    for block_q, block_kv in ((1, 16), (256, 512), (64, 64), (1000, 3000)):
        config = tf.FlashConfig(block_q, block_kv, 0.125, causal)
        plan = tf.explain(q, k, v, causal=causal, scale=0.125).plan
        plan = BY_NAME["native"].resize(plan, block_q, block_kv)
        assert tf.flash_attention(q, k, v, config).memory_bytes == plan.workspace_bytes, (block_q, block_kv)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native core is not installed")
@pytest.mark.parametrize("dtype", list(ROWS))
def test_native_takes_some_heads_of_keys_and_values_at_most(dtype):
    """Converted keys and values of as many heads as there are workers, and 2 MiB for each; pieces at most 16 MiB."""
    sizes = (12, 12, 512, 4096), (12, 3, 4096, 4096), (32, 8, 1, 32768), (2, 1, 7, 65536)
    for heads, kv_heads, rows, n in sizes:
        q, k, v = arrays(n, dtype, heads, kv_heads, rows)
        call = understand(q, k, v, Options(causal=True), backend="native")
        call.allocate()
        counted, workers = call.fold(), call.plan.workers
        in_pairs = dtype == "bfloat16" and call.plan.isa in ("avx512_bf16", "avx512_amx")
        in_pieces = dtype in ("float32", "float16") and call.plan.isa == "avx512_amx"  # of two bytes each
        size = 2 if in_pairs else {"float64": 8}.get(dtype, 4)
        if in_pieces:
            size = {"float32": 6, "float16": 4}[dtype]
        panels = min(workers, kv_heads) * n * (64 + 64) * size
        if in_pieces and panels > 16 * MIB:
            panels = 0
        assert counted <= panels + workers * 2 * MIB, (heads, kv_heads, rows, n, counted)
        if dtype in ("float32", "float64") and rows > 100 and not in_pieces:  # read where they lie
            assert counted <= workers * 2 * MIB, (heads, kv_heads, rows, n, counted)


def test_memory_saved_compares_with_the_score_matrix():
    q = np.random.default_rng(0).normal(size=(2, 4096, 64)).astype(np.float16)
    result = tf.flash_attention(q, q, q)
    matrix = 2 * 4096 * 4096 * 4
    assert result.memory_saved_percent == pytest.approx(100 * (1 - result.memory_bytes / matrix))
    assert tf.naive_attention(q, q, q)[1] == matrix


def shifted(x: np.ndarray) -> np.ndarray:
    """The same from an address that is no multiple of the item size."""
    room = np.zeros(x.nbytes + 1, np.uint8)
    moved = room[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


@pytest.mark.parametrize("backend", NAMES)
def test_inputs_are_never_copied_whole(backend):
    """A tile at a time: half precision, a strange order, grouped heads, a broadcast bias, none of them is expanded."""
    n, heads = 4096, 8
    rng = np.random.default_rng(0)
    q = np.asfortranarray(rng.normal(size=(heads, n, 64)).astype(np.float16))
    k, v = (rng.normal(size=(1, n, 64)).astype(np.float16)[:, ::-1] for _ in range(2))
    bias = np.zeros((heads, 1, n), np.float32)
    out = np.empty_like(q)
    tf.attention(q[:, :64], k, v, bias=bias, backend=backend)
    tracemalloc.start()
    tf.attention(q, k, v, bias=bias, out=out, backend=backend)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    plan = tf.explain(q, k, v, bias=bias, backend=backend).plan
    assert traced < (1.15 * plan.workspace_bytes if backend == "numpy" else 64 * 1024)
    assert plan.workspace_bytes < q.nbytes * 2


@pytest.mark.parametrize("shape", [(8, 1, 4096), (1, 256, 1), (8, 1, 1)], ids=str)
@pytest.mark.parametrize("order", [np.asarray, np.asfortranarray, shifted])
@pytest.mark.parametrize("backend", NAMES)
def test_a_bias_is_never_expanded(backend, order, shape):
    """Wherever it lies, also at an odd address."""
    q, k, v = arrays(4096, "float32", heads=8, rows=256, dim=8)
    bias = order(np.zeros(shape, np.float32))
    expected = tf.attention(q, k, v, backend=backend)
    out = np.empty_like(q)
    tracemalloc.start()
    tf.attention(q, k, v, bias=bias, out=out, backend=backend)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    untraced = tf.explain(q, k, v, bias=bias, backend=backend).plan.workspace_bytes
    assert traced < 64 * 1024 + 2 * bias.nbytes + 1.15 * untraced
    np.testing.assert_allclose(out, expected, atol=1e-6)
