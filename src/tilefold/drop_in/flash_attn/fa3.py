"""flash-attn 3's functions, those of ``flash_attn_interface``. Layout as in version 2.

What differs from 2: no dropout and no ALiBi, so their arguments are gone; a row that sees no key has lse *-inf*;
`return_attn_probs` gives a pair; sequences may leave rows unused (`seqused`), which come back as 0; `attention_chunk`;
and `flash_attn_with_kvcache` returns four things with the lse, the last two (the partial results of splits) empty here.
No gradient flows through the lse. Beyond the original: float32 and float64, gradients under `attention_chunk`.
"""

from __future__ import annotations

from typing import Any

from ...api import merge
from ...masks import chunked
from . import checks, kvcache, sight
from .calls import Scores, Side, dense, in_batch, in_pages, in_row, ragged

Tensor = Any

NO_QV = "attention with a second query for the values is not offered"
NO_FP8 = "8-bit floats and their descale factors are not offered; convert q, k and v to bfloat16"


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: None = None,
    q_descale: None = None, k_descale: None = None, v_descale: None = None,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
    num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """Attention of batches.

    Args:
        q: (batch, q_len, heads, dim); k: (batch, kv_len, kv_heads, dim); v: (batch, kv_len, kv_heads, v_dim).
        softmax_scale: ``1 / sqrt(dim)`` by default.
        causal: query i sees key j iff ``j <= i + kv_len - q_len``.
        window_size: (left, right) other keys on each side, a negative number is infinite.
        attention_chunk: positions in chunks of this size see only their own chunk, if > 0.
        softcap: ``cap * tanh(score / cap)`` if > 0.
        qv, q_descale, k_descale, v_descale: must be None.
        num_splits, pack_gqa, deterministic, sm_margin: accepted; they choose a schedule, and here there is one.

    Returns:
        out (batch, q_len, heads, v_dim), differentiable; with `return_attn_probs` (out, lse (batch, heads, q_len)).

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what was expected.
        NotImplementedError: an option of the original that is not offered.

    (Shah et al. 2024, arXiv 2407.08608.)

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 100, 8, 64, dtype=torch.bfloat16)
    >>> out, lse = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    >>> lse.shape
    torch.Size([2, 8, 100])
    """
    checks.absent(NO_QV, qv=qv)
    checks.absent(NO_FP8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    checks.batches(q, k, v)
    seen = sight.fa3(causal, window_size, q.shape[1], k.shape[1])
    out, lse = dense(q, k, v, _scores(seen, softmax_scale, softcap, attention_chunk), return_attn_probs)
    return (out.contiguous(), lse.detach()) if lse is not None else out.contiguous()


def flash_attn_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False, q_descale: None = None,
    k_descale: None = None, v_descale: None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, deterministic: bool = False,
    num_heads_q: int | None = None, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """`flash_attn_func` of queries, keys and values in one tensor: qkv (batch, length, 3, heads, dim), or
    (batch, length, num_heads_q + 2 * kv_heads, dim)."""
    checks.tensor("qkv", qkv)
    if qkv.ndim == 5:
        checks.shape("qkv", qkv, "batch", "length", 3, "heads", "dim")
        q, k, v = qkv.unbind(2)
    else:
        checks.shape("qkv", qkv, "batch", "length", "heads + 2 * kv_heads", "dim")
        if num_heads_q is None:
            raise TypeError("num_heads_q must say how many heads of a 4-D qkv are queries, got None")
        kv_heads, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd or kv_heads < 0 or num_heads_q < 0:
            raise ValueError(
                f"num_heads_q leaves no keys and values of {qkv.shape[2]} heads, got {num_heads_q}"
            )
        q, k, v = qkv.split([num_heads_q, kv_heads, kv_heads], 2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk,
        softcap, deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None, max_seqlen_k: int | None, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    qv: None = None, q_descale: None = None, k_descale: None = None, v_descale: None = None,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
    num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """Attention of sequences packed one after another, empty ones too.

    Args:
        q: (total_q, heads, dim); k: (total_k, kv_heads, dim); v: (total_k, kv_heads, v_dim). Where a cu_seqlens is
            None the tensor is a batch (batch, length, ...) instead.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), cumulative lengths from 0.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        seqused_q, seqused_k: int32 (batch,), how many of each sequence's rows count, the first ones. A sequence ends
            there: causal and windows align to it. Others are ignored, their out is 0 and their lse -inf.

    Returns:
        out in q's layout; with `return_attn_probs` (out, lse (heads, total_q)), or (batch, heads, q_len) of a batch.

    The other arguments are those of `flash_attn_func`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 100, 8, 64)
    >>> ends = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, ends, ends, 70, 70, causal=True).shape
    torch.Size([100, 8, 64])
    """
    checks.absent(NO_QV, qv=qv)
    checks.absent(NO_FP8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    queries, keys = sides(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None)
    q_most = checks.maximum("max_seqlen_q", max_seqlen_q, queries.counts)
    k_most = checks.maximum("max_seqlen_k", max_seqlen_k, keys.counts)
    seen = sight.fa3(causal, window_size, q_most, k_most)
    scores = _scores(seen, softmax_scale, softcap, attention_chunk)
    out, lse = ragged(q, k, v, queries, keys, scores, return_attn_probs)
    return (out.contiguous(), lse.detach()) if lse is not None else out.contiguous()


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    qv: None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None, q_descale: None = None,
    k_descale: None = None, v_descale: None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: Any = None, num_splits: int = 0,
    pack_gqa: bool | None = None, sm_margin: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Attention over a cache, to which k and v, if given, are appended in place first. No gradient.

    Arguments as `flash_attn_with_kvcache` of version 2 has them, and:

    Args:
        page_table: version 2's block_table; pages of any length.
        cu_seqlens_q: int32 (batch + 1,): q is packed (total_q, heads, dim).
        cu_seqlens_k_new: int32 (batch + 1,): k and v are packed (total_new, kv_heads, dim).
        rotary_seqlens: int32 (batch,): where positions of the rotation count from, cache_seqlens by default.
        scheduler_metadata: accepted.

    Returns:
        out in q's layout; with `return_softmax_lse` (out, lse, empty, empty), lse (batch, heads, q_len) or
        (heads, total_q).

    >>> import torch
    >>> k_cache, v_cache = torch.zeros(2, 16, 64, 8, 64)
    >>> q, k, v = torch.randn(3, 4, 1, 8, 64)
    >>> table = torch.arange(16, dtype=torch.int32).view(4, 4)
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=100, page_table=table).shape
    torch.Size([4, 1, 8, 64])
    """
    checks.absent(NO_QV, qv=qv)
    checks.absent(NO_FP8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    q_ends, batch = None, None
    if cu_seqlens_q is not None:
        checks.floats(q=q)
        checks.shape("q", q, "total_q", "heads", "dim")
        q_ends = checks.cumulative("cu_seqlens_q", cu_seqlens_q, len(q))
        batch = len(q_ends) - 1
    store = kvcache.Store(
        q, k_cache, v_cache, cache_batch_idx, cache_leftpad, page_table, "page_table", batch
    )
    new_ends = None
    if cu_seqlens_k_new is not None:
        if k is None:
            raise TypeError("cu_seqlens_k_new says how k is packed, and k is None")
        checks.floats(k=k)
        new_ends = checks.cumulative("cu_seqlens_k_new", cu_seqlens_k_new, len(k), store.batch)
    start = None
    if rotary_seqlens is not None:
        start = checks.integers("rotary_seqlens", rotary_seqlens, store.batch)
        checks.within("rotary_seqlens", start, 0, 2**31 - 1)
    q_most = q.shape[1]
    if q_ends is not None:
        q_most = checks.maximum("max_seqlen_q", max_seqlen_q, q_ends[1:] - q_ends[:-1])
    seen = sight.fa3(causal, window_size, q_most, store.capacity)
    scores = _scores(seen, softmax_scale, softcap, attention_chunk)
    rotary = kvcache.tables_of(rotary_cos, rotary_sin, rotary_interleaved)
    out, lse, _ = kvcache.attend(
        store, q, k, v, cache_seqlens, scores, rotary, return_softmax_lse, q_ends, new_ends, start
    )
    if lse is None:
        return out.contiguous()
    return out.contiguous(), lse, lse.new_empty(0), lse.new_empty(0)


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: Any = None
) -> tuple[Tensor, Tensor]:
    """Join the attention of the same queries over disjoint keys. No gradient.

    Args:
        out_partial: (splits, batch, q_len, heads, dim); lse_partial: (splits, batch, q_len, heads), -inf where a
            split has no key for a query.
        out: tensor to write to, (batch, q_len, heads, dim).
        out_dtype: its type, that of out_partial by default.

    Returns:
        out, and lse (batch, q_len, heads).

    >>> import torch
    >>> out, lse = flash_attn_combine(torch.randn(3, 2, 10, 8, 64), torch.randn(3, 2, 10, 8))
    >>> out.shape, lse.shape
    (torch.Size([2, 10, 8, 64]), torch.Size([2, 10, 8]))
    """
    import torch

    checks.floats(out_partial=out_partial)
    checks.floats(lse_partial=lse_partial)
    if out_partial.ndim < 2 or not len(out_partial):
        raise ValueError(
            f"out_partial must have shape (splits, ..., heads, dim), got {tuple(out_partial.shape)}"
        )
    checks.shape("lse_partial", lse_partial, *out_partial.shape[:-1])
    with torch.no_grad():
        whole, lse = merge(*zip(out_partial, lse_partial, strict=True))
        if out is None:
            return whole.to(out_dtype or out_partial.dtype), lse
        checks.floats(out=out)
        checks.shape("out", out, *whole.shape)
        if out_dtype is not None and out.dtype != out_dtype:
            raise TypeError(f"out must be out_dtype, {out_dtype}; got {out.dtype}")
        return out.copy_(whole), lse


def sides(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any,
    page_table: Any,
) -> tuple[Side, Side]:  # fmt: skip
    """Where the rows of each sequence are: packed, in a batch or in pages. Versions 3 and 4 mean the same by it."""
    checks.floats(q=q, k=k, v=v)
    if cu_seqlens_q is None:
        checks.shape("q", q, "batch", "q_len", "heads", "dim")
        batch = len(q)
    else:
        checks.shape("q", q, "total_q", "heads", "dim")
        q_ends = checks.cumulative("cu_seqlens_q", cu_seqlens_q, len(q))
        batch = len(q_ends) - 1
    checks.heads(q, k, v)
    if page_table is not None:
        checks.shape("k", k, "pages", "page_len", "kv_heads", q.shape[-1])
        if cu_seqlens_k is not None:
            raise ValueError("page_table excludes cu_seqlens_k: seqused_k says how long each sequence is")
        checks.tensor("page_table", page_table)
        room = k.shape[1] * page_table.shape[-1] if page_table.ndim == 2 else 0
        counts = _used("seqused_k", seqused_k, batch, room)
        keys = in_pages(k, page_table, counts, batch, "page_table")
    elif cu_seqlens_k is None:
        checks.shape("k", k, batch, "kv_len", "kv_heads", q.shape[-1])
        keys = in_batch(k, _used("seqused_k", seqused_k, batch, k.shape[1]))
    else:
        checks.shape("k", k, "total_k", "kv_heads", q.shape[-1])
        k_ends = checks.cumulative("cu_seqlens_k", cu_seqlens_k, len(k), batch)
        counts = None if seqused_k is None else checks.used("seqused_k", seqused_k, k_ends[1:] - k_ends[:-1])
        keys = in_row(k, k_ends, counts)
    if cu_seqlens_q is None:
        return in_batch(q, _used("seqused_q", seqused_q, batch, q.shape[1])), keys
    counts = None if seqused_q is None else checks.used("seqused_q", seqused_q, q_ends[1:] - q_ends[:-1])
    return in_row(q, q_ends, counts), keys


def _used(name: str, x: Any, batch: int, most: int) -> Tensor | None:
    import torch

    return None if x is None else checks.used(name, x, torch.full((batch,), most, device="cpu"))


def _scores(seen: sight.Sight, scale: float | None, softcap: float, attention_chunk: int) -> Scores:
    hidden = chunked(attention_chunk) if attention_chunk > 0 else None
    return Scores(sight=seen, scale=scale, softcap=max(softcap, 0.0), hidden=hidden)
