"""`merge` in torch's own operations, so that it differentiates, compiles and maps like any other of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    merged = [
        out.to(wide).masked_fill(empty[n, ..., None], 0) * weights[n, ..., None]
        for n, (out, _) in enumerate(parts)
    ]
    return sum(merged[1:], merged[0]).to(first.dtype), total.masked_fill(nothing, -torch.inf)
