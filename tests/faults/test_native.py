"""What may happen to a process while the native core works in it: Ctrl-C, signals, forks, many threads, no memory.

Each in a fresh interpreter, as it happens to users; with torch loaded too where it is installed, since the core then
runs on torch's threads.
"""

import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

LOADED = [
    "",
    pytest.param("import torch", marks=pytest.mark.skipif(not find_spec("torch"), reason="no torch")),
]
HEAD = """
import os, signal, sys, threading, time
import numpy as np
import tilefold as tf
{loaded}
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 4, 700, 64), dtype=np.float32)
right = tf.attention(q, k, v, causal=True)
def still_right():
    return tf.attention(q, k, v, causal=True).tobytes() == right.tobytes()
n = 60_000
long_q = np.broadcast_to(q[:1, :1], (8, n, 64))  # minutes of work in no memory
long_k = np.broadcast_to(k[:1, :1], (8, n, 64))
"""


def run(code: str, loaded: str = "", **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", HEAD.format(loaded=loaded) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("loaded", LOADED)
def test_ctrl_c_is_answered_at_once(loaded, threads):
    """Promised is a tenth of a second; a loaded machine is given a whole one."""
    code = f"""
tf.set_num_threads({threads})
def press():
    time.sleep(0.5)
    global pressed
    pressed = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=press).start()
try:
    tf.attention(long_q, long_k, long_k)
    print("finished")
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - pressed < 1.0, still_right())
"""
    answer = run(code, loaded)
    assert answer.stdout.split() == ["interrupted", "True", "True"], answer


def test_other_handlers_run_during_a_call():
    code = """
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(time.perf_counter()))
signal.signal(signal.SIGUSR1, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
threading.Timer(0.8, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
try:
    tf.attention(long_q, long_k, long_k)
except KeyboardInterrupt:
    print(len(seen), time.perf_counter() - seen[0] > 0.2, still_right())
"""
    assert run(code).stdout.split() == ["1", "True", "True"]


@pytest.mark.parametrize("loaded", LOADED)
def test_a_fork_computes(loaded):
    """After a call, and while another thread is in one."""
    code = """
def child():
    pid = os.fork()
    if pid == 0:
        os._exit(0 if still_right() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
after = child()
busy = threading.Thread(target=lambda: [tf.attention(q, k, v) for _ in range(60)])
busy.start()
during = [child() for _ in range(5)]
busy.join()
print(after, *during, still_right())
"""
    answer = run(code, loaded)
    assert answer.stdout.split() == ["0"] * 6 + ["True"], answer


@pytest.mark.parametrize("loaded", LOADED)
def test_sixteen_threads_at_once(loaded):
    code = """
wrong = []
def work():
    for _ in range(8):
        if not still_right():
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(16)]
for t in threads: t.start()
for t in threads: t.join()
print(len(wrong))
"""
    answer = run(code, loaded)
    assert answer.stdout.split() == ["0"], answer


def test_other_threads_go_on_meanwhile():
    """The interpreter is free during a call."""
    code = """
count = 0
def tick():
    global count
    while not done:
        count += 1
        time.sleep(0.001)
done = False
other = threading.Thread(target=tick)
other.start()
big = rng.standard_normal((8, 3000, 64), dtype=np.float32)
start = time.perf_counter()
before = count
tf.set_num_threads(1)
tf.attention(big, big, big)
done = True
other.join()
print(count - before > 10, time.perf_counter() - start)
"""
    assert run(code).stdout.split()[0] == "True"


def test_without_memory_it_says_how_much_was_wanted():
    code = """
import resource
wide = np.broadcast_to(np.float32(0.5), (1, 64, 2**24))
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, most))
try:
    tf.attention(wide, wide, wide[..., :8])
except MemoryError as error:
    print("MemoryError", error)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(still_right())
"""
    answer = run(code)
    first, second = answer.stdout.splitlines()
    assert first.startswith("MemoryError unable to allocate ")
    assert first.endswith(" bytes of workspace")
    assert second == "True"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("TILEFOLD_NUM_THREADS", "many", "TILEFOLD_NUM_THREADS"),
        ("TILEFOLD_ISA", "pentium", "TILEFOLD_ISA=pentium is not a machine"),
    ],
)
def test_a_wrong_variable_is_named_at_the_first_call(variable, value, says):
    code = "import numpy as np, tilefold as tf; print('imported'); tf.attention(*np.ones((3, 2, 4, 4)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={variable: value, "PATH": ""}
    )
    assert answer.stdout == "imported\n"
    assert says in answer.stderr
    assert "ValueError" in answer.stderr


@pytest.mark.parametrize("count", [0, -1, 4097, 1.5, "2", True])
def test_a_wrong_number_of_threads_is_refused(count):
    import tilefold as tf

    before = tf.get_num_threads()
    with pytest.raises((TypeError, ValueError), match="count must be"):
        tf.set_num_threads(count)
    assert tf.get_num_threads() == before
