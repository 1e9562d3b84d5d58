"""Gradients of statistics of the weights: of `entropy`, `mass_in` and `key_mass`; others are constants.

What a statistic is was found by the sweeps; how it changes is asked of ordinary attention, when backward comes. The
mass of a region is ``exp(lse of the region - lse)``. The masses of keys, weighted by g, are attention to the values g.
The entropy is ``lse - sum(w * s)``; without a softcap or a bias the mean score is ``scale * q . attention(q, k, k)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ...call import Options, mask_of
from ...probes.statistic import Filled, Statistic
from ...taps import Keys, Mass, Tapped
from . import tensors
from .autograd import Attention
from .calls import How


def differentiable(
    found: dict[str, Any], statistics: Sequence[Statistic], filled: Filled, squeeze: bool,
    q: Tensor, k: Tensor, o: Options,
) -> dict[str, Any]:  # fmt: skip
    """`found` with tensors that autograd knows in the place of those statistics that have a derivative."""
    through = _Through(filled.problem, filled.operands, q, k, o)
    return found | {s.name: s.result(through, squeeze) for s in statistics if s.smooth}


@dataclass(frozen=True)
class _Through(Filled):
    """What the sweeps filled, as functions of the call's tensors."""

    q: Tensor
    k: Tensor
    o: Options

    def __getitem__(self, tap: Tapped) -> Any:
        value = tensors.leave(np.ascontiguousarray(Filled.__getitem__(self, tap)))
        lift = self.q.dim() == 2  # one head
        q, k = (x[None] if lift else x for x in (self.q, self.k))
        return _Statistic.apply(q, k, self.o.bias, self.o.sinks, value, self._way(tap))

    def _way(self, tap: Tapped) -> Callable[..., Tensor]:
        """The statistic again, by ordinary attention: (q, k, bias, sinks, gradient) to a scalar."""
        p, x = self.problem, self.operands
        o = replace(self.o, bias=None, sinks=None, invariant=False)
        if isinstance(tap, Mass):
            return _mass(o, tap)
        if isinstance(tap, Keys):
            factors = tap.row_weights(p, x)
            return _key_mass(o, None if factors is None else torch.from_numpy(factors), p.group)
        if self.o.softcap is not None or self.o.bias is not None or self.o.alibi is not None:
            raise ValueError(
                "entropy has a gradient for scores without softcap, bias and alibi only: call within torch.no_grad()"
            )
        return _entropy(o, p.scale)


class _Statistic(Function):
    """(q, k, bias, sinks, what was found, the same again) to what was found."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Any, sinks: Any, value: Tensor, again: Any) -> Tensor:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in (q, k, bias, sinks)))
        ctx.again = again
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given = [
            x if x is None else x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors
        ]
        with torch.enable_grad():
            wide = [x if x is None or x.dtype == torch.float64 else x.float() for x in given]
            loss = ctx.again(*wide, gradient)
        wanted = [
            x for x, needed in zip(given, ctx.needs_input_grad, strict=False) if needed and x is not None
        ]
        grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        return *(
            next(grads) if needed and x is not None else None
            for x, needed in zip(given, ctx.needs_input_grad, strict=False)
        ), None, None  # fmt: skip


def _lse(q: Tensor, k: Tensor, bias: Tensor | None, sinks: Tensor | None, o: Options) -> Tensor:
    none = k.new_empty((*k.shape[:-1], 0))
    how = How(replace(o, bias=bias, sinks=sinks), "auto", None)
    return Attention.apply(q, k, none, bias, sinks, how)[1]


def _mass(o: Options, tap: Mass) -> Callable[..., Tensor]:
    whole = mask_of(o)
    region = tap.region if whole is None else whole & tap.region
    inside = replace(o, mask=region, causal=False, window=None)

    def again(q: Tensor, k: Tensor, bias: Any, sinks: Any, gradient: Tensor) -> Tensor:
        part, all_of_it = _lse(q, k, bias, None, inside), _lse(q, k, bias, sinks, o)
        none = torch.isneginf(part)
        gap = torch.where(none, 0, part - torch.where(none, 0, all_of_it))
        return (torch.where(none, 0, gap.exp()) * gradient).sum()

    return again


def _key_mass(o: Options, factors: Tensor | None, group: int) -> Callable[..., Tensor]:
    def again(q: Tensor, k: Tensor, bias: Any, sinks: Any, gradient: Tensor) -> Tensor:
        k = k.repeat_interleave(group, dim=-3) if group > 1 else k
        values = gradient.to(q.dtype)[..., None].contiguous()
        how = How(replace(o, bias=bias, sinks=sinks), "auto", None)
        out = Attention.apply(q, k, values, bias, sinks, how)[0][..., 0]
        return (out if factors is None else out * factors.to(q.dtype).unsqueeze(-2)).sum()

    return again


def _entropy(o: Options, scale: float) -> Callable[..., Tensor]:
    def again(q: Tensor, k: Tensor, bias: Any, sinks: Any, gradient: Tensor) -> Tensor:
        how = How(replace(o, sinks=sinks), "auto", None)
        mean_key, lse = Attention.apply(q, k, k, None, sinks, how)
        live = ~torch.isneginf(lse)
        entropy = torch.where(live, lse, 0) - scale * (q * mean_key).sum(dim=-1)
        if sinks is not None:
            logit = sinks.to(lse.dtype)[:, None]
            entropy = entropy - torch.exp(logit - torch.where(live, lse, torch.inf)) * logit
        return (torch.where(live, entropy, 0) * gradient).sum()

    return again
