"""Any number of Python threads may call at once, and none waits for the GIL: the same bits as one after the other.

How many threads a call may use is the caller's word; one that is no number of threads is an error.
"""

import contextlib
import threading

import numpy as np
import pytest
from faults.fresh import TORCHS, python

import tilefold as tf
from tilefold.backends.cpu import CORE


def together(jobs):
    """Run each job in a thread of its own, all from the same moment on."""
    gate, errors = threading.Barrier(len(jobs)), []

    def run(job):
        try:
            gate.wait(timeout=60)
            job()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not errors


CALLS = [
    {},
    {"causal": True},
    {"window": (100, 20), "softcap": 5.0},
    {"mask": tf.chunked(64) | tf.prefix(9), "sinks": np.arange(4.0)},
]


def test_sixteen_at_once():
    """Each of its own length and options; large calls want the pool, small ones are over before it is awake."""
    rng = np.random.default_rng(1)
    jobs, results = [], []
    for n in range(16):
        length = 600 + n if n % 3 else 40 + n
        dtype = (np.float32, np.float16, np.float64)[n % 3]
        qkv = rng.standard_normal((3, 4, length, 32)).astype(dtype)
        options = CALLS[n % 4]
        expected = tf.attention(*qkv, return_lse=True, **options)

        def job(qkv=qkv, options=options, expected=expected):
            for _ in range(5):
                got = tf.attention(*qkv, return_lse=True, **options)
                pairs = zip(got, expected, strict=True)
                results.append(all(same_bits(a, b) for a, b in pairs))

        jobs.append(job)
    together(jobs)
    assert results == [True] * 80


def same_bits(a, b):
    if CORE is None:  # BLAS may sum in another order when it is busy
        return np.allclose(a, b, rtol=1e-3, atol=1e-3)
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("team", [TORCHS])
def test_sixteen_at_once_with_one_team_of_torchs(team):
    said = python(
        """
import torch.nn.functional as F
big = np.random.default_rng(2).standard_normal((3, 4, 700, 64)).astype(np.float32)
expected = tf.attention(*big)
tensors = [torch.from_numpy(x) for x in big]
theirs = F.scaled_dot_product_attention(*tensors)
right = []
def ours(n):
    for _ in range(5):
        right.append(np.array_equal(tf.attention(*big), expected))
        if n % 4 == 0:  # whose own work goes on beside ours
            right.append(torch.allclose(F.scaled_dot_product_attention(*tensors), theirs))
threads = [threading.Thread(target=ours, args=(n,)) for n in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(right), all(right))
        """,
        **team,
    )
    assert said == "100 True\n"


@pytest.mark.parametrize("team", [TORCHS])
def test_from_within_a_team_of_openmps(team):
    """Each of torch's workers calls, with nobody left to help it."""
    said = python(
        """
import ctypes
big = np.random.default_rng(2).standard_normal((3, 4, 700, 64)).astype(np.float32)
expected = tf.attention(*big)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
from tilefold import _core
openmp = ctypes.CDLL(_core.openmp_path())
inside, right = [], []
def region(_):
    inside.append((openmp.omp_in_parallel(), openmp.omp_get_thread_num()))
    for n in range(3):
        right.append(np.array_equal(tf.attention(*big), expected))
region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(region)
for n in range(3):
    openmp.GOMP_parallel(region, None, 2, 0)
print(sorted(inside) == [(1, 0)] * 3 + [(1, 1)] * 3, len(right), all(right))
        """,
        **team,
    )
    assert said == "True 18 True\n"


def test_sixteen_gradients_at_once():
    rng = np.random.default_rng(1)
    jobs, results = [], []
    for n in range(16):
        q, k, v = rng.standard_normal((3, 2, 40 + n, 8))
        out, lse = tf.attention(q, k, v, causal=True, return_lse=True)
        expected = tf.attention_grad(q, k, v, out, lse, out, causal=True)[:3]

        def job(arguments=(q, k, v, out, lse, out), expected=expected):
            for _ in range(5):
                got = tf.attention_grad(*arguments, causal=True)[:3]
                pairs = zip(got, expected, strict=True)
                results.append(all(np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs))

        jobs.append(job)
    together(jobs)
    assert results == [True] * 80


def test_an_error_in_one_thread_leaves_the_others_right():
    q, k, v = np.random.default_rng(0).standard_normal((3, 4, 300, 32))
    expected = tf.attention(q, k, v)
    results = []

    def good():
        results.append(np.array_equal(tf.attention(q, k, v), expected))

    def bad():
        with contextlib.suppress(ValueError):
            tf.attention(q, k[..., :3], v)

    together([good, bad] * 8)
    assert results == [True] * 8


@pytest.mark.skipif(CORE is None, reason="tilefold was installed without its native core")
def test_other_threads_run_during_a_call():
    """The longest time that this thread had to wait is far less than the call took."""
    said = python(
        """
arguments, expected = lasting(0.4)
took = []
def call():
    start = time.monotonic()
    tf.attention(*arguments)
    took.append(time.monotonic() - start)
thread = threading.Thread(target=call)
thread.start()
longest, last = 0, time.monotonic()
while thread.is_alive():
    time.sleep(0.001)
    now = time.monotonic()
    longest, last = max(longest, now - last), now
print(longest / took[0])
        """,
        TILEFOLD_NUM_THREADS="2",
    )
    assert float(said) < 0.5


# ---- how many threads a call may use -------------------------------------------------------------------------


@pytest.fixture
def afterwards_as_before():
    yield
    tf.set_num_threads(None)


@pytest.mark.usefixtures("afterwards_as_before")
@pytest.mark.parametrize(
    ("count", "error", "says"),
    [
        (0, ValueError, "count must be >= 1, got 0"),
        (-1, ValueError, "count must be >= 1, got -1"),
        (4097, ValueError, "count must be at most 4096, got 4097"),
        (2**40, ValueError, "count must be at most 4096, got 1099511627776"),
        (2**80, ValueError, "count must be at most 4096, got 1208925819614629174706176"),
        (2.0, TypeError, r"count must be an integer, got 2\.0"),
        (np.float32(2), TypeError, "count must be an integer, got "),
        ("2", TypeError, "count must be an integer, got '2'"),
        (True, TypeError, "count must be an integer, got True"),
        ([2], TypeError, r"count must be an integer, got \[2\]"),
        (float("nan"), TypeError, "count must be an integer, got nan"),
    ],
)
def test_what_is_no_number_of_threads(count, error, says):
    tf.set_num_threads(3)
    with pytest.raises(error, match=says) as raised:
        tf.set_num_threads(count)
    assert raised.type is error
    assert tf.get_num_threads() == (3 if CORE else 1)


@pytest.mark.skipif(CORE is None, reason="NumPy's threads are its BLAS's")
@pytest.mark.usefixtures("afterwards_as_before")
def test_the_callers_word():
    before = tf.get_num_threads()
    qkv = np.random.default_rng(0).standard_normal((3, 2, 500, 64)).astype(np.float32)
    expected = tf.attention(*qkv)
    for count in (1, 2, 5, np.int64(3), 4096):
        tf.set_num_threads(count)
        assert tf.get_num_threads() == count
        assert tf.attention(*qkv).tobytes() == expected.tobytes()
    tf.set_num_threads(None)
    assert tf.get_num_threads() == before
