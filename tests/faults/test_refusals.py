"""What the system refuses to a call: the n-th allocation, for n = 1, 2, 3 … until the call succeeds, and new threads.

Each refused allocation is a MemoryError, or does not matter to the result; the next call gives the same bits, and
nothing stays behind. A library between the core and its C library (refuse.cpp) does it, compiled where a compiler is.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from faults.fresh import python

pytest.importorskip("tilefold._core", reason="the allocations are the native core's")

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="refuse.cpp calls glibc's own allocator"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler for refuse.cpp"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library stands there already"),
]

REFUSE = """
import ctypes
from tilefold import _core
refuse = ctypes.CDLL(None)
refuse.refuse_left.restype = refuse.refuse_live_bytes.restype = refuse.refuse_live_blocks.restype = ctypes.c_int64
mapped = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(_core.__file__)]
ends = [int(end, 16) for pair in mapped for end in pair]
refuse.refuse_watch(ctypes.c_size_t(min(ends)), ctypes.c_size_t(max(ends)))

def refuse_allocation(n):
    refuse.refuse_allocation(ctypes.c_int64(n))

def refuse_threads_after(n):
    refuse.refuse_threads_after(ctypes.c_int64(n))

def live():
    "Blocks and bytes that the core has allocated and not freed."
    return refuse.refuse_live_blocks(), refuse.refuse_live_bytes()

def same(a, b):
    return all(x is y or x.tobytes() == y.tobytes() for x, y in zip(a, b))

def in_turn(call):
    "What became of the call when its first, second, … allocation was refused."
    expected = call()
    assert same(call(), expected)
    before, outcomes = live(), []
    for n in range(1, 1000):
        refuse_allocation(n)
        try:
            got = call()
        except MemoryError as error:
            got = None
            outcomes.append("refused")
            assert "bytes of workspace" in str(error), error
        reached = refuse.refuse_left() <= 0
        refuse_allocation(0)
        if got is not None:
            assert same(got, expected), n
            if not reached:
                return outcomes
            outcomes.append("same bits")
        else:
            assert reached
        assert same(call(), expected), n
        after = live()  # the block that is kept for the next call may be another, smaller one
        assert after[0] == before[0] and after[1] <= before[1], (n, before, after)

x = np.random.default_rng(0)
def arrays(dtype, q, k, heads=(2, 2), dim=32):
    shapes = (heads[0], q, dim), (heads[1], k, dim), (heads[1], k, dim), (heads[0], q, dim)
    return [x.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]

def forward(dtype, q, k, heads=(2, 2), dim=32, **options):
    *qkv, _ = arrays(dtype, q, k, heads, dim)
    return lambda: tf.attention(*qkv, return_lse=True, **options)

def backward(dtype, q, k, heads=(2, 2), dim=32, **options):
    *qkv, dout = arrays(dtype, q, k, heads, dim)
    out, lse = tf.attention(*qkv, return_lse=True, **options)
    return lambda: tf.attention_grad(*qkv, out, lse, dout, **options)
"""

PREDICATE = "mask=tf.from_predicate(lambda i, j: (i + 2 * j) % 3 != 0)"
PACKED = "cu_seqlens_q=np.array([0, 90, 90, 300]), cu_seqlens_k=np.array([0, 200, 260, 700])"
CALLS = [
    "'float32', 300, 700",
    "'float32', 300, 700, causal=True, bias=np.zeros((1, 700), np.float32), sinks=np.zeros(2)",
    "'float64', 300, 700, softcap=3.0, alibi=[0.1, 0.2]",
    "'float16', 300, 700, heads=(6, 2)",
    "'bfloat16', 300, 700, heads=(6, 2), causal=True",
    "'bfloat16', 90, 90, dim=1100",
    f"'float32', 600, 700, {PREDICATE}",
    "'float16', 300, 700, mask=tf.dense(x.random((300, 700)) < 0.5)",
    f"'float16', 300, 700, {PACKED}, causal=True",
    "'float32', 1, 5000, heads=(8, 2)",
    "'bfloat16', 1, 5000, heads=(8, 2)",
    "'float32', 3000, 6000, heads=(1, 1), dim=64",  # more than what is kept between calls
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The environment of a process in which things are refused."""
    built = tmp_path_factory.mktemp("refuse") / "refuse.so"
    source = Path(__file__).parent / "refuse.cpp"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(built), "-ldl"], check=True
    )
    return {"LD_PRELOAD": str(built)}


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_each_allocation_in_turn(library, way, threads):
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    calls = "".join(f"print(*in_turn({way}({call})))\n" for call in CALLS)
    said = python(REFUSE + "import ml_dtypes\n" + calls, TILEFOLD_NUM_THREADS=threads, **library).splitlines()
    assert len(said) == len(CALLS)
    for call, line in zip(CALLS, said, strict=True):
        assert line.startswith("refused"), call
        # Only the note of what is kept for the next call does not matter: one for each panel, after other allocations.
        assert "same bits same bits" not in line, f"{call}: {line}"


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_threads(library, granted):
    """As many as there are do the work; when the system has more to give they are taken."""
    said = python(
        REFUSE
        + f"""
def ours():
    names = [open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    return names.count("tilefold")
tf.set_num_threads(1)
prefill, decode = ("float32", 700, 700), ("float32", 1, 40000, (8, 2))
calls = [forward(*prefill, dim=64), backward(*prefill, dim=64), forward(*decode)]
expected = [call() for call in calls]
tf.set_num_threads(4)
refuse_threads_after({granted})
print(all(same(call(), right) for call, right in zip(calls, expected)), ours())
refuse_threads_after(-1)
print(all(same(call(), right) for call, right in zip(calls, expected)), ours())
        """,
        **library,
    )
    assert said == f"True {granted}\nTrue 3\n"


def test_a_thread_whose_memory_is_refused(library):
    """Making a thread allocates, too: the worker is done without."""
    said = python(
        REFUSE
        + """
tf.set_num_threads(1)
call = forward("float32", 700, 700, dim=64)
expected = call()
tf.set_num_threads(3)
outcomes = []
for n in range(1, 1000):
    pid = os.fork()  # whose child has no thread yet
    if pid == 0:
        refuse_allocation(n)
        try:
            code = 1 if not same(call(), expected) else 10 if refuse.refuse_left() > 0 else 20
        except MemoryError:
            code = 30
        os._exit(code)
    outcomes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    if outcomes[-1] == 10:
        break
print(*outcomes)
        """,
        **library,
    )
    outcomes = [int(code) for code in said.split()]
    assert set(outcomes) == {10, 20, 30}
    assert outcomes.count(20) >= 2
