"""flash-attn's ``bert_padding``: padded batches (batch, length, ...) to packed sequences (total, ...) and back.

All four are differentiable. The fact to know: `unpad_input` returns five things since version 2.7, the last one how
many rows of each sequence are used where an `unused_mask` sets others aside.
"""

from __future__ import annotations

from typing import Any

from . import checks

Tensor = Any


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` (n,) of `input` (rows, ...)."""
    checks.tensor("input", input)
    at = checks.integers("indices", indices, "n")
    checks.within("indices", at, 0, len(input) - 1)
    return input[at]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse: `values` (n, ...) as the rows `indices` of a tensor of `first_axis_dim` rows, the others 0."""
    checks.tensor("values", values)
    at = checks.integers("indices", indices, len(values))
    checks.within("indices", at, 0, first_axis_dim - 1)
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_put((at,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the rows that a mask selects.

    Args:
        hidden_states: (batch, length, ...).
        attention_mask: (batch, length), booleans or integers: 1 is a row.
        unused_mask: alike, 1 is a row that is allocated but not used; disjoint from attention_mask.

    Returns:
        the rows (total, ...); their indices (total,) into the flattened batch; cu_seqlens int32 (batch + 1,); the
        longest length; and the used lengths int32 (batch,).

    >>> import torch
    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> rows, indices, cu_seqlens, longest, _ = unpad_input(torch.randn(2, 3, 8), mask)
    >>> rows.shape, cu_seqlens.tolist(), longest
    (torch.Size([5, 8]), [0, 2, 5], 3)
    """
    import torch

    checks.tensor("hidden_states", hidden_states)
    checks.tensor("attention_mask", attention_mask)
    checks.shape("attention_mask", attention_mask, *hidden_states.shape[:2])
    masks = attention_mask
    if unused_mask is not None:
        checks.tensor("unused_mask", unused_mask)
        checks.shape("unused_mask", unused_mask, *attention_mask.shape)
        masks = attention_mask + unused_mask
    lengths = masks.sum(-1, dtype=torch.int32)
    indices = masks.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    used = attention_mask.sum(-1, dtype=torch.int32)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: rows (total, ...) to (batch, seqlen, ...), 0 where there was none."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
