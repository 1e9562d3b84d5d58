"""flash-attn's functions on the CPU: the signatures, layouts and conventions of versions 2, 3 and 4.

The names here are those of flash-attn 2; `fa3` has those of ``flash_attn_interface``, `fa4` those of
``flash_attn.cute``. `install` lets ``import flash_attn`` find all of them where the original is absent. The three agree
on layout (batch, length, heads, dim) and differ in nearly everything else: what -1 means in a window, what the lse of
a row without keys is, which results have a gradient. Each of those differences is stated in the file it belongs to.
"""

from .bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
from .fa2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .installed import VERSION, install, uninstall

__version__ = VERSION

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_put_first_axis",
    "install",
    "pad_input",
    "uninstall",
    "unpad_input",
]
