"""The weights and the output as models compute them that return `output_attentions`: the whole matrix, in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def whole_matrix(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> Callable[[], Any]:
    """A call that returns ``(output, weights)``."""
    import torch

    tensors = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, q.dtype.name)) for x in (q, k, v)]
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1) if causal else None

    def call() -> Any:
        a, b, c = tensors
        s = a @ b.mT * a.shape[-1] ** -0.5
        if hidden is not None:
            s = s.masked_fill(hidden, -torch.inf)
        w = torch.softmax(s, dim=-1, dtype=torch.float32).to(a.dtype)
        return w @ c, w

    return call
