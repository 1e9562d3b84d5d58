"""PyTorch's door: which way a call on tensors takes.

Plain tensors go straight to the core, through autograd where a gradient may be asked for. Programs that are compiled or
exported, tensors that stand for others, and functorch's transforms see operators, or a function with rules of its own.
Imported with the first tensor that comes, so torch may be imported here at the top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import frameworks
from ...call import Options, is_cache
from ...plan import Plan
from . import operators, tensors
from .autograd import FORWARD, Attention, Transformed
from .calls import How, known, known_gradients, known_with, run
from .merge import merge
from .probes import differentiable

__all__ = [
    "attention",
    "differentiable",
    "entering",
    "known",
    "known_gradients",
    "known_with",
    "merge",
    "sees_more",
    "tensors",
    "wants_gradient",
]


def attention(
    q: Tensor, k: Any, v: Any, o: Options, return_lse: bool, out: Any, backend: str, plan: Plan | None
) -> Any:
    """`tilefold.attention` on tensors, without probes."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (_autocast(x) for x in (q, k, v))
    _refuse_tangents(q, k, v, o.bias, o.sinks, o.alibi)
    how = How(o, backend, plan)
    if is_cache(k):
        _refuse_in_programs(q, k)
        _refuse_through_caches(q, k, o)
        result = run(q, k, v, how, out)
    elif _as_operator(q, k, v):
        result = operators.attention(q, k, v, how, out)
    elif torch._C._are_functorch_transforms_active():
        result = Transformed.apply(q, k, v, o.bias, o.sinks, how)
    elif torch.is_grad_enabled() and _wants_gradient(q, k, v, o.bias, o.sinks, o.alibi):
        _refuse_gradients(o, out)
        result = Attention.apply(q, k, v, o.bias, o.sinks, how)
    else:
        result = run(q, k, v, how, out)
    return result if return_lse else result[0]


def entering(q: Tensor, k: Any) -> tuple[Tensor, Any]:
    """q and k of a probe, in the type that autocast asks for."""
    if not torch.is_autocast_enabled("cpu"):
        return q, k
    return _autocast(q), _autocast(k)


def wants_gradient(q: Tensor, k: Any, o: Options) -> bool:
    """Whether a gradient may be asked for of what is seen."""
    return torch.is_grad_enabled() and _wants_gradient(q, k, o.bias, o.sinks)


def sees_more(q: Tensor, k: Any, v: Any, o: Options) -> bool:
    """Whether attention has more to do for these tensors than fill results: then statistics are a call of their own."""
    return torch.is_autocast_enabled("cpu") or wants_gradient(q, k, o) or _wants_gradient(v)


def _as_operator(q: Tensor, k: Any, v: Any) -> bool:
    """Whether the call must be an operator: its tensors have no numbers, or a mode wants to see every operator."""
    without = {name: _without_numbers(x) for name, x in (("q", q), ("k", k), ("v", v))}
    if any(without.values()) and not all(without.values()):
        name = next(name for name, x in without.items() if x)
        raise TypeError(
            f"{name} stands for another tensor and has no memory of its own; q, k and v must be alike"
        )
    return any(without.values()) or bool(torch._C._len_torch_dispatch_stack())


def _without_numbers(x: Any) -> bool:
    return frameworks.is_traced(x) or (isinstance(x, Tensor) and x.device.type == "meta")


def _wants_gradient(*given: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in given)


def _autocast(x: Any) -> Any:
    """What torch's own attention does under autocast: float32 and narrower become its type."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def _refuse_tangents(*given: Any) -> None:
    if forward_ad._current_level >= 0 and not torch._C._are_functorch_transforms_active():
        for x in given:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(FORWARD)


def _refuse_in_programs(q: Tensor, cache: Any) -> None:
    if _without_numbers(q) or torch._C._are_functorch_transforms_active():
        raise TypeError(
            f"k must not be a {type(cache).__name__} in a program that is compiled, exported or transformed: "
            "what a cache holds is known when the call runs; pass tensors, or keep the call out of the program"
        )


def _refuse_through_caches(q: Tensor, cache: Any, o: Options) -> None:
    if torch.is_grad_enabled() and _wants_gradient(q, o.bias, o.sinks, o.alibi):
        raise ValueError(
            f"a gradient cannot be asked for beside a {type(cache).__name__}, which has none for its keys: "
            "call within torch.no_grad(), or pass detached tensors"
        )


def _refuse_gradients(o: Options, out: Any) -> None:
    if out is not None:
        raise ValueError("out must not be given where a gradient may be asked for; use torch.no_grad()")
    if isinstance(o.alibi, Tensor) and o.alibi.requires_grad:
        raise ValueError("alibi must not require a gradient: slopes are no parameters; pass alibi.detach()")
