"""Every case of the zoo, forward and backward, against the oracle in a wider type, with all fresh memory poisoned."""

import numpy as np
import pytest
from cases import ZOO

import tilefold as tf
from tilefold.backends import BACKENDS
from tilefold.bench.budgets import judge
from tilefold.bench.case import Case, replay
from tilefold.call import Options, understand
from tilefold.fold import fold_shapes
from tilefold.naive import naive, naive_grad


@pytest.mark.parametrize("text", ZOO)
@pytest.mark.usefixtures("poisoned")
def test_parity(text):
    report = replay(text)
    assert report.ok, "\n".join([f'tilefold case "{text}"', *report.lines])


@pytest.mark.parametrize("text", ZOO)
def test_workspace_is_what_the_plan_predicted(text):
    """What the kernel took, counted: the prediction, or less where no tile needed a mask's buffers or any at all."""
    a = Case.parse(text).build()
    call = understand(a.q, a.k, a.v, Options(**a.options))
    call.allocate()
    used = call.fold()
    plan = call.plan
    tested = 2 * plan.block_k * plan.block_q * call.problem.group if "seen" in fold_shapes(plan) else 0
    assert used <= plan.workspace_bytes
    if not {"dense=0", "k0"} & set(text.split()) and used:
        assert used in (plan.workspace_bytes, plan.workspace_bytes - tested)


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS])
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
