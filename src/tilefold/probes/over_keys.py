"""Statistics over keys, ``(..., Hq, Sk)``: what caches are emptied by. They need a second sweep."""

from __future__ import annotations

from ..masks import integer
from ..taps import Keys
from .statistic import Heads, Statistic


def key_mass(*, last: int | None = None, discount: float | None = None, heads: Heads = "each") -> Statistic:
    """The weight that each key received, summed over queries, ``(..., Hq, Sk)``.

    All queries: what H2O evicts by (Zhang et al. 2023, arXiv 2306.14048); the `last` w of each sequence: SnapKV (Li et
    al. 2024, arXiv 2404.14469), the last one: TOVA (Oren et al. 2024, arXiv 2401.06104). With `discount` the weights
    of a query count ``discount ** age``, the last one's age being 0. Of a head, all masses sum to its number of rows
    that see a key, less what a learned sink took.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.key_mass(), causal=True).key_mass.round(3)
    array([[2.083, 1.083, 0.583, 0.25 ]])
    """
    if last is not None:
        integer("key_mass: last", last, 1)
    if discount is not None and not (isinstance(discount, (int, float)) and 0 < discount <= 1):
        raise ValueError(f"key_mass: discount must be a number above 0 and at most 1, got {discount!r}")
    tap = Keys("sum", last, None if discount is None else float(discount))
    return Statistic("key_mass", (tap,), lambda filled: filled[tap], heads, smooth=True)


def key_max(*, heads: Heads = "each") -> Statistic:
    """The largest weight that each key received, ``(..., Hq, Sk)``.

    >>> import numpy as np, tilefold as tf
    >>> q, k = np.zeros((1, 4, 8)), np.ones((1, 4, 8))
    >>> tf.probe(q, k, tf.key_max(), causal=True).key_max.round(3)
    array([[1.   , 0.5  , 0.333, 0.25 ]])
    """
    tap = Keys("max")
    return Statistic("key_max", (tap,), lambda filled: filled[tap], heads, "max")
