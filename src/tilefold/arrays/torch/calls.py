"""A call on plain tensors, below autograd; known ones in a few microseconds.

What a call was understood to be is kept by the core, under the types, shapes and strides of its tensors. Lengths,
block tables and numbers per head it copies at every call, and checks the copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch import get_num_threads as torch_threads
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ...backends.cpu import CORE, running, team
from ...call import Call, Options, beside, differentiated, folded, may_be_known, understand
from ...plan import Plan
from ...problem import Want
from .tensors import leave

CAUSAL, LSE, GRAD, THREADS = 1, 2, 4, 8  # of the facts that a known call has beside its tensors and scales
PLAIN = -1, -1, None  # neither side of a window, and no other arrays

MADE_OF = Tensor, torch.nn.Parameter, np.ndarray, torch.empty_strided, torch.device("cpu")
_known: Any = None if CORE is None else CORE.Tensors(*MADE_OF)
_threads: Any = None if CORE is None else CORE.threads


@dataclass(frozen=True, slots=True, eq=False)
class How:
    """A call but for its tensors; `simple` where it has none but q, k and v, and nothing else that is unusual."""

    options: Options
    backend: str = "auto"
    plan: Plan | None = None
    simple: bool = False

    def others(self) -> tuple[Tensor, ...]:
        """Tensors that are read again by the gradients: autograd sees to it that nobody changes them meanwhile."""
        o = self.options
        given = (o.mask, o.alibi, o.cu_seqlens_q, o.cu_seqlens_k, o.q_lengths, o.kv_lengths)
        return tuple(x for x in given if isinstance(x, Tensor))

    def with_arrays(self, bias: Any, sinks: Any) -> How:
        """The same with these for its bias and sinks."""
        o = self.options
        if o.bias is bias and o.sinks is sinks:
            return self
        return replace(self, options=replace(o, bias=bias, sinks=sinks))


def _is_watched() -> bool:
    """Whether something stands around the call that must see it, or changes what it means."""
    return (
        is_compiling() or _len_torch_dispatch_stack() or _are_functorch_transforms_active()
        or is_autocast_enabled("cpu") or forward_ad._current_level >= 0
    )  # fmt: skip


def _are_plain(causal: Any, scale: Any, softcap: Any) -> bool:
    """Whether equality of these is sameness: True == 1, but causal=1 is an error."""
    return (
        (causal is True or causal is False)
        and (scale is None or type(scale) is float)
        and (softcap is None or type(softcap) is float)
    )


def known(q: Any, k: Any, v: Any, causal: Any, scale: Any, softcap: Any, return_lse: Any) -> Any:
    """The result of a call that has no other arguments, if it can be had at once; else None."""
    if (
        _is_watched() or _known is None or not _are_plain(causal, scale, softcap)
        or (return_lse is not True and return_lse is not False)
        or not (isinstance(k, Tensor) and isinstance(v, Tensor)) or q.is_neg() or k.is_neg() or v.is_neg()
    ):  # fmt: skip
        return None
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        from .autograd import Attention

        how = How(Options(causal=causal, scale=scale, softcap=softcap), simple=True)
        out, lse = Attention.apply(q, k, v, None, None, how)
        return (out, lse) if return_lse else out
    facts = (CAUSAL if causal else 0) | (LSE if return_lse else 0) | _threads(torch_threads()) * THREADS
    result = _known.fold(q, k, v, facts, scale, softcap, *PLAIN, team())
    if result is None:
        if q.dim() < 3 or not all(_is_plain(x) for x in (q, k, v)):
            return None
        want = Want.LSE if return_lse else Want(0)
        call = folded(q, k, v, Options(causal=causal, scale=scale, softcap=softcap), want=want)
        out, lse = leave(call.out), leave(call.lse) if return_lse else None
        _remember(call, (q, k, v), (facts, scale, softcap, *PLAIN), (out, lse) if return_lse else (out,))
        result = (out, lse) if return_lse else out
    return result


def known_with(q: Any, k: Any, v: Any, o: Options, return_lse: Any) -> Any:
    """The same for a call with lengths, a window, slopes or sinks, or with a cache for its keys and values."""
    if (
        _is_watched() or _known is None or not may_be_known(o) or (return_lse is not True and return_lse is not False)
        or not (_is_constant(q) and _is_constant(o.alibi) and _is_constant(o.sinks))
        or (v is not None and not (_is_constant(k) and _is_constant(v)))
        or (found := beside(k, v, o)) is None
    ):  # fmt: skip
        return None
    stored, keys, values, given = found
    facts = (CAUSAL if o.causal else 0) | (LSE if return_lse else 0) | _threads(torch_threads()) * THREADS
    left, right = (-1 if n is None else n for n in o.window or (None, None))
    key = (facts, o.scale, o.softcap, left, right, given)
    negated = stored is not None and (
        _is_negated(keys) or _is_negated(values) or _is_negated(stored.k_scale) or _is_negated(stored.v_scale)
    )
    result = None if negated else _known.fold(q, keys, values, *key, team())
    if result is None:
        call = folded(q, k if stored is None else stored, v, o, want=Want.LSE if return_lse else Want(0))
        out, lse = leave(call.out), leave(call.lse) if return_lse else None
        if not negated:
            _remember(call, (q, keys, values), key, (out, lse) if return_lse else (out,))
        result = (out, lse) if return_lse else out
    return result


def _is_constant(x: Any) -> bool:
    """Whether `x` is what its memory says, and no gradient of it is asked for."""
    if x is None or type(x) is np.ndarray:
        return True
    if not isinstance(x, Tensor):
        return False
    return _is_plain(x) and not x.is_neg() and not (x.requires_grad and is_grad_enabled())


def _is_negated(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_neg()


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.layout is torch.strided


def run(q: Any, k: Any, v: Any, how: How, out: Any = None) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    if how.simple and (
        result := known(q, k, v, how.options.causal, how.options.scale, how.options.softcap, True)
    ):
        return result
    call = folded(q, k, v, how.options, want=Want.LSE, backend=how.backend, plan=how.plan, out=out)
    return leave(call.out) if out is None else out, leave(call.lse)


def known_gradients(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, *, causal: Any = False, scale: Any = None,
    softcap: Any = None, **others: Any,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """Gradients of a call that has no other arguments and no gradient of its lse, if they can be had at once."""
    tensors = (q, k, v, out, lse, dout)
    if _known is None or others or not _are_plain(causal, scale, softcap):
        return None
    if not all(isinstance(x, Tensor) and _is_plain(x) and not x.is_neg() for x in tensors):
        return None
    how = How(Options(causal=causal, scale=scale, softcap=softcap), simple=True)
    return gradients(*tensors, None, how)


def gradients(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any, how: How
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbias, dsinks)."""
    o = how.options
    tensors = (q, k, v, out, lse, dout)
    if not (how.simple and dlse is None and _known is not None) or dout.is_neg():
        grads = differentiated(*tensors, dlse, o, backend=how.backend)
        return tuple(None if g is None else leave(g) for g in grads)
    facts = (CAUSAL if o.causal else 0) | GRAD | _threads(torch_threads()) * THREADS
    result = _known.gradient(*tensors, facts, o.scale, o.softcap, team())
    if result is None:
        result = tuple(leave(g) for g in differentiated(*tensors, None, o)[:3])
        call = understand(q, k, v, o, want=Want.LSE | Want.GRAD)
        _remember(call, tensors, (facts, o.scale, o.softcap, *PLAIN), result)
    return (*result, None, None)


def _remember(
    call: Call, tensors: tuple[Any, ...], key: tuple[Any, ...], results: tuple[Tensor, ...]
) -> None:
    """Keep what was understood, if the native core runs it as it is, under its tensors and the rest of its `key`."""
    if call.plan.backend != "native" or call.squeeze or call.operands.mask is not None:
        return
    if _known is not None:
        made = [(tuple(x.shape), x.stride(), x.dtype) for x in results]
        _known.remember(list(tensors), *key, running(call.plan), made)
