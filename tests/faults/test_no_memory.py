"""Where memory is short there is a MemoryError that says how many bytes were wanted, and the next call is right.

Refusal of each single allocation within the native core is the business of test_refusals.py.
"""

import re
import sys

import pytest
from faults.fresh import python

SHORT = """
check()
def call(shapes, dtype):
    arguments = [np.broadcast_to(dtype(0.5), shape) for shape in shapes]
    try:
        print("planned", tf.explain(*arguments).plan.workspace_bytes)
        tf.attention(*arguments)
        print("done")
    except (MemoryError, ValueError) as error:
        print(type(error).__name__ + ":", error)
    check()
"""
LIMIT = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.getrlimit(resource.RLIMIT_AS)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize(
    ("dtype", "q", "k", "v"),
    [
        ("np.float16", (1, 2**20, 1), (1, 2, 1), (1, 2, 2**12)),
        ("np.float16", (1, 1, 2**28), (1, 1, 2**28), (1, 1, 1)),
        ("np.float16", (1, 1, 1), (1, 600, 1), (1, 600, 2**24)),
        ("ml_dtypes.bfloat16", (1, 2**12, 16), (1, 2**24, 16), (1, 2**24, 16)),
    ],
    ids=["output", "workspace for queries", "workspace for values", "workspace for panels"],
)
def test_under_a_limit(dtype, q, k, v, threads):
    if "ml_dtypes" in dtype:
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    imports = "import ml_dtypes\n" if "ml_dtypes" in dtype else ""
    said = python(imports + SHORT + LIMIT + f"call({(q, k, v)}, {dtype})", TILEFOLD_NUM_THREADS=threads)
    planned, refused = said.splitlines()
    asked = re.fullmatch(
        r"MemoryError: [Uu]nable to allocate (\S+) (bytes of workspace|GiB for an array.*)", refused
    )
    assert asked, refused
    if "workspace" in refused:
        assert planned == f"planned {asked[1]}"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("power", [30, 44, 55, 56, 57, 58])
def test_sizes_that_no_machine_has(power, dtype):
    """A workspace is many times its inputs, so its size may overflow where theirs do not; arrays without memory get so
    far. Either it is too large to be counted, or to be had.
    """
    size = 2**power
    shapes = [((1, 1, size), (1, 1, size), (1, 1, 1)), ((1, 1, size), (1, 0, size), (1, 0, 1))]
    said = python(SHORT + LIMIT + "".join(f"call({s}, np.{dtype})\n" for s in shapes))
    for refused in re.findall("^.*Error: .*$", said, re.M):
        assert re.search(r"unable to allocate [1-9]\d* bytes|too large", refused)
    assert len(re.findall("Error: ", said)) == 2, said
