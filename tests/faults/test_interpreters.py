"""Two copies of the package in one process, subinterpreters, and the end of an interpreter while calls run.

A copy under another name has a core, a pool of threads and a memory of its own. In a subinterpreter the core refuses to
be loaded, with a sentence, and NumPy takes its place: nanobind would wait there for a lock that the call itself holds.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.fresh import ONE, TORCHS, TWO, python, run

import tilefold as tf
from tilefold.backends.cpu import CORE

HERE = Path(tf.__file__).parent


@pytest.fixture
def twin(tmp_path):
    """The environment in which the package is there a second time, as `twin`."""
    shutil.copytree(HERE, tmp_path / "twin", ignore=shutil.ignore_patterns("__pycache__", "_core*"))
    if CORE is not None:  # which an editable installation keeps elsewhere
        shutil.copy(CORE.__file__, tmp_path / "twin")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))}


@pytest.mark.parametrize("team", [TWO, TORCHS])
def test_two_copies(twin, team):
    """Each by turns, both at once, and both in a child of a fork."""
    said = python(
        """
import twin
print(twin.attention is not tf.attention, twin.api.__file__ != tf.api.__file__)
print(twin.backends.cpu.CORE is not tf.backends.cpu.CORE)
print(twin.explain(q, k, v).plan.backend == tf.explain(q, k, v).plan.backend)
big = np.random.default_rng(2).standard_normal((3, 4, 700, 64)).astype(np.float32)
out, lse = tf.attention(*big, return_lse=True)
grads = tf.attention_grad(*big, out, lse, out)
def right(copy):
    got = copy.attention(*big, return_lse=True)
    same = [np.array_equal(a, b) for a, b in zip(got, (out, lse))]
    return all(same + [np.array_equal(a, b) for a, b in zip(copy.attention_grad(*big, *got, out)[:3], grads)])
print(all(right(copy) for copy in (twin, tf) * 3))
results = []
def five(copy):
    results.extend(right(copy) for _ in range(5))
threads = [threading.Thread(target=five, args=(copy,)) for copy in (tf, twin) * 2]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(results), all(results))
pid = os.fork()
if pid == 0:
    os._exit(7 if right(tf) and right(twin) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
twin.set_num_threads(1)
print(twin.get_num_threads() == 1, tf.get_num_threads() == 2 or tf.backends.cpu.CORE is None)
        """,
        **team,
        **twin,
    )
    core = CORE is not None
    assert said == f"True True\n{core}\nTrue\nTrue\n20 True\n7\nTrue True\n"


def test_two_copies_know_nothing_of_each_others_masks_and_plans(twin):
    said = python(
        """
import twin
for wrong in ({"mask": twin.causal()}, {"plan": twin.explain(q, k, v).plan}):
    try:
        tf.attention(q, k, v, **wrong)
    except TypeError as error:
        print(error)
        """,
        **twin,
    )
    mask, plan = said.splitlines()
    assert mask.startswith("mask must be ")
    assert plan == "plan must be a tilefold Plan, got Plan"


# ---- subinterpreters -----------------------------------------------------------------------------------------

SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
import warnings
try:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import numpy as np, tilefold as tf
        q = np.arange(16.0).reshape(1, 4, 4)
        right = tf.naive_attention(q, q, q, 0.5)[0]
        print(tf.explain(q, q, q).plan.backend, np.allclose(tf.attention(q, q, q), right), flush=True)
        print(*(w.message for w in caught if "native core" in str(w.message)), flush=True)
except ImportError as error:
    print("ImportError:", error, flush=True)
'''
there = interpreters.create(CONFIGURATION)
answer = interpreters.run_string(there, code)
assert not answer, answer
interpreters.destroy(there)
"""
HAVE = any(importlib.util.find_spec(name) for name in ("_interpreters", "_xxsubinterpreters"))
OLD = sys.version_info < (3, 13)
KINDS = [
    pytest.param("isolated=False" if OLD else "'legacy'", id="sharing the lock"),
    pytest.param("isolated=True" if OLD else "'isolated'", id="isolated"),
]


@pytest.mark.skipif(not HAVE, reason="this Python cannot make subinterpreters")
@pytest.mark.parametrize("required", ["", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_subinterpreters(kind, required):
    """NumPy may refuse to be there too; whatever becomes of it is said in a sentence, and soon."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SUBINTERPRETER.replace("CONFIGURATION", kind)],
        env=os.environ | {"PYTHONPATH": path, "TILEFOLD_BACKEND": required},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    if said.startswith("numpy True"):
        assert not required or CORE is None
        assert "the NumPy backend is used" in said
    else:
        assert said.startswith("ImportError: ")
    assert CORE is None or "subinterpreter" in said


# ---- the end of an interpreter -------------------------------------------------------------------------------


@pytest.mark.parametrize("team", [ONE, TWO, TORCHS])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.skipif(CORE is None, reason="NumPy's own calls end when its BLAS lets them")
def test_daemon_threads_in_calls_do_not_hinder_the_end(way, team):
    """Three of them, while the interpreter is torn down around them for long enough that they look for signals."""
    done = run(
        f"""
arguments = of_length(4000, 2**24)
if {way == "backward"}:
    x, lse = np.ones((8, 100_000, 8), np.float32), np.ones((8, 100_000), np.float32)
    call = lambda: tf.attention_grad(x, x, x, x, lse, x)
else:
    call = lambda: tf.attention(*arguments)
for n in range(3):
    threading.Thread(target=call, daemon=True).start()
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.2)
sys.modules["slow"] = Slow()
time.sleep(0.3)
print("over")
        """,
        **team,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
