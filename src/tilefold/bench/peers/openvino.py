"""OpenVINO's ScaledDotProductAttention of opset 13, with static shapes; dynamic ones were slower where causal.

It does not know key heads that are shared; where every query sees every key they become rows of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..scenarios import Inputs, Scenario
from ..threads import given
from .row import Peer, four, heads_as_rows, installed

TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _refuses(scenario: Scenario) -> str | None:
    if scenario.dtype not in TYPES:
        return "it computes float64 as float32"
    if scenario.has_bias and scenario.dtype != "float32":
        return "its bias has the type of the queries, which would round it"
    if scenario.sees_all:
        grouped = scenario.case.heads != scenario.case.kv_heads
        return "its operator has no shared key heads" if grouped and scenario.has_bias else None
    if not scenario.is_causal:
        return "its operator has no window"
    if not scenario.is_square:
        return "its causal flag aligns to the top left, which is another function when lengths differ"
    if scenario.case.heads != scenario.case.kv_heads:
        return "its operator has no shared key heads"
    return "its operator takes a causal flag or a bias, not both" if scenario.has_bias else None


def _build(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    import openvino
    from openvino import opset13

    q, k, v, *bias = (four(x) for x in inputs)
    if scenario.sees_all and not bias:
        q = heads_as_rows(scenario, q)
    arrays = [np.ascontiguousarray(x) for x in (q, k, v, *bias)]
    kind = getattr(openvino.Type, TYPES[scenario.dtype])
    parameters = [opset13.parameter(x.shape, kind) for x in arrays]
    causal = not scenario.sees_all
    node = opset13.scaled_dot_product_attention(*parameters, causal=causal)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": given(),
        "INFERENCE_PRECISION_HINT": kind,
    }
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters, "attention"), "CPU", settings)
    request = compiled.create_infer_request()
    for i, x in enumerate(arrays):
        bits = x.view(np.uint16) if scenario.dtype == "bfloat16" else x
        request.set_input_tensor(i, openvino.Tensor(bits, x.shape, kind))
    keep = arrays  # the tensors point into them

    def call() -> Any:
        request.infer()
        return request.get_output_tensor(0), keep

    return call


def _result(out: Any, dtype: str) -> np.ndarray:
    data: np.ndarray = out[0].data
    if dtype == "bfloat16":  # NumPy is shown the bits
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data


OPENVINO = Peer(
    "openvino",
    installed("openvino"),
    _refuses,
    _build,
    _result,
    foreign=True,
    apart=f"{__name__}:OPENVINO",
    package="openvino",
    note="opset13 ScaledDotProductAttention with static shapes, at the precision of its inputs",
)
