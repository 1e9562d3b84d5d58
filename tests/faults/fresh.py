"""Runs a piece of code in an interpreter of its own: what signals, forks and limits do stays there.

The code finds `tf`, `np`, some calls that last, and `check`, which compares a small call with its right answer.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

PRELUDE = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
import numpy as np, tilefold as tf

q, k, v = np.random.default_rng(0).standard_normal((3, 2, 9, 4))
s = q @ k.swapaxes(1, 2) / 2
p = np.exp(s - s.max(axis=-1, keepdims=True))
right = p / p.sum(axis=-1, keepdims=True) @ v

def check():
    assert np.allclose(tf.attention(q, k, v), right, rtol=1e-12)

def of_length(queries, keys, heads=1):
    "Arguments of a call whose keys take no memory, so that it may last as long as one likes."
    rng = np.random.default_rng(1)
    x = rng.standard_normal((heads, queries, 64)).astype(np.float32)
    key = rng.standard_normal((heads, 1, 64)).astype(np.float32)
    return x, *[np.broadcast_to(key, (heads, keys, 64))] * 2

def lasting(seconds, queries=2000):
    "Arguments of a call that takes at least so long on this machine, and its result."
    keys = 4000
    while True:
        arguments = of_length(queries, keys)
        start = time.monotonic()
        result = tf.attention(*arguments)
        took = time.monotonic() - start
        if took >= seconds:
            return arguments, result
        keys = int(keys * min(max(1.4 * seconds / took, 1.4), 30))
"""

ONE = pytest.param({"TILEFOLD_NUM_THREADS": "1"}, id="one thread")
TWO = pytest.param({"TILEFOLD_NUM_THREADS": "2"}, id="two threads")
TORCHS = pytest.param(
    {"torch": "yes", "OMP_NUM_THREADS": "2"},
    id="two of torch's",
    marks=pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed"),
)


def run(code: str, timeout: float = 120, **environ: str) -> subprocess.CompletedProcess[str]:
    """Whatever becomes of it, but in time. Threads are the processors' unless `environ` says otherwise."""
    prelude = "import torch\n" + PRELUDE if environ.pop("torch", None) else PRELUDE
    ours = {name: x for name, x in os.environ.items() if name not in ("TILEFOLD_NUM_THREADS", "TILEFOLD_ISA")}
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=ours | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(code: str, **environ: str) -> str:
    """What the code printed; it must end well."""
    done = run(code, **environ)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    return done.stdout
