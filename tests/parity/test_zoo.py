"""Every case of the zoo, on every backend, against the oracle in a wider type, with all fresh memory poisoned."""

from itertools import product

import numpy as np
import pytest
from cases import ZOO
from oracle import complaint, judged

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.bench.budgets import judge
from tilefold.bench.case import Case, replay
from tilefold.call import Call, Options, understand
from tilefold.fold import fold_shapes
from tilefold.naive import naive, naive_grad
from tilefold.problem import Has, Layout, Want

NAMES = [b.name for b in BACKENDS]
NATIVE = BACKENDS[NAMES.index("native")]


def understood(text: str, backend: str) -> Call:
    """A case as a call of one backend, its results full of NaN; skipped where the backend has a reason to refuse."""
    a = Case.parse(text).build()
    try:
        call = understand(a.q, a.k, a.v, Options(**a.options), want=Want.LSE, backend=backend)
    except tf.BackendRefused as refused:
        pytest.skip(str(refused))
    call.allocate()
    return call


@pytest.mark.parametrize("text", ZOO)
@pytest.mark.usefixtures("poisoned")
def test_parity(text):
    """Forward and backward, as a call that names no backend runs them."""
    report = replay(text)
    assert report.ok, "\n".join([f'tilefold case "{text}"', *report.lines])


@pytest.mark.parametrize("text", ZOO)
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.usefixtures("poisoned")
def test_every_backend_folds_the_same(backend, text):
    call = understood(text, backend)
    call.fold()
    wrong = complaint(text, judged(text, call.out, call.lse))
    assert not wrong, wrong


@pytest.mark.parametrize("text", ZOO)
def test_numpy_takes_the_workspace_that_its_plan_predicted(text):
    """What was taken, counted: the prediction, or less where no tile needed a mask's buffers or any at all."""
    call = understood(text, "numpy")
    used = call.fold()
    plan = call.plan
    tested = 2 * plan.block_k * plan.block_q * call.problem.group if "seen" in fold_shapes(plan) else 0
    assert used <= plan.workspace_bytes
    if not {"dense=0", "k0", "kv_lengths=0,0"} & set(text.split()) and used:
        assert used in (plan.workspace_bytes, plan.workspace_bytes - tested)


@pytest.mark.parametrize("text", ZOO)
def test_native_takes_the_workspace_that_its_plan_predicted(text):
    """The core allocates once, before it starts: exactly the prediction. Less only where the sizes in the problem are
    those of the arrays and sequences are shorter, or where a mask is evaluated for a panel of rows at a time."""
    call = understood(text, "native")
    used, p = call.fold(), call.problem
    assert used <= call.plan.workspace_bytes
    mask = call.operands.mask
    if p.layout is Layout.DENSE and not p.has & Has.LENGTHS and (mask is None or "dense" in text):
        assert used == call.plan.workspace_bytes


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_native_predicts_every_size_and_order(dtype):
    """Groups that do not divide a tile, dims that are no whole vector, keys that lie in steps, plans resized."""
    wrong = []
    heads, sizes = ("h1", "h5/1", "b3 h6/2", "h40/1"), ("q7 k700", "q40 k2300", "q130 k70")
    dims, orders = ("d33", "d64", "d40 v17"), ("", "order=bshd", "order=strided")
    for words in product([dtype], heads, sizes, dims, orders):
        call = understood(" ".join(words), "native")
        for block_q in (call.plan.block_q, 1, 10):
            call.plan = NATIVE.resize(call.plan, block_q, call.plan.block_k)
            used, predicted = call.fold(), call.plan.workspace_bytes
            if used != predicted:
                wrong.append(f"{' '.join(words)}, tiles of {block_q}: {used} and not {predicted}")
    assert not wrong, f"{len(wrong)} predictions are wrong, the first: {wrong[:5]}"


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        "h2/1 q60 k2100 d33 v17 causal",
        "h2/1 q3 k1500 d64 window=700,0",
        "h2 q50 k1100 d8 window=30,0 nan",
        "h3/1 q2 k1100 d16 predicate=3 nan",
        "b2 h2 q40 k130 d16 kv_lengths=130,31 causal nan",
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_native_folds_in_blocks_of_any_size(case, dtype):
    """Blocks that divide neither a segment nor the keys that a machine takes at once; tiles of any number of rows."""
    text = f"{dtype} {case}"
    call = understood(text, "native")
    plan, seen = call.plan, set()
    for block_q in (5, 1000):
        for block_k in (1, 17, 48, 112, 333, 1000, 5000):
            call.plan = NATIVE.resize(plan, block_q, block_k)
            seen.add(call.plan.block_k)
            call.allocate()
            call.fold()
            wrong = complaint(text, judged(text, call.out, call.lse))
            assert not wrong, f"blocks of {block_q} x {block_k}: {wrong}"
    assert len(seen) > 3


@pytest.mark.parametrize("backend", NAMES)
def test_every_backend_answers_or_says_why(backend):
    q = np.ones((2, 8, 4), np.float32)
    try:
        out = tf.attention(q, q, q, backend=backend)
    except tf.BackendRefused as refused:
        assert backend in str(refused)
    else:
        np.testing.assert_allclose(out, q)


def test_float64_is_accurate_to_float64():
    """Unit-scale inputs, error at most 1e-14; libraries that let float32 slip in give 1e-7 here."""
    q, k, v = np.random.default_rng(2).normal(size=(3, 2, 200, 64))
    wide, _ = naive(q, k, v, causal=True, dtype=np.longdouble)
    assert np.abs(tf.attention(q, k, v, causal=True) - wide).max() <= 1e-14


def test_gradients_agree_with_finite_differences():
    """The oracle's own formula is checked against nothing but the forward pass."""
    rng = np.random.default_rng(4)
    q, k, v = rng.normal(size=(2, 5, 4)), rng.normal(size=(1, 7, 4)), rng.normal(size=(1, 7, 3))
    bias, sinks = rng.normal(size=(2, 1, 7)), rng.normal(size=2)
    dout, dlse = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5))
    inputs = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}

    def loss() -> float:
        out, lse = naive(q, k, v, causal=True, softcap=1.5, bias=bias, sinks=sinks)
        return float((out * dout).sum() + (lse * dlse).sum())

    grads = naive_grad(q, k, v, dout, dlse, causal=True, softcap=1.5, bias=bias, sinks=sinks)
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        for at in np.ndindex(x.shape):
            here, h = x[at], 1e-6
            x[at] = here + h
            up = loss()
            x[at] = here - h
            down = loss()
            x[at] = here
            assert abs((up - down) / (2 * h) - grad[at]) < 1e-7, (name, at)


def test_a_budget_can_be_exceeded():
    """The judge is not a rubber stamp: an error of four budgets, and a NaN in another place, are both seen."""
    ref = np.linspace(1, 2, 50)
    plain = ref.astype(np.float32)
    assert judge("x", plain, [plain], ref, "float32").ok
    assert not judge("x", plain + np.float32(1e-5), [plain], ref, "float32").ok
    wrong = plain.copy()
    wrong[3] = np.nan
    assert not judge("x", wrong, [plain], ref, "float32").ok
