"""Whether the sanitizers of `make sanitize-python` see anything: what the core cannot know is wrong ends its process.

Nothing else does, or the other tests would not have passed.
"""

import os

import pytest
from faults.fresh import run

pytestmark = pytest.mark.skipif(
    "libasan" not in os.environ.get("LD_PRELOAD", ""), reason="no sanitizer watches here"
)

FOLD = """
from tilefold import _core
def fold(*sizes):
    return _core.Fold(*sizes, "float32", "float32", "float32", 1.0, None, 0.0, (None, None, 0), 0, 0, 0)
"""


def test_a_shape_larger_than_its_memory():
    """Nobody but the allocator knows how far an array's memory goes."""
    done = run("""
k = np.lib.stride_tricks.as_strided(np.ones(2 * 70 * 4), (2, 71, 4), (70 * 4 * 8, 4 * 8, 8))
tf.attention(q, k, k)
""")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "READ of size" in done.stderr


def test_an_address_that_is_no_multiple_of_the_item_size():
    """The door in Python copies such an array; here nothing stands before the core."""
    done = run(
        FOLD
        + """
raw = np.zeros(4 * 3 * 5 + 1, np.uint8)
x = raw[1:].view(np.float32).reshape(1, 5, 3)
out = np.zeros((1, 5, 3), np.float32)
fold(1, 1, 1, 5, 5, 3, 3).run(x, x, x, out, *[None] * 10, 0, 5, -1, -1, None, None, None, 0, 0)
"""
    )
    assert done.returncode != 0
    assert "misaligned address" in done.stderr


def test_sizes_whose_product_overflows():
    """Nor do the checks of a Problem."""
    done = run(FOLD + "fold(2**40, 1, 1, 2**40, 1, 1, 1).plan(1)")
    assert done.returncode != 0
    assert "signed integer overflow" in done.stderr
