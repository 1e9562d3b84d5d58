"""A tensor as a NumPy view of its memory, and back.

NumPy has no bfloat16 of its own: `ml_dtypes` brings it. What lies elsewhere, or does not lie as it reads (negated
views, sparse tensors, tensors that stand for others), is brought here where that is a copy of the tensor, else refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def enter(name: str, x: Tensor) -> np.ndarray:
    """The argument `name` as a view; never a copy, but for negated views."""
    if (why := _why_not(x)) is not None:
        raise TypeError(f"{name} {why}")
    x = x.detach().resolve_neg()
    if x.dtype == torch.bfloat16:
        return np.asarray(x.view(torch.uint16).numpy().view(_bfloat16()))
    return x.numpy()


def leave(x: np.ndarray) -> Tensor:
    """An array that a call made, as a tensor over the same memory."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
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
    if x.is_conj():
        return "is a conjugated view; attention is of real numbers"
    return None


def _bfloat16() -> np.dtype:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ImportError(
            "bfloat16 tensors need the package ml_dtypes: pip install 'tilefold[torch]'"
        ) from None
    return np.dtype(bfloat16)


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
