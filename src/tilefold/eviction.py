"""Which keys a cache may forget when it has grown too long, and what it costs: the share of attention on them.

A choice (`Kept`) is made by weight (`heaviest`), by what the last queries look at (`snapkv`) or by place
(`anchors_and_window`), for each key head or one for all; `evict` makes a cache hold no more than it. The fact to know:
afterwards a row's place in the cache is no position. Rows stay as they were appended, rotary embedding included;
`cache.seen_tokens` is the position of the next token, while lengths, windows, ALiBi and arrays over keys count the
places of what is left. A query sees all of that, so decoding goes on as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .api import probe
from .arrays import enter, leave
from .call import is_cache
from .dtypes import known
from .masks import integer
from .probes import key_mass


@dataclass(frozen=True, slots=True)
class Kept:
    """A choice of keys to keep.

    `keys` ``(..., heads, n)``: ascending, of each key head or, with one head, of all; -1 beyond the `counts` ``(...)``
    of a sequence. `lengths` ``(...)``: how many keys it was chosen from. All are of the kind of what chose them.
    """

    keys: Any
    counts: Any
    lengths: Any

    def cells(self, kv_len: int) -> Any:
        """Which of `kv_len` keys are kept, ``(..., heads, kv_len)``.

        >>> anchors_and_window(8, anchors=1, window=2).cells(8).astype(int)
        array([[[1, 0, 0, 0, 0, 0, 1, 1]]])
        """
        keys = enter("keys", self.keys)
        cells = np.zeros((*keys.shape[:-1], kv_len + 1), bool)
        np.put_along_axis(cells, np.where(keys < 0, kv_len, keys), True, axis=-1)
        return leave(self.keys, cells[..., :kv_len].copy())

    def taken(self, x: Any, fill: float = 0) -> Any:
        """What an array over keys ``(..., heads, Sk)`` says of those that are kept, ``(..., heads, n)``, `fill` beyond.

        Masses that are added up while decoding go on this way, as H2O does it.

        >>> kept = anchors_and_window(8, anchors=1, window=2)
        >>> kept.taken(np.arange(8.0)[None, None])
        array([[[0., 6., 7.]]])
        """
        array, keys = enter("x", x), enter("keys", self.keys)
        lead, heads = keys.shape[:-2], keys.shape[-2]
        if array.ndim != keys.ndim or array.shape[:-2] != lead or heads not in (1, array.shape[-2]):
            raise ValueError(f"x must have shape (*{lead}, {heads}, Sk) as the choice has, got {array.shape}")
        if keys.size and array.shape[-1] <= keys.max():
            raise ValueError(f"x must span all keys, of which {keys.max()} is kept; got {array.shape}")
        keys = np.broadcast_to(keys, (*array.shape[:-1], keys.shape[-1]))
        return leave(x, np.where(keys < 0, array.dtype.type(fill), np.take_along_axis(array, keys, axis=-1)))

    def loss(self, q: Any, k: Any, mask: Any = None, **options: Any) -> Any:
        """How much of the attention of these queries lay on keys that are not kept: ``(..., Hq)``, 0 to 1.

        Args:
            q, k: as of `tilefold.probe`; k may be the cache, before it is evicted from.
            mask, options: the masks and score options of the call, such as ``causal=True``.

        Of each query head, the weight on keys that would go, over the weight on all keys. What a learned sink took is
        in neither; a head whose queries see no key loses 0. It is measured on these queries: those to come may differ.

        >>> q, k = np.random.default_rng(0).normal(size=(2, 1, 2, 100, 16))
        >>> kept = heaviest(tf.probe(q, k, tf.key_mass(), causal=True).key_mass, 50)
        >>> kept.loss(q, k, causal=True).round(2)
        array([[0.15, 0.15]])
        """
        found = probe(q, k, key_mass(), mask=mask, **options).key_mass
        mass = enter("key mass", found).astype(np.float64)
        cells = enter("keys", self.cells(mass.shape[-1]))
        lead, heads = cells.shape[:-2], cells.shape[-2]
        if mass.shape[:-2] != lead or mass.shape[-2] % heads:
            raise ValueError(
                f"q must have shape (*{lead}, heads, Sq, dim) with a multiple of the choice's {heads} heads, "
                f"got {tuple(q.shape)}"
            )
        stays = np.repeat(cells, mass.shape[-2] // heads, axis=-2)
        total = mass.sum(axis=-1)
        # Sums of the same shape with zeros in it: rounding is monotone, so more kept keys never lose more.
        lost = np.where(stays, 0, mass).sum(axis=-1) / np.where(total > 0, total, 1)
        return leave(q, lost.astype(enter("key mass", found).dtype))


@dataclass(frozen=True, slots=True)
class Evicted:
    """What `evict` did: the choice, how many keys each sequence dropped ``(batch,)``, and of the queries given the
    share of their attention that lay on those, ``(batch, Hq)``; None without queries."""

    kept: Kept
    dropped: Any
    loss: Any = None

    def __repr__(self) -> str:
        kept, had = (int(x.sum()) for x in (self.kept.counts, self.kept.lengths))
        said = "not measured"
        if self.loss is not None:
            loss = enter("loss", self.loss)
            said = f"{loss.mean():.4f} on average, {loss.max(initial=0):.4f} in the worst head"
        return f"Evicted(kept {kept} of {had} keys; loss of attention mass {said})"


def heaviest(mass: Any, keep: Any, *, recent: int = 0, lengths: Any = None) -> Kept:
    """The keys with the most attention mass, of each head by itself.

    Args:
        mass: ``(..., heads, Sk)``, such as ``tf.probe(q, cache, tf.key_mass(heads="group"), causal=True).key_mass``;
            one head chooses for all.
        keep: how many keys, one integer >= 1 or one for each sequence ``(...)``; all of them where there are fewer.
        recent: so many of them are the last ones in any case.
        lengths: how many keys each sequence has ``(...)``: `cache.lengths`, for a cache's capacity is longer. None: Sk.

    Of equal masses the lower key stays. Over all queries, and with half of the budget recent, this is H2O (Zhang et al.
    2023, arXiv 2306.14048); by the last query's mass, averaged over heads, TOVA (Oren et al. 2024, arXiv 2401.06104):
    ``key_mass(last=1, heads="all")`` and of its result ``[:, None]``.

    >>> kept = heaviest(np.float32([[[3, 0, 2, 5, 0, 1]]]), 3, recent=1)
    >>> kept.keys, kept.counts
    (array([[[0, 3, 5]]]), array([3]))
    """
    array = enter("mass", mass)
    if array.ndim < 2 or not known(array.dtype):
        raise TypeError(
            f"mass must be floating numbers (..., heads, Sk), got {array.dtype.name} {array.shape}"
        )
    lead, kv_len = array.shape[:-2], array.shape[-1]
    ends = _whole("lengths", kv_len if lengths is None else lengths, lead, 0)
    if (ends > kv_len).any():
        raise ValueError(f"lengths must be at most the {kv_len} keys of mass, got {ends.max()}")
    counts = _whole("keep", keep, lead, 1)
    if (counts < integer("recent", recent, 0)).any():
        raise ValueError(f"recent must be at most keep, {counts.min()}; got {recent}")
    scores = array.astype(np.float64)
    inside = np.arange(kv_len) < ends[..., None, None]
    if np.isnan(scores[np.broadcast_to(inside, scores.shape)]).any():
        raise ValueError("mass must not hold NaN")
    last = np.arange(kv_len) >= ends[..., None, None] - recent
    scores = np.where(inside, np.where(last, np.inf, scores), -np.inf)
    counts = np.minimum(counts, ends)
    most = int(counts.max(initial=0))
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :most]
    best = np.sort(np.where(np.arange(most) < counts[..., None, None], best, kv_len), axis=-1)
    return Kept(*(leave(mass, x) for x in (np.where(best == kv_len, -1, best), counts, ends)))


def snapkv(
    q_last: Any, k: Any, keep: Any, *, window: int | None = None, pool: int = 5,
    pooling: Literal["mean", "max"] = "mean", **options: Any,
) -> Kept:  # fmt: skip
    """What the last queries look at, with the neighbours of it, and the last keys (Li et al. 2024, arXiv 2404.14469).

    Args:
        q_last: ``(..., Hq, w, D)``: the last queries of each sequence, which stand at its end.
        k: ``(..., Hkv, Sk, D)``, or a cache.
        keep: how many keys, one integer or one for each sequence, the window included.
        window: how many of these queries look, and how many of the last keys stay; None: w.
        pool, pooling: an odd number of neighbouring keys whose mass is averaged, with 0 beyond the ends, or whose
            largest is taken, so that what stands beside a heavy key stays too; 1 is none.
        options: score options of the call, such as `softcap`, and `kv_lengths` and `q_lengths` of arrays.

    >>> k = np.random.default_rng(0).normal(size=(1, 2, 100, 16))
    >>> kept = snapkv(8 * k[:, :, 40:44], k, 10)
    >>> kept.keys[0, 0]
    array([39, 40, 41, 42, 43, 44, 96, 97, 98, 99])
    """
    if integer("pool", pool, 1) % 2 == 0:
        raise ValueError(f"pool must be odd, got {pool}")
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling must be 'mean' or 'max', got {pooling!r}")
    rows = int(q_last.shape[-2]) if len(getattr(q_last, "shape", ())) >= 2 else 0
    if not rows:
        raise ValueError(
            f"q_last must have shape (..., heads, w, dim), got {getattr(q_last, 'shape', q_last)}"
        )
    last = rows if window is None else integer("window", window, 1)
    if last > rows:
        raise ValueError(f"window must be at most the {rows} rows of q_last, got {last}")
    seen = probe(q_last, k, key_mass(last=last, heads="group"), causal=True, **options)
    mass = enter("key mass", seen.key_mass).astype(np.float64)
    lead, kv_len = mass.shape[:-2], mass.shape[-1]
    lengths = k.stored().lengths if is_cache(k) else options.get("kv_lengths")
    ends = _whole("kv_lengths", kv_len if lengths is None else lengths, lead, 0)
    if (_whole("keep", keep, lead, 1) < last).any():
        raise ValueError(f"keep must be at least the window, {last}; got {keep}")
    mass[~(np.arange(kv_len) < np.broadcast_to(ends[..., None, None] - last, (*mass.shape[:-1], 1)))] = 0
    padded = np.pad(mass, [(0, 0)] * len(lead) + [(0, 0), (pool // 2, pool // 2)])
    near = np.lib.stride_tricks.sliding_window_view(padded, pool, axis=-1)
    pooled = leave(q_last, near.mean(axis=-1) if pooling == "mean" else near.max(axis=-1))
    return heaviest(pooled, keep, recent=last, lengths=ends)


def anchors_and_window(lengths: Any, anchors: int, window: int) -> Kept:
    """The first `anchors` keys and the last `window`, of all heads (Xiao et al. 2023, arXiv 2309.17453).

    `lengths` is how many keys each sequence has, ``cache.lengths`` or one integer. A `PagedKVCache` with a `window`
    does this by itself, page by page and with positions that count on.

    >>> anchors_and_window([7, 3], anchors=1, window=3).keys
    array([[[ 0,  4,  5,  6]],
    <BLANKLINE>
           [[ 0,  1,  2, -1]]])
    """
    first, last = integer("anchors", anchors, 0), integer("window", window, 1)
    given = np.atleast_1d(_integers("lengths", lengths))
    ends = _whole("lengths", given, given.shape, 0)
    counts = np.minimum(ends, first + last)
    places = np.arange(int(counts.max(initial=0)))
    keys = np.where(places < first, places, places + (ends - counts)[..., None])
    keys = np.where(places < counts[..., None], keys, -1)
    like = given if isinstance(lengths, (int, np.integer, Sequence)) else lengths
    return Kept(*(leave(like, x) for x in (keys[..., None, :], counts, ends)))


def evict(
    cache: Any, kept: Kept, *, ids: Any = None, q: Any = None, mask: Any = None, **options: Any
) -> Evicted:
    """Make a cache hold only what is kept; rows move up, and nothing is copied that stays where it is.

    Args:
        cache: a `KVCache`, or a `PagedKVCache` with the `ids` of the sequences that the choice is for.
        kept: what to keep, chosen from the cache as it is now.
        q: ``(batch, Hq, Sq, D)``: queries, the last ones of each sequence, whose loss of attention mass is measured
            first, with the masks and score options of their call.

    Raises:
        TypeError, ValueError: for a choice that does not fit, and as `tilefold.probe`. Nothing has changed then.
        CacheFull: rows move into pages that others share, and a fixed number of pages does not suffice for copies.

    >>> k, v, q = np.random.default_rng(0).normal(size=(3, 1, 2, 100, 16))
    >>> cache = tf.KVCache(1, kv_heads=2, dim=16, dtype="float64")
    >>> cache.append(k, v)
    >>> kept = heaviest(tf.probe(q, cache, tf.key_mass(), causal=True).key_mass, 64, lengths=cache.lengths)
    >>> evict(cache, kept, q=q[:, :, -8:], causal=True)
    Evicted(kept 64 of 100 keys; loss of attention mass 0.3341 on average, 0.3486 in the worst head)
    >>> cache.lengths, cache.seen_tokens
    (array([64]), array([100]))
    """
    if not isinstance(kept, Kept):
        raise TypeError(f"kept must be a choice such as heaviest(...), got {type(kept).__name__}")
    if not callable(getattr(cache, "keep", None)):
        raise TypeError(f"cache must be a KVCache or a PagedKVCache, got {type(cache).__name__}")
    paged = hasattr(cache, "view")
    if paged is (ids is None):
        raise TypeError(
            "ids must name the sequences of a PagedKVCache" if paged else "ids must be left out for a KVCache"
        )
    now = cache.lengths(ids) if paged else cache.lengths
    if now.tolist() != kept.lengths.tolist():
        raise ValueError(
            f"kept was chosen from sequences of {kept.lengths.tolist()} keys, and the cache has {now.tolist()}"
        )
    if q is None and (mask is not None or options):
        raise TypeError("masks and score options are those of q, which is missing")
    loss = None if q is None else kept.loss(q, cache[ids] if paged else cache, mask, **options)
    if paged:
        cache.keep(ids, kept.keys)
    else:
        cache.keep(kept.keys)
    return Evicted(kept, kept.lengths - kept.counts, loss)


def _integers(name: str, given: Any) -> np.ndarray:
    """Integers as an array; lists are taken too."""
    plain = isinstance(given, (int, np.integer, Sequence)) and not isinstance(given, (bool, str))
    array = np.asarray(given) if plain else enter(name, given)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype.name}")
    return array


def _whole(name: str, given: Any, lead: tuple[int, ...], least: int) -> np.ndarray:
    """Integers from `least` on, one for each sequence ``lead`` or one for all, as a private copy."""
    array = _integers(name, given)
    if array.shape not in ((), lead):
        raise ValueError(f"{name} must be one integer or have shape {lead}, got {array.shape}")
    if array.size and array.min() < least:
        raise ValueError(f"{name} must be >= {least}, got {array.min()}")
    return np.array(np.broadcast_to(array, lead), np.int64)
