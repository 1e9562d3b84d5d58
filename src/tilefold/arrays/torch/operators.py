"""The operators `tilefold::fwd` and `tilefold::bwd`: what a compiled or exported program holds of a call.

An operator's arguments are tensors, numbers and text, so a mask is written down: its recipe as JSON, in which "#" is
the next of `numbers` (which may be symbolic: lengths that vary) and "@" the next of `arrays`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...call import Options, mask_of
from ...masks import RECIPES, Mask
from .autograd import ONCE
from .calls import How, gradients, run
from .tensors import empty_like, enter

ARRAYS = ("bias", "sinks", "alibi", "cu_seqlens_q", "cu_seqlens_k", "q_lengths", "kv_lengths")
TENSORS = 3 + len(ARRAYS)  # that stand first among the arguments: q, k, v and these
OPTIONS = ", ".join(
    [
        *(f"Tensor? {name}" for name in ARRAYS),
        "str mask, SymInt[] numbers, Tensor[] arrays, float? scale, float? softcap, bool invariant, str backend",
    ]
)

library = torch.library.Library("tilefold", "DEF")
for schema in (
    f"fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor out, Tensor lse)",
    f"bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def attention(q: Tensor, k: Tensor, v: Tensor, how: How, out: Any) -> tuple[Tensor, Tensor]:
    """The call as an operator."""
    if out is not None or how.plan is not None:
        raise TypeError(f"{'plan' if out is None else 'out'} cannot be given in a compiled program")
    o = how.options
    text, numbers, arrays = write(mask_of(o))
    given = [_tensor(getattr(o, name)) for name in ARRAYS]
    result: tuple[Tensor, Tensor] = torch.ops.tilefold.fwd(
        q, k, v, *given, text, numbers, arrays, o.scale, o.softcap, o.invariant, how.backend
    )
    return result


def _tensor(x: Any) -> Tensor | None:
    return x if x is None or isinstance(x, Tensor) else torch.as_tensor(x)


# ---- masks as text ---------------------------------------------------------------------------------------------


def write(mask: Mask | None) -> tuple[str, list[int], list[Tensor]]:
    """A mask as (text, numbers, arrays)."""
    numbers: list[int] = []
    arrays: list[Tensor] = []
    return _write(mask, numbers, arrays), numbers, arrays


def _write(x: Any, numbers: list[int], arrays: list[Tensor]) -> str:
    if x is None:
        return "null"
    if isinstance(x, Mask):
        name, arguments = x.recipe()
        parts = [f'"{key}": {_write(value, numbers, arrays)}' for key, value in arguments.items()]
        return f'{{"{name}": {{{", ".join(parts)}}}}}'
    if isinstance(x, str):
        return f'"{x}"'
    if isinstance(x, (int, torch.SymInt)):
        numbers.append(x)
        return '"#"'
    # A copy of arrays, which may be read-only; a program that is being compiled has none to copy.
    arrays.append(x if isinstance(x, Tensor) else torch.as_tensor(x if is_compiling() else np.array(x)))
    return '"@"'


def read(text: str, numbers: Sequence[int], arrays: Sequence[Tensor]) -> Mask | None:
    """What `write` wrote."""
    mask: Mask | None = _read(json.loads(text), iter(numbers), iter(arrays))
    return mask


def _read(x: Any, numbers: Iterator[int], arrays: Iterator[Tensor]) -> Any:
    if isinstance(x, dict):
        ((name, arguments),) = x.items()
        return RECIPES[name](**{key: _read(value, numbers, arrays) for key, value in arguments.items()})
    if x == "#":
        return next(numbers)
    return enter("mask", next(arrays)) if x == "@" else x


# ---- what the operators do -------------------------------------------------------------------------------------


def _how(
    bias: Any, sinks: Any, alibi: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, q_lengths: Any, kv_lengths: Any,
    mask: str, numbers: Sequence[int], arrays: Sequence[Tensor], scale: Any, softcap: Any, invariant: bool,
    backend: str,
) -> How:  # fmt: skip
    o = Options(
        mask=read(mask, numbers, arrays), scale=scale, softcap=softcap, bias=bias, alibi=alibi, sinks=sinks,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, q_lengths=q_lengths, kv_lengths=kv_lengths,
        invariant=invariant,
    )  # fmt: skip
    return How(o, backend)


def _fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return run(q, k, v, _how(*options))


def _bwd(
    dout: Tensor, dlse: Any, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    grads = gradients(q, k, v, out, lse, dout, dlse, _how(*options))
    return tuple(q.new_empty(0) if g is None else g for g in grads)


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fwd_shapes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out = empty_like(q, (*q.shape[:-1], v.shape[-1]), q.dtype)
    return out, q.new_empty(q.shape[:-1], dtype=_accumulate(q))


def _bwd_shapes(
    dout: Tensor, dlse: Any, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, sinks: Any,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    small = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias, sinks))
    return *(empty_like(x, tuple(x.shape), x.dtype) for x in (q, k, v)), *small


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, (mask, numbers, arrays, *rest) = inputs[:TENSORS], inputs[TENSORS:]
    ctx.save_for_backward(*output, *tensors, *arrays)
    ctx.mask, ctx.rest = (mask, numbers), rest
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *saved = ctx.saved_tensors
    tensors, arrays = saved[:TENSORS], saved[TENSORS:]
    grads: list[Any] = [None] * 5
    if dout is not None or dlse is not None:
        dout = torch.zeros_like(out) if dout is None else dout
        grads = list(torch.ops.tilefold.bwd(dout, dlse, out, lse, *tensors, *ctx.mask, arrays, *ctx.rest))
    grads = [None if x is None else g for g, x in zip(grads, tensors, strict=False)]
    grads += [None] * (TENSORS - len(grads))
    numbers: list[Any] | None = None if ctx.mask[1] else []  # torch takes an empty list for one of tensors
    return *grads, None, numbers, [None] * len(arrays), *(None for _ in ctx.rest)


def _refuse_twice(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(ONCE)


library.impl("fwd", _fwd, "CPU")
library.impl("bwd", _bwd, "CPU")
torch.library.register_fake("tilefold::fwd", _fwd_shapes, lib=library)
torch.library.register_fake("tilefold::bwd", _bwd_shapes, lib=library)
torch.library.register_autograd("tilefold::fwd", _differentiate, setup_context=_save, lib=library)
torch.library.register_autograd("tilefold::bwd", _refuse_twice, lib=library)
