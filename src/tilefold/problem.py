"""What is to be computed, and nothing about how.

`Problem` is hashable and owns no array: it is the cache key, the log line and the struct that crosses into C++
(`native/problem.h` is its twin, field by field). `Operands` owns the arrays and no meaning. `offset` is the one
fact about alignment: the position of query 0 among the keys; causal, windows and ALiBi all count from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from math import isfinite, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .dtypes import ROWS

if TYPE_CHECKING:
    from .masks import Mask
    from .taps import Tapped

MAX_SIZE = 2**63 - 1


class Band(NamedTuple):
    """Key j is visible to query i iff ``i + offset - left <= j <= i + offset + right``.

    ``None`` for `left` or `right` is unlimited; ``None`` for `offset` means that each sequence of a ragged batch
    uses its own ``kv_len - q_len``.
    """

    left: int | None = None
    right: int | None = None
    offset: int | None = None

    @property
    def unlimited(self) -> bool:
        return self.left is None and self.right is None


class Layout(IntEnum):
    """Where key row j of head h is: in place, in a packed ragged batch, or behind a block table."""

    DENSE = 0
    VARLEN = 1
    PAGED = 2


class Has(IntFlag):
    """Which optional arrays come along. BITS: the mask may need single bits, not only spans."""

    SPANS = 1
    BITS = 2
    BIAS = 4
    ALIBI = 8
    SINKS = 16
    LENGTHS = 32


class Want(IntFlag):
    """What the caller asks for beyond the output. ROWS, KEYS: taps over rows and keys; SHOWN: taps in Python."""

    LSE = 1
    GRAD = 2
    INVARIANT = 4
    ROWS = 8
    KEYS = 16
    SHOWN = 32


@dataclass(frozen=True, slots=True)
class Problem:
    """The facts of one attention call. `q_len` and `kv_len` of a VARLEN problem are totals over its sequences."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    v_dim: int
    q_dtype: str
    kv_dtype: str
    acc_dtype: str
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    band: Band = Band()
    layout: Layout = Layout.DENSE
    has: Has = Has(0)
    want: Want = Want(0)

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"q has {self.heads} heads and k has {self.kv_heads}: "
                "the number of query heads must be a multiple of the number of key heads"
            )
        if not isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale}")
        if self.softcap is not None and not (isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be None or a finite number > 0, got {self.softcap}")
        scores = self.batch * self.heads * max(self.q_len, 1) * max(self.kv_len, 1)
        if scores * max(self.dim, self.v_dim, 1) * 8 > MAX_SIZE:
            raise ValueError(
                f"the problem is too large: {self.batch} x {self.heads} x {self.q_len} x {self.kv_len} scores of "
                f"{max(self.dim, self.v_dim)} dimensions overflow 2^63"
            )

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def accumulate(self) -> np.dtype:
        return np.dtype(self.acc_dtype)

    @property
    def score_bytes(self) -> int:
        """Bytes of the score matrix that is never built, in the accumulate dtype."""
        batch = 1 if self.layout is Layout.VARLEN else self.batch
        return batch * self.heads * self.q_len * self.kv_len * ROWS[self.acc_dtype].itemsize

    def __str__(self) -> str:
        heads = f"h{self.heads}" if self.group == 1 else f"h{self.heads}/{self.kv_heads}"
        words = [self.q_dtype, f"b{self.batch}", heads, f"q{self.q_len}", f"k{self.kv_len}", f"d{self.dim}"]
        if self.v_dim != self.dim:
            words.append(f"v{self.v_dim}")
        if self.kv_dtype != self.q_dtype:
            words.append(f"kv={self.kv_dtype}")
        if not self.band.unlimited:
            words.append("band=" + ",".join("-" if x is None else str(x) for x in self.band))
        if self.softcap is not None:
            words.append(f"softcap={self.softcap:g}")
        if self.layout is not Layout.DENSE:
            words.append(self.layout.name.lower())
        words += [flag.name.lower() for flag in self.has if flag.name]
        words += [f"+{flag.name.lower()}" for flag in self.want if flag.name]
        return " ".join(words)


@dataclass(slots=True, eq=False)
class Operands:
    """The arrays of one call: q ``(*lead, Hq, Sq, D)``, k and v ``(*lead, Hkv, Sk, D or Dv)``, and what is optional.

    `mask` is what is left of the mask after the band has moved into the `Problem`. `bias` is a broadcast view of
    shape ``(*lead, Hq, Sq, Sk)`` over `given_bias`, `alibi` and `sinks` are views of shape ``(*lead, Hq)``; none is
    ever expanded in memory. `q_ends` and
    `kv_ends` are private copies: cumulative lengths (VARLEN) or one length per batch item (LENGTHS); queries that are
    packed over pages have cumulative `q_ends`, no leading axis, and are folded batch by batch. PAGED, k and v are
    ``(pages, Hkv, page, D or Dv)``, and `table` ``(B, n)`` says which page holds rows ``n * page`` and on of each item;
    -1 is no page: nobody sees those rows. Where k and v are codes (see `dtypes.CODES`), `k_scale` and `v_scale` are
    float32 views ``(pages, Hkv, page, groups)``: what each group of neighbouring dims is multiplied by. `taps` are
    to be filled, and `seen` holds what was: a fold fills those over rows if its backend can, a replay the others.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray | None = None
    lse: np.ndarray | None = None
    mask: Mask | None = None
    bias: np.ndarray | None = None
    given_bias: np.ndarray | None = None
    alibi: np.ndarray | None = None
    sinks: np.ndarray | None = None
    q_ends: np.ndarray | None = None
    kv_ends: np.ndarray | None = None
    table: np.ndarray | None = None
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None
    taps: tuple[Tapped, ...] = ()
    seen: dict[Tapped, Any] = field(default_factory=dict)

    @property
    def lead(self) -> tuple[int, ...]:
        return self.q.shape[:-3]


def bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The bytes of an array that is about to be made; ValueError where they overflow."""
    size = prod(shape) * dtype.itemsize
    if size > MAX_SIZE:
        raise ValueError(f"an array of shape {shape} and type {dtype} overflows 2^63 bytes")
    return size
