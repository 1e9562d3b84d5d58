"""The main job on real input: exact attention over 16384 tokens, beside the same job with the whole matrix.

It decides what is measured and when the demo fails. Every heavy step is a process of its own and this one
stays small, because on Linux the peak that wait4 reports for a child starts at the size of its parent.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilefold.bench.budgets import FACTOR
from tilefold.naive import naive

HERE = Path(__file__).resolve().parent
MEMORY_LIMIT = 300e6  # bytes: what `tilefold run` may take at its peak, interpreter and NumPy included
ROWS = 256  # how many queries are checked in float64, in every head

NOTE = """\
meaning  the vectors are real, but the model attends only within windows of 512 tokens; attention of
         every token to all {n} is the job here, not something the model was trained to do"""


class Cost(NamedTuple):
    seconds: float
    peak: int  # bytes


def run(*command):
    """Run `python command…` to its end; its wall time and its own peak memory."""
    start = time.perf_counter()
    pid = os.posix_spawn(sys.executable, [sys.executable, *map(str, command)], os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"This step failed: python {' '.join(map(str, command))}")
    return Cost(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def size(n_bytes):
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def sampled_errors(folder, names):
    """The largest error of each output on random rows against float64, and the largest value there."""
    q, k, v, *outs = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("q", "k", "v", *names))
    n = q.shape[1]
    rows = np.sort(np.random.default_rng(0).choice(n, min(ROWS, n), replace=False))
    errors, largest = np.zeros(len(outs)), 0.0
    for h in range(len(q)):
        exact, _ = naive(*(a[None].astype(np.float64) for a in (q[h, rows], k[h], v[h])))
        errors = np.maximum(errors, [np.abs(out[h, rows] - exact[0]).max() for out in outs])
        largest = max(largest, np.abs(exact).max())
    return errors, largest


def show(rows):
    """A table, its first row the head: with rich where a person looks at it, else plain text."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
            print("   ".join(cells).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", style="bold" if i == 0 else "")
    for i, row in enumerate(rows[1:]):
        table.add_row(*row, style="green" if i == 0 else "")
    Console().print(table)  # honours NO_COLOR


def main():
    options = argparse.ArgumentParser(description="Exact attention over a long real text, measured.")
    options.add_argument("--tokens", type=int, default=16384)
    options.add_argument("--layer", type=int, default=-1, help="from 0 (default: the last)")
    options.add_argument("--folder", type=Path, default=Path("build/demo"), help="where the .npy files go")
    args = options.parse_args()
    if not hasattr(os, "wait4"):
        raise SystemExit("The demo measures processes with os.wait4, which this system does not have.")
    folder = args.folder
    inputs = [folder / f"{name}.npy" for name in "qkv"]

    run(HERE / "vectors.py", folder, "--tokens", args.tokens, "--layer", args.layer)
    print(NOTE.format(n=args.tokens), end="\n\n", flush=True)
    ours = run("-m", "tilefold", "run", *inputs, "-o", folder / "out.npy")
    matrix = run(HERE / "whole_matrix.py", *inputs, "-o", folder / "whole_matrix.npy")
    (error, matrix_error), largest = sampled_errors(folder, ("out", "whole_matrix"))
    budget = FACTOR * matrix_error + np.finfo(np.float32).eps / 2 * largest
    apart = np.abs(np.load(folder / "out.npy") - np.load(folder / "whole_matrix.npy")).max()

    table = [
        ("", "time", "peak memory", "largest error"),
        ("tilefold run", f"{ours.seconds:.2f} s", size(ours.peak), f"{error:.1e}"),
        ("whole matrix", f"{matrix.seconds:.2f} s", size(matrix.peak), f"{matrix_error:.1e}"),
        ("ratio", f"{ours.seconds / matrix.seconds:.2f}", f"{ours.peak / matrix.peak:.2f}", ""),
    ]
    show(table)
    heads, n, _ = np.load(inputs[0], mmap_mode="r").shape
    one = n * n * np.dtype(np.float32).itemsize
    print(f"""
time     a whole process: start, read, compute, write; measured once
matrix   one head after the other, {size(one)} each; all {heads} heads at once would take {size(heads * one)}
error    {min(ROWS, n)} random rows of each head against float64; values to {largest:.2f}, allowed {budget:.1e}
         over all rows the two outputs differ by at most {apart:.1e}, allowed {2 * budget:.1e}""")

    if not error <= budget:
        raise SystemExit(f"FAILED: tilefold is off by {error:.1e}, and at most {budget:.1e} is allowed.")
    if not apart <= 2 * budget:
        raise SystemExit(f"FAILED: the outputs differ by {apart:.1e}; at most {2 * budget:.1e} is allowed.")
    if not ours.peak <= MEMORY_LIMIT:
        raise SystemExit(f"FAILED: tilefold run took {size(ours.peak)}; the limit is {size(MEMORY_LIMIT)}.")


if __name__ == "__main__":
    main()
