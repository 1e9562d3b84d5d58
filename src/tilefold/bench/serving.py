"""What caches cost a step of decoding, beside the same keys and values as plain arrays; nobody types a number.

    python -m tilefold.bench.serving [--keys 32768] [--heads 32] [--kv-heads 8] [--dim 128] [--dtype bfloat16]
                                     [--rounds 9]

Prints a Markdown table: one query over `--keys` keys in plain arrays, in pages, and as codes; 64 ragged sequences of 16
to 8192 keys; 64 sequences over a shared prefix of 8192 keys, with and without cascade. Everything takes part in every
round, medians are shown; the rate is that of the bytes of keys and values, beside the reading bandwidth measured in the
same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import tilefold as tf

from ..backends.cpu import CORE
from .machine import cpu_model
from .quiet import quiet

SHORTEST = 0.02  # seconds that one sample should last at least
SEQUENCES, SHARED, OWN = 64, 8192, 64  # of the cascade: sequences, keys that all have, keys of each


def _step(q: np.ndarray, cache: Any, ids: list[int]) -> Any:
    return tf.attention(q, cache[ids])


@dataclass(frozen=True, slots=True)
class Row:
    """One call: its words, what it is compared with, and the bytes of keys and values that it must read."""

    name: str
    beside: str
    bytes: int
    call: Callable[[], Any]


class Maker:
    """Makes the caches of one kind of model."""

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: str) -> None:
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.rng = np.random.default_rng(0)

    def drawn(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32).astype(self.dtype)

    def pages(self, page: int, lengths: Sequence[int], **options: Any) -> tuple[Any, list[int]]:
        cache = tf.PagedKVCache(self.kv_heads, self.dim, page=page, dtype=self.dtype, **options)
        ids = [cache.open() for _ in lengths]
        for id, n in zip(ids, lengths, strict=True):
            cache.append(id, *(self.drawn(1, self.kv_heads, n, self.dim) for _ in range(2)))
        return cache, ids

    def row_bytes(self, bits: float | None = None) -> float:
        """Of a key and its value."""
        width = np.dtype(self.dtype).itemsize if bits is None else bits / 8
        return 2 * self.kv_heads * self.dim * width

    def one_query(self, keys: int) -> list[Row]:
        q = self.drawn(1, self.heads, 1, self.dim)
        k, v = (self.drawn(1, self.kv_heads, keys, self.dim) for _ in range(2))
        size, plain = int(keys * self.row_bytes()), f"{keys:,} keys, plain arrays"
        rows = [Row(plain, plain, size, lambda: tf.attention(q, k, v))]
        for page in (128, 16):
            call = partial(_step, q, *self.pages(page, [keys]))
            rows.append(Row(f"{keys:,} keys, pages of {page}", plain, size, call))
        for code, bits in (("int8", 8), ("float8_e4m3fn", 8), ("int4", 4)):
            call = partial(_step, q, *self.pages(128, [keys], quantised=code))
            rows.append(Row(f"{keys:,} keys, {code}", plain, int(keys * self.row_bytes(bits)), call))
        return rows

    def ragged(self) -> list[Row]:
        lengths = np.geomspace(16, 8192, SEQUENCES).astype(int).tolist()
        self.rng.shuffle(lengths)
        cache, ids = self.pages(128, lengths)
        q = self.drawn(SEQUENCES, self.heads, 1, self.dim)
        name = f"{SEQUENCES} sequences of 16 to 8,192 keys, pages of 128"
        return [Row(name, name, int(sum(lengths) * self.row_bytes()), partial(_step, q, cache, ids))]

    def cascade(self) -> list[Row]:
        cache, (first,) = self.pages(128, [SHARED])
        ids = [first, *(cache.fork(first) for _ in range(SEQUENCES - 1))]
        cache.append(ids, *(self.drawn(SEQUENCES, self.kv_heads, OWN, self.dim) for _ in range(2)))
        q = self.drawn(SEQUENCES, self.heads, 1, self.dim)
        apart = f"{SEQUENCES} sequences that share {SHARED:,} keys, each alone"
        together = int((SHARED + SEQUENCES * OWN) * self.row_bytes())
        every = int(SEQUENCES * (SHARED + OWN) * self.row_bytes())
        return [
            Row(apart, apart, every, partial(_step, q, cache, ids)),
            Row(
                "the same, as a cascade",
                apart,
                together,
                lambda: tf.attention(q, cache.view(ids, cascade=True)),
            ),
        ]


def measured(rows: Sequence[Row], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each row, and the reading bandwidth beside each, medians of interleaved rounds."""
    seconds: list[list[float]] = [[] for _ in rows]
    read: list[list[float]] = [[] for _ in rows]
    threads = tf.get_num_threads()
    for row in rows:
        row.call()
    for _ in range(rounds):
        for n, row in enumerate(rows):
            quiet()
            if CORE is not None:
                read[n].append(CORE.peak("read", threads, SHORTEST, row.bytes))
            row.call()  # what the cache holds of other memory is not this row's
            start, times = perf_counter(), 0
            while times == 0 or perf_counter() - start < SHORTEST:
                row.call()
                times += 1
            seconds[n].append((perf_counter() - start) / times)
    return [median(some) for some in seconds], [median(some) if some else 0.0 for some in read]


def table(rows: Sequence[Row], seconds: Sequence[float], read: Sequence[float]) -> str:
    """Markdown."""
    took = {row.name: each for row, each in zip(rows, seconds, strict=True)}
    lines = [
        "| a step of decoding | time | beside its first line | GB/s | of reading |",
        "|---|---|---|---|---|",
    ]
    for row, each, roof in zip(rows, seconds, read, strict=True):
        rate = row.bytes / each
        share = f"{rate / roof:.0%}" if roof else "–"
        ahead = took[row.beside] / each
        lines.append(
            f"| {row.name} | {1e3 * each:,.2f} ms | {ahead:.2f}× as fast | {rate / 1e9:.1f} | {share} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("keys", 32768), ("heads", 32), ("kv-heads", 8), ("dim", 128), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    given = parser.parse_args(arguments)
    import ml_dtypes  # noqa: F401  (registers the names of bfloat16 and float8)

    maker = Maker(given.heads, given.kv_heads, given.dim, given.dtype)
    rows = [*maker.one_query(given.keys), *maker.ragged(), *maker.cascade()]
    print(table(rows, *measured(rows, given.rounds)))
    print(
        f"\n{given.heads}/{given.kv_heads} heads, d {given.dim}, {given.dtype}; {given.rounds} interleaved rounds on "
        f"{tf.get_num_threads()} threads of {cpu_model()}. Reading is of as many bytes, again and again."
    )


if __name__ == "__main__":
    main()
