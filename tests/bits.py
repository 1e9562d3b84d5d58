"""Same bits: bitwise equality, the only meaning of these words here. One NaN is like another."""

import numpy as np


def assert_same_bits(got, expected, what: object = "") -> None:
    """For arrays, or for tuples of them."""
    if isinstance(got, tuple):
        for name, x, y in zip(("out", "lse"), got, expected, strict=True):
            assert_same_bits(x, y, f"{name} of {what}")
        return
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    x, y = (np.ascontiguousarray(a).view(f"u{a.itemsize}") for a in (got, expected))
    other = (x != y) & ~(np.isnan(got) & np.isnan(expected))
    if other.any():
        at = tuple(int(n) for n in np.argwhere(other)[0])
        raise AssertionError(
            f"{other.sum()} of {other.size} numbers have other bits: {what}; "
            f"the first is {got[at]} for {expected[at]} at {at}"
        )
