"""How a call of flash-attn becomes calls of `tilefold.attention`: batches as they are, ragged ones packed.

All tensors are (..., length, heads, dim) here, and become (..., heads, length, dim) by a view. Packed sequences may
leave rows unused at their ends (`seqused`): then the rows in use are gathered into a private copy, O(n), and nothing
else is read. Pages are read where they lie, but for packed queries that a gradient may be asked of, or that have ALiBi
slopes of each sequence. Rows of no sequence come back as 0, their lse -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...api import attention
from ...frameworks import is_traced
from ...layouts import Stored
from ...masks import Mask
from . import checks
from .sight import Sight

Tensor = Any


@dataclass(slots=True, kw_only=True)
class Scores:
    """How scores are made and who is seen: what all forms of a call share."""

    sight: Sight
    scale: float | None = None
    softcap: float | None = None
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    hidden: Mask | None = None

    def options(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "softcap": self.softcap or None,
            "sinks": self.sinks,
            **self.sight.options(self.hidden),
        }


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    want_lse: bool,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Batches (B, length, heads, dim), or `Pages` for k and v: out alike, lse (B, heads, q_len)."""
    options = scores.options()
    if q_lengths is not None:
        options["q_lengths"] = q_lengths
    if kv_lengths is not None:
        options["kv_lengths"] = kv_lengths
    if scores.alibi is not None:
        options["alibi"] = scores.alibi
    if v is not None:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    out, lse = _called(q.transpose(1, 2), k, v, options, want_lse)
    return out.transpose(1, 2), lse


