"""How a call is differentiated: once, by the core's backward pass.

Two functions with one meaning: torch binds the arguments of one with `setup_context` by inspection, which takes longer
than a small call, but functorch's transforms know no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .calls import How, gradients, run


class Attention(Function):
    """(q, k, v, bias, sinks, how) to (out, lse)."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, sinks: Any, how: How) -> tuple[Tensor, Tensor]:
        out, lse = run(q, k, v, how)
        _save(ctx, (q, k, v, bias, sinks, how), (out, lse))
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 6
        out, lse, q, k, v, bias, sinks, *_ = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        if torch.is_grad_enabled():  # create_graph=True: what follows must not be taken for a constant
            return *TransformedGradients.apply(q, k, v, out, lse, dout, dlse, bias, sinks, ctx.how), None
        return *gradients(q, k, v, out, lse, dout, dlse, ctx.how.with_arrays(bias, sinks)), None


class Transformed(Function):
    """The same for functorch: `torch.func.grad`, `vjp` and `vmap`, in any order."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, bias: Any, sinks: Any, how: How) -> tuple[Tensor, Tensor]:
        return run(q, k, v, how.with_arrays(bias, sinks))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v, bias, sinks, *_ = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        return *TransformedGradients.apply(q, k, v, out, lse, dout, dlse, bias, sinks, ctx.how), None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(FORWARD)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(Transformed, info, in_dims, inputs)


class TransformedGradients(Function):
    """Its gradients, which cannot be differentiated again."""

    @staticmethod
    def forward(
        q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any, bias: Any, sinks: Any, how: How
    ) -> tuple[Tensor | None, ...]:
        return gradients(q, k, v, out, lse, dout, dlse, how.with_arrays(bias, sinks))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(TransformedGradients, info, in_dims, inputs)


FORWARD = "tilefold's attention has no forward-mode derivative; use reverse mode (backward, grad, vjp)"
ONCE = "tilefold's attention can be differentiated once; its gradients cannot be differentiated again"


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, how = inputs
    ctx.save_for_backward(*output, *tensors, *how.others())
    ctx.how = how
    ctx.set_materialize_grads(False)


def _one_by_one(
    function: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Item by item along the dimensions that vmap adds; each is a whole call, as large as it ever was."""
    results = []
    for n in range(info.batch_size):
        chosen = [x if dim is None else x.select(dim, n) for x, dim in zip(inputs, in_dims, strict=True)]
        results.append(function.apply(*chosen))
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)
