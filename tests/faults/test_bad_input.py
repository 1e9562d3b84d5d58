"""What is wrong is refused: with the right kind of exception, a sentence that names the argument, what it was and what
was expected, and nothing written. Below the table: the other doors, sizes, and what changes while a call runs.
"""

from dataclasses import replace

import numpy as np
import pytest

import tilefold as tf

INF, NAN = np.inf, np.nan


def arrays():
    """q, k and v of a small call that is all right: 2 batch items, 4 query heads on 2 key heads."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


Q, K, V = arrays()
OUT = (2, 4, 5, 3)
ENDS = np.array([0, 3, 5])
K_ENDS = np.array([0, 3, 7])
PACKED = {"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": ENDS, "cu_seqlens_k": K_ENDS}


def like(x, dtype):
    return np.zeros(x.shape, dtype)


def read_only(x):
    x.flags.writeable = False
    return x


class Tap:
    def __init__(self, name="tap"):
        self.name = name

    def start(self, problem, lead):
        raise AssertionError("nothing runs before everything is checked")


RECORDS = np.zeros(Q.shape, [("a", np.float32)])
OBJECTS = np.full(Q.shape, None)
OTHER_PLAN = tf.explain(Q, K, V, causal=True).plan

# What is wrong: (arguments of attention, exception, what its message says).
BAD = {
    # arrays
    "q: list": ({"q": [[1.0, 2.0]]}, TypeError, "q must be an array .*got list; lists become arrays"),
    "k: None": ({"k": None}, TypeError, "k must be an array .*got NoneType"),
    "v: None": ({"v": None}, TypeError, "v must be an array of values"),
    "q: number": ({"q": 3.0}, TypeError, "q must be an array .*got float"),
    "q: string": ({"q": "abc"}, TypeError, "q must be an array .*got str"),
    "v: objects": ({"v": OBJECTS}, TypeError, "v must hold numbers, got dtype object"),
    "q: complex": ({"q": like(Q, complex)}, TypeError, "q must be float16, .* or float64, got complex128"),
    "k: integers": ({"k": like(K, int)}, TypeError, "k must be float16, .* or float64, got int64"),
    "v: booleans": ({"v": like(V, bool)}, TypeError, "v must be float16, .* or float64, got bool"),
    "q: float128": (
        {"q": like(Q, np.longdouble)},
        TypeError,
        "q must be float16, .* or float64, got (float128|longdouble)",
    ),
    "q: other byte order": (
        {"q": like(Q, ">f4")},
        TypeError,
        "q must be .*, got float32 in another byte order",
    ),
    "k: records": ({"k": RECORDS}, TypeError, r"k must hold numbers, got dtype \[\('a'"),
    "q: masked": (
        {"q": np.ma.masked_array(Q)},
        TypeError,
        "q must not be a masked array: its mask would be ignored",
    ),
    "k: another type": ({"k": K.astype(np.float64)}, TypeError, "one dtype, got q float32 and k float64"),
    "v: another type": ({"v": V.astype(np.float16)}, TypeError, "one dtype, got q float32 and v float16"),
    # shapes
    "q: no dimension": (
        {"q": Q[0, 0, 0, 0, ...]},
        ValueError,
        r"q must have shape .*or \(length, dim\), got \(\)",
    ),
    "q: one dimension": (
        {"q": Q[0, 0, 0]},
        ValueError,
        r"q must have shape .*or \(length, dim\), got \(4,\)",
    ),
    "k: one dimension": ({"q": Q[0, 0], "k": K[0, 0, 0]}, ValueError, r"k must have shape .*got \(4,\)"),
    "k: fewer dimensions": ({"k": K[0]}, ValueError, "same number of dimensions, got q .* and k .2, 7, 4."),
    "v: more dimensions": (
        {"v": V[None]},
        ValueError,
        "same number of dimensions, got q .* and v .1, 2, 2, 7, 3.",
    ),
    "k: another batch": (
        {"k": K[:1], "v": V[:1]},
        ValueError,
        "same leading dimensions, got q .* and k .*broadcast_to",
    ),
    "v: another batch": ({"v": V[:1]}, ValueError, "same leading dimensions, got q .* and v"),
    "k: another dim": (
        {"k": K[..., :3]},
        ValueError,
        r"q and k must have the same last dimension, got .*7, 3\)",
    ),
    "v: another length": (
        {"v": V[..., :6, :]},
        ValueError,
        r"k and v must have the same heads and length, got .*6, 3\)",
    ),
    "v: other heads": (
        {"v": V[:, :1]},
        ValueError,
        r"k and v must have the same heads and length, got .*1, 7, 3\)",
    ),
    "heads no multiple": ({"q": Q[:, :3]}, ValueError, "q has 3 heads and k has 2: .*must be a multiple"),
    "fewer heads than k": ({"q": Q[:, :1]}, ValueError, "q has 1 heads and k has 2: .*must be a multiple"),
    "no key heads": (
        {"k": K[:, :0], "v": V[:, :0]},
        ValueError,
        "q has 4 heads and k has 0: .*must be a multiple",
    ),
    # numbers
    "scale: nan": ({"scale": NAN}, ValueError, "scale must be finite, got nan"),
    "scale: inf": ({"scale": INF}, ValueError, "scale must be finite, got inf"),
    "scale: bool": ({"scale": True}, TypeError, "scale must be a number, got bool"),
    "scale: string": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "scale: array": ({"scale": np.ones(4)}, TypeError, "scale must be a number, got ndarray"),
    "scale: complex": ({"scale": 1j}, TypeError, "scale must be a number, got complex"),
    "scale: huge integer": ({"scale": 10**400}, ValueError, "scale must be finite, got"),
    "scale: beyond the sums": (
        {"scale": -1e39},
        ValueError,
        "scale must be finite in float32, where scores are summed; got 1e\\+39",
    ),
    "softcap: zero": ({"softcap": 0}, ValueError, "softcap must be None or a finite number > 0, got 0"),
    "softcap: negative": (
        {"softcap": -1.0},
        ValueError,
        "softcap must be None or a finite number > 0, got -1",
    ),
    "softcap: nan": ({"softcap": NAN}, ValueError, "softcap must be finite, got nan"),
    "softcap: inf": ({"softcap": INF}, ValueError, "softcap must be finite, got inf"),
    "softcap: beyond the sums": (
        {"softcap": 1e39},
        ValueError,
        "softcap must be finite in float32, where scores are summed; got 1e\\+39",
    ),
    "softcap: bool": ({"softcap": False}, TypeError, "softcap must be a number, got bool"),
    # flags
    "causal: integer": ({"causal": 1}, TypeError, "causal must be True or False, got int"),
    "causal: None": ({"causal": None}, TypeError, "causal must be True or False, got NoneType"),
    "causal: array": (
        {"causal": np.tri(5, 7, dtype=bool)},
        TypeError,
        "causal must be True or False, got ndarray",
    ),
    "causal: string": ({"causal": "top-left"}, TypeError, "causal must be True or False, got str"),
    "invariant: string": ({"invariant": "yes"}, TypeError, "invariant must be True or False, got str"),
    "return_lse: string": ({"return_lse": "no"}, TypeError, "return_lse must be True or False, got str"),
    # windows
    "window: negative": ({"window": (-1, 0)}, ValueError, "window: left must be >= 0, got -1"),
    "window: negative right": ({"window": (None, -2)}, ValueError, "window: right must be >= 0, got -2"),
    "window: one number": ({"window": 5}, TypeError, r"window must be \(left, right\), .*got 5"),
    "window: three": ({"window": (1, 2, 3)}, TypeError, r"window must be \(left, right\), .*got \(1, 2, 3\)"),
    "window: empty": ({"window": ()}, TypeError, r"window must be \(left, right\), .*got \(\)"),
    "window: floats": ({"window": (1.0, 0)}, TypeError, "window: left must be an integer, got 1.0"),
    "window: bool": ({"window": (1, True)}, TypeError, "window: right must be an integer, got True"),
    "window: array": ({"window": np.array([1, 2])}, TypeError, r"window must be \(left, right\)"),
    # masks
    "mask: floats": ({"mask": np.zeros((5, 7))}, TypeError, "mask must be boolean .*got float64; .*bias="),
    "mask: integers": ({"mask": np.ones((5, 7), int)}, TypeError, "mask must be boolean .*got int64"),
    "mask: list": ({"mask": [[True] * 7] * 5}, TypeError, "mask must be an array .*got list"),
    "mask: function": ({"mask": lambda i, j: j <= i}, TypeError, "mask must be .*got function"),
    "mask: string": ({"mask": "causal"}, TypeError, "mask must be .*got str"),
    "mask: masked": (
        {"mask": np.ma.masked_array(np.ones((5, 7), bool))},
        TypeError,
        "mask must not be a masked array",
    ),
    "mask: shape": (
        {"mask": np.ones((5, 6), bool)},
        ValueError,
        r"mask of shape \(5, 6\) does not broadcast to .*5, 7\)",
    ),
    "mask: key heads": (
        {"mask": np.ones((2, 5, 7), bool)},
        ValueError,
        "mask of shape .2, 5, 7. does not broadcast",
    ),
    "mask: too many dimensions": (
        {"mask": np.ones((1, 1, 1, 5, 7), bool)},
        ValueError,
        r"mask of shape \(1, 1, 1, 5, 7\) does not broadcast",
    ),
    "mask: inside an expression": (
        {"mask": tf.causal() & ~tf.dense(np.ones((5, 6), bool))},
        ValueError,
        "mask of shape .5, 6. does not broadcast",
    ),
    "mask: bound to other lengths": (
        {"mask": tf.causal().bind(5, 8)},
        ValueError,
        "mask is bound to 5 queries and 8 keys, the operands have 5 and 7",
    ),
    "mask: bound slice": (
        {"mask": tf.causal().bind(9, 9)[:5, :6]},
        ValueError,
        "mask is bound to 5 queries and 6 keys",
    ),
    "lengths: too long": ({"mask": tf.lengths(8)}, ValueError, "kv_lengths must be at most 7, .*got 8"),
    "lengths: too long q": (
        {"mask": tf.lengths(q_lengths=[6, 1])},
        ValueError,
        "q_lengths must be at most 5, .*got 6",
    ),
    "lengths: wrong batch": (
        {"mask": tf.lengths([1, 2, 3])},
        ValueError,
        r"kv_lengths must have the leading shape \(2,\)",
    ),
    "documents: wrong length": (
        {"mask": tf.documents(np.zeros(6, int))},
        ValueError,
        r"documents: ids must have shape \(7,\)",
    ),
    "spans: rows": (
        {"mask": tf.spans([0] * 4, [2] * 4)},
        ValueError,
        "spans: lo and hi must have 5 rows.*got 4",
    ),
    "spans: beyond": ({"mask": tf.spans([0] * 5, [8] * 5)}, ValueError, "spans: hi must be at most 7.*got 8"),
    "documents: a number": (
        {"mask": tf.documents(3)},
        ValueError,
        r"documents: ids must have shape \(7,\) .*got \(\)",
    ),
    "documents: wrong q_ids": (
        {"mask": tf.documents(np.zeros(7, int), q_ids=np.zeros(4, int))},
        ValueError,
        r"documents: q_ids must have shape \(5,\) or \(2, 5\), got \(4,\)",
    ),
    "documents: more queries than keys": (
        {"mask": tf.documents(np.zeros(3, int)), "k": K[:, :, :3], "v": V[:, :, :3]},
        ValueError,
        "documents: 5 queries stand before 3 keys; give q_ids",
    ),
    "predicate: not booleans": (
        {"mask": tf.from_predicate(lambda i, j: i - j)},
        TypeError,
        "from_predicate: fn must return booleans, got int64",
    ),
    "predicate: wrong shape": (
        {"mask": tf.from_predicate(lambda i, j: np.ones((3, 3), bool))},
        ValueError,
        r"from_predicate: fn returned shape \(3, 3\), expected \(5, 7\)",
    ),
    # bias, alibi, sinks
    "bias: +inf": (
        {"bias": np.array([0, INF, 0, 0, 0, 0, 0])},
        ValueError,
        r"bias must not be \+inf; -inf hides",
    ),
    "bias: beyond the sums": (
        {"bias": np.array([0, 1e300, 0, 0, 0, 0, 0])},
        ValueError,
        "bias must be finite in float32, where scores are summed; got 1e\\+300",
    ),
    "bias: shape": (
        {"bias": np.zeros((5, 6))},
        ValueError,
        r"bias of shape \(5, 6\) does not broadcast to .*4, 5, 7\)",
    ),
    "bias: integers": (
        {"bias": np.zeros(7, int)},
        TypeError,
        "bias must be float16, .* or float64, got int64",
    ),
    "bias: booleans": ({"bias": np.zeros(7, bool)}, TypeError, "bias must be float16, .*got bool"),
    "bias: number": ({"bias": 1.0}, TypeError, "bias must be an array .*got float"),
    "bias: masked": ({"bias": np.ma.masked_array(np.zeros(7))}, TypeError, "bias must not be a masked array"),
    "alibi: shape": (
        {"alibi": np.ones(3)},
        ValueError,
        r"alibi must have shape \(4,\) or \(2, 4\), got \(3,\)",
    ),
    "alibi: True": ({"alibi": True}, TypeError, "alibi must be an array .*got bool"),
    "alibi: nan": ({"alibi": [0, 1, NAN, 1]}, ValueError, r"alibi must not hold NaN"),
    "alibi: inf": ({"alibi": [0, 1, INF, 1]}, ValueError, r"alibi must not hold .*inf"),
    "alibi: -inf": ({"alibi": [0, 1, -INF, 1]}, ValueError, r"alibi must not hold .*inf"),
    "alibi: beyond the sums": (
        {"alibi": [0, 1, -1e39, 1]},
        ValueError,
        "alibi must be finite in float32, where scores are summed; got 1e\\+39",
    ),
    "alibi: strings": ({"alibi": ["a"] * 4}, TypeError, "alibi must be"),
    "alibi: ragged list": ({"alibi": [[1.0], [2.0, 3.0]]}, TypeError, "alibi must be"),
    "sinks: shape": (
        {"sinks": np.ones((2, 4))},
        ValueError,
        r"sinks must have shape \(4,\), one logit per query head; got",
    ),
    "sinks: key heads": (
        {"sinks": np.ones(2)},
        ValueError,
        r"sinks must have shape \(4,\), one logit per query head; got",
    ),
    "sinks: number": ({"sinks": 0.0}, TypeError, "sinks must be an array .*got float"),
    "sinks: nan": ({"sinks": [0, 1, NAN, 1]}, ValueError, r"sinks must not hold NaN or \+inf"),
    "sinks: +inf": ({"sinks": [0, 1, INF, 1]}, ValueError, r"sinks must not hold NaN or \+inf"),
    "sinks: beyond the sums": (
        {"sinks": np.array([0, 1, 1e39, 1])},
        ValueError,
        "sinks must be finite in float32, where scores are summed; got 1e\\+39",
    ),
    # lengths
    "kv_lengths: too long": ({"kv_lengths": [7, 8]}, TypeError, "kv_lengths must be an array .*got list"),
    "kv_lengths: beyond": (
        {"kv_lengths": np.array([7, 8])},
        ValueError,
        "kv_lengths must lie within 0 and 7, got 7 to 8",
    ),
    "q_lengths: negative": (
        {"q_lengths": np.array([-1, 2])},
        ValueError,
        "q_lengths must lie within 0 and 5, got -1 to 2",
    ),
    "q_lengths: beyond, one": ({"q_lengths": 6}, ValueError, "q_lengths must lie within 0 and 5, got 6"),
    "kv_lengths: beyond 2^64": ({"kv_lengths": 2**70}, ValueError, "kv_lengths must lie within 0 and 7"),
    "kv_lengths: beyond 2^63": (
        {"kv_lengths": np.array([2**64 - 1, 1], np.uint64)},
        ValueError,
        "kv_lengths must lie within 0 and 7",
    ),
    "q_lengths: floats": (
        {"q_lengths": np.array([1.0, 2.0])},
        TypeError,
        "q_lengths must be integers, got float64",
    ),
    "q_lengths: bool": ({"q_lengths": True}, TypeError, "q_lengths must be .*integer.*got bool"),
    "q_lengths: booleans": (
        {"q_lengths": np.ones(2, bool)},
        TypeError,
        "q_lengths must be integers, got bool",
    ),
    "kv_lengths: shape": (
        {"kv_lengths": np.array([1, 2, 3])},
        ValueError,
        r"kv_lengths must have the leading shape \(2,\)",
    ),
    "kv_lengths: per head": (
        {"kv_lengths": np.ones((2, 4), int)},
        ValueError,
        r"kv_lengths must have the leading shape \(2,\)",
    ),
    # packed sequences
    "cu_seqlens: only q": ({"cu_seqlens_q": ENDS}, TypeError, "cu_seqlens_q and cu_seqlens_k come together"),
    "cu_seqlens: only k": ({"cu_seqlens_k": ENDS}, TypeError, "cu_seqlens_q and cu_seqlens_k come together"),
    "cu_seqlens: batch": (
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": K_ENDS},
        ValueError,
        r"packed sequences have shape \(heads, total, dim\) without a batch, got q \(2, 4, 5, 4\)",
    ),
    "cu_seqlens: lengths": (
        PACKED | {"kv_lengths": 3},
        TypeError,
        "cu_seqlens and lengths exclude each other",
    ),
    "cu_seqlens: other lengths": (
        PACKED | {"q_lengths": 3},
        TypeError,
        "cu_seqlens and lengths exclude each other",
    ),
    "cu_seqlens: list": (
        PACKED | {"cu_seqlens_q": [0, 3, 5]},
        TypeError,
        "cu_seqlens_q must be an array .*got list",
    ),
    "cu_seqlens: decreasing": (
        PACKED | {"cu_seqlens_k": np.array([0, 8, 7])},
        ValueError,
        "cu_seqlens_k must not decrease, got 7 after 8 at index 2",
    ),
    "cu_seqlens: start": (
        PACKED | {"cu_seqlens_q": np.array([1, 3, 5])},
        ValueError,
        "cu_seqlens_q must start at 0, got 1",
    ),
    "cu_seqlens: negative": (
        PACKED | {"cu_seqlens_q": np.array([0, -3, 5])},
        ValueError,
        "cu_seqlens_q must not decrease, got -3 after 0 at index 1",
    ),
    "cu_seqlens: too far": (
        PACKED | {"cu_seqlens_q": np.array([0, 3, 6])},
        ValueError,
        "cu_seqlens_q must end at 5, .*got 6",
    ),
    "cu_seqlens: too short": (
        PACKED | {"cu_seqlens_k": np.array([0, 3, 6])},
        ValueError,
        "cu_seqlens_k must end at 7, .*got 6",
    ),
    "cu_seqlens: floats": (
        PACKED | {"cu_seqlens_q": ENDS * 1.0},
        TypeError,
        "cu_seqlens_q must be a 1-D int32 or int64 array",
    ),
    "cu_seqlens: int16": (
        PACKED | {"cu_seqlens_q": ENDS.astype(np.int16)},
        TypeError,
        "cu_seqlens_q must be a 1-D int32 or int64 array .*got int16",
    ),
    "cu_seqlens: two dimensions": (
        PACKED | {"cu_seqlens_k": K_ENDS[None]},
        TypeError,
        r"cu_seqlens_k .*1-D.*\(1, 3\)",
    ),
    "cu_seqlens: empty": (PACKED | {"cu_seqlens_k": K_ENDS[:0]}, TypeError, r"cu_seqlens_k .*1-D.*\(0,\)"),
    "cu_seqlens: wraps around": (
        PACKED | {"cu_seqlens_k": np.array([0, 2**63 - 1, -(2**63), 7])},
        ValueError,
        "cu_seqlens_k must not decrease",
    ),
    "cu_seqlens: other counts": (
        PACKED | {"cu_seqlens_k": np.array([0, 2, 5, 7])},
        ValueError,
        "must count the same sequences, got 2 and 3",
    ),
    # out
    "out: list": ({"out": [0.0]}, TypeError, "out must be an array .*got list"),
    "out: shape": (
        {"out": np.zeros((2, 4, 5, 4), np.float32)},
        ValueError,
        r"out must have shape \(2, 4, 5, 3\), got",
    ),
    "out: type": ({"out": np.zeros(OUT)}, TypeError, "out must be float32 as q is, got float64"),
    "out: read-only": (
        {"out": read_only(np.zeros(OUT, np.float32))},
        ValueError,
        "out must be writeable, got a read-only",
    ),
    "out: stride of zero": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(99, np.float32), OUT, (0, 60, 12, 4))},
        ValueError,
        r"out must not overlap itself, got strides \(0, 60, 12, 4\)",
    ),
    "out: overlaps itself": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(999, np.float32), OUT, (240, 60, 8, 4))},
        ValueError,
        "out must not overlap itself",
    ),
    "out: overlaps itself backwards": (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(999, np.float32)[500:], OUT, (240, -60, 8, -4))},
        ValueError,
        "out must not overlap itself",
    ),
    # backend, plan, probes, what is not known
    "backend: unknown": ({"backend": "cuda"}, ValueError, "backend must be 'auto', .*'numpy'; got 'cuda'"),
    "backend: not a name": ({"backend": 3}, TypeError, "backend must be a name, got int"),
    "backend: None": ({"backend": None}, TypeError, "backend must be a name, got NoneType"),
    "plan: name": ({"plan": "numpy"}, TypeError, "plan must be a tilefold Plan, got str"),
    "plan: another problem": (
        {"plan": OTHER_PLAN},
        ValueError,
        "plan was made for another problem: it is for '.*band.*', the call is '",
    ),
    "plan: another backend": (
        {
            "plan": OTHER_PLAN,
            "causal": True,
            "backend": "native" if OTHER_PLAN.backend == "numpy" else "numpy",
        },
        ValueError,
        "backend='.*' contradicts the plan, which is for '",
    ),
    "plan: backend gone": (
        {"plan": replace(OTHER_PLAN, backend="abacus"), "causal": True},
        ValueError,
        "plan is for the backend 'abacus', which does not exist",
    ),
    "plan: block of zero": (
        {"plan": replace(OTHER_PLAN, block_q=0), "causal": True},
        ValueError,
        "plan: block_q must be >= 1, got 0",
    ),
    "plan: a block that is no number": (
        {"plan": replace(OTHER_PLAN, block_k=2.5), "causal": True},
        TypeError,
        r"plan: block_k must be an integer, got 2\.5",
    ),
    "plan: no workers": (
        {"plan": replace(OTHER_PLAN, workers=0), "causal": True},
        ValueError,
        "plan: workers must be >= 1, got 0",
    ),
    "plan: another backend's": (
        {"plan": replace(OTHER_PLAN, backend="native"), "causal": True, "probes": [Tap()]},
        tf.BackendRefused,
        "plan is for the backend 'native', which refuses: the native core (shows its tiles to no|is not installed)",
    ),
    "plan: cannot do what is asked": (
        {"plan": tf.explain(Q, K, V, backend="numpy").plan, "invariant": True},
        tf.BackendRefused,
        "plan is for the backend 'numpy', which refuses: invariant=True promises",
    ),
    "probes: a name": (
        {"probes": ["entropy"]},
        TypeError,
        r"probes must be statistics such as tilefold\.entropy\(\), or objects with .*; got str",
    ),
    "probes: not called": (
        {"probes": [tf.entropy]},
        TypeError,
        r"probes must be statistics .*got function; call it: tilefold\.entropy\(\)",
    ),
    "probes: not a list": (
        {"probes": Tap()},
        TypeError,
        "probes must be a list or tuple of statistics, got Tap",
    ),
    "probes: a string": (
        {"probes": "entropy"},
        TypeError,
        "probes must be a list or tuple of statistics, got str",
    ),
    "probes: same name": (
        {"probes": [Tap(), Tap()]},
        ValueError,
        r"probes must have different names, got \['tap', 'tap'\]",
    ),
    "dropout": (
        {"dropout": 0.1},
        TypeError,
        "dropout: dropout is not offered: exact attention has no random part",
    ),
    "dropout_p": ({"dropout_p": 0.0}, TypeError, "dropout_p: dropout is not offered"),
    "unknown": ({"is_causal": True}, TypeError, "unexpected keyword argument 'is_causal'"),
}


def owner(x):
    while isinstance(x, np.ndarray) and isinstance(x.base, np.ndarray):
        x = x.base
    return x


@pytest.mark.parametrize("what", BAD)
def test_is_refused_and_nothing_is_written(what):
    wrong, error, says = BAD[what]
    arguments = {"q": Q, "k": K, "v": V} | wrong
    shape = (4, 5, 3) if "cu_seqlens_k" in wrong and "q" in wrong else OUT
    out = arguments.setdefault("out", np.full(shape, NAN, np.float32))
    held = [owner(x) for x in arguments.values() if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in held]
    with pytest.raises(error, match=says) as raised:
        tf.attention(**arguments)
    assert raised.type is error
    assert [x.tobytes() for x in held] == before
    assert out is arguments["out"]


LENGTHS = {"kv_lengths": np.array([7, 3]), "q_lengths": np.array([5, 1])}
KNOWN = [
    {},
    {"causal": True},
    {"scale": 1.0},
    {"softcap": 1.0},
    {"return_lse": True},
    {"window": (1, 0)},
    {"window": (None, 2)},
    {"alibi": np.ones(4)},
    {"sinks": np.ones(4)},
    LENGTHS,
    *({name: ends} for name, ends in LENGTHS.items()),
    PACKED,
]


@pytest.mark.parametrize("what", BAD)
def test_a_known_call_is_refused_as_the_first_would_be(what):
    """A call is known by its shapes and a few numbers; the one that is wrong may have those of one that was right."""
    for right in KNOWN:
        for _ in range(2):
            tf.attention(**({"q": Q, "k": K, "v": V} | right))
    wrong, error, says = BAD[what]
    for _ in range(2):
        with pytest.raises(error, match=says):
            tf.attention(**({"q": Q, "k": K, "v": V} | wrong))


@pytest.mark.parametrize(
    "what", [what for what in BAD if what.startswith(("cu_seqlens", "kv_len", "q_len", "alibi", "sinks"))]
)
def test_a_known_call_on_tensors_is_refused_as_the_first_would_be(what):
    torch = pytest.importorskip("torch")

    def call(arguments):
        given = {"q": Q, "k": K, "v": V} | arguments
        return tf.attention(
            **{name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
        )

    for right in KNOWN:
        call(right), call(right)
    wrong, error, says = BAD[what]
    for _ in range(2):
        with pytest.raises(error, match=says):
            call(wrong)


def test_the_call_without_a_fault_is_taken():
    """Else every refusal above could be for another reason."""
    assert tf.attention(Q, K, V, out=np.full(OUT, NAN, np.float32)).shape == OUT
    assert tf.attention(**PACKED, out=np.full((4, 5, 3), NAN, np.float32)).shape == (4, 5, 3)


@pytest.mark.parametrize("size", [2**31, 2**63 - 1, 2**70])
def test_numbers_of_a_plan_may_be_larger_than_any_array(size):
    expected = tf.attention(Q, K, V, causal=True)
    huge = {name: size for name in ("block_q", "block_k", "splits", "workers")}
    got = tf.attention(Q, K, V, causal=True, plan=replace(OTHER_PLAN, **huge))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    config = tf.FlashConfig(size, size, 0.5, causal=True)
    np.testing.assert_allclose(tf.flash_attention(Q, K, V, config).output, expected, rtol=1e-5)


def test_float64_sums_hold_larger_numbers():
    q, k, v = (x.astype(np.float64) for x in (Q, K, V))
    out = tf.attention(q, k, v, sinks=np.array([0, 1, 1e39, 1]), alibi=[0, 1, 0, 1e39], softcap=1e39)
    assert np.isfinite(out).all()
    assert (out[:, 2] == 0).all()


def test_nan_in_bias_is_a_number_like_others():
    bias = np.zeros((5, 7), np.float32)
    bias[2, 3] = NAN
    out = tf.attention(Q, K, V, bias=bias)
    assert np.isnan(out[:, :, 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=2)).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks", "alibi", "mask"])
def test_out_shares_no_memory_with_an_input(name):
    raw = np.zeros(1000, np.float32)
    out = raw[:120].reshape(OUT)
    given = {
        "q": raw[:160].reshape(2, 4, 5, 4),
        "k": raw[100:212].reshape(2, 2, 7, 4),
        "v": raw[119:203].reshape(2, 2, 7, 3),
        "bias": raw[:7],
        "sinks": raw[60:64],
        "alibi": raw[100:108].reshape(2, 4),
        "mask": tf.causal() | ~tf.dense(raw[100:].view(bool)[:35].reshape(5, 7)).bind(5, 7),
    }[name]
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        tf.attention(**({"q": Q, "k": K, "v": V, "out": out} | {name: given}))
    assert (raw == 0).all()


def test_out_may_lie_between_its_inputs():
    """Slots of one buffer interleave without sharing an element."""
    whole = np.zeros((2, 5, 3, 4, 4), np.float32)
    q, k, out = (whole[:, :, n].swapaxes(1, 2) for n in range(3))
    q[...], k[...] = Q, Q
    assert np.array_equal(tf.attention(q, k, k, out=out), tf.attention(Q, Q, Q))


def test_out_may_have_odd_but_disjoint_strides():
    raw = np.full(500, NAN, np.float32)
    out = raw[: 2 * 4 * 5 * 3 * 2].reshape(5, 3, 2, 4, 2)[..., 1].transpose(2, 3, 0, 1)[::-1, :, ::-1]
    assert np.array_equal(tf.attention(Q, K, V, out=out), tf.attention(Q, K, V))


# ---- the other doors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: tf.band("1", 0), TypeError, "band: left must be an integer, got '1'"),
        (lambda: tf.band(1, 2.0), TypeError, "band: right must be an integer, got 2.0"),
        (lambda: tf.band(1, 2, None), TypeError, "band: offset must be an integer, got None"),
        (lambda: tf.band(1, 2, "top-left"), TypeError, "band: offset must be an integer, got 'top-left'"),
        (
            lambda: tf.causal(align="right"),
            ValueError,
            "causal: align must be 'bottom-right' or 'top-left', got 'right'",
        ),
        (lambda: tf.window(-1), ValueError, "window: left must be >= 0, got -1"),
        (lambda: tf.prefix(-1), ValueError, "prefix: length must be >= 0, got -1"),
        (lambda: tf.prefix(1.5), TypeError, "prefix: length must be an integer, got 1.5"),
        (lambda: tf.chunked(0), ValueError, "chunked: size must be >= 1, got 0"),
        (lambda: tf.anchors(-1, 2), ValueError, "anchors: count must be >= 0, got -1"),
        (lambda: tf.anchors(1, -2), ValueError, "left must be >= 0, got -2"),
        (lambda: tf.lengths(), TypeError, "lengths: give kv_lengths, q_lengths or both"),
        (lambda: tf.lengths(-1), ValueError, "lengths: kv_lengths must be >= 0, got -1"),
        (lambda: tf.lengths(q_lengths=[1.5]), TypeError, "lengths: q_lengths must be integers, got float64"),
        (lambda: tf.lengths([True]), TypeError, "lengths: kv_lengths must be integers, got bool"),
        (lambda: tf.documents(), TypeError, "documents: give either ids or cu_seqlens"),
        (lambda: tf.documents([0], cu_seqlens=[0, 1]), TypeError, "documents: give either ids or cu_seqlens"),
        (lambda: tf.documents([0.5]), TypeError, "documents: ids must be integers, got float64"),
        (lambda: tf.documents([0, 1], q_ids=["a"]), TypeError, "documents: q_ids must be integers, got"),
        (
            lambda: tf.documents(cu_seqlens=[0, 4, 2]),
            ValueError,
            "documents: cu_seqlens must not decrease, got 2 after 4",
        ),
        (lambda: tf.documents(cu_seqlens=[1, 4]), ValueError, "documents: cu_seqlens must start at 0, got 1"),
        (
            lambda: tf.documents(cu_seqlens=[0.0, 4]),
            TypeError,
            "documents: cu_seqlens must be a 1-D int32 or int64",
        ),
        (
            lambda: tf.tree([-1, 1]),
            ValueError,
            "tree: each of parents must be an earlier query, got 1 for query 1",
        ),
        (lambda: tf.tree([[-1, 0], [-1, 5]]), ValueError, "earlier query, got 5 for query 1"),
        (lambda: tf.tree([-2]), ValueError, "tree: parents must be >= -1, got -2"),
        (lambda: tf.tree([0.5]), TypeError, "tree: parents must be integers, got float64"),
        (lambda: tf.tree(-1), ValueError, r"tree: parents must have shape .*, got \(\)"),
        (lambda: tf.spans([0, 1], [2]), ValueError, r"spans: lo and hi must both be .*got \(2,\) and \(1,\)"),
        (lambda: tf.spans(0, 1), ValueError, r"spans: lo and hi must both be .*got \(\) and \(\)"),
        (lambda: tf.spans([0.0], [2]), TypeError, "spans: lo must be integers, got float64"),
        (lambda: tf.spans([0], [-1]), ValueError, "spans: hi must be >= 0, got -1"),
        (lambda: tf.spans([3], [2]), ValueError, "spans: hi must not be less than lo"),
        (lambda: tf.spans([[0, 1]], [[2, 3]]), ValueError, "spans of a row must ascend and be disjoint"),
        (lambda: tf.dense([[1, 0]]), TypeError, "mask must be boolean .*got int64"),
        (lambda: tf.from_predicate(3), TypeError, "from_predicate: fn must be callable, got int"),
        (
            lambda: tf.causal() & np.ones((2, 2), bool),
            TypeError,
            r"combines with masks .*got ndarray; .*tilefold\.dense",
        ),
        (lambda: tf.causal() | True, TypeError, "combines with masks .*got bool"),
        (
            lambda: np.ones((2, 2), bool) & tf.causal(),
            TypeError,
            r"combines with masks .*got ndarray; .*tilefold\.dense",
        ),
        (lambda: tf.causal().bind(-1, 2), ValueError, "q_len must be a length >= 0, got -1"),
        (lambda: tf.causal().bind(1, 2.0), ValueError, r"kv_len must be a length >= 0, got 2\.0"),
        (
            lambda: tf.causal().bind(4, 4)[::2],
            ValueError,
            "a mask is sliced with step 1, got a query slice of step 2",
        ),
        (
            lambda: tf.causal().bind(4, 4)[:, ::-1],
            ValueError,
            "a mask is sliced with step 1, got a key slice of step -1",
        ),
        (lambda: tf.causal().bind(4, 4)[1], TypeError, "a mask is sliced .*got .*int"),
        (lambda: tf.causal().bind(4, 4)[:, 1], TypeError, "a mask is sliced .*got .*int"),
        (lambda: tf.causal().bind(4, 4)[:, :, :], TypeError, r"a mask is sliced .*\[queries, keys\]"),
        (lambda: tf.FlashConfig(0, 64, 0.1), ValueError, "block_q must be >= 1, got 0"),
        (lambda: tf.FlashConfig(64, -4, 0.1), ValueError, "block_kv must be >= 1, got -4"),
        (lambda: tf.FlashConfig(64.0, 64, 0.1), TypeError, "block_q must be an integer, got 64.0"),
        (lambda: tf.FlashConfig(64, True, 0.1), TypeError, "block_kv must be an integer, got True"),
        (lambda: tf.default_config(0), ValueError, "head_dim must be >= 1, got 0"),
        (lambda: tf.causal_config(1.5), TypeError, "head_dim must be an integer, got 1.5"),
        (lambda: tf.flash_attention(Q, K, V, 64), TypeError, "config must be a FlashConfig, got int"),
        (
            lambda: tf.flash_attention(Q, K, V, tf.FlashConfig(4, 4, NAN)),
            ValueError,
            "scale must be finite, got nan",
        ),
        (
            lambda: tf.flash_attention(Q, K, V, tf.FlashConfig(4, 4, 1.0, 1)),
            TypeError,
            "causal must be True or False",
        ),
        (lambda: tf.flash_attention(Q, K[0], V), ValueError, "same number of dimensions"),
        (lambda: tf.flash_attention([1.0], K, V), TypeError, "q must be an array .*got list"),
        (lambda: tf.naive_attention(Q, K, V, NAN), ValueError, "scale must be finite, got nan"),
        (
            lambda: tf.naive_attention(Q, K[..., :2], V),
            ValueError,
            "q and k must have the same last dimension",
        ),
        (lambda: tf.merge(), TypeError, r"merge: give at least one \(out, lse\)"),
        (lambda: tf.merge(Q), TypeError, r"merge: part 0 must be \(out, lse\), got ndarray"),
        (lambda: tf.merge((Q, Q[..., 0]), (Q,)), TypeError, r"merge: part 1 must be \(out, lse\), got tuple"),
        (
            lambda: tf.merge((Q, Q)),
            ValueError,
            r"merge: part 0 has out .* and lse .*; lse must be \(2, 4, 5\)",
        ),
        (
            lambda: tf.merge((Q, Q[..., 0]), (K, K[..., 0])),
            ValueError,
            "merge: part 1 is float32 .*, the first is float32",
        ),
        (
            lambda: tf.merge((Q, Q[..., 0]), (Q.astype(float), Q[..., 0].astype(float))),
            ValueError,
            "merge: part 1 is float64 .*, the first is float32",
        ),
        (lambda: tf.merge(([1.0], Q)), TypeError, "merge: out of part 0 must be an array .*got list"),
        (
            lambda: tf.merge((Q, Q[..., 0].astype(int))),
            TypeError,
            "merge: lse of part 0 must be float16, .*got int64",
        ),
        (
            lambda: tf.merge((np.ones(()), np.ones(()))),
            ValueError,
            "merge: out of part 0 must have shape .*got",
        ),
        (lambda: tf.probe(Q, K), TypeError, "probe: give at least one statistic"),
        (lambda: tf.probe(Q, K, "entropy"), TypeError, "probe: statistics must be statistics such as"),
        (lambda: tf.probe(Q, K, tf.topk), TypeError, r"got function; call it: tilefold\.topk\(\)"),
        (lambda: tf.probe(Q, K, tf.topk(1), tf.topk(2)), ValueError, r"different names.*\.named\(\.\.\.\)"),
        (lambda: tf.topk(0), ValueError, "topk: k must be >= 1, got 0"),
        (lambda: tf.topk(2.5), TypeError, "topk: k must be an integer, got 2.5"),
        (
            lambda: tf.probe(Q, K, tf.topk(99)),
            ValueError,
            "topk: k must be at most the number of keys, 7; got 99",
        ),
        (lambda: tf.topk(2, heads="group"), ValueError, "topk: lists of several heads have no mean"),
        (
            lambda: tf.entropy(heads="mean"),
            ValueError,
            "entropy: heads must be 'each', 'group' or 'all', got 'mean'",
        ),
        (lambda: tf.key_mass(last=0), ValueError, "key_mass: last must be >= 1, got 0"),
        (
            lambda: tf.key_mass(discount=1.5),
            ValueError,
            "key_mass: discount must be a number above 0 and at most 1",
        ),
        (
            lambda: tf.probe(Q, K, tf.key_mass(last=6)),
            ValueError,
            "key_mass: last must be at most the number of queries, 5; got 6",
        ),
        (lambda: tf.heatmap(0, 4), ValueError, "heatmap: rows must be >= 1, got 0"),
        (lambda: tf.heatmap(4, 4, pool="median"), ValueError, "heatmap: pool must be 'mean', 'sum' or 'max'"),
        (lambda: tf.block_mass(0), ValueError, "block_mass: block must be >= 1, got 0"),
        (lambda: tf.mass_in(), ValueError, "mass_in: give 1 to 8 regions by name"),
        (lambda: tf.mass_in(a=3), TypeError, "mass_in: a must be a mask or a slice of keys, got int"),
        (
            lambda: tf.mass_in(a=slice(-3, None)),
            ValueError,
            "mass_in: a must be a slice of keys with 0 <= start",
        ),
        (
            lambda: tf.mass_in(a=slice(0, 9, 2)),
            ValueError,
            "mass_in: a must be a slice of keys with 0 <= start",
        ),
        (
            lambda: tf.mass_in(a=tf.from_predicate(lambda n, h, i, j: i > j, per_head=True)),
            ValueError,
            "mass_in: a must be the same for all heads",
        ),
        (
            lambda: tf.probe(
                np.ones((1, 99, 4)),
                np.ones((1, 99, 4)),
                tf.mass_in(a=tf.from_predicate(lambda i, j: (i + j) % 2 == 0)),
            ),
            ValueError,
            "mass_in: a region must be few spans of keys per row, and .* is single cells",
        ),
        (lambda: tf.probe(Q, K, tf.rows([1, 5])), ValueError, "rows: there are 5 rows, got 5"),
        (lambda: tf.probe(Q, K, tf.rows([-6])), ValueError, "rows: there are 5 rows, got -6"),
        (lambda: tf.rows("1"), TypeError, "rows: which must be a list of row numbers"),
        (lambda: tf.block(3, slice(0, 2)), TypeError, "block: q must be a slice without steps, got 3"),
        (
            lambda: tf.probe(Q, K, tf.block(slice(0, 5), slice(0, 7), limit=1000)),
            ValueError,
            r"block: \(2, 4, 5, 7\) weights would take 1,120 bytes, more than limit=1,000; ask for",
        ),
        (lambda: tf.entropy().named("two words"), ValueError, "entropy: a name must be an identifier"),
        (lambda: tf.probe(Q, K, Tap(), dropout=0.1), TypeError, "dropout: dropout is not offered"),
        (lambda: tf.probe(Q, K, Tap(), sink=1), TypeError, "unexpected keyword argument 'sink'"),
        (lambda: tf.probe(Q, None, Tap()), TypeError, "k must be an array"),
        (lambda: tf.probe(Q, K[0, 0, 0, 0, ...], Tap()), ValueError, r"k must have shape .*got \(\)"),
        (lambda: tf.explain(Q, K, V, dropout_p=0.5), TypeError, "dropout_p: dropout is not offered"),
        (lambda: tf.explain(Q, K, V, nonsense=1), TypeError, "unexpected keyword argument 'nonsense'"),
        (lambda: tf.explain(Q, K, V, backend="cuda"), ValueError, "backend must be 'auto'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_doors(make, error, says):
    with pytest.raises(error, match=says):
        make()


FINE = dict(zip(("out", "lse"), tf.attention(Q, K, V, return_lse=True), strict=True))
FINE |= {"dout": np.ones(OUT, np.float32), "dlse": np.ones(OUT[:3], np.float32)}


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (
            {"out": FINE["out"][..., :2]},
            ValueError,
            r"out must have shape \(2, 4, 5, 3\), got \(2, 4, 5, 2\)",
        ),
        ({"out": FINE["out"].astype(float)}, TypeError, "out must be float32, got float64"),
        ({"out": None}, TypeError, "out must be an array"),
        ({"lse": FINE["out"]}, ValueError, r"lse must have shape \(2, 4, 5\), got \(2, 4, 5, 3\)"),
        ({"lse": FINE["lse"].astype(np.float16)}, TypeError, "lse must be float32, got float16"),
        ({"lse": None}, TypeError, "lse must be an array"),
        ({"dout": FINE["dout"][0]}, ValueError, r"dout must have shape \(2, 4, 5, 3\), got \(4, 5, 3\)"),
        ({"dout": FINE["dout"].astype(float)}, TypeError, "dout must be float32, got float64"),
        ({"dout": 1.0}, TypeError, "dout must be an array .*got float"),
        ({"dlse": FINE["dlse"][..., :4]}, ValueError, r"dlse must have shape \(2, 4, 5\), got \(2, 4, 4\)"),
        ({"dlse": FINE["dlse"].astype(int)}, TypeError, "dlse must be float16, .*got int64"),
        ({"dropout": 0.1}, TypeError, "dropout: dropout is not offered"),
        ({"return_lse": True}, TypeError, "unexpected keyword argument 'return_lse'"),
        ({"q": Q[0]}, ValueError, "same number of dimensions"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto'"),
    ],
    ids=str,
)
def test_attention_grad(wrong, error, says):
    arguments = {"q": Q, "k": K, "v": V} | FINE
    assert tf.attention_grad(**arguments).dq.shape == Q.shape
    with pytest.raises(error, match=says):
        tf.attention_grad(**(arguments | wrong))


# ---- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 2**31, 4), (1, 2**31, 4), (1, 2**31, 4)),
        ((2**40, 1, 1, 1), (2**40, 1, 2**20, 1), (2**40, 1, 2**20, 1)),
        ((1, 2**20, 1), (1, 2**20, 1), (1, 2**20, 2**22)),
        ((2**30, 2**30), (2**30, 2**30), (2**30, 1)),
    ],
    ids=str,
)
def test_sizes_beyond_2_to_the_63_are_refused(q, k, v):
    one = np.float16(1)
    arrays = [np.broadcast_to(one, shape) for shape in (q, k, v)]
    for verb in (tf.explain, tf.attention):  # the first would only plan
        with pytest.raises(ValueError, match=r"too large: .* overflow 2\^63"):
            verb(*arrays)


# ---- what changes while a call runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cu_seqlens_q", "cu_seqlens_k", "q_lengths", "kv_lengths", "ids", "mask lengths"]
)
def test_lengths_are_copied_before_they_are_used(name):
    """Another thread may change its table between the check and the use; here the mask does, midway through."""
    ends = np.array({"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": [0, 3, 7], "ids": [0] * 7}.get(name, [5, 4]))
    changed = []

    def meddle(i, j):
        ends[...] = 2**40
        changed.append(True)
        return np.ones((len(i), j.shape[1]), bool)

    def call(mask):
        if name.startswith("cu_seqlens"):
            return tf.attention(**(PACKED | {"mask": mask, name: ends}))
        if name == "ids":
            return tf.attention(Q, K, V, mask & tf.documents(ends))
        if name == "mask lengths":
            return tf.attention(Q, K, V, mask & tf.lengths(ends))
        return tf.attention(Q, K, V, mask, **{name: ends})

    expected = call(tf.prefix(7))
    assert np.array_equal(call(tf.from_predicate(meddle)), expected)
    assert changed


def test_a_call_within_a_call():
    inner = []

    def rule(i, j):
        inner.append(tf.attention(Q, K, V, causal=True))
        return j <= i + 2

    assert np.allclose(
        tf.attention(Q, K, V, tf.from_predicate(rule)), tf.attention(Q, K, V, causal=True), rtol=1e-6
    )
    assert all(np.array_equal(x, inner[0]) for x in inner)


def test_an_error_from_the_callers_own_code_passes_through():
    def rule(i, j):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        tf.attention(Q, K, V, tf.from_predicate(rule))
    assert tf.attention(Q, K, V).shape == OUT