def packed(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Sequences one after another (total, heads, dim), all rows in use: out alike, lse (heads, total)."""
    import torch

    options = scores.options()
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if scores.alibi is None or scores.alibi.ndim == 1:
        if scores.alibi is not None:
            options["alibi"] = scores.alibi
        options |= {"cu_seqlens_q": q_ends, "cu_seqlens_k": k_ends}
        out, lse = _called(q, k, v, options, want_lse)
        return out.transpose(0, 1), lse
    parts = []  # each sequence has slopes of its own, which a packed call has not
    for slopes, q0, q1, k0, k1 in zip(
        scores.alibi, *(x.tolist() for x in (q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:])), strict=True
    ):
        rows = q[:, q0:q1], k[:, k0:k1], v[:, k0:k1]
        parts.append(_called(*rows, options | {"alibi": slopes}, True))
    if not parts:
        return q.new_empty((0, len(q), v.shape[2])), q.new_empty((len(q), 0), dtype=torch.float32)
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1)


def _called(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    import torch

    if torch.is_autocast_enabled("cpu"):  # which changes no type of flash-attn's inputs
        with torch.autocast("cpu", enabled=False):
            return _called(q, k, v, options, want_lse)
    if want_lse:
        return attention(q, k, v, **options, return_lse=True)
    return attention(q, k, v, **options), None


@dataclass(slots=True)
class Pages:
    """A cache in pages, or without a table in a stretch for each sequence, as `tilefold.attention` takes it."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    table: Tensor | None

    def stored(self) -> Stored:
        return Stored(self.k, self.v, self.lengths, self.table)


@dataclass(slots=True)
class Side:
    """The queries, or the keys, of ragged sequences: where the rows of each are, and how many of them count."""

    counts: Tensor  # (B,) rows in use
    index: (
        tuple[Tensor, ...] | slice | None
    )  # of those rows, one sequence after another; None: made when needed
    rows: tuple[int, ...]  # the leading sizes of the tensor that is indexed
    known_ends: Tensor | None = None  # the cumulative counts
    table: Tensor | None = (
        None  # (B, n) the pages in use of each sequence, -1 for none, where `rows` are pages
    )

    @property
    def batch(self) -> bool:
        """Whether sequences lie in a batch, each beginning where attention expects it."""
        return len(self.rows) == 2 and not isinstance(self.index, tuple) and self.table is None

    @property
    def at(self) -> tuple[Tensor, ...] | slice:
        if self.index is not None:
            return self.index
        which, place = steps(self.counts)
        if self.table is None:
            return which, place
        return self.table[which, place // self.rows[1]], place % self.rows[1]

    @property
    def ends(self) -> Tensor:
        return ends_of(self.counts) if self.known_ends is None else self.known_ends

    def take(self, x: Tensor) -> Tensor:
        """The rows in use, one after another: a view where they lie so, else a copy."""
        at = self.at
        return x.reshape(-1, *x.shape[len(self.rows) :])[at] if isinstance(at, slice) else x[at]

    def give(self, packed: Tensor, fill: float) -> Tensor:
        """The inverse, for results: rows in use where they were, `fill` elsewhere."""
        total = 1
        for n in self.rows:
            total *= n
        at = self.at
        if len(packed) == total and isinstance(at, slice):
            return packed.reshape(*self.rows, *packed.shape[1:])
        whole = packed.new_full((*self.rows, *packed.shape[1:]), fill)
        if isinstance(at, slice):
            flat = whole.reshape(-1, *packed.shape[1:])
            flat[at] = packed
            return flat.reshape(whole.shape)
        return whole.index_put(at, packed)


def ends_of(counts: Tensor) -> Tensor:
    """Cumulative lengths, from 0."""
    ends = counts.new_zeros(len(counts) + 1)
    ends[1:] = counts.cumsum(0)
    return ends


def steps(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of ragged sequences: which sequence it is in, and at which place there."""
    import torch

    which = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    return which, torch.arange(len(which), device="cpu") - ends_of(counts)[which]


def in_batch(x: Tensor, counts: Tensor | None) -> Side:
    """Sequences (B, length, ...), of which `counts` rows are in use, or all."""
    import torch

    batch, length = x.shape[:2]
    if counts is None:
        return Side(torch.full((batch,), length, device="cpu"), slice(None), (batch, length))
    return Side(counts, None, (batch, length))


def in_row(x: Tensor, ends: Tensor, counts: Tensor | None) -> Side:
    """Sequences packed as (total, ...) that end at `ends`, of which the first `counts` rows are in use, or all."""
    lengths = ends[1:] - ends[:-1]
    if counts is None and is_traced(ends):
        return Side(lengths, slice(None), (len(x),), ends)
    if counts is None or bool((counts == lengths).all()):
        return Side(lengths, slice(0, int(ends[-1])), (len(x),), ends)
    which, place = steps(counts)
    return Side(counts, (ends[:-1][which] + place,), (len(x),))


def in_pages(pages: Tensor, table: Any, counts: Tensor | None, batch: int, name: str) -> Side:
    """Sequences in pages (number, page length, ...), those of sequence b named by ``table[b]`` in order.

    Only entries that a sequence in use needs are looked at, as they are all that is read.
    """
    import torch

    entries = checks.integers(name, table, batch, "pages per sequence")
    number, length = pages.shape[:2]
    most = torch.full((batch,), entries.shape[1] * length, device="cpu")
    counts = most if counts is None else counts
    if bool((counts > most).any()):
        raise ValueError(
            f"{name} has room for {entries.shape[1]} pages of {length} rows a sequence, got lengths {counts.tolist()}"
        )
    used = torch.arange(entries.shape[1], device="cpu") * length < counts[:, None]
    checks.within(f"{name}'s entries in use", entries[used], 0, number - 1)
    return Side(counts, None, (number, length), table=entries.where(used, -1))


def ragged(
    q: Tensor, k: Tensor, v: Tensor, queries: Side, keys: Side, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of sequences that lie anywhere: out where q lies; lse (heads, total) if that is packed, else
    (B, heads, q_len)."""
    if queries.batch and keys.batch:
        ends = (side.counts if side.index is None else None for side in (queries, keys))
        return dense(q, k, v, scores, want_lse, *ends)
    pages = None
    if keys.table is not None or keys.batch:
        pages = Pages(k.transpose(1, 2), v.transpose(1, 2), keys.counts, keys.table)
    if queries.batch and pages is not None:
        return dense(q, pages, None, scores, want_lse, queries.counts if queries.index is None else None)
    if pages is not None and _reads_packed(q, k, v, scores):
        options = scores.options() | {"cu_seqlens_q": queries.ends}
        if scores.alibi is not None:
            options["alibi"] = scores.alibi
        out, lse = _called(queries.take(q).transpose(0, 1), pages, None, options, want_lse)
        out = out.transpose(0, 1)
    else:
        rows = queries.take(q), keys.take(k), keys.take(v)
        out, lse = packed(*rows, queries.ends, keys.ends, scores, want_lse)
    out = queries.give(out, 0.0)
    if lse is None:
        return out, None
    return out, queries.give(lse.transpose(0, 1), float("-inf")).transpose(-1, -2).contiguous()


def _reads_packed(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> bool:
    """Whether packed queries can be folded over keys in a cache: no gradient, and one set of slopes for all."""
    import torch

    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v) if x is not None)
    sinks = scores.sinks is not None and torch.is_grad_enabled() and scores.sinks.requires_grad
    slopes = scores.alibi is not None and scores.alibi.ndim > 1
    return not (graded or sinks or slopes or is_traced(q))
