"""flash-attn 2's functions. Layout (batch, length, heads, dim), or packed (total, heads, dim).

Where its meaning surprises: a row that sees no key has out 0 and lse *+inf*; under ALiBi a causal call (the diagonal on
the right, no limit on the left) adds ``slope * j`` rather than ``-slope * |i + kv_len - q_len - j|``, which leaves the
weights alone and raises the lse by ``slope * (i + kv_len - q_len)``; no gradient flows through the lse. All of that is
so here. Beyond the original: float32 and float64, any head size, any page size, keys and values of different head
size, and as `deterministic` says nothing, the same bits for any number of threads in every call.
"""

from __future__ import annotations

from typing import Any

from . import checks, kvcache, sight
from .calls import Scores, Side, dense, in_pages, in_row, ragged, steps

Tensor = Any


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """Attention of batches.

    Args:
        q: (batch, q_len, heads, dim); k: (batch, kv_len, kv_heads, dim); v: (batch, kv_len, kv_heads, v_dim).
            Query head h reads key head ``h // (heads / kv_heads)``.
        dropout_p: must be 0.
        softmax_scale: ``1 / sqrt(dim)`` by default.
        causal: query i sees key j iff ``j <= i + kv_len - q_len``.
        window_size: (left, right) other keys on each side, a negative number is infinite.
        softcap: ``cap * tanh(score / cap)`` if > 0.
        alibi_slopes: (heads,) or (batch, heads).
        deterministic: accepted; it always is.

    Returns:
        out (batch, q_len, heads, v_dim), differentiable; with `return_attn_probs` the triple (out, lse, empty), lse
        (batch, heads, q_len) without a gradient, empty in place of the weights, which exist under dropout only.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what was expected.

    (Dao 2023, arXiv 2307.08691.)

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 100, 8, 64, dtype=torch.bfloat16)
    >>> flash_attn_func(q, k, v, causal=True).shape
    torch.Size([2, 100, 8, 64])
    """
    checks.no_dropout(dropout_p)
    checks.batches(q, k, v)
    slopes = checks.slopes(alibi_slopes, q.shape[0], q.shape[2])
    seen = sight.fa2(causal, window_size, k.shape[1])
    scores = Scores(sight=seen, scale=softmax_scale, softcap=max(softcap, 0.0), alibi=slopes)
    out, lse = dense(q, k, v, scores, return_attn_probs)
    if not return_attn_probs:
        return out
    return out, lse_of_batch(lse, scores, k.shape[1] - q.shape[1]), q.new_empty(0)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """`flash_attn_func` of keys and values in one tensor kv (batch, kv_len, 2, kv_heads, dim)."""
    checks.tensor("kv", kv)
    checks.shape("kv", kv, "batch", "kv_len", 2, "kv_heads", "dim")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """`flash_attn_func` of queries, keys and values in one tensor qkv (batch, length, 3, heads, dim)."""
    checks.tensor("qkv", qkv)
    checks.shape("qkv", qkv, "batch", "length", 3, "heads", "dim")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Any:  # fmt: skip
    """Attention of sequences packed one after another, empty ones too.

    Args:
        q: (total_q, heads, dim); k: (total_k, kv_heads, dim); v: (total_k, kv_heads, v_dim). Rows after the last
            sequence are ignored, their out is 0.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), cumulative lengths from 0.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: int32 (batch, pages per sequence): k and v are then pages (pages, page_len, kv_heads, dim), those
            of sequence b named in order by row b. Only pages that a length reaches are read.

    Returns:
        out (total_q, heads, v_dim); with `return_attn_probs` (out, lse (heads, total_q), empty).

    The other arguments are those of `flash_attn_func`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 100, 8, 64)
    >>> ends = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, ends, ends, 70, 70, causal=True).shape
    torch.Size([100, 8, 64])
    """
    checks.no_dropout(dropout_p)
    checks.floats(q=q, k=k, v=v)
    checks.shape("q", q, "total_q", "heads", "dim")
    checks.heads(q, k, v)
    q_ends = checks.cumulative("cu_seqlens_q", cu_seqlens_q, len(q))
    batch = len(q_ends) - 1
    queries = in_row(q, q_ends, None)
    if block_table is None:
        checks.shape("k", k, "total_k", "kv_heads", q.shape[2])
        keys = in_row(k, checks.cumulative("cu_seqlens_k", cu_seqlens_k, len(k), batch), None)
    else:
        checks.shape("k", k, "pages", "page_len", "kv_heads", q.shape[2])
        k_ends = checks.cumulative(
            "cu_seqlens_k", cu_seqlens_k, 2**62, batch
        )  # the table says what there is room for
        keys = in_pages(k, block_table, k_ends[1:] - k_ends[:-1], batch, "block_table")
    checks.maximum("max_seqlen_q", max_seqlen_q, queries.counts)
    k_most = checks.maximum("max_seqlen_k", max_seqlen_k, keys.counts)
    slopes = checks.slopes(alibi_slopes, batch, q.shape[1])
    seen = sight.fa2(causal, window_size, k_most)
    scores = Scores(sight=seen, scale=softmax_scale, softcap=max(softcap, 0.0), alibi=slopes)
    out, lse = ragged(q, k, v, queries, keys, scores, return_attn_probs)
    return (out, _lse_of_rows(lse, scores, queries, keys), q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """`flash_attn_varlen_func` of keys and values in one tensor kv (total_k, 2, kv_heads, dim)."""
    checks.tensor("kv", kv)
    checks.shape("kv", kv, "total_k", 2, "kv_heads", "dim")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """`flash_attn_varlen_func` of queries, keys and values in one tensor qkv (total, 3, heads, dim)."""
    checks.tensor("qkv", qkv)
    checks.shape("qkv", qkv, "total", 3, "heads", "dim")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None,
    num_splits: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Attention over a cache, to which k and v, if given, are appended in place first. No gradient.

    Args:
        q: (batch, q_len, heads, dim).
        k_cache, v_cache: (cache_batch, capacity, kv_heads, dim), or pages (pages, page_len, kv_heads, dim) with
            `block_table`; the last dimension contiguous.
        k, v: (batch, new, kv_heads, dim), written from row cache_seqlens on. All or nothing: an error leaves the cache
            as it was, and what does not fit is an error.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2). k is rotated to positions cache_seqlens, + 1, ...; so is q
            if the call is causal or has a window, else all of q is rotated to position cache_seqlens.
        cache_seqlens: rows in use before the call, an integer or int32 (batch,); it is not advanced. All rows by
            default.
        cache_batch_idx: int32 (batch,): the cache's sequence for each of q. If one is named twice and written, either
            may remain.
        cache_leftpad: int32 (batch,): the first row that counts; cache_seqlens includes those before.
        block_table: int32 (batch, pages per sequence). Only entries that a length reaches are looked at.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, rotary_dim / 2), ...
        num_splits: accepted; the same bits come out for any number.

    Returns:
        out (batch, q_len, heads, v_dim); with `return_softmax_lse` (out, lse (batch, heads, q_len)).

    The other arguments are those of `flash_attn_func`, causal and window count from the end of each sequence.

    >>> import torch
    >>> k_cache, v_cache = torch.zeros(2, 4, 1024, 8, 64)
    >>> q, k, v = torch.randn(3, 4, 1, 8, 64)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=100, causal=True).shape
    torch.Size([4, 1, 8, 64])
    """
    store = kvcache.Store(q, k_cache, v_cache, cache_batch_idx, cache_leftpad, block_table, "block_table")
    seen = sight.fa2(causal, window_size, store.capacity)
    slopes = checks.slopes(alibi_slopes, len(q), q.shape[2])
    scores = Scores(sight=seen, scale=softmax_scale, softcap=max(softcap, 0.0), alibi=slopes)
    rotary = kvcache.tables_of(rotary_cos, rotary_sin, rotary_interleaved)
    out, lse, counts = kvcache.attend(store, q, k, v, cache_seqlens, scores, rotary, return_softmax_lse)
    if not return_softmax_lse:
        return out
    return out, lse_of_batch(lse, scores, (counts - q.shape[1])[:, None, None])


def lse_of_batch(lse: Tensor, scores: Scores, offset: Any) -> Tensor:
    """flash-attn 2's lse (batch, heads, q_len) from the natural one; query 0 stands at key `offset`."""
    import torch

    lse = lse.detach()
    if scores.alibi is not None and scores.sight.causal:
        at = torch.arange(lse.shape[-1], device="cpu") + offset
        lse = lse + scores.alibi[..., None].to(lse.dtype) * at
    return _unseen(lse)


def _lse_of_rows(lse: Tensor, scores: Scores, queries: Side, keys: Side) -> Tensor:
    """The same for (heads, total)."""
    lse = lse.detach()
    if scores.alibi is not None and scores.sight.causal:
        which, place = steps(queries.counts)
        at = place + (keys.counts - queries.counts)[which]
        slopes = scores.alibi.to(lse.dtype)
        slope = slopes[:, None] if slopes.ndim == 1 else slopes[which].T
        lse = lse.clone()
        lse[:, : len(at)] += slope * at
    return _unseen(lse)


def _unseen(lse: Tensor) -> Tensor:
    """A row that sees no key: +inf, which is what this version's kernels write."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))
