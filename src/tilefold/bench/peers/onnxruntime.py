"""ONNX Runtime, through a model of one node: the one of its three attention operators that is fastest for the question.

Where every query sees every key that is MultiHeadAttention. A causal mask makes that one more than twice as slow, so
there it is GroupQueryAttention, which is causal always, and finds earlier keys in a cache. The standard's own Attention
(opset 23) was never faster than either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..scenarios import Inputs, Scenario
from ..threads import given
from .row import Peer, four, heads_as_rows, installed

Arrays = dict[str, np.ndarray]


def _refuses(scenario: Scenario) -> str | None:
    grouped = scenario.case.heads != scenario.case.kv_heads
    if scenario.dtype not in ("float32", "float16"):
        return f"its attention kernels have no {scenario.dtype}"
    if scenario.has_bias and (grouped or scenario.dtype != "float32" or not scenario.sees_all):
        return "its bias is called in float32, without a mask, without shared key heads"
    if scenario.sees_all:
        return None
    if scenario.band.right != 0:
        return "its window is called in its causal form only"
    if scenario.case.size["q"] > scenario.case.size["k"]:
        return "it has no more queries than keys"
    return "it wants values as wide as keys" if scenario.case.size["d"] != scenario.case.size["v"] else None


def _build(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    q, k, v, *bias = (four(x) for x in inputs)
    if scenario.sees_all:
        q = q if bias else heads_as_rows(scenario, q)
        arrays = {"q": _merged(q), "k": k, "v": v} | dict(zip(["bias"], bias, strict=False))
        node = (
            "MultiHeadAttention",
            ["q", "k", "v", *(["", "", "bias"] if bias else [])],
            {"num_heads": q.shape[1]},
        )
        cache: Arrays = {}
    else:
        arrays, cache = _causal(q, k, v)
        names = ["q", "k", "v", "past_k" if cache else "", "past_v" if cache else "", "last", "total"]
        node = ("GroupQueryAttention", names, {"num_heads": q.shape[1], "kv_num_heads": k.shape[1]})
        if scenario.band.left is not None:
            node[2]["local_window_size"] = scenario.band.left + 1  # itself included
    shape = (*q.shape[:-1], v.shape[-1])
    result = np.empty((shape[0], shape[2], shape[1] * shape[3]), q.dtype)
    session = _session(node, arrays, cache, result)
    call = _bound(session, arrays, cache, result)
    return lambda: call().reshape(shape[0], shape[2], shape[1], shape[3])


def _merged(x: np.ndarray) -> np.ndarray:
    """(batch, heads, length, dim) as (batch, length, heads * dim)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)


def _causal(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[Arrays, Arrays]:
    """Inputs, and the cache that is read and written in place: as many new keys as queries, all earlier ones in it."""
    new, total = q.shape[2], k.shape[2]
    arrays = {"q": _merged(q), "k": _merged(k[:, :, -new:]), "v": _merged(v[:, :, -new:])}
    arrays["last"] = np.full(len(q), total - 1, np.int32)
    arrays["total"] = np.array([total], np.int32)
    return arrays, ({} if new == total else {"past_k": k.copy(), "past_v": v.copy()})


def _session(
    node: tuple[str, list[str], dict[str, int]], arrays: Arrays, cache: Arrays, result: np.ndarray
) -> Any:
    import onnxruntime
    from onnx import helper

    def info(name: str, x: np.ndarray) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)

    operator, names, attributes = node
    written = {name.replace("past", "present"): x for name, x in cache.items()}
    made = helper.make_node(operator, names, ["out", *written], domain="com.microsoft", **attributes)
    inputs = [info(name, x) for name, x in (arrays | cache).items()]
    outputs = [info(name, x) for name, x in ({"out": result} | written).items()]
    graph = helper.make_graph([made], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = given(), 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _bound(session: Any, arrays: Arrays, cache: Arrays, result: np.ndarray) -> Callable[[], Any]:
    """A call that reads and writes the arrays where they lie."""
    from onnxruntime import OrtValue

    binding = session.io_binding()
    for name, x in arrays.items():
        binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(x))
    for name, x in cache.items():
        both = OrtValue.ortvalue_from_numpy(x)
        binding.bind_ortvalue_input(name, both)
        binding.bind_ortvalue_output(name.replace("past", "present"), both)
    out = OrtValue.ortvalue_from_numpy(result)
    binding.bind_ortvalue_output("out", out)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return out.numpy()

    return call


def _result(out: Any, dtype: str) -> np.ndarray:
    return np.asarray(out).swapaxes(1, 2)


ONNXRUNTIME = Peer(
    "onnxruntime",
    installed("onnxruntime", "onnx"),
    _refuses,
    _build,
    _result,
    foreign=True,
    apart=f"{__name__}:ONNXRUNTIME",
    package="onnxruntime",
    note="com.microsoft MultiHeadAttention, and GroupQueryAttention where causal",
)
