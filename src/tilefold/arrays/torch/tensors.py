"""A tensor as a NumPy view of its memory, and back.

NumPy has no bfloat16 and no float8: `ml_dtypes` brings them. What lies elsewhere, or does not lie as it reads (negated
views, sparse tensors, tensors that stand for others), is brought here where that is a copy of the tensor, else refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...dtypes import name_of

# Types that NumPy does not have: their names there, and the tensors of the same bits.
FOREIGN = {
    torch.bfloat16: ("bfloat16", torch.uint16),
    torch.float8_e4m3fn: ("float8_e4m3fn", torch.uint8),
}


def enter(name: str, x: Tensor) -> np.ndarray:
    """The argument `name` as a view; never a copy, but for negated views."""
    if (why := _why_not(x)) is not None:
        raise TypeError(f"{name} {why}")
    x = x.detach().resolve_neg()
    if x.dtype in FOREIGN:
        name, bits = FOREIGN[x.dtype]
        return np.asarray(x.view(bits).numpy().view(brought(name)))
    return x.numpy()


def leave(x: np.ndarray) -> Tensor:
    """An array that a call made, as a tensor over the same memory."""
    for dtype, (name, _) in FOREIGN.items():
        if name_of(x.dtype) == name:
            return torch.from_numpy(x.view(f"u{x.itemsize}")).view(dtype)
    return torch.from_numpy(x)


def _why_not(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return (
            f"is a tensor on {x.device}, and this version of tilefold computes on the CPU: "
            "pass tensor.cpu(), or leave attention on that device to torch"
        )
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        return f"is a {layout} tensor; tensors must be strided"
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {type(x).__name__} that stands for other tensors and has no memory of its own"
    if x.is_quantized:
        return f"is a quantised tensor of {x.dtype}; pass tensor.dequantize()"
    if x.is_conj():
        return "is a conjugated view; attention is of real numbers"
    return None


def brought(name: str) -> np.dtype:
    """A type that NumPy does not have."""
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(
            f"{name} tensors need the package ml_dtypes: pip install 'tilefold[torch]'"
        ) from None
    return np.dtype(getattr(ml_dtypes, name))


def order_of(model: Tensor) -> tuple[list[int], list[int]]:
    """The axes of `model` as they lie in memory, farthest steps first, and back: the twin of `layouts.order_of`."""
    slots = [axis for axis in range(model.dim()) if model.stride(axis) != 0]
    there = list(range(model.dim()))
    for slot, axis in zip(slots, sorted(slots, key=lambda axis: -model.stride(axis)), strict=True):
        there[slot] = axis
    return there, sorted(range(model.dim()), key=there.__getitem__)


def empty_like(model: Tensor, shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor whose axes lie in memory in the order of those of `model`."""
    there, back = order_of(model)
    return model.new_empty([shape[axis] for axis in there], dtype=dtype).permute(back)
