"""`merge` in torch's own operations, so that it differentiates, compiles and maps like any other of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tensors import order_of


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Parts of one shape to (out, lse)."""
    first, lse = parts[0]
    wide = torch.promote_types(torch.promote_types(first.dtype, lse.dtype), torch.float32)
    logs = torch.stack([lse.to(wide) for _, lse in parts])
    # A part without keys carries -inf; where all do, logsumexp would have no derivative.
    empty = logs == -torch.inf
    nothing = empty.all(dim=0)
    total = torch.logsumexp(logs.masked_fill(nothing, 0), dim=0)
    weights = torch.exp(logs.masked_fill(empty, 0) - total).masked_fill(empty, 0)
    there, back = order_of(first)  # filling forgets the order of memory, so it is done in that order
    merged = [
        (out.to(wide) * weights[n, ..., None])
        .permute(there)
        .masked_fill(empty[n, ..., None].permute(there), 0)
        for n, (out, _) in enumerate(parts)
    ]
    out = sum(merged[1:], merged[0]).permute(back)
    return out.to(first.dtype), total.masked_fill(nothing, -torch.inf)
