"""Who is measured: one row each, with a sentence where a row cannot take part.

Frameworks are imported only when asked for. Inputs are handed over before the clock starts, without a copy where the
framework takes NumPy's memory; JAX wants another order of axes, so it gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..api import attention
from ..dtypes import ROWS
from ..flash import naive_attention
from .scenarios import Inputs, Scenario


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to compute attention. `available` and `why_not` return None for yes, or one sentence."""

    name: str
    available: Callable[[], str | None]
    why_not: Callable[[Scenario], str | None]
    build: Callable[[Scenario, Inputs], Callable[[], Any]]
    to_numpy: Callable[[Any, str], np.ndarray]
    foreign: bool  # it may fail without failing the run, and tracemalloc does not see its memory


def _always() -> None:
    return None


def _anything(scenario: Scenario) -> None:
    return None


def _as_is(out: Any, dtype: str) -> np.ndarray:
    return np.asarray(out)


def _flash(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    window = (scenario.band.left, scenario.band.right)
    if scenario.band.unlimited:
        return lambda: attention(*inputs)
    return lambda: attention(*inputs, window=window)


def _naive(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    if scenario.band.unlimited:
        return lambda: naive_attention(*inputs)[0]
    return lambda: _naive_band(scenario, inputs)


def _naive_band(scenario: Scenario, inputs: Inputs) -> np.ndarray:
    """`naive_attention` with a mask: the same passes over the whole matrix, and one more that hides cells."""
    case, acc = scenario.case, np.dtype(ROWS[scenario.case.dtype].accumulate)
    q, k, v = (x.astype(acc, copy=False) for x in inputs)
    grouped = q.reshape(*q.shape[:-3], case.kv_heads, -1, *q.shape[-2:])
    s = np.matmul(grouped, k[..., None, :, :].swapaxes(-1, -2))
    s *= acc.type(q.shape[-1] ** -0.5)
    at = np.arange(q.shape[-2])[:, None] + (k.shape[-2] - q.shape[-2])
    hidden = np.zeros((q.shape[-2], k.shape[-2]), bool)
    if scenario.band.right is not None:
        hidden |= np.arange(k.shape[-2]) > at + scenario.band.right
    if scenario.band.left is not None:
        hidden |= np.arange(k.shape[-2]) < at - scenario.band.left
    np.copyto(s, acc.type(-np.inf), where=hidden)
    with np.errstate(invalid="ignore"):
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)
    s[..., hidden.all(axis=1), :] = 0  # a row that sees no key is 0, not NaN
    shape = (*q.shape[:-1], v.shape[-1])
    out: np.ndarray = np.matmul(s, v[..., None, :, :]).reshape(shape)
    return out.astype(inputs[0].dtype, copy=False)


def _torch_missing() -> str | None:
    return None if find_spec("torch") else "PyTorch is not installed"


def _torch_refuses(scenario: Scenario) -> str | None:
    n = scenario.case.size
    if not scenario.band.unlimited and not scenario.is_causal:
        return "torch's scaled_dot_product_attention has no window"
    if scenario.is_causal and n["q"] != n["k"]:
        return "torch's is_causal aligns to the top left, which is another function when lengths differ"
    return None


def _torch(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    import torch

    def enter(x: np.ndarray) -> Any:
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    q, k, v = (enter(x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:])) for x in inputs)
    grouped = scenario.case.heads != scenario.case.kv_heads
    shape = (*inputs[0].shape[:-1], inputs[2].shape[-1])
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(q, k, v, is_causal=scenario.is_causal, enable_gqa=grouped).reshape(shape)


def _from_torch(out: Any, dtype: str) -> np.ndarray:
    return np.asarray(out.float() if dtype == "bfloat16" else out)


def _jax_missing() -> str | None:
    return None if find_spec("jax") else "JAX is not installed"


def _jax_refuses(scenario: Scenario) -> str | None:
    n = scenario.case.size
    if scenario.case.dtype == "float64":
        return "JAX computes float64 as float32 unless it was told otherwise at its start"
    if n["d"] != n["v"]:
        return "jax.nn.dot_product_attention wants values as wide as keys"
    if not scenario.band.unlimited and n["q"] != n["k"]:
        return "JAX aligns masks to the top left, which is another function when lengths differ"
    if not scenario.band.unlimited and (scenario.band.right != 0):
        return "only its causal form is called here"
    return None


def _jax(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    import jax

    left = scenario.band.left

    def call(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=scenario.band.right == 0, local_window_size=None if left is None else (left, 0)
        )

    compiled = jax.jit(call)
    rows_first = [jax.numpy.asarray(x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)) for x in inputs]
    compiled(*rows_first).block_until_ready()
    return lambda: compiled(*rows_first).block_until_ready()


def _from_jax(out: Any, dtype: str) -> np.ndarray:
    return np.asarray(out).swapaxes(1, 2)


NAIVE = Peer("naive", _always, _anything, _naive, _as_is, foreign=False)
FLASH = Peer("tilefold", _always, _anything, _flash, _as_is, foreign=False)
TORCH = Peer("torch", _torch_missing, _torch_refuses, _torch, _from_torch, foreign=True)
JAX = Peer("jax", _jax_missing, _jax_refuses, _jax, _from_jax, foreign=True)

PEERS = (NAIVE, FLASH, TORCH, JAX)
