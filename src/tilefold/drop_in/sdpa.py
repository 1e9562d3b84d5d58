"""PyTorch's scaled_dot_product_attention, meaning what PyTorch means, in memory that grows with the length.

Three ways in: call it; run a block of code under `use()`, where every call of torch's own function is this one; or give
the whole process tilefold's kernels through torch's registry (`register`). The fact to know: is_causal aligns to the
top left here, query i sees key j iff j <= i, while `tilefold.attention(causal=True)` aligns to the bottom right.
"""

from __future__ import annotations

import math
import sys
import warnings
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.attention import register_flash_attention_impl
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from ..api import attention, attention_grad
from ..call import DROPOUT
from ..masks import Mask, causal

_TORCHS = F.scaled_dot_product_attention
_TOP_LEFT = causal(align="top-left")
_BOTTOM_RIGHT = causal()


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `torch.nn.functional.scaled_dot_product_attention` of PyTorch 2.13 gives, exactly and differentiably.

    Args:
        query: ``(..., H, L, E)``, or ``(L, E)``; any strides.
        key, value: ``(..., H, S, E)`` and ``(..., H, S, Ev)``. Leading dimensions broadcast, without a copy.
        attn_mask: booleans, True = attend, or floats of query's type or float32 that are added to the scores, with a
            gradient where they ask for one; broadcastable to ``(..., H, L, S)``. `torch.nn.attention.bias.causal_lower_right`
            and `causal_upper_left` cost no memory here.
        dropout_p: must be 0.
        is_causal: query i sees key j iff ``j <= i``, whatever the lengths; excludes `attn_mask`.
        scale: factor of the scores, ``1 / sqrt(E)`` by default.
        enable_gqa: key and value may have fewer heads; query head h reads key head ``h // (H / Hkv)``. Nothing is copied.

    Returns:
        ``(..., H, L, Ev)`` in query's type and memory order. A row that sees no key is 0. NaN or infinity behind a
        mask reaches no output and no gradient (in PyTorch it may).

    Raises:
        TypeError, ValueError: a wrong kind, value or shape, where PyTorch raises RuntimeError. The message names the argument,
            what it was and what was expected.

    >>> q, k, v = torch.randn(3, 2, 8, 100, 64)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 8, 100, 64])
    """
    if dropout_p:
        raise ValueError(f"dropout_p must be 0, got {dropout_p!r}; {DROPOUT}")
    try:
        q, k, v = query.shape, key.shape, value.shape
        if (q[:-2] != k[:-2] or k[:-2] != v[:-2]) and not (
            enable_gqa and q[:-3] == k[:-3] and k[:-2] == v[:-2]
        ):
            query, key, value = _joined(query, key, value, enable_gqa)
        mask: Mask | Tensor | None = None
        bias = None
        if attn_mask is not None:
            mask, bias = _mask_and_bias(attn_mask, query, key, is_causal)
        elif is_causal is True and q[-2] != k[-2]:
            mask, is_causal = _TOP_LEFT, False
        if scale is not None and isinstance(scale, Tensor):
            scale = scale.item()
        return attention(query, key, value, mask, causal=is_causal, scale=scale, bias=bias)
    except (AttributeError, TypeError, ValueError):
        _complain(query, key, value, attn_mask)
        raise


def _joined(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The three under common leading dimensions, as views. Key heads stay as few as they are where all share them."""
    _complain(query, key, value)
    if enable_gqa:
        key, value = _of_as_many_heads(query, key, value)
        lead = _broadcast(-3, query=query, key=key, value=value)
        return tuple(x.expand(*lead, *x.shape[-3:]) for x in (query, key, value))  # type: ignore[return-value]
    lead = _broadcast(-2, query=query, key=key, value=value)
    shared = lead
    if key.shape[:-2][-1:] == value.shape[:-2][-1:] == (1,):
        shared = (*lead[:-1], 1)
    return (
        query.expand(*lead, *query.shape[-2:]),
        key.expand(*shared, *key.shape[-2:]),
        value.expand(*shared, *value.shape[-2:]),
    )


def _of_as_many_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with equally many heads, which divide those of query. Only where they differ is one repeated."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(f"{name} must have shape (..., heads, length, dim) for enable_gqa, got {_sizes(x)}")
    heads, k_heads, v_heads = query.shape[-3], key.shape[-3], value.shape[-3]
    for name, n in (("key", k_heads), ("value", v_heads)):
        if n == 0 or heads % n:
            raise ValueError(f"{name} must have heads that divide the {heads} of query, got {n}")
    common = math.lcm(k_heads, v_heads)
    if k_heads < common:
        key = key.repeat_interleave(common // k_heads, -3)
    if v_heads < common:
        value = value.repeat_interleave(common // v_heads, -3)
    return key, value


def _broadcast(end: int, **tensors: Tensor) -> tuple[int, ...]:
    """What the leading dimensions, up to `end`, broadcast to."""
    try:
        return tuple(torch.broadcast_shapes(*(x.shape[:end] for x in tensors.values())))
    except RuntimeError:
        shapes = ", ".join(f"{name} {_sizes(x)}" for name, x in tensors.items())
        hint = "" if end == -3 else "; enable_gqa=True shares key heads"
        raise ValueError(f"leading dimensions must broadcast, got {shapes}{hint}") from None


def _mask_and_bias(
    attn_mask: Tensor, query: Tensor, key: Tensor, is_causal: bool
) -> tuple[Mask | Tensor | None, Tensor | None]:
    """An attn_mask as what hides and what is added, one of them None."""
    if is_causal:
        raise ValueError("attn_mask must be None with is_causal=True; torch applies one or the other")
    if isinstance(attn_mask, CausalBias):
        lengths = (query.shape[-2], key.shape[-2])
        if attn_mask.variant is CausalVariant.UPPER_LEFT:
            return _TOP_LEFT, None
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != lengths:
            raise ValueError(
                f"attn_mask must be made for the lengths of query and key {lengths}, "
                f"got {(attn_mask.seq_len_q, attn_mask.seq_len_kv)}"
            )
        return _BOTTOM_RIGHT, None
    if attn_mask.dtype is torch.bool:
        return attn_mask, None
    if attn_mask.dtype is not torch.float32 and attn_mask.dtype is not query.dtype:
        raise TypeError(f"attn_mask must be bool, float32 or {query.dtype} as query is, got {attn_mask.dtype}")
    return None, attn_mask


def _complain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> None:
    """What is wrong with the tensors, by the names of this signature. Asked only once something is."""
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    if attn_mask is None:
        del tensors["attn_mask"]
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.device.type != "cpu":
            raise TypeError(f"{name} must be in CPU memory, got a tensor on {x.device}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2:
            raise ValueError(f"{name} must have shape (..., length, dim), got {_sizes(x)}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} as query is, got {x.dtype}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's last dimension {query.shape[-1]}, got {_sizes(key)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have key's length {key.shape[-2]}, got {_sizes(value)}")
    if attn_mask is not None and not isinstance(attn_mask, CausalBias):
        shape = (*_broadcast(-2, query=query, key=query), query.shape[-2], key.shape[-2])
        try:
            fits = torch.broadcast_shapes(attn_mask.shape, shape)[-2:] == shape[-2:]
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"attn_mask must broadcast to (..., {shape[-2]}, {shape[-1]}), got {_sizes(attn_mask)}")


def _sizes(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
