"""Keys and values that stay between calls, as one object: `tilefold.attention(q, cache, causal=True)`.

A cache is any object whose method `stored` gives `layouts.Stored`. The fact to know: which cache it is, the size of its
pages and what else it holds change no bit of a result, for the core folds keys by their logical position.
"""

from .contiguous import KVCache
from .paged import PagedKVCache
from .quantised import dequantise, quantise
from .rotary import Rotary
from .rows import CacheFull

__all__ = ["CacheFull", "KVCache", "PagedKVCache", "Rotary", "dequantise", "quantise"]
