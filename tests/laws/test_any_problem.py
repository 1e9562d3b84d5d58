"""Any problem, in any memory order, forward and backward, on each backend, against the oracle in a wider type.

What Hypothesis draws is a case string and a layout for each array, so a failure is a line that `tilefold case` replays,
and numbers that say how its arrays lay. Whatever is allocated is full of NaN beforehand, `out` is given like that, and
all that lies between the elements of an array is NaN as well.
"""

import math

import numpy as np
import pytest
from conftest import poison
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import complaint, judged

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.bench.case import Case
from tilefold.dtypes import ROWS

pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")

NAMES = [b.name for b in BACKENDS if b.why_not(tf.explain(*np.zeros((3, 1, 1, 1))).problem) is None]

few = st.integers(0, 9)
lengths = st.one_of(few, st.integers(0, 70))
dims = st.one_of(few, st.sampled_from([16, 17, 31, 33, 64, 80]))
limits = st.one_of(st.just("-"), few, st.integers(0, 80))
layouts = st.one_of(st.just(0), st.integers(0, 2**16))

MASKS = {
    "causal": st.just("causal"),
    "top-left": st.just("causal=top-left"),
    "window": st.builds("window={},{}".format, limits, limits),
    "band": st.builds("band={},{},{}".format, st.integers(-5, 60), st.integers(-5, 60), st.integers(-9, 60)),
    "prefix": st.builds("prefix={}".format, lengths),
    "chunked": st.builds("chunked={}".format, st.integers(1, 20)),
    "anchors": st.builds("anchors={},{}".format, few, lengths),
    "predicate": st.builds("predicate={}".format, st.integers(2, 5)),
    "dense": st.builds("dense={}".format, st.sampled_from([0, 0.02, 0.5])),
}
SCORES = {
    "scale": st.builds("scale={}".format, st.sampled_from([0, 0.3, -1])),
    "softcap": st.builds("softcap={}".format, st.sampled_from([0.5, 3, 50])),
    "sinks": st.just("sinks"),
    "alibi": st.just("alibi"),
    "logits": st.builds("logits={}".format, st.sampled_from(["peaked", "rising", "falling"])),
    "bias": st.builds(
        "bias={}{}{}{} hide={}".format, *map(st.sampled_from, ("b1", "h1", "q1", "k1", [0, 0.3, 0.95]))
    ),
}


def joined(numbers):
    return ",".join(map(str, numbers))


def parts_of(whole):
    """Sizes of consecutive documents that make the whole."""
    cuts = st.lists(st.integers(0, whole), max_size=4).map(sorted)
    return cuts.map(lambda at: [b - a for a, b in zip([0, *at], [*at, whole], strict=True)])


@st.composite
def shapes(draw):
    """The words for heads, dims, lengths and how sequences are stored."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 7]))
    words = [f"h{kv_heads * group}/{kv_heads}", f"d{draw(dims)}", f"v{draw(dims)}"]
    storage = draw(st.sampled_from(["whole", "padded", "packed"]))
    if storage == "packed":
        q_sizes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        k_sizes = draw(st.lists(st.integers(0, 40), min_size=len(q_sizes), max_size=len(q_sizes)))
        return [*words, f"packed={joined(q_sizes)}/{joined(k_sizes)}"]
    lead = draw(st.sampled_from([(), (), (1,), (2,), (3,), (2, 2), (0,)]))
    items, q_len, kv_len = math.prod(lead), draw(lengths), draw(st.one_of(lengths, st.just(1030)))
    words += ["b" + "x".join(map(str, lead))] if lead else []
    for name, most in (("q_lengths", q_len), ("kv_lengths", kv_len)):
        if storage == "padded" and lead and items and draw(st.booleans()):
            ends = draw(st.lists(st.integers(0, most), min_size=items, max_size=items))
            words.append(f"{name}={joined(ends)}")
    if storage == "whole" and q_len <= kv_len and draw(st.integers(0, 4)) == 0:
        words.append(f"documents={joined(draw(parts_of(kv_len)))}")
    return [*words, f"q{q_len}", f"k{kv_len}"]


@st.composite
def cases(draw):
    """A case string."""
    words = draw(shapes())
    for name in draw(st.lists(st.sampled_from(list(MASKS)), max_size=2, unique=True)):
        if name != "top-left" or "causal" not in words:  # one word says both
            words.append(draw(MASKS[name]))
    for name in draw(st.lists(st.sampled_from(list(SCORES)), max_size=3, unique=True)):
        words.append(draw(SCORES[name]))
    if draw(st.booleans()):
        words.append("nan")
    return " ".join([draw(st.sampled_from(list(ROWS))), *words, f"seed={draw(st.integers(0, 99))}"])


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
