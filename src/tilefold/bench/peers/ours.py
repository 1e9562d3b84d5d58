"""Naive attention and tilefold, in this process: their memory is counted, and they may not fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...api import attention, attention_grad
from ...call import Options, understand
from ...dtypes import ROWS
from ...flash import naive_attention
from ...problem import Want
from ..scenarios import Inputs, Scenario
from .row import Peer


def _always() -> None:
    return None


def _anything(scenario: Scenario) -> None:
    return None


def _as_is(out: Any, dtype: str) -> np.ndarray:
    return np.asarray(out)


def _options(scenario: Scenario, inputs: Inputs) -> dict[str, Any]:
    options: dict[str, Any] = {"bias": inputs[3]} if len(inputs) > 3 else {}
    if not scenario.band.unlimited:
        options["window"] = (scenario.band.left, scenario.band.right)
    return options


def _flash(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    q, k, v = inputs[:3]
    options = _options(scenario, inputs)
    if not scenario.grad:
        return lambda: attention(q, k, v, **options)
    dout = scenario.dout(inputs)

    def both() -> tuple[np.ndarray, ...]:
        out, lse = attention(q, k, v, **options, return_lse=True)
        return tuple(attention_grad(q, k, v, out, lse, dout, **options)[:3])

    return both


def _workspace(scenario: Scenario, inputs: Inputs) -> int:
    """What the native core allocates out of NumPy's sight."""
    wants = (Want(0), Want.LSE | Want.GRAD) if scenario.grad else (Want(0),)
    q, k, v = inputs[:3]
    options = Options(**_options(scenario, inputs))
    plans = [understand(q, k, v, options, want=want).plan for want in wants]
    return max(plan.workspace_bytes if plan.backend == "native" else 0 for plan in plans)


def _naive(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    if scenario.band.unlimited and not scenario.has_bias:
        q, k, v = inputs
        return lambda: naive_attention(q, k, v)[0]
    return lambda: _naive_whole(scenario, inputs)


def _naive_whole(scenario: Scenario, inputs: Inputs) -> np.ndarray:
    """`naive_attention` with a mask or a bias: the same passes over the whole matrix, and one more for each."""
    case, acc = scenario.case, np.dtype(ROWS[scenario.dtype].accumulate)
    q, k, v, *bias = (x.astype(acc, copy=False) for x in inputs)
    grouped = q.reshape(*q.shape[:-3], case.kv_heads, -1, *q.shape[-2:])
    s = np.matmul(grouped, k[..., None, :, :].swapaxes(-1, -2))
    s *= acc.type(q.shape[-1] ** -0.5)
    for b in bias:
        by_head = s.reshape(*q.shape[:-1], -1)  # a view
        by_head += b
    if not scenario.band.unlimited:
        hidden = _hidden(scenario)
        np.copyto(s, acc.type(-np.inf), where=hidden)
    with np.errstate(invalid="ignore"):
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)
    if not scenario.band.unlimited:
        s[..., hidden.all(axis=1), :] = 0  # a row that sees no key is 0, not NaN
    shape = (*q.shape[:-1], v.shape[-1])
    out: np.ndarray = np.matmul(s, v[..., None, :, :]).reshape(shape)
    return out.astype(inputs[0].dtype, copy=False)


def _hidden(scenario: Scenario) -> np.ndarray:
    n = scenario.case.size
    at = np.arange(n["q"])[:, None] + (n["k"] - n["q"])
    hidden = np.zeros((n["q"], n["k"]), bool)
    if scenario.band.right is not None:
        hidden |= np.arange(n["k"]) > at + scenario.band.right
    if scenario.band.left is not None:
        hidden |= np.arange(n["k"]) < at - scenario.band.left
    return hidden


NAIVE = Peer("naive", _always, _anything, _naive, _as_is, foreign=False, package="numpy")
FLASH = Peer(
    "tilefold",
    _always,
    _anything,
    _flash,
    _as_is,
    foreign=False,
    package="tilefold",
    unseen=_workspace,
    backward=True,
)
