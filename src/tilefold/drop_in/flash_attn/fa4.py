"""flash-attn 4's functions, those of ``flash_attn.cute``. Layout as in version 2.

What differs from 3: None is infinite in a window and -1 a real offset; `learnable_sink`; the result is always the pair
(out, lse), lse None unless it was asked for or a gradient will be; the lse that was asked for is differentiable. A row
that sees no key has lse -inf, or its sink. Beyond the original: float32 and float64, a gradient for the sink and under
pages, softcap with a gradient in ragged calls.
"""

from __future__ import annotations

from typing import Any

from . import checks, fa3, sight
from .calls import Scores, dense, ragged

Tensor = Any

NO_MOD = (
    "scores and masks written as device code are not offered; tilefold.attention takes a bias and any mask"
)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, qv: None = None, gather_kv_indices: None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None), learnable_sink: Tensor | None = None,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
    score_mod: None = None, score_mod_bwd: None = None, mask_mod: None = None, aux_tensors: None = None,
    aux_scalars: None = None, block_sparse_tensors: None = None, block_sparse_tensors_bwd: None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of batches.

    Args:
        q: (batch, q_len, heads, dim); k: (batch, kv_len, kv_heads, dim); v: (batch, kv_len, kv_heads, v_dim).
        softmax_scale: ``1 / sqrt(dim)`` by default.
        causal: query i sees key j iff ``j <= i + kv_len - q_len``; replaces the right limit of the window.
        window_size: (left, right), None infinite: ``-left <= j - (i + kv_len - q_len) <= right``. Negative limits are
            offsets; two whose sum is negative are no window.
        learnable_sink: (heads,) logits: one more key per head without a value, neither scaled nor capped.
        softcap: ``cap * tanh(score / cap)`` unless 0.
        num_splits, pack_gqa, deterministic: accepted; they choose a schedule, and here there is one.
        qv and all after deterministic but return_lse: must be None.

    Returns:
        out (batch, q_len, heads, v_dim), and lse (batch, heads, q_len), the sink included: differentiable with
        `return_lse`, without it a plain tensor if q, k or v requires a gradient, else None.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what was expected.
        NotImplementedError: an option of the original that is not offered.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 100, 8, 64, dtype=torch.bfloat16)
    >>> sink = torch.zeros(8, dtype=torch.bfloat16)
    >>> out, lse = flash_attn_func(q, k, v, window_size=(15, 0), learnable_sink=sink, return_lse=True)
    >>> lse.shape
    torch.Size([2, 8, 100])
    """
    _absent(
        qv, gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd, mask_mod=mask_mod,
        aux_tensors=aux_tensors, aux_scalars=aux_scalars, block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
    )  # fmt: skip
    checks.batches(q, k, v)
    scores = _scores(q, causal, window_size, softmax_scale, softcap, learnable_sink)
    want_lse = return_lse or _will_have_gradients(q, k, v)
    out, lse = dense(q, k, v, scores, want_lse)
    return out.contiguous(), lse if return_lse or lse is None else lse.detach()


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, qv: None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    gather_kv_indices: None = None, page_table: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, score_mod: None = None,
    score_mod_bwd: None = None, mask_mod: None = None, block_sparse_tensors: None = None,
    aux_tensors: None = None, aux_scalars: None = None, return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of sequences that are packed, in a batch with unused ends, or, keys and values, in pages.

    Args:
        q: (total_q, heads, dim) with cu_seqlens_q, else (batch, q_len, heads, dim).
        k, v: (total_k, kv_heads, ...) with cu_seqlens_k, (pages, page_len, kv_heads, ...) with page_table, else
            (batch, kv_len, kv_heads, ...).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), cumulative lengths from 0.
        max_seqlen_q, max_seqlen_k: at least the longest sequence, if given. min_seqlen_k: accepted.
        seqused_q, seqused_k: int32 (batch,), how many of each sequence's rows count, the first ones; others are
            ignored, their out is 0 and their lse -inf.
        page_table: int32 (batch, pages per sequence). Only entries that a length reaches are looked at.

    Returns:
        out in q's layout, and lse as `flash_attn_func` does: (heads, total_q), or (batch, heads, q_len) of a batch.

    The other arguments are those of `flash_attn_func`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 100, 8, 64)
    >>> ends = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
    >>> out, lse = flash_attn_varlen_func(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, causal=True)
    >>> out.shape, lse
    (torch.Size([100, 8, 64]), None)
    """
    _absent(
        qv, gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd, mask_mod=mask_mod,
        aux_tensors=aux_tensors, aux_scalars=aux_scalars, block_sparse_tensors=block_sparse_tensors,
    )  # fmt: skip
    queries, keys = fa3.sides(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)
    for name, most, side in (("max_seqlen_q", max_seqlen_q, queries), ("max_seqlen_k", max_seqlen_k, keys)):
        if most is not None:
            checks.maximum(name, most, side.counts)
    scores = _scores(q, causal, window_size, softmax_scale, softcap, learnable_sink)
    want_lse = return_lse or _will_have_gradients(q, k, v)
    out, lse = ragged(q, k, v, queries, keys, scores, want_lse)
    return out.contiguous(), lse if return_lse or lse is None else lse.detach()


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: Any = None,
    cu_seqlens: Tensor | None = None, seqused: Tensor | None = None, return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Version 3's `flash_attn_combine`, of packed sequences (splits, total_q, heads, dim) too.

    cu_seqlens and seqused say which rows the original may skip; here all are joined.
    """
    whole, lse = fa3.flash_attn_combine(out_partial, lse_partial, out, out_dtype)
    return whole, lse if return_lse else None


def _absent(qv: Any, gather_kv_indices: Any, **modifiers: Any) -> None:
    checks.absent(fa3.NO_QV, qv=qv)
    checks.absent("attention over keys picked per query is not offered", gather_kv_indices=gather_kv_indices)
    checks.absent(NO_MOD, **modifiers)


def _scores(
    q: Tensor, causal: bool, window_size: Any, scale: float | None, softcap: float | None, sink: Any
) -> Scores:
    if sink is not None:
        checks.floats(learnable_sink=sink)
        checks.shape("learnable_sink", sink, q.shape[-2])
    return Scores(sight=sight.fa4(causal, window_size), scale=scale, softcap=softcap, sinks=sink)


def _will_have_gradients(*given: Tensor) -> bool:
    import torch

    return torch.is_grad_enabled() and any(x.requires_grad for x in given)
