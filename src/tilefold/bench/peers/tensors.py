"""NumPy arrays as torch tensors over the same memory, and back: shared by all peers that stand on torch."""

from __future__ import annotations

from typing import Any

import numpy as np


def tensor(x: np.ndarray) -> Any:
    """torch does not know NumPy's bfloat16, so it is told the bits and then what they are."""
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(out: Any, dtype: str) -> np.ndarray:
    return np.asarray(out.float() if dtype == "bfloat16" else out)
