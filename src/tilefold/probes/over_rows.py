"""Statistics over query rows, ``(..., Hq, Sq)``: they ride in the forward sweep.

A row that sees no key is 0 everywhere, and -inf as a maximum of scores. A learned sink is an outcome of the softmax
without a key: it counts in the entropy, and takes its share from every mass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..masks import Mask, integer, prefix
from ..taps import ROW_REGIONS, Distance, Entropy, Mass, Peak, Top
from .statistic import Heads, Regions, Statistic, TopK


def entropy(*, heads: Heads = "each") -> Statistic:
    """Entropy of each row's weights in nats, ``(..., Hq, Sq)``: 0 for one key, log(n) for n alike.

    It falls towards 0 where training is about to diverge (Zhai et al. 2023, arXiv 2303.06296).

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.entropy(), causal=True).entropy.round(3)
    array([[0.   , 0.693, 1.099, 1.386]])
    """
    tap = Entropy()
    return Statistic("entropy", (tap,), lambda filled: filled[tap], heads, smooth=True)


def effective_keys(*, heads: Heads = "each") -> Statistic:
    """``exp(entropy)``: over how many keys a row spreads, ``(..., Hq, Sq)``; 0 for a row that sees none.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.effective_keys(), causal=True).effective_keys.round(9)
    array([[1., 2., 3., 4.]])
    """
    tap = Entropy()
    return Statistic(
        "effective_keys",
        (tap,),
        lambda filled: np.where(np.isneginf(filled.lse), 0, np.exp(filled[tap])).astype(filled[tap].dtype),
        heads,
    )


def max_logit(*, heads: Heads = "each") -> Statistic:
    """The largest score of each row after scale, softcap, bias and mask, ``(..., Hq, Sq)``; a sink is none.

    Over all rows of a head it is what QK-clip rescales by (Kimi K2, arXiv 2507.20534): ``seen.max_logit.max(axis=-1)``.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
    >>> seen = tf.probe(q, k, tf.max_logit(heads="all"), causal=True)
    >>> bool(np.allclose(seen.max_logit[99], (q[:, 99:] @ k.swapaxes(1, 2)).max() / 4))
    True
    """
    tap = Peak()
    return Statistic("max_logit", (tap,), lambda filled: filled[tap], heads, "max")


def max_weight(*, heads: Heads = "each") -> Statistic:
    """The largest weight of each row, ``(..., Hq, Sq)``.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.max_weight(), causal=True).max_weight.round(3)
    array([[1.   , 0.5  , 0.333, 0.25 ]])
    """
    tap = Peak()
    return Statistic("max_weight", (tap,), lambda filled: filled.weights(filled[tap]), heads, "max")


def mean_distance(*, heads: Heads = "each") -> Statistic:
    """``sum(w * |i + Sk - Sq - j|)``: how many positions away each row looks on average, ``(..., Hq, Sq)``.

    Weight on a learned sink has no distance and adds nothing.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.mean_distance(), causal=True).mean_distance
    array([[0. , 0.5, 1. , 1.5]])
    """
    tap = Distance()
    return Statistic("mean_distance", (tap,), lambda filled: filled[tap], heads)


def mass_in(*, heads: Heads = "each", **regions: Mask | slice) -> Statistic:
    """How much of each row's weight lies in each region, ``(..., Hq, Sq)`` by the region's name.

    A region is a mask that is a few spans of keys per row, the same for all heads (`prefix`, `window`, `documents`,
    `spans` and what is made of them), or a slice of keys. At most 8 in one statistic.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> seen = tf.probe(q, k, tf.mass_in(first=slice(0, 1), near=tf.window(1, 0)), causal=True)
    >>> seen.mass_in.first.round(3), seen.mass_in.near.round(3)
    (array([[1.   , 0.5  , 0.333, 0.25 ]]), array([[1.   , 1.   , 0.667, 0.5  ]]))
    """
    if not regions or len(regions) > ROW_REGIONS:
        raise ValueError(
            f"mass_in: give 1 to {ROW_REGIONS} regions by name, such as anchors=slice(0, 4); got {len(regions)}"
        )
    taps = {name: Mass(_region(name, region)) for name, region in regions.items()}
    return Statistic(
        "mass_in",
        tuple(taps.values()),
        lambda filled: Regions(**{name: filled[tap] for name, tap in taps.items()}),
        heads,
        smooth=True,
    )


def _region(name: str, region: Any) -> Mask:
    if isinstance(region, slice):
        first, last = region.start or 0, region.stop
        if (
            region.step not in (None, 1)
            or last is None
            or integer(f"mass_in: {name}", first, 0) > integer(f"mass_in: {name}", last, 0)
        ):
            raise ValueError(f"mass_in: {name} must be a slice of keys with 0 <= start <= stop, got {region}")
        return prefix(last) & ~prefix(first) if first else prefix(last)
    if not isinstance(region, Mask):
        raise TypeError(f"mass_in: {name} must be a mask or a slice of keys, got {type(region).__name__}")
    if region.by_head:
        raise ValueError(f"mass_in: {name} must be the same for all heads")
    return region


def topk(k: int, *, heads: Heads = "each") -> Statistic:
    """The `k` largest weights of each row and their keys, both ``(..., Hq, Sq, k)``, largest first.

    Of equal scores the lower key comes first; beyond the keys that a row sees the weight is 0 and the key -1. Keys are
    counted along k's axis, in a cache by position.

    >>> import numpy as np, tilefold as tf
    >>> q, keys = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
    >>> top = tf.probe(q, keys, tf.topk(3), causal=True).topk
    >>> top.weights.shape, top.keys[0, 1]
    ((4, 100, 3), array([ 1,  0, -1]))
    """
    tap = Top(integer("topk: k", k, 1))
    if heads != "each":
        raise ValueError(f"topk: lists of several heads have no mean, so heads must be 'each', got {heads!r}")
    return Statistic(
        "topk", (tap,), lambda filled: TopK(filled.weights(filled[tap][0]), filled[tap][1]), heads, "none"
    )
