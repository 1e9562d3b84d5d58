"""Any problem, in any memory order, forward and backward, on each backend, against the oracle in a wider type.

What Hypothesis draws is a case string and a layout for each array, so a failure is a line that `tilefold case` replays,
and numbers that say how its arrays lay. Whatever is allocated is full of NaN beforehand, `out` is given like that, and
all that lies between the elements of an array is NaN as well.
"""

import numpy as np
import pytest
from conftest import poison
from drawn import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import complaint, judged

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.bench.case import Case

pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")

NAMES = [b.name for b in BACKENDS if b.why_not(tf.explain(*np.zeros((3, 1, 1, 1))).problem) is None]

layouts = st.one_of(st.just(0), st.integers(0, 2**16))


def laid(x, layout):
    """The same numbers in another order of the axes, with gaps between them, some axes backwards; 0 is as it was."""
    if not layout:
        return x
    rng = np.random.default_rng(layout)
    order, steps = rng.permutation(x.ndim), rng.integers(1, 3, x.ndim)
    room = np.full([x.shape[axis] * steps[axis] + rng.integers(0, 3) for axis in order], np.nan, x.dtype)
    room = room.transpose(np.argsort(order))
    room = room[tuple(slice(0, n * step, step) for n, step in zip(x.shape, steps, strict=True))]
    room = room[tuple(slice(None, None, rng.choice([1, -1])) for _ in x.shape)]
    room[...] = x
    return room


@settings(max_examples=200)
@given(cases(), st.tuples(*[layouts] * 7), st.booleans())
def test_any_problem(text, order, backward):
    case = Case.parse(text)
    a = case.build()
    arrays = (a.q, a.k, a.v, a.dout, a.dlse, np.full_like(a.dout, np.nan))
    q, k, v, dout, dlse, out = (laid(x, layout) for x, layout in zip(arrays, order, strict=False))
    options = a.options | {name: laid(a.options[name], order[6]) for name in a.options if name == "bias"}
    for backend in NAMES:
        with pytest.MonkeyPatch.context() as patch:
            poison(patch)
            got, lse = tf.attention(q, k, v, **options, return_lse=True, out=out, backend=backend)
            grads = backward and tf.attention_grad(q, k, v, out, lse, dout, dlse, **options, backend=backend)
        assert got is out
        errors = judged(text, out, lse)
        if grads:
            errors += case.judge_gradients(a, grads, (out, lse))
        assert all(e.ok for e in errors), f"{backend}: {complaint(text, errors)}"
        out[...] = np.nan
