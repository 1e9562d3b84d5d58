"""The founding names, meaning exactly what the founding document says: tiles, an online softmax, counted memory.

`flash_attention` is `attention` with a tile size of one's own and an account of its memory. Two bugs of the founding
implementation are not kept: its causal mask hid only whole blocks, so rows looked into the future, and its e was
2.71828.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from .arrays import enter_floats, leave
from .call import Options, understand
from .masks import integer
from .plan import MOST, backend_of
from .problem import bytes_of


@dataclass(frozen=True, slots=True)
class FlashConfig:
    """Tile sizes, score factor and whether to look only at the past.

    `block_q` and `block_kv` are rows and keys per tile; `scale` multiplies the scores.

    >>> FlashConfig(64, 128, scale=0.125, causal=True)
    FlashConfig(block_q=64, block_kv=128, scale=0.125, causal=True)
    """

    block_q: int
    block_kv: int
    scale: float
    causal: bool = False

    def __post_init__(self) -> None:
        integer("block_q", self.block_q, 1)
        integer("block_kv", self.block_kv, 1)


@dataclass(frozen=True, slots=True)
class FlashResult:
    """The output and what it took.

    Attributes:
        output: attention ``(..., n, d)``.
        memory_bytes: the workspace that the call allocated beyond its inputs and output, counted as it was taken.
        memory_saved_percent: how much less that is than the score matrix of the same problem in its accumulate type;
            negative where a tile is larger than the whole matrix.
    """

    output: Any
    memory_bytes: int
    memory_saved_percent: float


def default_config(head_dim: int) -> FlashConfig:
    """Tiles of 512 x 1024 and the usual scale ``1 / sqrt(head_dim)``.

    >>> default_config(64).scale
    0.125
    """
    return FlashConfig(512, 1024, 1 / sqrt(integer("head_dim", head_dim, 1)))


def causal_config(head_dim: int) -> FlashConfig:
    """The same for decoders: no row looks into the future, and tiles of 256 rows waste less under the diagonal.

    >>> causal_config(64).causal
    True
    """
    return FlashConfig(256, 1024, 1 / sqrt(integer("head_dim", head_dim, 1)), causal=True)


def flash_attention(q: Any, k: Any, v: Any, config: FlashConfig | None = None) -> FlashResult:
    """Attention on ``(n, d)`` arrays, or any leading dimensions, in tiles of `config`.

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 4096, 64)).astype(np.float32)
    >>> result = flash_attention(q, k, v, causal_config(64))
    >>> result.output.shape, result.memory_saved_percent > 90
    ((4096, 64), True)
    """
    if config is None:
        config = default_config(max(enter_floats("q", q).shape[-1], 1))
    if not isinstance(config, FlashConfig):
        raise TypeError(f"config must be a FlashConfig, got {type(config).__name__}")
    call = understand(q, k, v, Options(causal=config.causal, scale=config.scale))
    block_q, block_kv = min(config.block_q, MOST), min(config.block_kv, MOST)
    call.plan = backend_of(call.plan).resize(call.plan, block_q, block_kv)
    call.allocate()
    used = call.fold()
    matrix = call.problem.score_bytes
    saved = 100 * (1 - used / matrix) if matrix else 0.0
    return FlashResult(leave(q, call.out), used, saved)


def naive_attention(q: Any, k: Any, v: Any, scale: float | None = None) -> tuple[Any, int]:
    """The usual way: ``softmax(q k^T * scale) v`` with the whole matrix. Returns the output and the matrix's bytes.

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 100, 16))
    >>> output, memory_bytes = naive_attention(q, k, v)
    >>> output.shape, memory_bytes
    ((100, 16), 80000)
    """
    call = understand(q, k, v, Options(scale=scale), backend="numpy")
    p, x = call.problem, call.operands
    acc = p.accumulate
    qs, ks, vs = (a.astype(acc, copy=False) for a in (x.q, x.k, x.v))
    bytes_of((*qs.shape[:-1], p.kv_len), acc)
    grouped = qs.reshape(*qs.shape[:-3], p.kv_heads, p.group, p.q_len, p.dim)
    with np.errstate(all="ignore"):
        s = np.matmul(grouped, ks[..., None, :, :].swapaxes(-1, -2))
        memory_bytes = s.nbytes
        s *= acc.type(p.scale)
        s -= s.max(axis=-1, keepdims=True, initial=-np.inf)
        np.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)
        out = np.matmul(s, vs[..., None, :, :]).reshape(*qs.shape[:-1], p.v_dim).astype(x.q.dtype, copy=False)
    return leave(q, out[0] if call.squeeze else out), memory_bytes


def benchmark_flash_attention() -> None:
    """Naive against flash over growing n, time and memory of each, and a projection to a million tokens.

    Every figure is measured in this call but those of the projection, which scale the last measured row: time with
    n^2, memory as each method's grows. Takes some ten seconds.
    """
    from .bench.founding import run

    run()
