"""What it costs to see what attention looked at, as parts of a plain forward call; nobody types a number.

    python -m tilefold.bench.probes [--tokens 8192] [--heads 8] [--dim 64] [--rounds 7] [--causal] [--dtype float32]
    python -m tilefold.bench.probes --once --tokens 1048576 --heads 1 --causal --dtype bfloat16

Prints a Markdown table. Everything takes part in every round, medians are shown, and each row is a call of its own, so
`probe` rows contain the sweep that finds the log-sum-exp. Beside it stands what the whole matrix costs: torch's own
softmax of the product, where torch is installed and the matrix fits; else the bytes that it would take.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import tilefold as tf

from ..api import size
from ..call import NO_VALUES, Options, understand
from ..dtypes import ROWS
from ..probes.statistic import Filled, results, taps_of
from .here import peak_bytes
from .machine import cpu_model
from .peers.matrix import whole_matrix
from .quiet import quiet

Call = Callable[[], Any]


def statistics_over_rows(keys: int) -> list[tf.probes.Statistic]:
    """Every statistic that rides in the forward sweep."""
    near = tf.window(min(127, keys - 1), 0)
    return [
        tf.entropy(),
        tf.effective_keys(),
        tf.max_logit(),
        tf.max_weight(),
        tf.mean_distance(),
        tf.mass_in(first=slice(0, 4), near=near),
        tf.topk(min(8, keys)),
    ]


@dataclass(frozen=True, slots=True)
class Asked:
    """One row: its words, the statistics, and whether it attends too."""

    name: str
    what: tuple[tf.probes.Statistic, ...]
    attends: bool

    def run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> Any:
        if not self.attends:
            return tf.probe(q, k, *self.what, causal=causal)
        return tf.attention(q, k, v, causal=causal, probes=self.what)

    def bytes(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> int:
        """Of a call beyond its inputs: what NumPy allocates, and what the core does out of its sight."""
        counted = 0

        def call() -> Any:
            nonlocal counted
            values = v if self.attends else NO_VALUES
            call = understand(q, k, values, Options(causal=causal), taps=taps_of(self.what))
            call.allocate()
            counted = max(call.fold(), call.see())
            return results(self.what, Filled(call.problem, call.operands), call.squeeze), call

        return peak_bytes(call) + counted


def asked(keys: int) -> list[Asked]:
    """What is measured; a plain call comes first."""
    every, bins = tuple(statistics_over_rows(keys)), min(64, keys)
    mass, heat, short = tf.key_mass(), tf.heatmap(bins, bins), min(64, keys)
    return [
        Asked("`attention`", (), True),
        Asked("`attention`, with `entropy()`", every[:1], True),
        Asked("`attention`, with `topk(8)`", every[-1:], True),
        Asked("`attention`, with all statistics over rows", every, True),
        Asked("`probe`, all statistics over rows", every, False),
        Asked("`probe`, `key_mass()`", (mass,), False),
        Asked(f"`probe`, `heatmap({bins}, {bins})`", (heat,), False),
        Asked(f"`probe`, `key_mass()` and `heatmap({bins}, {bins})`", (mass, heat), False),
        Asked("`probe`, `key_mass(last=64)`", (tf.key_mass(last=short),), False),
    ]


def once(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> str:
    """One probe of everything over rows, masses and a map, in words."""
    n = k.shape[-2]
    what = (*statistics_over_rows(n), tf.key_mass(), tf.heatmap(min(64, n), min(64, n)))
    start = perf_counter()
    taken = Asked("", what, False).bytes(q, k, v, causal)
    took = perf_counter() - start
    matrix = q.shape[0] * q.shape[1] * n * ROWS[q.dtype.name].itemsize
    return (
        f"{n:,} tokens, {q.shape[0]} head(s), d {q.shape[-1]}, {q.dtype.name}{', causal' if causal else ''}: all "
        f"statistics over rows, `key_mass()` and a `heatmap` in {took:,.1f} s and {size(taken)} beyond inputs, results "
        f"included, on {tf.get_num_threads()} threads of {cpu_model()}. The weights would be {size(matrix)}."
    )


def measured(every: dict[str, Call], rounds: int) -> dict[str, float]:
    """Seconds of each, the median of interleaved rounds after one that nobody counts."""
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for n in range(rounds + (rounds > 1)):
        for name, call in every.items():
            quiet()
            start = perf_counter()
            call()
            if n or rounds == 1:
                seconds[name].append(perf_counter() - start)
    return {name: median(some) for name, some in seconds.items()}


def table(seconds: dict[str, float], taken: dict[str, int], refused: dict[str, str]) -> str:
    """Markdown."""
    base = next(iter(seconds.values()))
    lines = ["| call | time | of `attention` | memory beyond inputs |", "|---|---|---|---|"]
    for name, each in seconds.items():
        memory = size(taken[name]) if name in taken else "–"
        lines.append(f"| {name} | {1e3 * each:,.0f} ms | {each / base:.2f}× | {memory} |")
    lines += [f"| {name} | – | – | {why} |" for name, why in refused.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("tokens", 8192), ("heads", 8), ("dim", 64), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--once", action="store_true", help="one probe of all statistics at once, its time and memory"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    given = parser.parse_args(arguments)
    if given.dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  (registers the name)
    shape = (given.heads, given.tokens, given.dim)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32).astype(given.dtype) for _ in range(3))
    if given.once:
        print(once(q, k, v, given.causal))
        return
    rows, refused = asked(given.tokens), {}
    every: dict[str, Call] = {row.name: partial(row.run, q, k, v, given.causal) for row in rows}
    matrix = given.heads * given.tokens**2 * ROWS[given.dtype].itemsize
    scores = 2 * given.heads * given.tokens**2 * 4  # in float32, before and after the softmax
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    name = "the whole matrix, torch"
    if find_spec("torch") is None:
        refused["the whole matrix"] = f"{size(matrix)} for the weights alone"
    elif scores + matrix > 0.8 * room:
        refused[name] = f"{size(scores + matrix)}, which this machine does not have"
    else:
        every[name] = whole_matrix(q, k, v, given.causal)
    seconds = measured(every, given.rounds)
    taken = {row.name: row.bytes(q, k, v, given.causal) for row in rows} if given.rounds > 1 else {}
    if name in every:
        taken[name] = scores + (matrix if given.dtype != "float32" else 0)
    print(table(seconds, taken, refused))
    words = ", causal" if given.causal else ""
    print(
        f"\n{given.heads} heads, n {given.tokens:,}, d {given.dim}, {given.dtype}{words}; {given.rounds} interleaved "
        f"rounds on {tf.get_num_threads()} threads of {cpu_model()}."
    )


if __name__ == "__main__":
    main()
