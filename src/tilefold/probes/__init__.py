"""What attention looked at: statistics of the weights in O(n) memory, for `tilefold.probe` and ``probes=``.

A statistic names the taps that it is made of (`taps.py`) and finishes what they filled. Over rows: over_rows.py; over
keys: over_keys.py; pictures and pieces of the matrix: maps.py.
"""

from .maps import block, block_mass, heatmap, rows
from .over_keys import key_mass, key_max
from .over_rows import effective_keys, entropy, mass_in, max_logit, max_weight, mean_distance, topk
from .statistic import Seen, Statistic, TopK

__all__ = [
    "Seen",
    "Statistic",
    "TopK",
    "block",
    "block_mass",
    "effective_keys",
    "entropy",
    "heatmap",
    "key_mass",
    "key_max",
    "mass_in",
    "max_logit",
    "max_weight",
    "mean_distance",
    "rows",
    "topk",
]
