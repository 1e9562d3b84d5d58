"""JAX's dot_product_attention, compiled. It wants another order of axes, so it gets a copy before the clock starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..scenarios import Inputs, Scenario
from .row import Peer, four, installed


def _refuses(scenario: Scenario) -> str | None:
    if scenario.dtype == "float64":
        return "its softmax is float32 whatever comes in"
    if scenario.case.size["d"] != scenario.case.size["v"]:
        return "jax.nn.dot_product_attention wants values as wide as keys"
    if scenario.sees_all:
        return None
    if not scenario.is_square:
        return "its masks align to the top left, which is another function when lengths differ"
    if scenario.band.right != 0:
        return "its window is called in its causal form only"
    return None


def _build(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    import jax

    causal = not scenario.sees_all
    window = (scenario.band.left, 0) if causal and scenario.band.left is not None else None

    def call(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal, local_window_size=window)

    def both(dout: Any, *arrays: Any) -> Any:
        return jax.vjp(call, *arrays)[1](dout)

    compiled = jax.jit(both if scenario.grad else call)
    rows_first = [four(x).swapaxes(1, 2) for x in inputs[:3]]
    if scenario.grad:
        rows_first.insert(0, four(scenario.dout(inputs)).swapaxes(1, 2))
    ready = [jax.numpy.asarray(x) for x in (*rows_first, *(four(b) for b in inputs[3:]))]
    return lambda: jax.block_until_ready(compiled(*ready))


def _result(out: Any, dtype: str) -> np.ndarray:
    return np.asarray(out).swapaxes(1, 2)


JAX = Peer(
    "jax",
    installed("jax"),
    _refuses,
    _build,
    _result,
    foreign=True,
    apart=f"{__name__}:JAX",
    package="jax",
    note="jax.nn.dot_product_attention, compiled",
    backward=True,
)
