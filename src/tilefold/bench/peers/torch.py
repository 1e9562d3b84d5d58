"""PyTorch's scaled_dot_product_attention. Decoding with shared key heads is called in the form that is fastest here.

`enable_gqa` leaves torch's fused kernel and took three times as long for one query; heads as rows do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..scenarios import Inputs, Scenario
from ..threads import given
from .row import Peer, four, heads_as_rows, installed
from .tensors import array, tensor


def refuses(scenario: Scenario) -> str | None:
    """Also what zentorch's operator cannot do, which has torch's interface."""
    if scenario.sees_all:
        return None
    if not scenario.is_causal:
        return "scaled_dot_product_attention has no window"
    if not scenario.is_square:
        return "is_causal aligns to the top left, which is another function when lengths differ"
    if scenario.has_bias:
        return "scaled_dot_product_attention takes is_causal or a bias, not both"
    return None


def _build(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    from torch.nn.functional import scaled_dot_product_attention

    return called(scaled_dot_product_attention, scenario, inputs, rows=True)


def called(sdpa: Any, scenario: Scenario, inputs: Inputs, *, rows: bool) -> Callable[[], Any]:
    """A function of that signature, on tensors; `rows`: shared key heads in the form that is fastest for torch."""
    import torch

    torch.set_num_threads(given())
    q, k, v, *bias = (four(x) for x in inputs)
    shape = (*q.shape[:-1], v.shape[-1])
    grouped = scenario.case.heads != scenario.case.kv_heads
    if rows and grouped and scenario.sees_all and not bias:
        q, grouped = heads_as_rows(scenario, q), False
    x, y, z, *added = (tensor(a) for a in (q, k, v, *bias))
    attn_mask, causal = (added[0] if added else None), scenario.is_causal and not scenario.sees_all

    def call() -> Any:
        return sdpa(x, y, z, attn_mask, is_causal=causal, enable_gqa=grouped).reshape(shape)

    if not scenario.grad:
        return call
    dout = tensor(four(scenario.dout(inputs)))
    for leaf in (x, y, z):
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(call(), (x, y, z), dout)


TORCH = Peer(
    "torch",
    installed("torch"),
    refuses,
    _build,
    array,
    foreign=True,
    apart=f"{__name__}:TORCH",
    package="torch",
    note="scaled_dot_product_attention",
    backward=True,
)
