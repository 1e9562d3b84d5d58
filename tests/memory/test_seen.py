"""Statistics of the weights take O(n) memory beside their results, in fresh processes, up to 131,072 tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tilefold as tf

pytest.importorskip("tilefold._core", reason="NumPy's own arithmetic takes minutes here")
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("the peak of a process can be read, and begun anew, on Linux only", allow_module_level=True)

MIB = 2**20
MEASURE = """
import json, sys
import numpy as np
import tilefold as tf

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

n = int(sys.argv[1])
q, k = (np.random.default_rng(s).standard_normal((1, n, 16), dtype=np.float32) for s in range(2))
what = [tf.entropy(), tf.max_logit(), tf.mean_distance(), tf.mass_in(first=slice(0, 4), near=tf.window(9, 0)),
        tf.topk(4), tf.key_mass(), tf.key_mass(discount=0.999).named("fading"), tf.key_max(),
        tf.heatmap(32, 32), tf.rows([5])]
tf.probe(q[:, :300], k[:, :300], *what, window=(127, 0))  # what a first call costs once
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before = peak()
seen = tf.probe(q, k, *what, window=(127, 0))
after = peak()
mass = float(seen.key_mass.sum(dtype=float))
print(json.dumps({"peak": after - before, "mass": mass}))
"""


def measured(n: int) -> dict[str, float]:
    run = [sys.executable, "-W", "ignore", "-c", MEASURE, str(n)]
    found: dict[str, float] = json.loads(
        subprocess.run(run, check=True, capture_output=True, text=True).stdout
    )
    assert abs(found["mass"] - n) < 1e-3 * n  # it did look at every row
    return found


def test_memory_grows_like_the_tokens():
    """Some thirty numbers of four or eight bytes per token, lists in room for 16 and the spans of regions among them; a
    matrix of 131,072 rows would be 64 GiB."""
    few, many = (measured(n)["peak"] for n in (32768, 131072))
    assert many < 131072 * 300 + 4 * MIB
    assert many < 4.5 * few + 4 * MIB


def test_a_matrix_would_be_refused():
    import numpy as np

    x = np.broadcast_to(np.float32(0), (1, 131072, 16))
    with pytest.raises(ValueError, match=r"would take 68,719,476,736 bytes, more than limit=1,073,741,824"):
        tf.probe(x, x, tf.block(slice(None), slice(None)))
