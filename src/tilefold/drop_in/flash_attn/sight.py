"""What a query sees by position: `causal` and `window_size` of each version, brought to one pair of limits.

Queries stand at the end of the keys in all three. The trap: -1 is infinite in flash-attn 2 and 3, and a real offset in
4, where None is infinite and a pair whose sum is negative means no window at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...masks import Mask, band


@dataclass(frozen=True, slots=True)
class Sight:
    """Query i sees key j iff ``-left <= j - (i + kv_len - q_len) <= right``; None is unlimited."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0

    @property
    def local(self) -> bool:
        return not self.causal and (self.left is not None or self.right is not None)

    def options(self, hidden: Mask | None = None) -> dict[str, Any]:
        """The arguments of `tilefold.attention` that mean this, and `hidden` as well."""
        if self.causal:
            return {"causal": True, "mask": hidden}
        if not self.local:
            return {"mask": hidden}
        if min(self.left or 0, self.right or 0) >= 0:
            return {"window": (self.left, self.right), "mask": hidden}
        beyond = band(self.left, self.right)
        return {"mask": beyond if hidden is None else beyond & hidden}


def fa2(causal: bool, window_size: Any, kv_len: int) -> Sight:
    """flash-attn 2: negative is infinite, and so is what reaches over `kv_len` keys; causal ends at the diagonal."""
    left, right = _pair(window_size)
    return _signed(causal, left, right, kv_len, kv_len)


def fa3(causal: bool, window_size: Any, q_len: int, kv_len: int) -> Sight:
    """flash-attn 3: as 2, but already what reaches over all other keys, or all other queries, is infinite."""
    left, right = _pair(window_size)
    return _signed(causal, left, right, kv_len - 1, q_len - 1)


def fa4(causal: bool, window_size: Any) -> Sight:
    """flash-attn 4: None is infinite, negative a real offset, and a pair with a negative sum is no window."""
    left, right = _pair(window_size, none=True)
    right = 0 if causal else right
    if left is not None and right is not None and left + right < 0:
        return Sight(None, 0 if causal else None)
    return Sight(left, right)


def _signed(causal: bool, left: int, right: int, most_left: int, most_right: int) -> Sight:
    """Limits where a negative number or one of at least `most` is infinite."""
    return Sight(
        None if left < 0 or left >= most_left else left,
        0 if causal else None if right < 0 or right >= most_right else right,
    )


def _pair(window_size: Any, none: bool = False) -> Any:
    kinds = (int, np.integer, type(None)) if none else (int, np.integer)
    words = "None or an integer" if none else "an integer, -1 for infinite"
    pair = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(x, kinds) for x in pair):
        raise TypeError(f"window_size must be (left, right), each {words}; got {window_size!r}")
    return pair
