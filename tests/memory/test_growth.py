"""Memory grows like n, in fresh processes: bytes per token are constant from 1k to 64k, and the count is true."""

import json
import subprocess
import sys

import numpy as np
import pytest

import tilefold as tf

MEASURE = """
import json, resource, sys, tracemalloc
import numpy as np
import tilefold as tf
n, what, mode, dim = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
def go(n):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, dim), dtype=np.float32) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if mode == "traced":
        tracemalloc.start()
    options = {"causal": dict(causal=True), "window": dict(window=(127, 0)), "anchors": dict(mask=tf.anchors(4, 127)),
               "predicate": dict(mask=tf.from_predicate(lambda i, j: (i + j) % 2 == 0), window=(127, 0)),
               "full": {}, "backward": dict(window=(127, 0))}[what]
    out, lse = tf.attention(q, k, v, return_lse=True, **options)
    if what == "backward":
        tf.attention_grad(q, k, v, out, lse, out, **options)
    if mode == "traced":
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return traced
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
go(256)  # what a first call costs once
print(json.dumps(go(n)))
"""


def peak(n: int, what: str, mode: str, dim: int = 16) -> int:
    """Peak bytes beyond the inputs of one call in a process of its own."""
    run = [sys.executable, "-W", "ignore", "-c", MEASURE, str(n), what, mode, str(dim)]
    return json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("what", ["window", "anchors", "predicate", "backward"])
def test_bytes_per_token_are_constant(what):
    sizes = [4096, 16384, 65536]
    peaks = [peak(n, what, "traced") for n in sizes]
    slopes = [(b - a) / (m - n) for a, b, n, m in zip(peaks, peaks[1:], sizes, sizes[1:], strict=False)]
    assert slopes[1] < 1.1 * slopes[0] + 4, (peaks, slopes)
    assert slopes[1] < {"backward": 8}.get(what, 1) * (16 + 1) * 4 * 1.2, (
        "more than out and lse (and the gradients)"
    )


def test_causal_from_1k_to_64k():
    """The whole triangle. What is held beyond the output does not grow at all once a tile is full."""
    peaks = {n: peak(n, "causal", "traced") for n in (1024, 8192, 65536)}
    results = {n: n * 17 * 4 for n in peaks}
    assert abs((peaks[65536] - results[65536]) - (peaks[8192] - results[8192])) < 0.2e6, peaks


def test_64k_tokens_take_under_64_mib():
    """Resident memory, which also sees what BLAS keeps for itself."""
    assert peak(65536, "causal", "resident", dim=64) < 64 * 2**20


@pytest.mark.parametrize("n", [512, 2048, 5000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_memory_bytes_is_what_was_allocated(n, causal, dtype):
    """Within 10 % of tracemalloc's peak, less the output itself."""
    import tracemalloc

    q, k, v = np.random.default_rng(0).normal(size=(3, 2, n, 64)).astype(dtype)
    config = tf.FlashConfig(256, 512, 0.125, causal)
    tf.flash_attention(q, k, v, config)
    tracemalloc.start()
    result = tf.flash_attention(q, k, v, config)
    traced = tracemalloc.get_traced_memory()[1] - result.output.nbytes
    tracemalloc.stop()
    assert abs(result.memory_bytes - traced) < 0.1 * traced, (result.memory_bytes, traced)


def test_memory_saved_compares_with_the_score_matrix():
    q = np.random.default_rng(0).normal(size=(2, 4096, 64)).astype(np.float16)
    result = tf.flash_attention(q, q, q)
    matrix = 2 * 4096 * 4096 * 4
    assert result.memory_saved_percent == pytest.approx(100 * (1 - result.memory_bytes / matrix))
    assert tf.naive_attention(q, q, q)[1] == matrix


def test_inputs_are_never_copied_whole():
    """A tile at a time: half precision, a strange order, grouped heads, a broadcast bias, none of them is expanded."""
    import tracemalloc

    n, heads = 4096, 8
    rng = np.random.default_rng(0)
    q = np.asfortranarray(rng.normal(size=(heads, n, 64)).astype(np.float16))
    k, v = (rng.normal(size=(1, n, 64)).astype(np.float16)[:, ::-1] for _ in range(2))
    bias = np.zeros((heads, 1, n), np.float32)
    out = np.empty_like(q)
    tf.attention(q[:, :64], k, v, bias=bias)
    tracemalloc.start()
    tf.attention(q, k, v, bias=bias, out=out)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    plan = tf.explain(q, k, v, bias=bias).plan
    assert traced < 1.15 * plan.workspace_bytes < q.nbytes * 2
