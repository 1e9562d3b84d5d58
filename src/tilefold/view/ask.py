"""What to probe for so that a page has everything: row statistics, lists, masses, and maps from coarse to fine.

All maps come out of one sweep. Their sizes are powers of four apart, so bins of one level are whole bins of the next.
"""

from __future__ import annotations

from ..masks import integer
from ..probes import entropy, heatmap, key_mass, max_weight, mean_distance, topk
from ..probes.statistic import Statistic

COARSEST = 64
STEP = 4


def statistics(q_len: int, kv_len: int, *, top: int = 8, finest: int = 1024) -> tuple[Statistic, ...]:
    """The statistics that a page shows, for `q_len` queries on `kv_len` keys.

    Entropy, the largest weight and the mean distance of each query, its `top` largest weights (all of fewer keys), the
    mass of each key, and maps of 64, 256, 1024, ... bins a side up to `finest`, the last of single cells where the
    lengths are below it.
    Per head the finest map takes 4 MiB as it stands.

    >>> import numpy as np, tilefold as tf
    >>> from tilefold.view import statistics
    >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 300, 16))
    >>> tf.probe(q, k, *statistics(300, 300), causal=True)
    Seen(entropy: (4, 300), max_weight: (4, 300), mean_distance: (4, 300), topk: {weights: (4, 300, 8), \
keys: (4, 300, 8)}, key_mass: (4, 300), map_64: (4, 64, 64), map_256: (4, 256, 256), map_300: (4, 300, 300))
    """
    integer("statistics: q_len", q_len, 1)
    integer("statistics: kv_len", kv_len, 1)
    integer("statistics: finest", finest, 1)
    maps = [heatmap(min(n, q_len), min(n, kv_len)).named(f"map_{n}") for n in _sides(q_len, kv_len, finest)]
    return (
        entropy(),
        max_weight(),
        mean_distance(),
        topk(min(integer("statistics: top", top, 1), kv_len)),
        key_mass(),
        *maps,
    )


def _sides(q_len: int, kv_len: int, finest: int) -> list[int]:
    """Bins of the longer side, level by level."""
    end, sides = min(max(q_len, kv_len), finest), []
    side = COARSEST
    while side < end:
        sides.append(side)
        side *= STEP
    return [*sides, end]
