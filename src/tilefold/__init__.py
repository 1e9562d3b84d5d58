"""Exact attention in O(n) memory, on any array. The door: names, no logic."""

from .api import attention, attention_grad, explain, merge, probe
from .backends.cpu import warn_if_missing
from .caches import CacheFull, KVCache, PagedKVCache
from .flash import (
    FlashConfig,
    FlashResult,
    benchmark_flash_attention,
    causal_config,
    default_config,
    flash_attention,
    naive_attention,
)
from .masks import (
    Mask,
    anchors,
    band,
    causal,
    chunked,
    dense,
    documents,
    from_predicate,
    lengths,
    prefix,
    spans,
    tree,
    window,
)
from .plan import BackendRefused, Plan
from .probes import (
    Seen,
    block,
    block_mass,
    effective_keys,
    entropy,
    heatmap,
    key_mass,
    key_max,
    mass_in,
    max_logit,
    max_weight,
    mean_distance,
    rows,
    topk,
)
from .problem import Problem
from .replay import Grads
from .stats import OnlineStats
from .threads import get_num_threads, set_num_threads
from .watching import watch

__version__ = "0.1.0"

__all__ = [
    "BackendRefused",
    "CacheFull",
    "FlashConfig",
    "FlashResult",
    "Grads",
    "KVCache",
    "Mask",
    "OnlineStats",
    "PagedKVCache",
    "Plan",
    "Problem",
    "Seen",
    "anchors",
    "attention",
    "attention_grad",
    "band",
    "benchmark_flash_attention",
    "block",
    "block_mass",
    "causal",
    "causal_config",
    "chunked",
    "default_config",
    "dense",
    "documents",
    "effective_keys",
    "entropy",
    "explain",
    "flash_attention",
    "from_predicate",
    "get_num_threads",
    "heatmap",
    "key_mass",
    "key_max",
    "lengths",
    "mass_in",
    "max_logit",
    "max_weight",
    "mean_distance",
    "merge",
    "naive_attention",
    "prefix",
    "probe",
    "rows",
    "set_num_threads",
    "spans",
    "topk",
    "tree",
    "watch",
    "window",
]

warn_if_missing()
